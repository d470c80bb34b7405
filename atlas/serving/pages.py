"""The routes for the server's pages: generation, the model's internals at each token, and the curves of runs."""

from __future__ import annotations

import asyncio
import codecs
import math
import unicodedata
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import Field

from atlas.inference import look
from atlas.inference.generate import window_start
from atlas.inference.load import LoadedModel
from atlas.inference.text import encode_prompt
from atlas.serving.api.body import Body, TokenIds
from atlas.serving.api.errors import ApiError
from atlas.serving.api.requests import MOST_CANDIDATES, ChatRequest, SamplingParams, SamplingSettings
from atlas.serving.backends.engine import Engine
from atlas.serving.backends.generation import Backend, GenerationRequest
from atlas.serving.dispatcher import Dispatcher
from atlas.serving.prompts import encode_conversation
from atlas.serving.runs import RunFolder
from atlas.serving.stream import EventStream, event, until_disconnect

_LIKELIEST = 24
"""The number of likeliest tokens that a page shows for each distribution."""
_LENS = 6
"""The number of likeliest tokens that a page shows after each layer."""
_DRAWN = 256
"""The largest number of tokens whose attention the page draws. Of a longer text, the page draws the last tokens, since
the response would otherwise need megabytes and the picture would be unreadable."""

MOST_KNOWN = 32_768
"""The largest number of known tokens that a page may continue, unless the context is longer. The response describes
each token, in about a kilobyte of memory."""

MOST_READ = 8192
"""The largest number of tokens of a text that a page measures, unless the context is longer."""
_MOST_CHARACTERS = 65_536
"""The largest number of characters of such a text. A tokenizer may need 100 bytes of memory for each."""

T = TypeVar("T")
Prompt = str | TokenIds
InTurn = Callable[..., Awaitable[Any]]
"""A function that calls its argument in the thread of `page_routes`."""


class WriteRequest(SamplingParams):
    """A request to continue a text, with alternatives for each token."""

    prompt: Prompt = ""
    max_tokens: int = Field(100, ge=1)
    n: Annotated[int, Field(ge=1, le=1)] | None = None
    alternatives: int = Field(10, ge=0, le=MOST_CANDIDATES)


class TalkRequest(ChatRequest):
    """A conversation to answer, with alternatives for each token."""

    n: Annotated[int, Field(ge=1, le=1)] | None = None
    alternatives: int = Field(10, ge=0, le=MOST_CANDIDATES)


class ReadRequest(Body):
    """A text to read, of any length."""

    model: str | None = None
    prompt: str = Field(min_length=1, max_length=_MOST_CHARACTERS)
    alternatives: int = Field(10, ge=0, le=MOST_CANDIDATES)


class LookRequest(Body):
    """A request for the model's internals on a text."""

    model: str | None = None
    prompt: Prompt = ""
    given: int | None = Field(None, ge=1)
    """The number of prompt tokens that the model did not generate; None: all tokens of the prompt."""


class SamplingRequest(LookRequest, SamplingSettings):
    """A request for the effect of the sampling settings on the choice of a text's next token."""


class AttentionRequest(LookRequest):
    """A request for the attention weights of one layer on a text."""

    layer: int = Field(0, ge=0)


def page_routes(dispatcher: Dispatcher) -> APIRouter:
    """Return the routes of the pages, under `/api/`."""
    router, run_folder = APIRouter(include_in_schema=False), RunFolder(dispatcher.settings.runs)
    # Requests for internals run one after the other in their own thread, so that they do not block generation and
    # tokenization.
    thread = ThreadPoolExecutor(1, thread_name_prefix="look")

    async def in_turn(work: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(thread, work, *arguments)

    async def look_inside(body: LookRequest, request: Request, work: Callable[..., T]) -> T | None:
        """Return the result of `work`, or None after a disconnect. The arguments of `work` are the model, the ids in
        the model's window, the start of this window in the text, and `body`."""
        engine = _engine(dispatcher.model(body.model))
        ids = await _ids(engine, body.prompt)
        start = window_start(body.given or len(ids), len(ids), engine.context)
        looking = in_turn(work, engine.loaded, ids[start:], start, body)
        return await until_disconnect(request.receive, looking)

    _add_generation(router, dispatcher, in_turn)

    @router.post("/api/read")
    async def read(body: ReadRequest, request: Request) -> dict[str, Any] | None:
        """Return the loss of a text, and its tokens with the model's predictions."""
        engine = _engine(dispatcher.model(body.model))
        ids = await asyncio.to_thread(encode_prompt, body.prompt, engine.loaded.tokenizer)
        _check_number(ids, engine, MOST_READ)
        reading = in_turn(_read_text, engine, ids, body.alternatives)
        return await until_disconnect(request.receive, reading)

    @router.post("/api/sampling")
    async def sampling(body: SamplingRequest, request: Request) -> dict[str, Any] | None:
        return await look_inside(body, request, _sampling)

    @router.post("/api/attention")
    async def attention(body: AttentionRequest, request: Request) -> dict[str, Any] | None:
        return await look_inside(body, request, _attention)

    @router.post("/api/layers")
    async def layers(body: LookRequest, request: Request) -> dict[str, Any] | None:
        return await look_inside(body, request, _layers)

    @router.get("/api/runs")
    async def runs() -> dict[str, Any]:
        return await asyncio.to_thread(run_folder.curves)

    return router


def _add_generation(router: APIRouter, dispatcher: Dispatcher, in_turn: InTurn) -> None:
    """Add the routes that generate text and send it as events."""

    @router.post("/api/write")
    async def write(body: WriteRequest) -> Response:
        """Send events: the prompt's tokens, each new token with its probability, and at the end the finish reason.

        If the prompt is a list of token ids, the client continues an earlier text. The client already has the
        probabilities of these tokens, so the response omits them.
        """
        backend = dispatcher.model(body.model)
        ids = await _ids(backend, body.prompt)
        is_known = not isinstance(body.prompt, str)
        _check_number(ids, backend, MOST_KNOWN)
        may_exceed = is_known and isinstance(backend, Engine)
        generations = dispatcher.submit(
            backend, [ids], body, max_tokens=body.limit, candidates=body.alternatives, may_exceed=may_exceed
        )
        read = partial(_read, backend, ids, None if is_known else body.alternatives)
        return EventStream(_events(generations, in_turn, read), lambda: dispatcher.close(generations))

    @router.post("/api/chat")
    async def chat(body: TalkRequest) -> Response:
        """Send the events of /api/write for the answer to a conversation. The prompt is the conversation as the chat
        template writes it."""
        backend = dispatcher.model(body.model)
        ids = await asyncio.to_thread(encode_conversation, body, backend)
        generations = dispatcher.submit(
            backend, [ids], body, max_tokens=body.limit, candidates=body.alternatives
        )
        read = partial(_read, backend, ids, body.alternatives)
        return EventStream(_events(generations, in_turn, read), lambda: dispatcher.close(generations))


def _engine(backend: Backend) -> Engine:
    if not isinstance(backend, Engine):
        message = f"{backend.id}: llama.cpp does not show how it chooses a token: serve the checkpoint"
        raise ApiError(400, message)
    return backend


def _check_number(ids: list[int], backend: Backend, most: int) -> None:
    if len(ids) > (most := max(backend.context, most)):
        rule = f"at most {most:,} tokens, not {len(ids):,}: use a shorter text"
        raise ApiError(400, f"prompt: {rule}", param="prompt")


async def _ids(backend: Backend, prompt: Prompt) -> list[int]:
    return await asyncio.to_thread(backend.encode, prompt) if isinstance(prompt, str) else prompt


def _read(backend: Backend, ids: list[int], alternatives: int | None) -> list[dict[str, Any]]:
    """Return the tokens of a prompt. If the backend is an `Engine` and `alternatives` is not None, each token has the
    model's predictions."""
    if isinstance(backend, Engine) and alternatives is not None:
        return [asdict(each) for each in look.expectations(backend.loaded, ids, alternatives=alternatives)]
    return [{**_option(backend, token, 0.0), "probability": None, "alternatives": []} for token in ids]


def _read_text(engine: Engine, ids: list[int], alternatives: int) -> dict[str, Any]:
    predictions = look.expectations(engine.loaded, ids, alternatives=alternatives)
    loss, shown = look.loss_of(engine.loaded, predictions), _Shown(engine)
    names = ("tokens", "loss", "perplexity", "bits_per_byte")
    values = {name: getattr(loss, name) for name in names} if loss else {}
    if any(map(math.isnan, values.values())):
        raise ApiError(500, f"{engine.id}: the loss of this text is not a number: the weights are damaged")
    measured = {name: value if math.isfinite(value) else None for name, value in values.items()}
    return {"tokens": [shown.add(asdict(each)) for each in predictions], "measured": measured}


class _Shown:
    """Adds `shown` to the tokens of a text: the text that a token completes. If a character consists of several tokens,
    the last of these tokens shows the character."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._decoder = codecs.getincrementaldecoder("utf-8")("backslashreplace")

    def add(self, token: dict[str, Any]) -> dict[str, Any]:
        text = self._decoder.decode(self._backend.token_bytes(token["id"]))
        return {**token, "shown": _visible(text)}


async def _events(
    generations: GenerationRequest,
    in_turn: InTurn,
    read: Callable[[], list[dict[str, Any]]],
) -> AsyncIterator[str]:
    backend, shown = generations.backend, _Shown(generations.backend)

    def prompt_event() -> str:
        tokens = [shown.add(token) for token in read()]
        return event({"kind": "prompt", "tokens": tokens, "looks_inside": isinstance(backend, Engine)})

    yield await in_turn(prompt_event)
    finish = None
    async for _, piece in generations.pieces():
        finish = piece.finish
        if piece.candidates:
            chosen, *likeliest = [_option(backend, *each) for each in piece.candidates]
            yield event({"kind": "token", **shown.add(chosen), "alternatives": likeliest})
    yield event({"kind": "end", "tokens": generations.num_generated, "finish": finish})


def _option(backend: Backend, token: int, logprob: float) -> dict[str, Any]:
    text = backend.token_bytes(token).decode("utf-8", errors="backslashreplace")
    return {"id": token, "text": _visible(text), "probability": math.exp(logprob)}


def _visible(text: str) -> str:
    """Return the text with escaped control characters and direction marks. Line breaks and tabs stay as they are."""
    return "".join(
        each if each in "\n\t\r" or unicodedata.category(each) not in ("Cc", "Cf") else ascii(each)[1:-1]
        for each in text
    )


def _sampling(loaded: LoadedModel, ids: list[int], start: int, body: SamplingRequest) -> dict[str, Any]:
    return asdict(look.next_token(loaded, ids, body.sampling(), candidates=_LIKELIEST))


def _attention(loaded: LoadedModel, ids: list[int], start: int, body: AttentionRequest) -> dict[str, Any]:
    drawn = look.attention(loaded, ids, layers=[body.layer])[0, :, -_DRAWN:, -_DRAWN:]
    return {
        "layer": body.layer,
        "num_layers": loaded.config.model.num_layers,
        "first": start + len(ids) - drawn.shape[-1],
        "weights": [[[round(weight, 4) for weight in row] for row in head] for head in drawn.tolist()],
    }


def _layers(loaded: LoadedModel, ids: list[int], start: int, body: LookRequest) -> dict[str, Any]:
    return {"layers": [asdict(each) for each in look.lens(loaded, ids, alternatives=_LENS)]}
