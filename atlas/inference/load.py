"""A checkpoint as something that can speak: model, tokenizer and the facts of its training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from atlas.config import AtlasConfig
from atlas.config.loader import resolve
from atlas.errors import AtlasError
from atlas.model import AtlasLM
from atlas.planning import count_parameters
from atlas.tokenizer import Tokenizer
from atlas.tokenizer.chat import CHAT_FORM, CHAT_TEMPLATE
from atlas.training.checkpoint import find_checkpoint, load_checkpoint, load_weights
from atlas.training.runtime import choose_device, choose_weights_dtype

NOT_NEEDED = ("optimizer_state_dict",)
"""What of a checkpoint only training reads."""

_LARGE = 50_000_000
"""Parameters from which a model is built without memory, to take the checkpoint's tensors as they are. PyTorch needs a
second and some 60 MB to get ready for that; a small model is initialised and overwritten in less."""


@dataclass(frozen=True)
class LoadedModel:
    """`model` is in evaluation mode, on its device, in fp32 unless another dtype was asked for; `facts` is the
    checkpoint without its tensors."""

    model: AtlasLM
    tokenizer: Tokenizer
    config: AtlasConfig
    path: Path
    facts: dict[str, Any]

    @property
    def learnt_to_answer(self) -> bool:
        """Whether it was trained on conversations in Atlas's own form."""
        return bool(self.facts["data"].get("chat_form") == CHAT_FORM)

    @property
    def chat_template(self) -> str | None:
        """In Jinja, the form of the conversations that the model learnt from, here or where it was imported from; None
        where it learnt from none."""
        if self.learnt_to_answer:
            return CHAT_TEMPLATE
        imported = self.facts["data"].get("chat_template")
        return imported if isinstance(imported, str) else None


def load_model(
    path: str | Path, *, device: str = "cpu", tokenizer: str | None = None, dtype: str = "f32"
) -> LoadedModel:
    """Load a checkpoint for inference, evaluation or export, its weights as `dtype`: f32, bf16, f16 or auto.

    `tokenizer` names a custom tokenizer (`package.module:factory`); the others travel inside the
    checkpoint. Raises `AtlasError` for a missing, broken or foreign file, or another tokenizer.
    """
    path = find_checkpoint(path)
    contents = load_checkpoint(path, without=NOT_NEEDED)
    return model_of(contents, path, device=device, tokenizer=tokenizer, dtype=dtype)


def model_of(
    contents: dict[str, Any],
    path: Path,
    *,
    device: str = "cpu",
    tokenizer: str | None = None,
    dtype: str = "f32",
) -> LoadedModel:
    """The same, from the contents that `load_checkpoint` read from `path`."""
    where = choose_device(device)
    kind = choose_weights_dtype(dtype, where)
    saved = contents["tokenizer"]
    try:
        config = resolve(contents["config"])
        own = None if tokenizer else Tokenizer.from_state(saved)
    except AtlasError as error:
        raise AtlasError(f"{path}: {error}") from None
    if config.model.vocab_size is None:
        raise AtlasError(f"{path}: its config has no model.vocab_size; take one that atlas train wrote")
    own = own or Tokenizer.resolve(str(tokenizer))
    if own.fingerprint != saved.get("fingerprint"):
        raise AtlasError(
            f"--tokenizer {tokenizer}: is not the tokenizer {path} was trained with ({saved.get('name')})"
        )
    is_large = count_parameters(config.model).total >= _LARGE
    with torch.device("meta" if is_large else "cpu"):
        model = AtlasLM(config.model)
    load_weights(model, contents, path)
    facts = {key: value for key, value in contents.items() if not key.endswith("_state_dict")}
    return LoadedModel(model.to(where, kind).eval(), own, config, path, facts)
