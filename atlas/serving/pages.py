"""The page at /, and what it asks this server: the model's thoughts at each token."""

from __future__ import annotations

import asyncio
import codecs
import functools
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
from atlas.inference.sampling import Sampling
from atlas.serving.answers import refusal
from atlas.serving.dispatcher import Dispatcher
from atlas.serving.engine import Engine
from atlas.serving.errors import Refusal
from atlas.serving.schema import MOST_CANDIDATES, Body, SamplingParams, TokenId
from atlas.serving.stream import EventStream, event, until_disconnect
from atlas.serving.text import Backend, GenerationRequest

_LIKELIEST = 24
"""Tokens of a distribution that are drawn."""
_LENS = 6
"""Tokens after each layer."""
_DRAWN = 256
"""Tokens of a text whose attention is drawn: a picture of more shows nothing, and takes megabytes."""

T = TypeVar("T")
Prompt = str | Annotated[list[TokenId], Field(min_length=1)]


class WriteRequest(SamplingParams):
    """A text to continue, and what else each token might have been."""

    prompt: Prompt = ""
    max_tokens: int = Field(100, ge=1)
    n: Annotated[int, Field(ge=1, le=1)] | None = None
    alternatives: int = Field(10, ge=0, le=MOST_CANDIDATES)


class LookRequest(Body):
    """A text, of which something is asked."""

    model: str | None = None
    prompt: Prompt = ""
    given: int | None = Field(None, ge=1)
    """Tokens of the prompt that were there when the model began to write; left out: all."""


class SamplingRequest(LookRequest):
    temperature: float = Field(0.8, ge=0, allow_inf_nan=False)
    top_k: int = Field(50, ge=0)
    top_p: float = Field(0.95, gt=0, le=1)
    min_p: float = Field(0.0, ge=0, lt=1)
    repetition_penalty: float = Field(1.0, gt=0, allow_inf_nan=False)


class AttentionRequest(LookRequest):
    layer: int = Field(0, ge=0)


def page_routes(dispatcher: Dispatcher) -> APIRouter:
    """What the page at `/` asks, under `/api/`."""
    router = APIRouter(include_in_schema=False)
    # Looks inside take a thread of their own, one after the other: texts are written meanwhile, and other prompts read.
    looking = ThreadPoolExecutor(1, thread_name_prefix="look")

    async def in_turn(work: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(looking, work, *arguments)

    @router.post("/api/write")
    async def write(body: WriteRequest) -> Response:
        """Server-sent events: the prompt's tokens, each new one with its probability, and how it ended. Of a prompt
        in ids, a text that goes on from one of its places, nothing is told: who sends it has been told."""
        backend = dispatcher.model(body.model)
        ids = await _ids(backend, body.prompt)
        goes_on = not isinstance(body.prompt, str)
        generation_request = dispatcher.generation_request(
            backend,
            [ids],
            body,
            max_tokens=body.max_tokens,
            candidates=body.alternatives,
            may_exceed=goes_on and isinstance(backend, Engine),
        )
        reading = functools.partial(in_turn, _read, backend, ids, None if goes_on else body.alternatives)
        events = _written(generation_request, dispatcher, reading, body.alternatives)
        return EventStream(events, lambda: dispatcher.close(generation_request))

    @router.post("/api/sampling")
    async def sampling(body: SamplingRequest, request: Request) -> dict[str, Any] | None:
        loaded, ids, _ = await _asked(dispatcher, body)
        settings = Sampling(body.temperature, body.top_k, body.top_p, body.min_p, body.repetition_penalty)
        return await until_disconnect(request.receive, in_turn(_sampling, loaded, ids, settings))

    @router.post("/api/attention")
    async def attention(body: AttentionRequest, request: Request) -> dict[str, Any] | None:
        loaded, ids, start = await _asked(dispatcher, body)
        return await until_disconnect(request.receive, in_turn(_attention, loaded, ids, start, body.layer))

    @router.post("/api/layers")
    async def layers(body: LookRequest, request: Request) -> dict[str, Any] | None:
        loaded, ids, _ = await _asked(dispatcher, body)
        return await until_disconnect(request.receive, in_turn(_layers, loaded, ids))

    return router


async def _ids(backend: Backend, prompt: Prompt) -> list[int]:
    return await asyncio.to_thread(backend.encode, prompt) if isinstance(prompt, str) else prompt


async def _asked(dispatcher: Dispatcher, body: LookRequest) -> tuple[LoadedModel, list[int], int]:
    """The model, its window on the text that a question is about, and where in the text that begins. Raises `Refusal`
    of a model that shows nothing."""
    backend = dispatcher.model(body.model)
    if not isinstance(backend, Engine):
        raise Refusal(
            400, f"{backend.id}: llama.cpp does not show how it comes to a token: serve the checkpoint"
        )
    ids = await _ids(backend, body.prompt)
    start = window_start(body.given or len(ids), len(ids), backend.context)
    return backend.loaded, ids[start:], start


def _read(backend: Backend, ids: list[int], alternatives: int | None) -> list[dict[str, Any]]:
    """The tokens of a prompt, with what the model thinks of each where it can and is to be asked."""
    if isinstance(backend, Engine) and alternatives is not None:
        loaded = backend.loaded
        return [asdict(each) for each in look.expectations(loaded, ids, alternatives=alternatives)]
    return [
        {**_option(backend.token_bytes, token, 0.0), "probability": None, "alternatives": []} for token in ids
    ]


async def _written(
    generation_request: GenerationRequest,
    dispatcher: Dispatcher,
    reading: Callable[[], Awaitable[list[dict[str, Any]]]],
    alternatives: int,
) -> AsyncIterator[str]:
    token_bytes = generation_request.backend.token_bytes
    reader = codecs.getincrementaldecoder("utf-8")("backslashreplace")

    def read(token: dict[str, Any]) -> dict[str, Any]:
        """With what is read once it stands there: a character of several tokens with the last of them."""
        return {**token, "shown": _visible(reader.decode(token_bytes(token["id"])))}

    looks_inside = isinstance(generation_request.backend, Engine)
    tokens = [read(token) for token in await reading()]
    yield event({"kind": "prompt", "tokens": tokens, "looks_inside": looks_inside})
    finish = None
    async for _, piece in generation_request.pieces(dispatcher.rules.seconds):
        finish = piece.finish
        if finish in ("error", "timeout"):
            yield event(refusal(piece, dispatcher.rules.seconds).body)
            return
        if piece.token is not None:
            options = [
                _option(token_bytes, each.token, each.logprob) for each in piece.candidates[:alternatives]
            ]
            own = _option(token_bytes, piece.token, piece.logprob or 0.0)
            yield event({"kind": "token", **read(own), "alternatives": options})
    yield event({"kind": "end", "tokens": generation_request.num_written, "finish": finish})


def _option(token_bytes: Callable[[int], bytes], token: int, logprob: float) -> dict[str, Any]:
    return {
        "id": token,
        "text": _visible(token_bytes(token).decode("utf-8", errors="backslashreplace")),
        "probability": math.exp(logprob),
    }


def _visible(text: str) -> str:
    """Signs that show nothing, or turn the text around, by their numbers; not the blanks."""
    return "".join(
        each if each in "\n\t\r" or unicodedata.category(each) not in ("Cc", "Cf") else ascii(each)[1:-1]
        for each in text
    )


def _sampling(loaded: LoadedModel, ids: list[int], settings: Sampling) -> dict[str, Any]:
    return asdict(look.next_token(loaded, ids, settings, candidates=_LIKELIEST))


def _attention(loaded: LoadedModel, ids: list[int], start: int, layer: int) -> dict[str, Any]:
    weights = look.attention(loaded, ids, layers=[layer])[0]
    drawn = weights[:, -_DRAWN:, -_DRAWN:]
    return {
        "layer": layer,
        "num_layers": loaded.config.model.num_layers,
        "first": start + len(ids) - drawn.shape[-1],
        "weights": [[[round(weight, 4) for weight in row] for row in head] for head in drawn.tolist()],
    }


def _layers(loaded: LoadedModel, ids: list[int]) -> dict[str, Any]:
    return {"layers": [asdict(each) for each in look.lens(loaded, ids, alternatives=_LENS)]}
