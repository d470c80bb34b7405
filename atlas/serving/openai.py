"""OpenAI's routes: models, completions, chat completions."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from atlas.serving.answers import Answer
from atlas.serving.dispatcher import Dispatcher
from atlas.serving.errors import Refusal
from atlas.serving.schema import (
    ChatCompletion,
    ChatMessage,
    ChatRequest,
    Completion,
    CompletionRequest,
    ModelFacts,
    Models,
    SamplingParams,
)
from atlas.serving.stream import EventStream, until_disconnect
from atlas.serving.text import Backend
from atlas.tokenizer.chat import Message

_USUAL_TOKENS = 16
"""OpenAI's number of new tokens where a completion names none."""
_EVENT = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
_ALSO_A_STREAM: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {"schema": _EVENT}}}
}


def openai_routes(dispatcher: Dispatcher) -> APIRouter:
    """Under `/v1`."""
    router = APIRouter(prefix="/v1")

    @router.get("/models", response_model=Models)
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_facts(backend) for backend in dispatcher.backends.values()]}

    @router.get("/models/{model:path}", response_model=ModelFacts)
    async def model(model: str) -> dict[str, Any]:
        return _facts(dispatcher.model(model))

    @router.post("/completions", response_model=Completion, responses=_ALSO_A_STREAM)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue a text."""
        backend = dispatcher.model(body.model)
        generation_request = dispatcher.generation_request(
            backend,
            await asyncio.to_thread(_prompts, body, backend),  # a long text takes a moment
            body,
            max_tokens=body.max_tokens or _USUAL_TOKENS,
            candidates=body.logprobs,
        )
        answer = Answer(generation_request, is_chat=False, logprobs=body.logprobs is not None)
        return await _answered(dispatcher, answer, body, request)

    @router.post("/chat/completions", response_model=ChatCompletion, responses=_ALSO_A_STREAM)
    async def chat(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation."""
        backend = dispatcher.model(body.model)
        if body.top_logprobs is not None and not body.logprobs:
            raise Refusal(400, "top_logprobs: only with logprobs", param="top_logprobs")
        messages = [_message(message) for message in body.messages]
        prompt = await asyncio.to_thread(backend.encode_chat, messages)
        room = max(1, min(backend.context - len(prompt), dispatcher.rules.max_tokens))
        generation_request = dispatcher.generation_request(
            backend,
            [prompt],
            body,
            max_tokens=body.max_completion_tokens or body.max_tokens or room,
            candidates=(body.top_logprobs or 0) if body.logprobs else None,
        )
        answer = Answer(generation_request, is_chat=True, logprobs=bool(body.logprobs))
        return await _answered(dispatcher, answer, body, request)

    return router


async def _answered(
    dispatcher: Dispatcher, answer: Answer, params: SamplingParams, request: Request
) -> Response:
    if params.stream:
        include_usage = bool(params.stream_options and params.stream_options.include_usage)
        events = answer.stream(dispatcher.rules.seconds, include_usage=include_usage)
        return EventStream(events, lambda: dispatcher.close(answer.generation_request))
    try:
        whole = await until_disconnect(request.receive, answer.whole(dispatcher.rules.seconds))
    finally:
        dispatcher.close(answer.generation_request)
    return JSONResponse(whole or {})  # nobody reads the empty one


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


def _message(message: ChatMessage) -> Message:
    """`developer` is OpenAI's newer word for `system`."""
    return Message("system" if message.role == "developer" else message.role, message.text)


def _facts(backend: Backend) -> dict[str, Any]:
    return {"id": backend.id, "object": "model", "created": backend.created, "owned_by": "atlas"}
