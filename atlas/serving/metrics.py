"""The metrics at /metrics, in Prometheus's format (https://prometheus.io/docs/instrumenting/exposition_formats/)."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from atlas.serving.backends.generation import Backend, GenerationRequest

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)

_V1 = ("/v1/models", "/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/embeddings")
_ROUTES = frozenset({*_V1, "/tokenize", "/detokenize", "/tokenizer_info", "/props", "/health", "/metrics"})


class Metrics:
    """The Prometheus metrics of one server."""

    def __init__(self, backends: Iterable[Backend]) -> None:
        self._registry = CollectorRegistry()
        atlas: dict[str, Any] = {"namespace": "atlas", "registry": self._registry}
        self._requests = Counter("requests", "Requests answered.", ["route", "status"], **atlas)
        self._prompt_tokens = Counter("prompt_tokens", "Tokens of prompts.", ["model"], **atlas)
        self._reused = Counter(
            "reused_tokens", "Tokens of prompts known from earlier texts.", ["model"], **atlas
        )
        self.tokens = Counter("completion_tokens", "Tokens generated.", ["model"], **atlas)
        about = "Seconds from a request's acceptance to its first token."
        self._first = Histogram("time_to_first_token_seconds", about, ["model"], buckets=_SECONDS, **atlas)
        for name, about in (("running", "Running sequences."), ("waiting", "Queued sequences.")):
            gauge = Gauge(name, about, ["model"], **atlas)
            for backend in backends:
                gauge.labels(backend.id).set_function(functools.partial(getattr, backend, f"num_{name}"))

    def count_request(self, request: GenerationRequest) -> None:
        """Record the metrics of a request at its end, including failed and cancelled requests."""
        model = request.backend.id
        self.count_prompt(model, request.num_prompt_tokens)
        self._reused.labels(model).inc(request.num_reused)
        if request.seconds_to_first is not None:
            self._first.labels(model).observe(request.seconds_to_first)

    def count_prompt(self, model: str, num_tokens: int) -> None:
        """Record that a model read this number of tokens."""
        self._prompt_tokens.labels(model).inc(num_tokens)

    def middleware(self, app: ASGIApp) -> ASGIApp:
        """Add ASGI middleware that counts requests by route and status. All unknown paths count as `other`, since each
        label needs memory and clients can request any number of paths."""

        async def counted(scope: Scope, receive: Receive, send: Send) -> None:
            async def watched(message: Message) -> None:
                if message["type"] == "http.response.start":
                    path = scope["path"] if scope["path"] in _ROUTES else "other"
                    self._requests.labels(path, message["status"]).inc()
                await send(message)

            await app(scope, receive, watched)

        return counted

    def text(self) -> bytes:
        """Return all metrics in Prometheus's format."""
        return generate_latest(self._registry)
