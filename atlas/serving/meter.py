"""What Prometheus is told at /metrics (https://prometheus.io/docs/instrumenting/exposition_formats/)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from atlas.serving.text import Backend, GenerationRequest

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)

_ROUTES = frozenset({"/v1/models", "/v1/completions", "/v1/chat/completions", "/health", "/metrics"})


class Meter:
    """Counts of one server."""

    def __init__(self, backends: Iterable[Backend]) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "atlas_requests", "Requests answered.", ["route", "status"], registry=self._registry
        )
        self._prompt_tokens = Counter(
            "atlas_prompt_tokens", "Tokens of prompts.", ["model"], registry=self._registry
        )
        self._tokens = Counter(
            "atlas_completion_tokens", "Tokens written.", ["model"], registry=self._registry
        )
        self._first = Histogram(
            "atlas_time_to_first_token_seconds",
            "From a request's acceptance to its first token.",
            ["model"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        running = Gauge("atlas_running", "Texts being written.", ["model"], registry=self._registry)
        waiting = Gauge("atlas_waiting", "Texts that wait for a place.", ["model"], registry=self._registry)
        for backend in backends:
            running.labels(backend.id).set_function(functools.partial(getattr, backend, "num_running"))
            waiting.labels(backend.id).set_function(functools.partial(getattr, backend, "num_waiting"))

    def counter(self, backend: Backend) -> Callable[[int], object]:
        """To be told of the model's tokens as they come."""
        return self._tokens.labels(backend.id).inc

    def count_request(self, generation_request: GenerationRequest) -> None:
        """When it ends, however it does."""
        model = generation_request.backend.id
        self._prompt_tokens.labels(model).inc(generation_request.num_prompt_tokens)
        if generation_request.seconds_to_first is not None:
            self._first.labels(model).observe(generation_request.seconds_to_first)

    def counting(self, app: ASGIApp) -> ASGIApp:
        """ASGI middleware: a request by its route and status. What is no route is one of `other`: anybody can ask for
        any number of them."""

        async def counted(scope: Scope, receive: Receive, send: Send) -> None:
            async def watched(message: Message) -> None:
                if message["type"] == "http.response.start":
                    path = scope["path"] if scope["path"] in _ROUTES else "other"
                    self._requests.labels(path, message["status"]).inc()
                await send(message)

            await app(scope, receive, watched)

        return counted

    def told(self) -> bytes:
        return generate_latest(self._registry)
