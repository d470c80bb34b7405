"""Check requests against the server's limits, and put valid requests into the queue of a model."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from atlas.inference.sampling import row_seed
from atlas.serving.api.errors import ApiError
from atlas.serving.api.requests import MOST_STOPS, SamplingParams
from atlas.serving.backends.generation import Backend, Generation, GenerationRequest, TooLong
from atlas.serving.metrics import Metrics


@dataclass(frozen=True)
class ServerSettings:
    """The settings of a server: limits, API key and folder of runs."""

    max_tokens: int = 4096
    """The largest number of new tokens in one generation."""
    seconds: float = 300.0
    """The time limit of a request in seconds, from its acceptance to its end."""
    api_key: str | None = None
    runs: Path = Path("checkpoints")
    """The folder of the runs whose curves the page at /runs shows."""


class Dispatcher:
    """A dispatcher, which puts requests into the queues of the models. The first model is the default."""

    def __init__(self, backends: Sequence[Backend], settings: ServerSettings) -> None:
        self.backends = {backend.id: backend for backend in backends}
        self.settings = settings
        self.metrics = Metrics(backends)

    def model(self, name: str | None) -> Backend:
        """Return the model of this name, or the default model for None. Raises `ApiError` if no model has this name."""
        if name is None:
            return next(iter(self.backends.values()))
        if name not in self.backends:
            message = f"The model {name[:100]!r} does not exist: the models are {', '.join(self.backends)}"
            raise ApiError(404, message, param="model", code="model_not_found")
        return self.backends[name]

    def submit(
        self,
        backend: Backend,
        prompts: Sequence[list[int]],
        params: SamplingParams,
        max_tokens: int,
        candidates: int | None,
        *,
        may_exceed: bool = False,
    ) -> GenerationRequest:
        """Put `params.n` generations of each prompt into the queue of `backend`. Raises `ApiError` if the request
        exceeds a limit or the queue is full.

        If `may_exceed` is true, a prompt may be longer than the model's context. The model then reads only the prompt's
        last tokens.
        """
        n, most, known = params.n or 1, self.settings.max_tokens, backend.vocab_size
        stops, texts, largest = len(params.stops), len(prompts) * n, max(map(max, prompts))
        limit = f"at most {most}, not {max_tokens} (the server's --max-tokens)"
        for is_wrong, param, rule in (
            (stops > MOST_STOPS, "stop", f"at most {MOST_STOPS} strings, not {stops}"),
            (params.stream_options and not params.stream, "stream_options", "only allowed with stream"),
            (
                texts > backend.capacity,
                "n",
                f"at most {backend.capacity} completions in one request, not {texts}",
            ),
            (max_tokens > most, "max_tokens", limit),
            (largest >= known, "prompt", f"token {largest}: the vocabulary has {known} tokens"),
        ):
            if is_wrong:
                raise ApiError(400, f"{param}: {rule}", param=param)
        if (longest := max(map(len, prompts))) > backend.context and not may_exceed:
            raise TooLong(backend.context, longest)
        sampling = params.sampling()
        seed = secrets.randbelow(2**63) if params.seed is None else params.seed
        rows = [prompt for prompt in prompts for _ in range(n)]
        generations = [
            Generation(prompt, sampling, max_tokens, row_seed(seed, row), params.stops, candidates)
            for row, prompt in enumerate(rows)
        ]
        count = self.metrics.tokens.labels(backend.id).inc
        return GenerationRequest(backend, generations, self.settings.seconds, count)

    def close(self, request: GenerationRequest) -> None:
        """Cancel a request, and record its metrics, after the client has received the answer or has disconnected."""
        for generation in request.generations:
            generation.cancelled = True
        self.metrics.count_request(request)
