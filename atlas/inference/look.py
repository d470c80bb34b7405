"""How a model thinks: what it expects at each place of a text, how the next token is chosen, where attention looks, and
how a prediction grows from layer to layer.

Plain functions of a loaded model and token ids, for pages, terminals and notebooks alike; numbers are computed in fp32,
whatever the weights are in. Shapes: L layers, H heads, T tokens, C hidden_size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from atlas.errors import AtlasError
from atlas.inference.load import LoadedModel
from atlas.inference.sampling import Sampling, filters, penalize_repetition
from atlas.model.attention import Context
from atlas.tokenizer import Tokenizer

_ROWS_AT_ONCE = 128
"""Of logits, which take 4 bytes for every token of the vocabulary."""


@dataclass(frozen=True)
class Choice:
    """A token that may come, and how likely the model takes it to be."""

    id: int
    text: str
    probability: float


@dataclass(frozen=True)
class Place:
    """A token of a text, and what the model expected in its place.

    `log_probability` is in nats, as the loss, which is its mean with the other sign; `rank` is 1 for the likeliest;
    `entropy` is in bits: as unsure as between 2^entropy tokens that are equally likely. `alternatives` are the
    likeliest tokens of the place. The first token, with nothing before it, is not expected: None, and no alternatives.
    """

    id: int
    text: str
    probability: float | None = None
    log_probability: float | None = None
    rank: int | None = None
    entropy: float | None = None
    alternatives: tuple[Choice, ...] = ()


@dataclass(frozen=True)
class Candidate:
    """A token that may come next, its probability after each step, and the step that struck it out, if one did."""

    id: int
    text: str
    probabilities: dict[str, float]
    removed_by: str | None


@dataclass(frozen=True)
class NextToken:
    """The distribution that the next token is drawn from, as it is made.

    For each step, `model` and then the settings in the order in which they are taken: how many tokens remain, and the
    entropy in bits. `candidates` are those that the model itself takes to be likeliest, the likeliest first.
    """

    remaining: dict[str, int]
    entropy: dict[str, float]
    candidates: tuple[Candidate, ...]


@dataclass(frozen=True)
class Depth:
    """What a model would predict if it ended after `layer`, counted from 0; None: with nothing but the embedding.

    `probability` and `rank` are those of the token that really follows, None where the text ends; entropy in bits.
    """

    layer: int | None
    likeliest: tuple[Choice, ...]
    entropy: float
    probability: float | None
    rank: int | None


def encode(loaded: LoadedModel, text: str) -> list[int]:
    """The ids that the model is given for a text; an empty one begins a document."""
    return loaded.tokenizer.encode(text) or [loaded.tokenizer.eos_id]


def token_text(tokenizer: Tokenizer, id: int) -> str:
    r"""What a token stands for; bytes that are no whole character are written out, as in \xe2\x82."""
    return tokenizer.token_bytes(id).decode("utf-8", errors="backslashreplace")


@torch.no_grad()
def logits(loaded: LoadedModel, ids: Sequence[int]) -> Tensor:
    """(T, V): row t predicts token t + 1."""
    whole: Tensor = loaded.model(_tensor(loaded, ids))
    return whole[0].float()


@torch.no_grad()
def expectations(loaded: LoadedModel, ids: Sequence[int], *, alternatives: int = 5) -> list[Place]:
    """A `Place` for each token, with so many of the likeliest tokens of each."""
    tokens = _tensor(loaded, ids)
    hidden, following = loaded.model.hidden_states(tokens)[0, :-1], tokens[0, 1:]
    places = [Place(ids[0], token_text(loaded.tokenizer, ids[0]))]
    for start in range(0, len(following), _ROWS_AT_ONCE):
        states, targets = (part[start : start + _ROWS_AT_ONCE] for part in (hidden, following))
        log_chances = loaded.model.head(states).float().log_softmax(dim=-1)
        own = log_chances.gather(-1, targets[:, None])
        ranks, entropies = (log_chances > own).sum(dim=-1) + 1, _entropy(log_chances.exp())
        likeliest = _likeliest(loaded, log_chances, alternatives)
        own, ranks, entropies = own.cpu(), ranks.cpu(), entropies.cpu()  # together, and not number by number
        for row, id in enumerate(targets.tolist()):
            place = Place(
                id,
                token_text(loaded.tokenizer, id),
                probability=float(own[row].exp()),
                log_probability=float(own[row]),
                rank=int(ranks[row]),
                entropy=float(entropies[row]),
                alternatives=likeliest[row],
            )
            places.append(place)
    return places


@torch.no_grad()
def next_token(
    loaded: LoadedModel, ids: Sequence[int], sampling: Sampling, *, candidates: int = 10
) -> NextToken:
    """How the token after `ids` is chosen, shown at the tokens that the model itself takes to be likeliest."""
    hidden = loaded.model.hidden_states(_tensor(loaded, ids))[:, -1]
    raw = loaded.model.head(hidden).float()
    penalized = penalize_repetition(raw, [list(ids)], sampling.repetition_penalty)
    steps = {"model": raw, "repetition_penalty": penalized, **dict(filters(penalized, sampling))}
    left = {name: (scores[0] > -torch.inf).cpu() for name, scores in steps.items()}
    chances = {name: scores[0].softmax(dim=-1).cpu() for name, scores in steps.items()}
    shown = [
        Candidate(
            id,
            token_text(loaded.tokenizer, id),
            {name: float(row[id]) for name, row in chances.items()},
            next((name for name, kept in left.items() if not kept[id]), None),
        )
        for id in raw[0].topk(min(candidates, raw.shape[-1])).indices.tolist()
    ]
    return NextToken(
        {name: int(kept.sum()) for name, kept in left.items()},
        {name: float(_entropy(row)) for name, row in chances.items()},
        tuple(shown),
    )


@torch.no_grad()
def attention(loaded: LoadedModel, ids: Sequence[int], *, layers: Sequence[int] | None = None) -> Tensor:
    """(L, H, T, T) on the CPU: the part that the token of each row takes of the token of each column, of itself and
    earlier ones. Of `layers`, counted from 0, or of all, which is much for a long text."""
    num_layers = loaded.model.config.num_layers
    wanted = range(num_layers) if layers is None else layers
    if wrong := [layer for layer in wanted if not 0 <= layer < num_layers]:
        raise AtlasError(f"layer {wrong[0]}: the model has layers 0 to {num_layers - 1}")
    blocks: Any = loaded.model.blocks
    streams, context = _streams(loaded, ids)
    patterns = {
        layer: block.attention.weights(block.attention_norm(x), context)[0].cpu()
        for layer, (block, x) in enumerate(zip(blocks, streams, strict=False))
        if layer in wanted
    }
    return torch.stack([patterns[layer] for layer in wanted])


@torch.no_grad()
def lens(
    loaded: LoadedModel, ids: Sequence[int], *, position: int = -1, alternatives: int = 5
) -> list[Depth]:
    """What follows the token at `position` (negative: counted from the end), after the embedding and after each layer:
    the final norm and the head, applied to the residual stream there. This is the logit lens (nostalgebraist 2020,
    https://www.lesswrong.com/posts/AcKRB8wDpdaN6v6ru)."""
    if not -len(ids) <= position < len(ids):
        raise AtlasError(f"position {position}: the text has tokens 0 to {len(ids) - 1}")
    position %= len(ids)
    streams, _ = _streams(loaded, ids)
    hidden = loaded.model.final_norm(torch.stack([x[0, position] for x in streams]))
    log_chances = loaded.model.head(hidden).float().log_softmax(dim=-1)
    chances: list[float | None] = [None] * len(streams)
    ranks: list[int | None] = [None] * len(streams)
    if position + 1 < len(ids):
        own = log_chances[:, ids[position + 1], None]
        chances, ranks = own[:, 0].exp().tolist(), ((log_chances > own).sum(dim=-1) + 1).tolist()
    entropies = _entropy(log_chances.exp()).tolist()
    columns = (_likeliest(loaded, log_chances, alternatives), entropies, chances, ranks)
    layers = [None, *range(len(streams) - 1)]
    return [Depth(layer, *row) for layer, row in zip(layers, zip(*columns, strict=True), strict=True)]


def _streams(loaded: LoadedModel, ids: Sequence[int]) -> tuple[list[Tensor], Context]:
    """The residual stream, (1, T, C), before the first block and after each; and what attention takes beside it."""
    x, context = loaded.model.embed(_tensor(loaded, ids))
    streams = [x]
    for block in loaded.model.blocks:
        streams.append(block(streams[-1], None, *context))
    return streams, context


def _tensor(loaded: LoadedModel, ids: Sequence[int]) -> Tensor:
    """(1, T), where the model is. Ids may come from anybody."""
    config = loaded.model.config
    if not 1 <= len(ids) <= config.max_seq_len:
        raise AtlasError(
            f"a text of {len(ids):,} tokens: the model takes 1 to {config.max_seq_len:,} at once, its context; "
            "look at a part of it"
        )
    if not 0 <= min(ids) <= max(ids) < config.vocabulary:
        wrong = next(id for id in ids if not 0 <= id < config.vocabulary)
        raise AtlasError(f"token id {wrong}: the model's vocabulary has 0 to {config.vocabulary - 1:,}")
    return torch.tensor([list(ids)], device=next(loaded.model.parameters()).device)


def _likeliest(loaded: LoadedModel, log_chances: Tensor, count: int) -> list[tuple[Choice, ...]]:
    """Of each row of (N, V), the likeliest first."""
    best = log_chances.topk(min(count, log_chances.shape[-1]), dim=-1)
    return [
        tuple(Choice(id, token_text(loaded.tokenizer, id), chance) for id, chance in zip(*row, strict=True))
        for row in zip(best.indices.tolist(), best.values.exp().tolist(), strict=True)
    ]


def _entropy(chances: Tensor) -> Tensor:
    """(…, V) → (…) in bits (Shannon 1948)."""
    nats: Tensor = torch.special.entr(chances).sum(dim=-1)
    return nats / math.log(2)
