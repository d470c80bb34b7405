"""The routes: OpenAI's, and what a supervisor and Prometheus ask."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope
from starlette.types import Send as ASGISend

from atlas import __version__
from atlas.errors import AtlasError
from atlas.inference.sampling import Sampling, row_seed
from atlas.serving.answers import Answer
from atlas.serving.errors import Refusal, of_validation, response
from atlas.serving.limits import Door, Limits
from atlas.serving.meter import Meter
from atlas.serving.schema import MOST_STOPS, ChatRequest, CompletionRequest, ErrorBody, Wishes
from atlas.serving.text import Backend, Busy, Order, Piece, Text, hand_out
from atlas.tokenizer.chat import Message

BODY_SECONDS = 10.0
"""For a body to arrive."""
_USUAL_TOKENS = 16
"""OpenAI's number of new tokens where a completion names none."""

T = TypeVar("T")


@dataclass(frozen=True)
class Rules:
    """What a server lets its clients do."""

    max_tokens: int = 4096
    """New tokens of one text."""
    seconds: float = 300.0
    """For a request, from its acceptance to its end."""
    api_key: str | None = None


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
    ) -> Order:
        """Raises `Refusal`."""
        self._check(backend, prompts, wishes, max_tokens)
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

    def _check(self, backend: Backend, prompts: Sequence[list[int]], wishes: Wishes, max_tokens: int) -> None:
        if len(wishes.stops) > MOST_STOPS:
            raise Refusal(400, f"stop: at most {MOST_STOPS} strings, not {len(wishes.stops)}", param="stop")
        if wishes.stream_options and not wishes.stream:
            raise Refusal(400, "stream_options: only with stream", param="stream_options")
        if max_tokens > self.rules.max_tokens:
            raise Refusal(
                400,
                f"max_tokens: at most {self.rules.max_tokens}, not {max_tokens} (--max-tokens of the server)",
                param="max_tokens",
            )
        longest = max(map(len, prompts))
        if longest > backend.context:
            raise Refusal(
                400,
                f"This model's maximum context length is {backend.context} tokens, the prompt has {longest}",
                param="prompt",
                code="context_length_exceeded",
            )
        largest = max(map(max, prompts))
        if largest >= backend.vocab_size:
            raise Refusal(
                400, f"prompt: token {largest}: the vocabulary has {backend.vocab_size}", param="prompt"
            )

    async def answer(self, answer: Answer, wishes: Wishes, request: Request) -> Response:
        if wishes.stream:
            include_usage = bool(wishes.stream_options and wishes.stream_options.include_usage)
            events = answer.stream(self.rules.seconds, include_usage=include_usage)
            return EventStream(events, lambda: self.meter.count_order(answer.order))
        try:
            whole = await unless_gone(request.receive, answer.whole(self.rules.seconds))
        finally:
            self.meter.count_order(answer.order)
        return JSONResponse(whole or {})  # nobody reads the empty one


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T | None:
    """The result of `work`; None, and no more work, when the client has gone."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        gone.cancel()
        if not task.done():
            task.cancel()
            await asyncio.wait({task})


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events (https://html.spec.whatwg.org/multipage/server-sent-events.html) as long as somebody reads."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[str], ended: Callable[[], None]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._ended = ended

    async def __call__(self, scope: Scope, receive: Receive, send: ASGISend) -> None:
        try:
            await unless_gone(receive, self._write(send))
        finally:
            self._ended()

    async def _write(self, send: ASGISend) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async for event in self._events:
            await send({"type": "http.response.body", "body": event.encode(), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def build_app(backends: Sequence[Backend], rules: Rules) -> FastAPI:
    """The application. The models begin when it does, and end with it."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        loop = asyncio.get_running_loop()

        def deliver(pieces: list[tuple[Text, Piece]]) -> None:
            loop.call_soon_threadsafe(hand_out, pieces)

        for backend in backends:
            backend.begin(deliver)
        yield
        for backend in backends:
            backend.close()

    app = FastAPI(
        title="Atlas",
        version=__version__,
        description="OpenAI's API over a model of one's own.",
        lifespan=lifespan,
        docs_url=None,  # its page is from a CDN
        redoc_url=None,
        responses={"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}},
    )
    _add_errors(app)
    desk = Desk(backends, rules)
    _add_routes(app, desk)
    app.add_middleware(Limits, seconds=BODY_SECONDS)
    app.add_middleware(Door, api_key=rules.api_key, is_page=lambda path: False)
    app.add_middleware(desk.meter.counting)
    return app


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(Refusal)
    async def refused(request: Request, refusal: Refusal) -> JSONResponse:
        return response(refusal)

    @app.exception_handler(AtlasError)
    async def mistaken(request: Request, error: AtlasError) -> JSONResponse:
        return response(Refusal(400, str(error)))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return response(of_validation(error.errors()))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        message = f"{request.method} {request.url.path}: {error.detail}"
        return response(Refusal(error.status_code, message), error.headers)

    @app.exception_handler(Exception)
    async def bug(request: Request, error: Exception) -> JSONResponse:
        return response(Refusal(500, "a bug of the server's: its log says more"))


def _add_routes(app: FastAPI, desk: Desk) -> None:
    @app.get("/health")
    async def health() -> dict[str, str]:
        """200 while the server takes requests."""
        return {"status": "ok"}

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(desk.meter.told(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_facts(backend) for backend in desk.backends.values()]}

    @app.get("/v1/models/{model:path}")
    async def model(model: str) -> dict[str, Any]:
        return _facts(desk.model(model))

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue a text."""
        backend = desk.model(body.model)
        order = desk.order(
            backend,
            _prompts(body, backend),
            body,
            max_tokens=body.max_tokens or _USUAL_TOKENS,
            candidates=body.logprobs,
        )
        answer = Answer(order, is_chat=False, logprobs=body.logprobs is not None)
        return await desk.answer(answer, body, request)

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation."""
        backend = desk.model(body.model)
        if body.top_logprobs is not None and not body.logprobs:
            raise Refusal(400, "top_logprobs: only with logprobs", param="top_logprobs")
        prompt = backend.encode_chat([_message(message) for message in body.messages])
        room = max(1, min(backend.context - len(prompt), desk.rules.max_tokens))
        order = desk.order(
            backend,
            [prompt],
            body,
            max_tokens=body.max_completion_tokens or body.max_tokens or room,
            candidates=(body.top_logprobs or 0) if body.logprobs else None,
        )
        answer = Answer(order, is_chat=True, logprobs=bool(body.logprobs))
        return await desk.answer(answer, body, request)


def _prompts(body: CompletionRequest, backend: Backend) -> list[list[int]]:
    """Ids of each prompt, at least one."""
    prompt = body.prompt
    if isinstance(prompt, str):
        return [backend.encode(prompt)]
    prompts: list[list[int]] = []
    for each in prompt:
        if isinstance(each, int):
            return [prompt]  # type: ignore[list-item]
        prompts.append(backend.encode(each) if isinstance(each, str) else each)
    return prompts


def _message(message: Any) -> Message:
    """`developer` is OpenAI's newer word for `system`."""
    return Message("system" if message.role == "developer" else message.role, message.text)


def _facts(backend: Backend) -> dict[str, Any]:
    return {"id": backend.id, "object": "model", "created": backend.created, "owned_by": "atlas"}
