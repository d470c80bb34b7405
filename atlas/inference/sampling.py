"""Sample tokens from logits: pure functions of (B, V) tensors, with one random generator per row.

The steps have the same order as in `transformers`: repetition penalty, temperature, top-k, top-p, min-p, then a draw.
The logit bias and the frequency and presence penalties of OpenAI's API come before and after the repetition penalty, as
in llama.cpp.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from atlas.errors import AtlasError
from atlas.model import long_tensor

_FEW = 1024
"""The number of likeliest tokens that top-p sorts first. Their probabilities nearly always sum to at least p, and
sorting the full vocabulary would take milliseconds."""
_COLDEST = 1e-6
"""The lowest temperature that logits are divided by. A division by a lower temperature could overflow in fp32, and only
the likeliest token would be drawn anyway."""

BAN = -1e9
"""The logit bias that bans a token. It is finite, so that a banned token can still be chosen if all others are
impossible."""


@dataclass(frozen=True)
class Sampling:
    """Sampling settings for the next token. Temperature 0 is greedy decoding."""

    temperature: float = 0.8
    top_k: int = 50
    """The number of likeliest tokens to keep; 0: all."""
    top_p: float = 0.95
    """The probability p: keep the smallest set of likeliest tokens whose probabilities sum to at least p; 1: all."""
    min_p: float = 0.0
    """The smallest allowed ratio of a token's probability to the likeliest token's probability; 0: all."""
    repetition_penalty: float = 1.0
    """The number that divides positive logits of tokens already seen, and multiplies their negative logits; 1: off."""
    frequency_penalty: float = 0.0
    """The number that is subtracted from a token's logit for each time that the token was seen."""
    presence_penalty: float = 0.0
    """The number that is subtracted from the logits of tokens already seen."""
    repeat_last_n: int = -1
    """The number of the latest tokens that count as seen; -1: all tokens, those of the prompt included."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token id, number that is added to this token's logit) pairs; `BAN` bans a token."""

    def __post_init__(self) -> None:
        for name, valid, rule in (
            ("temperature", self.temperature >= 0, "0 or more"),
            ("top-k", self.top_k >= 0, "0 (all) or more"),
            ("top-p", 0 <= self.top_p <= 1, "from 0 to 1"),
            ("min-p", 0 <= self.min_p <= 1, "from 0 to 1"),
            ("repetition-penalty", 0.01 <= self.repetition_penalty <= 100, "from 0.01 to 100"),
        ):
            if not valid:
                raise AtlasError(f"--{name} {getattr(self, name.replace('-', '_'))}: must be {rule}")


def sample(
    logits: Tensor,
    sampling: Sampling,
    seen: list[list[int]],
    generators: list[torch.Generator],
    allowed: Tensor | None = None,
) -> Tensor:
    """Return (B,): the next token id of each row, or -1 for a row whose logits are not finite.

    `logits` is (B, V). `seen` has the earlier token ids of each row, for the penalties. `generators` has one random
    generator per row. On CUDA, the CPU never waits for the GPU in this function.
    """
    logits = logits.float()
    is_finite = logits.sum(dim=-1).isfinite()
    logits = adjust(logits, seen, sampling)
    if allowed is not None:
        logits = logits.masked_fill(~allowed, -torch.inf)
    is_greedy = sampling.temperature == 0
    tokens = logits.argmax(dim=-1) if is_greedy else draw(probabilities(logits, sampling), generators)
    return tokens.where(is_finite, -1)


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """The distribution (B, V) that the next token is drawn from."""
    *_, (_, filtered) = filters(logits, sampling)
    return filtered.softmax(dim=-1)


def filters(logits: Tensor, sampling: Sampling) -> Iterator[tuple[str, Tensor]]:
    """Apply temperature, top-k, top-p and min-p in this order. After each step, yield the setting's name and the logits
    (B, V)."""
    logits = divide_by_temperature(logits, sampling.temperature)
    yield "temperature", logits
    logits = keep_top_k(logits, sampling.top_k)
    yield "top_k", logits
    # On CUDA, the CPU would have to wait for the GPU to know whether `_FEW` tokens are enough. So on CUDA, top-p keeps
    # at most `most` tokens. If top-k kept more tokens because of ties, some of the tied
    # tokens are dropped.
    most = _FEW if 0 < sampling.top_k <= _FEW else logits.shape[-1]
    logits = keep_top_p(logits, sampling.top_p, most=most if logits.is_cuda else None)
    yield "top_p", logits
    yield "min_p", keep_min_p(logits, sampling.min_p)


def adjust(logits: Tensor, seen: list[list[int]], sampling: Sampling) -> Tensor:
    """Apply the logit bias, and then the penalties for the tokens already seen, to logits (B, V)."""
    if sampling.logit_bias:
        index, biases = zip(*sampling.logit_bias, strict=True)
        bias = torch.tensor(biases, dtype=logits.dtype).to(logits.device, non_blocking=True)
        logits = logits.index_add(-1, long_tensor(index, logits.device), bias.expand(len(logits), -1))
    latest = sampling.repeat_last_n
    if latest >= 0:
        seen = [tokens[max(0, len(tokens) - latest) :] for tokens in seen]
    logits = penalize_repetition(logits, seen, sampling.repetition_penalty)
    return penalize_frequency(logits, seen, sampling.frequency_penalty, sampling.presence_penalty)


def penalize_repetition(logits: Tensor, seen: list[list[int]], penalty: float) -> Tensor:
    """Make tokens already seen less likely (Keskar et al. 2019, arXiv:1909.05858)."""
    if penalty == 1:
        return logits
    logits = logits.clone()
    for row, tokens in enumerate(seen):
        index = long_tensor(sorted(set(tokens)), logits.device)
        scores = logits[row, index]
        logits[row, index] = torch.where(scores > 0, scores / penalty, scores * penalty)
    return logits


def penalize_frequency(logits: Tensor, seen: list[list[int]], frequency: float, presence: float) -> Tensor:
    """Lower the logit of each token already seen by `presence`, and by `frequency` for each time that it was seen
    (https://platform.openai.com/docs/api-reference/completions/create)."""
    if frequency == presence == 0:
        return logits
    logits = logits.clone()
    for row, tokens in enumerate(seen):
        counts = Counter(tokens)
        lower = torch.tensor([presence + frequency * count for count in counts.values()], dtype=logits.dtype)
        logits[row, long_tensor(list(counts), logits.device)] -= lower.to(logits.device, non_blocking=True)
    return logits


def divide_by_temperature(logits: Tensor, temperature: float) -> Tensor:
    """Divide logits by the temperature. At 0, return the limit: 0 for the likeliest token of each row, -inf for all
    others."""
    if temperature > 0:
        # The largest logit becomes 0 first. Otherwise its quotient by a small temperature could overflow.
        return (logits - logits.amax(dim=-1, keepdim=True)) / max(temperature, _COLDEST)
    likeliest = logits.argmax(dim=-1, keepdim=True)
    return torch.full_like(logits, -torch.inf).scatter(-1, likeliest, 0.0)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Set all logits of each row to -inf except the k largest. Ties with the k-th logit stay."""
    if k == 0 or k >= logits.shape[-1]:
        return logits
    smallest_kept = logits.topk(k, dim=-1).values[:, -1:]
    return logits.masked_fill(logits < smallest_kept, -torch.inf)


def keep_top_p(logits: Tensor, p: float, *, most: int | None = None) -> Tensor:
    """Set logits to -inf except those of the smallest set of likeliest tokens whose probabilities sum to at least p.

    This is nucleus sampling (Holtzman et al. 2019, arXiv:1904.09751). The likeliest token is always kept. `most` limits
    the number of kept tokens; None means no limit.
    """
    if p == 1:
        return logits
    probs = logits.softmax(dim=-1)
    for count in (_FEW, logits.shape[-1]) if most is None else (most,):
        index = logits.topk(min(count, logits.shape[-1]), dim=-1).indices
        ordered = probs.gather(-1, index)
        before = ordered.cumsum(dim=-1) - ordered  # the total probability of the likelier tokens
        if most is not None or bool(((before[:, -1] >= p) | (ordered[:, -1] == 0)).all()):
            break  # all less likely tokens, which `index` lacks, are also removed
    kept = before < p
    kept[:, 0] = True
    removed = torch.ones_like(logits, dtype=torch.bool).scatter(-1, index, ~kept)
    return logits.masked_fill(removed, -torch.inf)


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """Set logits to -inf for tokens less than p times as likely as the likeliest (Nguyen et al. 2024,
    arXiv:2407.01082)."""
    if p == 0:
        return logits
    probs = logits.softmax(dim=-1)
    return logits.masked_fill(probs < p * probs.amax(dim=-1, keepdim=True), -torch.inf)


def draw(probs: Tensor, generators: list[torch.Generator]) -> Tensor:
    """Draw one token id per row from `probs` (B, V): the first token whose cumulative probability exceeds the row's
    random number.

    Each row has its own generator, so its text does not depend on the other rows. The numbers are drawn on the CPU, so
    the same seed gives the same numbers on every device.
    """
    numbers = [torch.rand(1, generator=generator, dtype=torch.float64) for generator in generators]
    sums = probs.cumsum(dim=-1, dtype=torch.float64)  # in fp32, a random number could round up to the total
    goals = torch.stack(numbers).to(probs.device, non_blocking=True) * sums[:, -1:]
    return torch.searchsorted(sums, goals, right=True)[:, 0]


def row_generators(seed: int, rows: int, *, first_row: int = 0) -> list[torch.Generator]:
    """Return a random generator for each of `rows` rows, from row number `first_row`. The random numbers of a row
    depend only on `seed` and the row's number."""
    return [torch.Generator().manual_seed(row_seed(seed, first_row + row)) for row in range(rows)]


def row_seed(seed: int, row: int) -> int:
    """The seed of row number `row`; row 0 has `seed` itself."""
    return (seed + 0x9E3779B97F4A7C15 * row) % 2**63
