"""The routes of OpenAI's API: models, completions, chat completions."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from atlas.serving.answers import Answer
from atlas.serving.api.errors import ApiError
from atlas.serving.api.requests import ChatRequest, CompletionRequest, SamplingParams
from atlas.serving.api.responses import ChatCompletion, Completion, ModelInfo, Models
from atlas.serving.backends.generation import Backend
from atlas.serving.dispatcher import Dispatcher
from atlas.serving.stream import EventStream, until_disconnect
from atlas.tokenizer.chat import Message

_DEFAULT_TOKENS = 16
"""The default of `max_tokens` for completions in OpenAI's API."""
_EVENT = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
_OR_STREAM: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {"schema": _EVENT}}}}


def openai_routes(dispatcher: Dispatcher) -> APIRouter:
    """Return the routes under `/v1`."""
    router = APIRouter(prefix="/v1")

    @router.get("/models", response_model=Models)
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_info(backend) for backend in dispatcher.backends.values()]}

    @router.get("/models/{model:path}", response_model=ModelInfo)
    async def model(model: str) -> dict[str, Any]:
        return _info(dispatcher.model(model))

    @router.post("/completions", response_model=Completion, responses=_OR_STREAM)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue a text."""
        backend = dispatcher.model(body.model)
        prompts = await asyncio.to_thread(_prompts, body, backend)  # tokenization may be slow
        max_tokens = body.max_tokens or _DEFAULT_TOKENS
        generations = dispatcher.submit(backend, prompts, body, max_tokens, body.logprobs)
        return await _respond(dispatcher, Answer(generations, is_chat=False), body, request)

    @router.post("/chat/completions", response_model=ChatCompletion, responses=_OR_STREAM)
    async def chat(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation."""
        backend = dispatcher.model(body.model)
        if body.top_logprobs is not None and not body.logprobs:
            raise ApiError(400, "top_logprobs: only allowed with logprobs", param="top_logprobs")
        messages = [
            # `developer` is OpenAI's newer name for `system`.
            Message("system" if message.role == "developer" else message.role, message.text)
            for message in body.messages
        ]
        prompt = await asyncio.to_thread(backend.encode_chat, messages)
        room = max(1, min(backend.context - len(prompt), dispatcher.settings.max_tokens))
        max_tokens = body.max_completion_tokens or body.max_tokens or room
        candidates = (body.top_logprobs or 0) if body.logprobs else None
        generations = dispatcher.submit(backend, [prompt], body, max_tokens, candidates)
        return await _respond(dispatcher, Answer(generations, is_chat=True), body, request)

    return router


async def _respond(
    dispatcher: Dispatcher, answer: Answer, params: SamplingParams, request: Request
) -> Response:
    if params.stream:
        include_usage = bool(params.stream_options and params.stream_options.include_usage)
        events = answer.stream(include_usage=include_usage)
        return EventStream(events, lambda: dispatcher.close(answer.request))
    try:
        content = await until_disconnect(request.receive, answer.complete())
    finally:
        dispatcher.close(answer.request)
    return JSONResponse(content or {})  # None only after a disconnect, when no client reads the response


def _prompts(body: CompletionRequest, backend: Backend) -> list[list[int]]:
    """Return the token ids of each prompt in the request."""
    prompt: Any = body.prompt
    prompts = [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt
    return [backend.encode(each) if isinstance(each, str) else each for each in prompts]


def _info(backend: Backend) -> dict[str, Any]:
    return {"id": backend.id, "object": "model", "created": backend.created, "owned_by": "atlas"}
