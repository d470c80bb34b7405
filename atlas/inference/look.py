"""Compute the internals of a model on a text: predictions at each position, the choice of the next token, attention
weights, and predictions after each layer.

The functions take a loaded model and token ids. The web page, `atlas look` and notebooks use these functions.
Probabilities and entropies are computed in fp32, whatever the dtype of the weights. Shapes: L layers, H heads, T
tokens, C hidden_size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from atlas.errors import AtlasError
from atlas.inference.load import LoadedModel
from atlas.inference.sampling import Sampling, adjust, filters
from atlas.inference.text import encode_prompt
from atlas.model.attention import Context
from atlas.tokenizer import Tokenizer

_ROWS_AT_ONCE = 128
"""The number of positions whose logits are computed in one chunk. The logits of a position need 4 bytes per token of
the vocabulary."""


@dataclass(frozen=True)
class Choice:
    """A token and its probability under the model."""

    id: int
    text: str
    probability: float


@dataclass(frozen=True)
class TokenPrediction:
    """A token of a text, and the model's prediction at the token's position.

    `log_probability` is in nats; the loss is its negative mean over the text. `rank` is 1 for the likeliest token.
    `entropy` is in bits: the model is as uncertain as between 2^entropy equally likely tokens. `alternatives` are the
    likeliest tokens at this position. The first token has no prediction, so its fields are None and `alternatives` is
    empty.
    """

    id: int
    text: str
    probability: float | None = None
    log_probability: float | None = None
    rank: int | None = None
    entropy: float | None = None
    alternatives: tuple[Choice, ...] = ()


@dataclass(frozen=True)
class TextLoss:
    """The mean loss of a text in nats per token, over `tokens` tokens that encode `num_bytes` bytes."""

    loss: float
    tokens: int
    num_bytes: int

    @property
    def perplexity(self) -> float:
        """e to the power of the loss; infinity if a float cannot hold it."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """The loss in bits per byte of the text, which is comparable between tokenizers."""
        return self.loss * self.tokens / (math.log(2) * max(1, self.num_bytes))


@dataclass(frozen=True)
class Candidate:
    """A possible next token, and its probability after each sampling step. `removed_by` is the step that removed the
    token, or None."""

    id: int
    text: str
    probabilities: dict[str, float]
    removed_by: str | None


@dataclass(frozen=True)
class NextToken:
    """The distribution of the next token after each sampling step.

    The first step, `model`, is the unchanged distribution. The other steps are the sampling settings, in the order in
    which they are applied. `remaining` has the number of remaining tokens after each step. `entropy` has the entropy in
    bits after each step. `candidates` are the likeliest tokens of the unchanged distribution, the likeliest first.
    """

    remaining: dict[str, int]
    entropy: dict[str, float]
    candidates: tuple[Candidate, ...]


@dataclass(frozen=True)
class LayerPrediction:
    """The prediction of the model if `layer`, counted from 0, were its last layer. `layer` is None for the embedding
    alone.

    `probability` and `rank` belong to the token that follows in the text. They are None at the end of the text.
    `entropy` is in bits.
    """

    layer: int | None
    likeliest: tuple[Choice, ...]
    entropy: float
    probability: float | None
    rank: int | None


def encode(loaded: LoadedModel, text: str) -> list[int]:
    """The token ids of a text. An empty text gives the one id that begins a document."""
    return encode_prompt(text, loaded.tokenizer)


def token_text(tokenizer: Tokenizer, id: int) -> str:
    r"""The text of a token. Bytes of an incomplete character are written as \xe2\x82."""
    return tokenizer.token_bytes(id).decode("utf-8", errors="backslashreplace")


@torch.no_grad()
def expectations(loaded: LoadedModel, ids: Sequence[int], *, alternatives: int = 5) -> list[TokenPrediction]:
    """Return a `TokenPrediction` for each token of `ids`. `alternatives` is the number of alternatives per token.

    A text that is longer than the context is read in windows. Each window after the first begins half a context before
    the first token that it predicts.
    """
    predictions: list[TokenPrediction] = []
    if loaded.config.model.max_seq_len == 1:
        loaded.batch_of(ids)  # with more than one token, no window has a token and its successor
    for window, known in _windows(ids, loaded.config.model.max_seq_len):
        tokens = loaded.batch_of(window)
        if not predictions:
            predictions.append(TokenPrediction(ids[0], token_text(loaded.tokenizer, ids[0])))
        hidden, following = loaded.model.hidden_states(tokens)[0, known - 1 : -1], tokens[0, known:]
        for start in range(0, len(following), _ROWS_AT_ONCE):
            states, targets = (part[start : start + _ROWS_AT_ONCE] for part in (hidden, following))
            log_probs = loaded.model.head(states).float().log_softmax(dim=-1)
            own = log_probs.gather(-1, targets[:, None])
            ranks, entropies = (log_probs > own).sum(dim=-1) + 1, _entropy(log_probs.exp())
            columns = [column.tolist() for column in (targets, own[:, 0].exp(), own[:, 0], ranks, entropies)]
            for id, *row in zip(*columns, _likeliest(loaded, log_probs, alternatives), strict=True):
                predictions.append(TokenPrediction(id, token_text(loaded.tokenizer, id), *row))
    return predictions


def _windows(ids: Sequence[int], context: int) -> Iterator[tuple[Sequence[int], int]]:
    """Yield (window, number of its first tokens that an earlier window predicted, or that have no prediction)."""
    yield ids[:context], 1
    known = max(1, context // 2)
    for end in range(context, len(ids), max(1, context - known)):
        yield ids[end - known : end - known + context], known


def loss_of(loaded: LoadedModel, predictions: Sequence[TokenPrediction]) -> TextLoss | None:
    """Return the loss of a text from the predictions of its tokens; None if no token has a prediction."""
    predicted = [each for each in predictions if each.log_probability is not None]
    if not predicted:
        return None
    loss = -math.fsum(each.log_probability or 0.0 for each in predicted) / len(predicted)
    num_bytes = sum(len(loaded.tokenizer.token_bytes(each.id)) for each in predicted)
    return TextLoss(loss, len(predicted), num_bytes)


@torch.no_grad()
def embedding(loaded: LoadedModel, ids: Sequence[int]) -> Tensor:
    """Return the embedding of a text, (C,) in fp32 on the CPU: the mean over the tokens of the hidden states after the
    final norm, scaled to length 1."""
    hidden = loaded.model.hidden_states(loaded.batch_of(ids))[0].float().mean(dim=0)
    return torch.nn.functional.normalize(hidden, dim=0).cpu()


@torch.no_grad()
def next_token(
    loaded: LoadedModel, ids: Sequence[int], sampling: Sampling, *, candidates: int = 10
) -> NextToken:
    """Return how the sampling settings change the distribution of the token after `ids`. `candidates` is the number of
    likeliest tokens to return."""
    hidden = loaded.model.hidden_states(loaded.batch_of(ids))[:, -1]
    raw = loaded.model.head(hidden).float()
    penalized = adjust(raw, [list(ids)], sampling)
    steps = {"model": raw, "repetition_penalty": penalized, **dict(filters(penalized, sampling))}
    left = {name: (scores[0] > -torch.inf).cpu() for name, scores in steps.items()}
    probabilities = {name: scores[0].softmax(dim=-1).cpu() for name, scores in steps.items()}
    shown = [
        Candidate(
            id,
            token_text(loaded.tokenizer, id),
            {name: float(row[id]) for name, row in probabilities.items()},
            next((name for name, kept in left.items() if not kept[id]), None),
        )
        for id in raw[0].topk(min(candidates, raw.shape[-1])).indices.tolist()
    ]
    return NextToken(
        {name: int(kept.sum()) for name, kept in left.items()},
        {name: float(_entropy(row)) for name, row in probabilities.items()},
        tuple(shown),
    )


@torch.no_grad()
def attention(loaded: LoadedModel, ids: Sequence[int], *, layers: Sequence[int] | None = None) -> Tensor:
    """Return (L, H, T, T) on the CPU: the attention weights, with queries as rows and keys as columns.

    `layers` are counted from 0. None means all layers, whose weights need much memory for a long text.
    """
    num_layers = loaded.model.config.num_layers
    wanted = range(num_layers) if layers is None else layers
    if wrong := [layer for layer in wanted if not 0 <= layer < num_layers]:
        raise AtlasError(f"layer {wrong[0]}: the model has layers 0 to {num_layers - 1}")
    blocks: Any = loaded.model.blocks
    streams, context = _streams(loaded, ids)
    taken = [(blocks[layer], streams[layer]) for layer in wanted]
    patterns = (block.attention.weights(block.attention_norm(x), context)[0].cpu() for block, x in taken)
    return torch.stack([*patterns])


@torch.no_grad()
def lens(
    loaded: LoadedModel, ids: Sequence[int], *, position: int = -1, alternatives: int = 5
) -> list[LayerPrediction]:
    """Return the predictions of the token after `position`: one after the embedding, and one after each layer.

    A negative `position` counts from the end. This is the logit lens (nostalgebraist 2020,
    https://www.lesswrong.com/posts/AcKRB8wDpdaN6v6ru): the final norm and the LM head are applied to the residual
    stream at `position`.
    """
    if not -len(ids) <= position < len(ids):
        raise AtlasError(f"position {position}: the text has tokens 0 to {len(ids) - 1}")
    position %= len(ids)
    streams, _ = _streams(loaded, ids)
    hidden = loaded.model.final_norm(torch.stack([x[0, position] for x in streams]))
    log_probs = loaded.model.head(hidden).float().log_softmax(dim=-1)
    probabilities: list[float | None] = [None] * len(streams)
    ranks: list[int | None] = [None] * len(streams)
    if position + 1 < len(ids):
        own = log_probs[:, ids[position + 1], None]
        probabilities, ranks = own[:, 0].exp().tolist(), ((log_probs > own).sum(dim=-1) + 1).tolist()
    entropies = _entropy(log_probs.exp()).tolist()
    layers, likeliest = [None, *range(len(streams) - 1)], _likeliest(loaded, log_probs, alternatives)
    columns = (layers, likeliest, entropies, probabilities, ranks)
    return [LayerPrediction(*row) for row in zip(*columns, strict=True)]


def _streams(loaded: LoadedModel, ids: Sequence[int]) -> tuple[list[Tensor], Context]:
    """Return the residual stream, (1, T, C), before the first block and after each block, and the `Context` of
    attention."""
    x, context = loaded.model.embed(loaded.batch_of(ids))
    streams = [x]
    for block in loaded.model.blocks:
        streams.append(block(streams[-1], context))
    return streams, context


def _likeliest(loaded: LoadedModel, log_probs: Tensor, count: int) -> list[tuple[Choice, ...]]:
    """The `count` likeliest tokens of each row of `log_probs` (N, V), the likeliest first."""
    best = log_probs.topk(min(count, log_probs.shape[-1]), dim=-1)
    return [
        tuple(Choice(id, token_text(loaded.tokenizer, id), prob) for id, prob in zip(*row, strict=True))
        for row in zip(best.indices.tolist(), best.values.exp().tolist(), strict=True)
    ]


def _entropy(probabilities: Tensor) -> Tensor:
    """The entropy in bits of each distribution, (…, V) → (…) (Shannon 1948)."""
    nats: Tensor = torch.special.entr(probabilities).sum(dim=-1)
    return nats / math.log(2)
