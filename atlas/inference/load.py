"""A checkpoint as something that can speak: model, tokenizer and the facts of its training."""

from __future__ import annotations

import copy
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from atlas.config import AtlasConfig
from atlas.config.loader import resolve
from atlas.errors import AtlasError
from atlas.inference.layout import lay_out_for_decoding
from atlas.inference.sampling import Sampling
from atlas.inference.text import stream_text
from atlas.model import AtlasLM
from atlas.model.cost import count_parameters
from atlas.tokenizer import Tokenizer
from atlas.tokenizer.chat import CHAT_FORMAT, CHAT_TEMPLATE, Message
from atlas.training.checkpoint.load import load_checkpoint, load_weights
from atlas.training.checkpoint.locate import find_checkpoint
from atlas.training.devices.device import choose_device, choose_weights_dtype

NOT_NEEDED = ("optimizer_state_dict",)
"""What of a checkpoint only training reads."""

_LARGE = 50_000_000
"""Parameters from which a model is built without memory, to take the checkpoint's tensors as they are. PyTorch needs a
second and some 60 MB to get ready for that; a small model is initialised and overwritten in less."""


@dataclass(frozen=True, repr=False)
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
        return bool(self.facts["data"].get("chat_form") == CHAT_FORMAT)

    @property
    def chat_template(self) -> str | None:
        """In Jinja, the form of the conversations that the model learnt from, here or where it was imported from; None
        where it learnt from none."""
        if self.learnt_to_answer:
            return CHAT_TEMPLATE
        imported = self.facts["data"].get("chat_template")
        return imported if isinstance(imported, str) else None

    def check_chat(self) -> None:
        """Raises `AtlasError` unless it can answer as `atlas generate --chat` has it."""
        if self.chat_template is None:
            raise AtlasError(
                f"--chat: {self.path} did not learn from conversations: leave --chat out, or fine-tune it with "
                "atlas train --init-from on JSONL rows with messages"
            )
        if not self.learnt_to_answer:
            raise AtlasError(
                f"--chat: {self.path} was imported with a chat template of its own, which Atlas does not run: write it "
                "out in --prompt, or export the model and chat in llama.cpp"
            )

    def generate(
        self,
        prompt: str,
        *,
        max_tokens: int = 100,
        temperature: float = 0.8,
        top_k: int = 50,
        top_p: float = 0.95,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        stop: Sequence[str] = (),
        seed: int | None = None,
        chat: bool = False,
    ) -> str:
        """What `atlas generate` prints for the same settings: `prompt` and how it goes on, or with `chat` the answer
        to it alone. The same seed gives the same text; None takes a new one each time."""
        sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
        if not isinstance(prompt, str):
            raise AtlasError(f"prompt: must be one text, not {type(prompt).__name__}: call it once for each")
        if chat:
            self.check_chat()
        pieces = stream_text(
            self._for_writing(),
            [[Message("user", prompt)] if chat else prompt],
            sampling,
            max_tokens=max_tokens,
            stop=[stop] if isinstance(stop, str) else stop,
            seed=secrets.randbelow(2**31) if seed is None else seed,
        )
        return ("" if chat else prompt) + "".join(piece for (piece,) in pieces)

    @torch.no_grad()
    def logits(self, text: str | Sequence[int]) -> Tensor:
        """(T, vocabulary) in fp32 on the CPU: row t holds the logits of the token that follows the first t + 1 of
        `text`, which is text or its T ids. An empty text begins a document, as in `generate`.
        """
        ids = self.tokenizer.encode(text) or [self.tokenizer.eos_id] if isinstance(text, str) else list(text)
        context, vocabulary = self.config.model.max_seq_len, self.config.model.vocabulary
        if not ids:
            raise AtlasError("logits of no ids: give at least one, say [tokenizer.eos_id]")
        if wrong := [i for i in ids if not 0 <= i < vocabulary]:
            raise AtlasError(f"id {wrong[0]}: is none of this model's, which go from 0 to {vocabulary - 1:,}")
        if len(ids) > context:
            raise AtlasError(
                f"{len(ids):,} tokens: the model's context is {context:,}; "
                f"give so many, say the last: logits(tokenizer.encode(text)[-{context}:])"
            )
        device = self.model.head_weight.device
        return self.model(torch.tensor([ids], device=device))[0].float().cpu()  # type: ignore[no-any-return]

    def _for_writing(self) -> LoadedModel:
        """On a CPU with the weights laid out as `atlas generate` has them, so that it rounds in the same way. Made anew
        each time, since `model` is the caller's to change; that copies the weights once."""
        if self.model.head_weight.device.type != "cpu":
            return self
        shared = {id(parameter): parameter for parameter in self.model.parameters()}
        model = copy.deepcopy(self.model, shared)
        lay_out_for_decoding(model)
        return replace(self, model=model)

    def __repr__(self) -> str:
        shape, weights = self.config.model, self.model.head_weight
        losses = {"loss": self.facts.get("loss"), "validation loss": self.facts.get("val_loss")}
        known = "".join(f", {name} {loss:.4f}" for name, loss in losses.items() if loss is not None)
        return (
            f"<LoadedModel {self.path}\n"
            f"  {count_parameters(shape).total:,} parameters: {shape.num_layers} layers × {shape.hidden_size} × "
            f"{shape.num_heads} heads, context {shape.max_seq_len:,}\n"
            f"  {str(weights.dtype).removeprefix('torch.')} on {weights.device}\n"
            f"  step {self.facts['step']:,} of {self.facts['horizon']:,}{known}\n"
            f"  tokenizer {self.tokenizer.name}, {self.tokenizer.vocab_size:,} tokens>"
        )


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
