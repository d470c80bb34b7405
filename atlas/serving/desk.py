"""Where requests are taken: which model, within which limits, and in which place of its queue."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from atlas.inference.sampling import Sampling, row_seed
from atlas.serving.errors import Refusal
from atlas.serving.meter import Meter
from atlas.serving.schema import MOST_STOPS, Wishes
from atlas.serving.text import Backend, Busy, Order, Text


@dataclass(frozen=True)
class Rules:
    """What a server lets its clients do."""

    max_tokens: int = 4096
    """New tokens of one text."""
    seconds: float = 300.0
    """For a request, from its acceptance to its end."""
    api_key: str | None = None
    runs: Path = Path("checkpoints")
    """The folder whose runs are drawn at /runs."""


class Desk:
    """Takes requests to the models, of which the first is the usual one."""

    def __init__(self, backends: Sequence[Backend], rules: Rules) -> None:
        self.backends = {backend.id: backend for backend in backends}
        self.rules = rules
        self.meter = Meter(backends)

    def model(self, name: str | None) -> Backend:
        """Raises `Refusal`."""
        if name is None:
            return next(iter(self.backends.values()))
        if name not in self.backends:
            there = ", ".join(self.backends)
            raise Refusal(
                404,
                f"The model {name[:100]!r} does not exist: here is {there}",
                param="model",
                code="model_not_found",
            )
        return self.backends[name]

    def order(
        self,
        backend: Backend,
        prompts: Sequence[list[int]],
        wishes: Wishes,
        *,
        max_tokens: int,
        candidates: int | None,
        may_exceed: bool = False,
    ) -> Order:
        """`may_exceed`: of a prompt longer than the context its end is read. Raises `Refusal`."""
        self._check(backend, prompts, wishes, max_tokens)
        longest = max(map(len, prompts))
        if longest > backend.context and not may_exceed:
            raise Refusal(
                400,
                f"This model's maximum context length is {backend.context} tokens, the prompt has {longest}",
                param="prompt",
                code="context_length_exceeded",
            )
        sampling = Sampling(
            temperature=1.0 if wishes.temperature is None else wishes.temperature,
            top_k=wishes.top_k or 0,
            top_p=wishes.top_p or 1.0,
            min_p=wishes.min_p or 0.0,
            repetition_penalty=wishes.repetition_penalty or 1.0,
        )
        seed = secrets.randbelow(2**63) if wishes.seed is None else wishes.seed
        rows = [prompt for prompt in prompts for _ in range(wishes.n or 1)]
        texts = [
            Text(prompt, sampling, max_tokens, row_seed(seed, number), wishes.stops, candidates)
            for number, prompt in enumerate(rows)
        ]
        try:
            return Order(backend, texts, self.meter.counter(backend))
        except Busy:
            raise Refusal(
                429, "too many texts wait: try again in a moment, or ask for fewer", code="queue_full"
            ) from None

    def close(self, order: Order) -> None:
        """When its client has the answer, or has gone."""
        order.cancel()
        self.meter.count_order(order)

    def _check(self, backend: Backend, prompts: Sequence[list[int]], wishes: Wishes, max_tokens: int) -> None:
        if len(wishes.stops) > MOST_STOPS:
            raise Refusal(400, f"stop: at most {MOST_STOPS} strings, not {len(wishes.stops)}", param="stop")
        if wishes.stream_options and not wishes.stream:
            raise Refusal(400, "stream_options: only with stream", param="stream_options")
        num_texts = len(prompts) * (wishes.n or 1)
        if num_texts > backend.capacity:
            raise Refusal(400, f"n: {num_texts} texts at once: at most {backend.capacity}", param="n")
        if max_tokens > self.rules.max_tokens:
            raise Refusal(
                400,
                f"max_tokens: at most {self.rules.max_tokens}, not {max_tokens} (--max-tokens of the server)",
                param="max_tokens",
            )
        largest = max(map(max, prompts))
        if largest >= backend.vocab_size:
            raise Refusal(
                400, f"prompt: token {largest}: the vocabulary has {backend.vocab_size}", param="prompt"
            )
