"""What a model thinks at each token: what else it expected, where it looks, what each layer would have said.

Plain numbers, which the served page draws, `atlas look` prints and a notebook holds. All of it is computed from the
model's own parts; nothing is hooked in. Shapes: T tokens, V vocabulary, H heads, C hidden_size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from atlas.errors import AtlasError
from atlas.inference.sampling import (
    Sampling,
    divide_by_temperature,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    penalize_repetition,
    probabilities,
)
from atlas.model import AtlasLM
from atlas.model.transformer import Block
from atlas.tokenizer import Tokenizer


@dataclass(frozen=True)
class Option:
    """A token that could stand at a place, and its probability there."""

    id: int
    text: str
    p: float


@dataclass(frozen=True)
class Place:
    """A token of a text, as the tokens before it predict it; None where nothing stands before it."""

    id: int
    text: str
    p: float | None
    rank: int | None
    """1: the likeliest."""
    entropy: float | None
    """Bits, of the distribution over all tokens: how open the place was."""
    alternatives: tuple[Option, ...]
    """The likeliest tokens there, whether or not it is one of them."""


@dataclass(frozen=True)
class Candidate:
    """A token of a distribution, before and after the settings of sampling."""

    id: int
    text: str
    p: float
    """As the model says it."""
    final: float
    """As it is drawn."""
    removed_by: str | None
    """The setting that leaves it out, if one does."""


@dataclass(frozen=True)
class Distribution:
    """What is drawn from behind a text. Entropies are in bits."""

    candidates: tuple[Candidate, ...]
    """The likeliest by the model, the likeliest first."""
    kept: int
    """So many tokens of the whole vocabulary can be drawn."""
    entropy_before: float
    entropy_after: float


@dataclass(frozen=True)
class Layer:
    """What the model would say if it ended here. `layer` 0 is the embedding."""

    layer: int
    likeliest: tuple[Option, ...]
    entropy: float


def shown(tokenizer: Tokenizer, token: int) -> str:
    """The text of one token; bytes that are only a part of a character as `\\xe2\\x82`."""
    return tokenizer.token_bytes(token).decode("utf-8", errors="backslashreplace")


@torch.inference_mode()
def places(model: AtlasLM, tokenizer: Tokenizer, ids: Sequence[int], *, alternatives: int = 5) -> list[Place]:
    """Each token of a text. Raises `AtlasError` for one that is longer than the context."""
    logprobs = model(_row(model, ids))[0].float().log_softmax(dim=-1)
    found = [Place(ids[0], shown(tokenizer, ids[0]), None, None, None, ())]
    for place, token in enumerate(ids[1:]):
        row = logprobs[place]
        found.append(
            Place(
                token,
                shown(tokenizer, token),
                float(row[token].exp()),
                int((row > row[token]).sum()) + 1,
                _entropy(row.exp()),
                _likeliest(tokenizer, row.exp(), alternatives),
            )
        )
    return found


@torch.inference_mode()
def distribution(
    model: AtlasLM, tokenizer: Tokenizer, ids: Sequence[int], sampling: Sampling, *, likeliest: int = 20
) -> Distribution:
    """Of the token after a text, before and after `sampling`."""
    logits = model(_row(model, ids))[:, -1].float()
    before = logits.softmax(dim=-1)
    penalized = penalize_repetition(logits, [list(ids)], sampling.repetition_penalty)
    if sampling.temperature == 0:
        after = torch.zeros_like(before)
        after[0, penalized.argmax()] = 1
    else:
        after = probabilities(penalized, sampling)
    reasons = _reasons(penalized, sampling)
    top = before[0].topk(min(likeliest, before.shape[-1])).indices.tolist()
    return Distribution(
        tuple(
            Candidate(
                token,
                shown(tokenizer, token),
                float(before[0, token]),
                float(after[0, token]),
                reasons[token] if after[0, token] == 0 else None,
            )
            for token in top
        ),
        int((after > 0).sum()),
        _entropy(before[0]),
        _entropy(after[0]),
    )


def _reasons(logits: Tensor, sampling: Sampling) -> list[str]:
    """Of each token the first filter, in the sampler's order, that leaves it out. What passes all and still has no
    probability has too little for fp32: that is the temperature's doing."""
    reasons = ["temperature"] * logits.shape[-1]
    if sampling.temperature == 0:
        return reasons
    scaled = divide_by_temperature(logits, sampling.temperature)
    after_top_k = keep_top_k(scaled, sampling.top_k)
    after_top_p = keep_top_p(after_top_k, sampling.top_p)
    after_min_p = keep_min_p(after_top_p, sampling.min_p)
    for name, before, after in (
        ("top-k", scaled, after_top_k),
        ("top-p", after_top_k, after_top_p),
        ("min-p", after_top_p, after_min_p),
    ):
        removed = (after == -torch.inf) & (before != -torch.inf)
        for token in removed[0].nonzero()[:, 0].tolist():
            reasons[token] = name
    return reasons


@torch.inference_mode()
def attention(model: AtlasLM, ids: Sequence[int], layer: int) -> Tensor:
    """(H, T, T): in layer `layer`, from 0, how much each token (row) takes of each token up to itself."""
    tokens = _row(model, ids)
    x, rotation = model.embed(tokens, torch.arange(len(ids), device=tokens.device))
    for block in model.blocks[:layer]:
        x = block(x, rotation=rotation)
    block = model.blocks[layer]
    assert isinstance(block, Block)
    return block.attention.weights(x, block.attention_norm, rotation)[0]


@torch.inference_mode()
def layers(model: AtlasLM, tokenizer: Tokenizer, ids: Sequence[int], *, likeliest: int = 5) -> list[Layer]:
    """The token after a text, as it would be read out of the residual stream after the embedding and after each block:
    the logit lens (nostalgebraist 2020, "interpreting GPT: the logit lens")."""
    tokens = _row(model, ids)
    x, rotation = model.embed(tokens, torch.arange(len(ids), device=tokens.device))
    read = [x[:, -1]]
    for block in model.blocks:
        x = block(x, rotation=rotation)
        read.append(x[:, -1])
    chances = model.head(model.final_norm(torch.stack(read))).float().softmax(dim=-1)[:, 0]
    return [
        Layer(number, _likeliest(tokenizer, row, likeliest), _entropy(row))
        for number, row in enumerate(chances)
    ]


def _row(model: AtlasLM, ids: Sequence[int]) -> Tensor:
    if not ids:
        raise ValueError("a text has at least one token")
    if len(ids) > model.config.max_seq_len:
        raise AtlasError(
            f"the text has {len(ids):,} tokens, the model's context {model.config.max_seq_len:,}: look at a part of it"
        )
    return torch.tensor([list(ids)], device=next(model.parameters()).device)


def _likeliest(tokenizer: Tokenizer, chances: Tensor, count: int) -> tuple[Option, ...]:
    values, tokens = (part.tolist() for part in chances.topk(min(count, len(chances))))
    return tuple(Option(token, shown(tokenizer, token), p) for token, p in zip(tokens, values, strict=True))


def _entropy(chances: Tensor) -> float:
    """Bits (Shannon 1948)."""
    return float(torch.special.entr(chances).sum() / torch.log(torch.tensor(2.0)))
