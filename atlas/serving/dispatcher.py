"""Check requests against the server's limits, and put valid requests into the queue of a model."""

from __future__ import annotations

import secrets
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from atlas.inference.sampling import row_seed
from atlas.serving.api.body import Body
from atlas.serving.api.errors import ApiError
from atlas.serving.api.fields import MOST_NAMED, shown
from atlas.serving.api.requests import MOST_STOPS, SamplingParams
from atlas.serving.backends.generation import Backend, Generation, GenerationRequest, TooLong
from atlas.serving.metrics import Metrics

_MOST_PRINTED = 1000
"""The number of names of ignored fields that the server prints, each of them once."""


@dataclass(frozen=True)
class ServerSettings:
    """The settings of a server: limits, API key, folder of runs and allowed origins."""

    max_tokens: int = 4096
    """The largest number of new tokens in one generation. A request for more gets this number."""
    seconds: float = 300.0
    """The time limit of a request in seconds, from its acceptance to its end."""
    api_key: str | None = None
    runs: Path = Path("checkpoints")
    """The folder of the runs whose curves the page at /runs shows."""
    origins: tuple[str, ...] = ()
    """The origins of other sites whose pages may send requests; `*` stands for all origins."""


class Dispatcher:
    """A dispatcher, which puts requests into the queues of the models. The first model is the default."""

    def __init__(self, backends: Sequence[Backend], settings: ServerSettings) -> None:
        self.backends = {backend.id: backend for backend in backends}
        self.settings = settings
        self.metrics = Metrics(backends)
        self._printed: set[str] = set()
        """The names of ignored fields that were printed."""

    def model(self, name: str | None, *, is_exact: bool = False) -> Backend:
        """Return the model of this name, or the default model for None. If the server has only one model, return it for
        every name, unless `is_exact` is true. Raises `ApiError` if no model has this name."""
        if name is None or (len(self.backends) == 1 and not is_exact):
            return next(iter(self.backends.values()))
        if name not in self.backends:
            message = f"The model {name[:100]!r} does not exist: the models are {', '.join(self.backends)}"
            raise ApiError(404, message, param="model", code="model_not_found")
        return self.backends[name]

    def ignored(self, body: Body) -> dict[str, str]:
        """Return a header with the names of the request's fields that no server knows; an empty dict if there are none.
        Print each name when it occurs for the first time."""
        names = list(dict.fromkeys(map(shown, islice(body.ignored(), MOST_NAMED))))
        new = [name for name in names if name not in self._printed]
        if new and len(self._printed) < _MOST_PRINTED:
            print(f"ignored fields that no server knows: {', '.join(new)}", file=sys.stderr)
            self._printed.update(new)
        return {"X-Ignored-Fields": ", ".join(names)} if names else {}

    def submit(
        self,
        backend: Backend,
        prompts: Sequence[list[int]],
        params: SamplingParams,
        *,
        max_tokens: int | None,
        candidates: int | None,
        choices: int | None = None,
        scores_prompt: bool = False,
        constraint: Any = None,
        may_exceed: bool = False,
    ) -> GenerationRequest:
        """Put generations of each prompt into the queue of `backend`. Raises `ApiError` if the request exceeds a limit
        or the queue is full.

        Each prompt has `choices` generations (default: `params.n`) of at most `max_tokens` tokens, and of not more than
        the server allows. None is the number of free positions in the context. `candidates` is the number of
        alternatives to return for each token, and `scores_prompt` also returns those of the prompt's tokens.
        `constraint` is the grammar of the texts, as `Backend.constrain` returned it. If `may_exceed` is true, a prompt
        may be longer than the model's context. The model then reads only the prompt's last tokens.
        """
        each, known = choices or params.n or 1, backend.vocab_size
        texts, largest, sampling = len(prompts) * each, max(map(max, prompts)), params.sampling()
        biased = max((token for token, _ in sampling.logit_bias), default=0)
        at_most = f"at most {backend.capacity} completions in one request, not {texts}"
        for is_wrong, param, rule in (
            (
                len(params.stops) > MOST_STOPS,
                "stop",
                f"at most {MOST_STOPS} strings, not {len(params.stops)}",
            ),
            (texts > backend.capacity, "n", at_most),
            (largest >= known, "prompt", f"token {largest}: the vocabulary has {known} tokens"),
            (params.ignore_eos and constraint is not None, "ignore_eos", "not together with a format"),
            (params.min_tokens and constraint is not None, "min_tokens", "not together with a format"),
            (biased >= known, "logit_bias", f"token {biased}: the vocabulary has {known} tokens"),
        ):
            if is_wrong:
                raise ApiError(400, f"{param}: {rule}", param=param)
        if (longest := max(map(len, prompts))) > backend.context and not may_exceed:
            raise TooLong(backend.context, longest)
        is_any_seed = params.seed is None or params.seed == -1
        seed = secrets.randbelow(2**63) if is_any_seed else params.seed or 0
        rows = [prompt for prompt in prompts for _ in range(each)]
        generations = [
            Generation(
                prompt,
                sampling,
                min(self.settings.max_tokens, _room(backend, prompt) if max_tokens is None else max_tokens),
                row_seed(seed, row),
                params.stops,
                candidates,
                min_tokens=params.min_tokens or 0,
                ignore_eos=bool(params.ignore_eos),
                scores_prompt=scores_prompt,
                constraint=constraint,
                uses_known=params.uses_known,
            )
            for row, prompt in enumerate(rows)
        ]
        count = self.metrics.tokens.labels(backend.id).inc
        return GenerationRequest(backend, generations, self.settings.seconds, count)

    def close(self, request: GenerationRequest) -> None:
        """Cancel a request, and record its metrics, after the client has received the answer or has disconnected."""
        for generation in request.generations:
            generation.cancelled = True
        self.metrics.count_request(request)


def _room(backend: Backend, prompt: Sequence[int]) -> int:
    """The number of free positions in the context after a prompt, at least 1."""
    return max(1, backend.context - len(prompt))
