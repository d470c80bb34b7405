"""What the pages request from this server: generations, looks inside the model at each token, and curves of runs."""

from __future__ import annotations

import asyncio
import codecs
import math
import unicodedata
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import Field

from atlas.inference import look
from atlas.inference.generate import window_start
from atlas.inference.load import LoadedModel
from atlas.serving.dispatcher import Dispatcher
from atlas.serving.engine import Engine
from atlas.serving.errors import ApiError
from atlas.serving.generation import Backend, GenerationRequest
from atlas.serving.runs import RunFolder
from atlas.serving.schema import MOST_CANDIDATES, Body, SamplingParams, SamplingSettings, TokenIds
from atlas.serving.stream import EventStream, event, until_disconnect

_LIKELIEST = 24
"""Tokens of a distribution that are drawn."""
_LENS = 6
"""Tokens after each layer."""
_DRAWN = 256
"""Tokens of a text whose attention is drawn; more would be megabytes, in a picture that shows nothing."""

T = TypeVar("T")
Prompt = str | TokenIds


class WriteRequest(SamplingParams):
    """A text to continue, with alternatives for each token."""

    prompt: Prompt = ""
    max_tokens: int = Field(100, ge=1)
    n: Annotated[int, Field(ge=1, le=1)] | None = None
    alternatives: int = Field(10, ge=0, le=MOST_CANDIDATES)


class LookRequest(Body):
    """A text to look into."""

    model: str | None = None
    prompt: Prompt = ""
    given: int | None = Field(None, ge=1)
    """Tokens of the prompt that the model did not generate; None: all."""


class SamplingRequest(LookRequest, SamplingSettings):
    """A text, and the settings with which its next token is chosen."""


class AttentionRequest(LookRequest):
    """A text, and the layer whose attention is drawn."""

    layer: int = Field(0, ge=0)


def page_routes(dispatcher: Dispatcher) -> APIRouter:
    """The pages' routes under `/api/`."""
    router, run_folder = APIRouter(include_in_schema=False), RunFolder(dispatcher.settings.runs)
    # Looks inside run one after the other in their own thread, so that generation and tokenization continue meanwhile.
    thread = ThreadPoolExecutor(1, thread_name_prefix="look")

    async def in_turn(work: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(thread, work, *arguments)

    async def look_inside(body: LookRequest, request: Request, work: Callable[..., T]) -> T | None:
        """What `work` returns for the model, the ids of its window on the text, where that begins, and the request."""
        backend = dispatcher.model(body.model)
        if not isinstance(backend, Engine):
            message = f"{backend.id}: llama.cpp does not show how it chooses a token: serve the checkpoint"
            raise ApiError(400, message)
        ids = await _ids(backend, body.prompt)
        start = window_start(body.given or len(ids), len(ids), backend.context)
        looking = in_turn(work, backend.loaded, ids[start:], start, body)
        return await until_disconnect(request.receive, looking)

    @router.post("/api/write")
    async def write(body: WriteRequest) -> Response:
        """Server-sent events: the prompt's tokens, each new token with its probability, and how the text ended.

        A prompt in ids continues a text from one of its tokens. The client knows those tokens already, so their
        probabilities are left out.
        """
        backend = dispatcher.model(body.model)
        ids = await _ids(backend, body.prompt)
        is_known = not isinstance(body.prompt, str)
        may_exceed = is_known and isinstance(backend, Engine)
        generations = dispatcher.submit(
            backend, [ids], body, body.max_tokens, body.alternatives, may_exceed=may_exceed
        )
        prompt = in_turn(_read, backend, ids, None if is_known else body.alternatives)
        return EventStream(_events(generations, prompt), lambda: dispatcher.close(generations))

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


async def _ids(backend: Backend, prompt: Prompt) -> list[int]:
    return await asyncio.to_thread(backend.encode, prompt) if isinstance(prompt, str) else prompt


def _read(backend: Backend, ids: list[int], alternatives: int | None) -> list[dict[str, Any]]:
    """The tokens of a prompt, with the model's predictions if the backend shows them and `alternatives` is not None."""
    if isinstance(backend, Engine) and alternatives is not None:
        return [asdict(each) for each in look.expectations(backend.loaded, ids, alternatives=alternatives)]
    return [{**_option(backend, token, 0.0), "probability": None, "alternatives": []} for token in ids]


async def _events(
    generations: GenerationRequest, prompt: Awaitable[list[dict[str, Any]]]
) -> AsyncIterator[str]:
    backend = generations.backend
    decoder = codecs.getincrementaldecoder("utf-8")("backslashreplace")

    def shown(token: dict[str, Any]) -> dict[str, Any]:
        """Add the text that the token completes: a character of several tokens comes with the last one."""
        return {**token, "shown": _visible(decoder.decode(backend.token_bytes(token["id"])))}

    tokens = [shown(token) for token in await prompt]
    yield event({"kind": "prompt", "tokens": tokens, "looks_inside": isinstance(backend, Engine)})
    finish = None
    async for _, piece in generations.pieces():
        finish = piece.finish
        if piece.candidates:
            chosen, *likeliest = [_option(backend, *each) for each in piece.candidates]
            yield event({"kind": "token", **shown(chosen), "alternatives": likeliest})
    yield event({"kind": "end", "tokens": generations.num_generated, "finish": finish})


def _option(backend: Backend, token: int, logprob: float) -> dict[str, Any]:
    text = backend.token_bytes(token).decode("utf-8", errors="backslashreplace")
    return {"id": token, "text": _visible(text), "probability": math.exp(logprob)}


def _visible(text: str) -> str:
    """Escape control characters and direction marks, but not whitespace."""
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
