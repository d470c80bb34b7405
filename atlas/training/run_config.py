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
from atlas.data.sequences.conversations import Conversations
from atlas.errors import AtlasError
from atlas.tokenizer import Tokenizer
from atlas.tokenizer.load import chat_template_of, with_chat_template
from atlas.training.checkpoint.load import context_of
from atlas.training.schedule import NO_LIMIT, horizon_steps, length_of

LENGTHS = {"max_steps", "epochs", "max_hours"}
"""The settings that limit the length of a run."""
_CHAT_UPDATES, _LORA_UPDATES, _CHAT_EPOCHS, _UPDATES_PER_EPOCH = 400, 800, 3, 8
"""Without a length of the user's, fine-tuning on conversations makes at least so many updates, and at least so many
passes. A few conversations have so small an update that a pass has several of them."""
_CHAT_RATE_STEPS, _CHAT_RATES = 0.8, (1e-3, 8e-3)
"""The peak learning rate times the number of updates, and the lowest and the highest rate."""
_LORA_RATE_STEPS, _LORA_RATES = 3.2, (4e-3, 12e-3)
_CHAT_RATE_WIDTH = 128
"""The `hidden_size` for which these rates were measured. A wider model has a proportionally lower rate."""
_CHAT_WARMUP_STEPS, _CHAT_CONTEXT = 10, 256


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
        config = _for_conversations(config, explicit, data, contents)
    return with_vocabulary(config, data.tokenizer.vocab_size, data.name), data


def _for_conversations(
    config: AtlasConfig, explicit: Layer, data: ResolvedData, contents: Mapping[str, Any] | None
) -> AtlasConfig:
    """Return the config with the settings that conversations need, except for settings that the user set.

    A document mask restricts attention to one conversation, as in a chat. In fine-tuning the checkpoint with these
    `contents`, the context, the length, the batch size, the learning rate and the warm-up suit the conversations
    (docs/TRAINING.md#conversations). The values in the checkpoint are those of another run.
    """
    config = _unless_set(config, explicit, "data", document_mask=True)
    if not contents:
        return config
    config, windows = with_written_length(config, explicit), None
    if isinstance(data.train, Conversations) and len(data.trains) == 1:
        if config.model.position == "rope":
            longest = max(
                stream.longest for stream in (data.train, *data.vals) if isinstance(stream, Conversations)
            )
            context = min(context_of(contents), max(_CHAT_CONTEXT, 2 ** math.ceil(math.log2(longest))))
            config = _unless_set(config, explicit, "model", max_seq_len=context)
        windows = data.train.num_windows(config.model.max_seq_len)
        config = _with_chat_length(config, explicit, windows)
    rate = chat_learning_rate(config, horizon_steps(config.training, windows or NO_LIMIT))
    warmup_steps = min(config.training.warmup_steps, _CHAT_WARMUP_STEPS)
    config = _unless_set(config, explicit, "training", learning_rate=rate, warmup_steps=warmup_steps)
    data.notes.append(_chat_note(config))
    return config


def _chat_note(config: AtlasConfig) -> str:
    """Return a note with the settings that fine-tuning on conversations may have taken from them."""
    training, context = config.training, config.model.max_seq_len
    lengths = {key: getattr(training, key) for key in sorted(LENGTHS)}
    shown = {"max_seq_len": context, "batch_size": training.batch_size, **lengths}
    shown |= {"learning_rate": training.learning_rate, "warmup_steps": training.warmup_steps}
    stated = ", ".join(f"{key} {value:g}" for key, value in shown.items() if value is not None)
    return f"fine-tuning on conversations with {stated}: what you do not set follows from the conversations"


def _with_chat_length(config: AtlasConfig, explicit: Layer, windows: int) -> AtlasConfig:
    """Return the config with a batch size and a length for so many `windows` of conversations. Each remains as it is if
    the user set it."""
    asked = explicit.get("training", {})
    per_update = min(config.training.sequences_per_update, max(1, windows // _UPDATES_PER_EPOCH))
    if not {"batch_size", "gradient_accumulation_steps"} & asked.keys():
        config = config.replace("training", batch_size=per_update, gradient_accumulation_steps=1)
    if not LENGTHS & asked.keys():
        updates = _LORA_UPDATES if config.lora.rank else _CHAT_UPDATES
        is_large = _CHAT_EPOCHS * windows > updates * config.training.sequences_per_update
        epochs, steps = (_CHAT_EPOCHS, None) if is_large else (None, updates)
        config = config.replace("training", max_steps=steps, epochs=epochs, max_hours=None)
    return config


def chat_learning_rate(config: AtlasConfig, updates: int) -> float:
    """Return the peak learning rate for fine-tuning on conversations in `updates` updates. The fewer the updates, the
    higher the rate."""
    steps, (lowest, highest) = _CHAT_RATE_STEPS, _CHAT_RATES
    if config.lora.rank:
        steps, (lowest, highest) = _LORA_RATE_STEPS, _LORA_RATES
    rate = min(highest, max(lowest, steps / updates)) * min(1.0, _CHAT_RATE_WIDTH / config.model.hidden_size)
    return float(f"{rate:.2g}")


def _unless_set(config: AtlasConfig, explicit: Layer, section: str, **values: Any) -> AtlasConfig:
    """Return the config with these values, except for those that the user set."""
    unset = {key: value for key, value in values.items() if key not in explicit.get(section, {})}
    return config.replace(section, **unset)


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
    written = LENGTHS & explicit.get("training", {}).keys()
    return config.replace("training", **dict.fromkeys(LENGTHS - written)) if written else config


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
