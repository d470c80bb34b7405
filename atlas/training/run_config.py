"""Complete the config of a run from its data: set the vocabulary size, and the settings that depend on the data unless
the user set them."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

from atlas.config import AtlasConfig
from atlas.config.loader import Layer, resolve
from atlas.data import ResolvedData, resolve_data, resolve_mixture
from atlas.errors import AtlasError
from atlas.tokenizer import Tokenizer
from atlas.tokenizer.load import chat_template_of, with_chat_template
from atlas.training.schedule import length_of

CHAT_RATE, CHAT_RATE_WIDTH = 2e-3, 128
"""The peak learning rate for fine-tuning on conversations, and the `hidden_size` for which this rate was chosen. A
wider model has a proportionally lower rate."""
CHAT_WARMUP_STEPS = 10


def with_data(
    config: AtlasConfig, explicit: Layer, contents: Mapping[str, Any] | None, *, is_new_run: bool = False
) -> tuple[AtlasConfig, ResolvedData]:
    """Return the config, completed with the vocabulary size, and the data that the config names.

    `contents` are the contents of the checkpoint that the run starts from, if any. If the data is the same as the
    checkpoint's, the run resumes from the checkpoint, unless `is_new_run`.
    """
    if config.data.train_data is None and config.data.mixture is None:
        raise AtlasError(
            "no training data: set --train-data to a prepared folder (made by atlas prepare) or to plain text. To "
            f"resume a run, set --output-dir to the folder of the run ({config.checkpoint.output_dir} contains no run)"
        )
    asked = explicit.get("data", {}).get("tokenizer")
    tokenizer: Tokenizer | None = None
    if asked is not None:
        tokenizer = Tokenizer.resolve(asked)
        if contents and tokenizer.fingerprint == contents["tokenizer"].get("fingerprint"):
            tokenizer = with_chat_template(tokenizer, chat_template_of(contents))
    elif contents:
        tokenizer = Tokenizer.from_checkpoint(contents)
    how: dict[str, Any] = {
        "val_fraction": config.data.val_fraction,
        "chat_format": config.data.chat_format,
        "on_error": config.data.on_error,
    }
    if config.data.mixture is not None:
        data = resolve_mixture(config.data.mixture, config.data.val_data, tokenizer=tokenizer, **how)
    else:
        assert config.data.train_data is not None
        data = resolve_data(config.data.train_data, config.data.val_data, tokenizer=tokenizer, **how)
    if contents and data.tokenizer.fingerprint != contents["tokenizer"].get("fingerprint"):
        raise AtlasError(
            f"{data.name}: was made with the tokenizer {data.tokenizer.name} ({data.tokenizer.fingerprint[:12]}), but "
            f"the checkpoint uses {contents['tokenizer'].get('name')} "
            f"({str(contents['tokenizer'].get('fingerprint'))[:12]}): set --train-data to the text of {data.name}"
        )
    resumes = contents and data.fingerprint == contents["data"].get("fingerprint")
    if data.has_conversations and (is_new_run or not resumes):
        config = _for_conversations(config, explicit, is_finetuning=bool(contents))
    return with_vocabulary(config, data.tokenizer.vocab_size, data.name), data


def _for_conversations(config: AtlasConfig, explicit: Layer, *, is_finetuning: bool) -> AtlasConfig:
    """Return the config with the settings that conversations need, except for settings that the user set.

    A document mask restricts attention to one conversation, as in a chat. In fine-tuning, the learning rate and the
    warm-up suit a few dozen conversations (docs/TRAINING.md#conversations). The values in the checkpoint are for a
    longer run.
    """
    settings: dict[str, dict[str, Any]] = {"data": {"document_mask": True}}
    if is_finetuning:
        settings["training"] = {
            "learning_rate": CHAT_RATE * min(1.0, CHAT_RATE_WIDTH / config.model.hidden_size),
            "warmup_steps": min(config.training.warmup_steps, CHAT_WARMUP_STEPS),
        }
    for section, values in settings.items():
        unwritten = {key: value for key, value in values.items() if key not in explicit.get(section, {})}
        config = config.replace(section, **unwritten)
    return config


def with_vocabulary(config: AtlasConfig, vocab_size: int, data: str) -> AtlasConfig:
    """Return the config with this `vocab_size`, the vocabulary size of the data named `data`. Raises `AtlasError` if
    the config already has another size."""
    stated = config.model.vocab_size
    if stated not in (None, vocab_size):
        raise AtlasError(
            f"model.vocab_size: {stated}: the tokenizer of {data} has {vocab_size} tokens: remove vocab_size, or if a "
            f"preset sets it, add --set model.vocab_size={vocab_size}"
        )
    return config.replace("model", vocab_size=vocab_size)


def with_written_length(config: AtlasConfig, explicit: Layer) -> AtlasConfig:
    """Return the config of a new run. If the user set a length (`max_steps`, `epochs` or `max_hours`), every length
    that the user did not set becomes None."""
    lengths = {"max_steps", "epochs", "max_hours"}
    written = lengths & explicit.get("training", {}).keys()
    return config.replace("training", **dict.fromkeys(lengths - written)) if written else config


def base_key(contents: Mapping[str, Any]) -> str:
    """Return an identifier of the checkpoint that a run starts from: a hash of the checkpoint's config, step, loss and
    data."""
    keys = "config", "step", "sequences_consumed", "loss", "initialized_from"
    facts = [*(contents.get(key) for key in keys), contents.get("data", {}).get("fingerprint")]
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def is_complete(contents: Mapping[str, Any], config: AtlasConfig) -> bool:
    """Return whether a checkpoint is at the end of its run, and the user has not asked for a longer one."""
    is_as_long = length_of(resolve(contents["config"]).training) == length_of(config.training)
    return is_as_long and contents["step"] >= contents.get("horizon", math.inf)


def has_other_validation(contents: Mapping[str, Any], data: ResolvedData, config: AtlasConfig) -> bool:
    """Return whether the text changed in documents that are held out. Older checkpoints do not store which these
    were."""
    stored = contents["data"].get("val_fingerprint")
    return stored is not None and config.data.val_data is None and stored != data.val_fingerprint
