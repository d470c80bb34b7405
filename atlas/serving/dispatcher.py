"""Where requests are taken: which model, within which limits, and in which place of its queue."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from atlas.inference.sampling import Sampling, row_seed
from atlas.serving.errors import Refusal
from atlas.serving.meter import Meter
from atlas.serving.schema import MOST_STOPS, SamplingParams
from atlas.serving.text import Backend, Busy, Generation, GenerationRequest


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


class Dispatcher:
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

    def generation_request(
        self,
        backend: Backend,
        prompts: Sequence[list[int]],
        params: SamplingParams,
        *,
        max_tokens: int,
        candidates: int | None,
        may_exceed: bool = False,
    ) -> GenerationRequest:
        """`may_exceed`: of a prompt longer than the context its end is read. Raises `Refusal`."""
        self._check(backend, prompts, params, max_tokens)
        longest = max(map(len, prompts))
        if longest > backend.context and not may_exceed:
            raise Refusal(
                400,
                f"This model's maximum context length is {backend.context} tokens, the prompt has {longest}",
                param="prompt",
                code="context_length_exceeded",
            )
        sampling = Sampling(
            temperature=1.0 if params.temperature is None else params.temperature,
            top_k=params.top_k or 0,
            top_p=params.top_p or 1.0,
            min_p=params.min_p or 0.0,
            repetition_penalty=params.repetition_penalty or 1.0,
        )
        seed = secrets.randbelow(2**63) if params.seed is None else params.seed
        rows = [prompt for prompt in prompts for _ in range(params.n or 1)]
        texts = [
            Generation(prompt, sampling, max_tokens, row_seed(seed, number), params.stops, candidates)
            for number, prompt in enumerate(rows)
        ]
        try:
            return GenerationRequest(backend, texts, self.meter.counter(backend))
        except Busy:
            raise Refusal(
                429, "too many texts wait: try again in a moment, or ask for fewer", code="queue_full"
            ) from None

    def close(self, generation_request: GenerationRequest) -> None:
        """When its client has the answer, or has gone."""
        generation_request.cancel()
        self.meter.count_request(generation_request)

    def _check(
        self, backend: Backend, prompts: Sequence[list[int]], params: SamplingParams, max_tokens: int
    ) -> None:
        if len(params.stops) > MOST_STOPS:
            raise Refusal(400, f"stop: at most {MOST_STOPS} strings, not {len(params.stops)}", param="stop")
        if params.stream_options and not params.stream:
            raise Refusal(400, "stream_options: only with stream", param="stream_options")
        num_texts = len(prompts) * (params.n or 1)
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
