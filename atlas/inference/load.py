"""Load a checkpoint for inference: model, tokenizer and the metadata of its training."""

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
from atlas.inference.text import ModelAndTokenizer, encode_prompt, stream_text
from atlas.model import AtlasLM
from atlas.model.cost import count_parameters
from atlas.tokenizer import Tokenizer
from atlas.tokenizer.chat import Message
from atlas.tokenizer.load import chat_template_of, with_chat_template
from atlas.training.checkpoint.load import context_of, load_checkpoint, load_weights
from atlas.training.checkpoint.locate import find_checkpoint
from atlas.training.devices.device import choose_device, choose_weights_dtype

NOT_NEEDED = ("optimizer_state_dict",)
"""The keys of a checkpoint that inference does not load."""

_LARGE = 50_000_000
"""The smallest number of parameters for which a model is built on the device `meta`. The model then takes the
checkpoint's tensors without a copy. The first use of `meta` costs PyTorch a second and about 60 MB. Initializing a
smaller model and overwriting its weights costs less."""


@dataclass(frozen=True, repr=False)
class LoadedModel(ModelAndTokenizer):
    """A model that is ready for inference.

    `model` is in evaluation mode, on its device, in the dtype that the caller of `load_model` requested. `facts` is the
    checkpoint without its state dicts.
    """

    config: AtlasConfig
    path: Path
    facts: dict[str, Any]

    @property
    def chat_template(self) -> str | None:
        """The model's Jinja chat template: Atlas's own, or that of an imported model. None if the model has none."""
        return self.tokenizer.chat_template

    def check_chat(self) -> None:
        """Raise `AtlasError` unless `atlas generate --chat` works with this model."""
        if self.chat_template is None:
            raise AtlasError(
                f"--chat: {self.path} was not trained on conversations: leave --chat out, or fine-tune it with "
                "atlas train --init-from on JSONL rows with messages"
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
        """Return the text that `atlas generate` prints for the same settings: `prompt` and its continuation, or only
        the answer if `chat` is true. The same seed gives the same text. If `seed` is None, each call draws a new
        seed."""
        sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
        if not isinstance(prompt, str):
            raise AtlasError(
                f"prompt: must be one text, not {type(prompt).__name__}: call generate once for each text"
            )
        if chat:
            self.check_chat()
        pieces = stream_text(
            self._for_decoding(),
            [[Message("user", prompt)] if chat else prompt],
            sampling,
            max_tokens=max_tokens,
            stop=[stop] if isinstance(stop, str) else stop,
            seed=secrets.randbelow(2**31) if seed is None else seed,
        )
        return ("" if chat else prompt) + "".join(piece for (piece,) in pieces)

    @torch.no_grad()
    def logits(self, text: str | Sequence[int]) -> Tensor:
        """Return (T, V) in fp32 on the CPU: row t has the logits of the token after the first t + 1 tokens of `text`.

        `text` is a string or a list of T token ids. An empty string begins a document, as in `generate`.
        """
        ids = encode_prompt(text, self.tokenizer) if isinstance(text, str) else list(text)
        return self.model(self.batch_of(ids))[0].float().cpu()  # type: ignore[no-any-return]

    def batch_of(self, ids: Sequence[int]) -> Tensor:
        """The ids as a (1, T) tensor on the model's device. Raises `AtlasError` if there are no ids, ids outside the
        vocabulary, or more ids than the context holds."""
        context, vocabulary = self.config.model.max_seq_len, self.config.model.vocabulary
        if len(ids) == 0:
            raise AtlasError("0 tokens: give at least one id, such as [tokenizer.eos_id]")
        if wrong := [id for id in ids if not 0 <= id < vocabulary]:
            raise AtlasError(f"token id {wrong[0]}: the model's vocabulary has 0 to {vocabulary - 1:,}")
        if len(ids) > context:
            remedy = f"give at most that many, such as tokenizer.encode(text)[-{context}:]"
            raise AtlasError(f"{len(ids):,} tokens: the model's context is {context:,}; {remedy}")
        return torch.tensor([list(ids)], device=next(self.model.parameters()).device)

    def _for_decoding(self) -> LoadedModel:
        """Return this object, or on a CPU a copy with the weight layout that `atlas generate` uses. With the same
        layout, `generate` and `atlas generate` round in the same way. Each call makes a new copy, since the caller may
        change `model`."""
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
    path: str | Path,
    *,
    device: str = "cpu",
    tokenizer: str | None = None,
    dtype: str = "f32",
    context: int | None = None,
    contents: dict[str, Any] | None = None,
) -> LoadedModel:
    """Load a checkpoint for inference, evaluation or export, with weights in `dtype`: f32, bf16, f16 or auto.

    `tokenizer` names a custom tokenizer (`package.module:factory`); other tokenizers are stored inside the checkpoint.
    `context` is a shorter context than the model's, which needs less memory. A model with RoPE that was fine-tuned with
    a shorter context than its base has the context of its base.
    `contents` is the result of `load_checkpoint(path)`, if the caller has loaded the checkpoint already. Raises
    `AtlasError` if the file is missing, damaged or not a checkpoint, or if the model was trained with another
    tokenizer.
    """
    path = find_checkpoint(path)
    contents = contents or load_checkpoint(path, without=NOT_NEEDED)
    where = choose_device(device)
    kind = choose_weights_dtype(dtype, where)
    saved = contents["tokenizer"]
    try:
        config = resolve(contents["config"])
        own = None if tokenizer else Tokenizer.from_checkpoint(contents)
    except AtlasError as error:
        raise AtlasError(f"{path}: {error}") from None
    if config.model.vocab_size is None:
        raise AtlasError(
            f"{path}: its config has no model.vocab_size; take a checkpoint that atlas train wrote"
        )
    own = own or with_chat_template(Tokenizer.resolve(str(tokenizer)), chat_template_of(contents))
    if own.fingerprint != saved.get("fingerprint"):
        raise AtlasError(
            f"--tokenizer {tokenizer}: is not the tokenizer that {path} was trained with ({saved.get('name')})"
        )
    config = config.replace("model", max_seq_len=_context_of(config, contents, context))
    is_large = count_parameters(config.model).total >= _LARGE
    with torch.device("meta" if is_large else "cpu"):
        model = AtlasLM(config.model)
    if (positions := contents["model_state_dict"].get("position_embedding.weight")) is not None:
        contents["model_state_dict"]["position_embedding.weight"] = positions[: config.model.max_seq_len]
    load_weights(model, contents, path)
    facts = {key: value for key, value in contents.items() if not key.endswith("_state_dict")}
    return LoadedModel(model.to(where, kind).eval(), own, config, path, facts)


def _context_of(config: AtlasConfig, contents: dict[str, Any], asked: int | None) -> int:
    """Return the context for inference: that of the model or, for a fine-tuned model with RoPE, of its base, unless the
    user asked for a shorter one."""
    longest = context_of(contents)
    if asked is not None and not 1 <= asked <= longest:
        raise AtlasError(f"--context {asked}: the model's context has 1 to {longest:,} tokens")
    return asked or longest
