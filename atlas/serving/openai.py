"""The routes of OpenAI's API: models, completions, chat completions."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from atlas.serving.answers import Answer
from atlas.serving.api.errors import ApiError
from atlas.serving.api.requests import ChatRequest, CompletionRequest, SamplingParams
from atlas.serving.api.shapes import ChatCompletion, Completion, ModelInfo, Models
from atlas.serving.backends.generation import Backend
from atlas.serving.dispatcher import Dispatcher
from atlas.serving.grammars import constraint_of
from atlas.serving.prompts import each_prompt, encode_conversation, encode_prompts, text_of
from atlas.serving.stream import OR_STREAM, EventStream, Json, until_disconnect

_DEFAULT_TOKENS = 16
"""The default of `max_tokens` for completions in OpenAI's API."""
_LIMITS = {"max_tokens", "max_completion_tokens", "n_predict"}


def openai_routes(dispatcher: Dispatcher) -> APIRouter:
    """Return the routes under `/v1`."""
    router = APIRouter(prefix="/v1")

    @router.get("/models", response_model=Models)
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_info(backend) for backend in dispatcher.backends.values()]}

    @router.get("/models/{model:path}", response_model=ModelInfo)
    async def model(model: str) -> dict[str, Any]:
        return _info(dispatcher.model(model, is_exact=True))

    @router.post("/completions", response_model=Completion, responses=OR_STREAM)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue a text."""
        backend, n = dispatcher.model(body.model), body.n or 1
        choices = max(n, body.best_of or 1)
        if body.best_of is not None and (body.best_of < n or (body.best_of > n and body.stream)):
            rule = "only without stream" if body.stream else f"at least n, which is {n}"
            raise ApiError(400, f"best_of: {rule}", param="best_of")
        prompts = await asyncio.to_thread(encode_prompts, body, backend)  # tokenization may be slow
        constraint = await asyncio.to_thread(constraint_of, body, backend)
        candidates, is_default = body.candidates, not body.model_fields_set & _LIMITS
        generations = dispatcher.submit(
            backend,
            prompts,
            body,
            max_tokens=_DEFAULT_TOKENS if is_default else body.limit,
            candidates=0 if candidates is None and choices > n else candidates,
            choices=choices,
            scores_prompt=bool(body.echo) and candidates is not None,
            constraint=constraint,
        )
        answer = Answer(generations, is_chat=False, has_logprobs=candidates is not None, best=n, of=choices)
        if body.echo:
            answer.echo(
                [text_of(prompt, backend) for prompt in each_prompt(body.prompt) for _ in range(choices)]
            )
        return await _respond(dispatcher, answer, body, request)

    @router.post("/chat/completions", response_model=ChatCompletion, responses=OR_STREAM)
    async def chat(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation."""
        backend = dispatcher.model(body.model)
        if body.top_logprobs is not None and not body.logprobs:
            raise ApiError(400, "top_logprobs: only allowed with logprobs", param="top_logprobs")
        prompt = await asyncio.to_thread(encode_conversation, body, backend)
        constraint = await asyncio.to_thread(constraint_of, body, backend)
        candidates, must_call = body.candidates, body.must_call if body.offered else None
        generations = dispatcher.submit(
            backend, [prompt], body, max_tokens=body.limit, candidates=candidates, constraint=constraint
        )
        answer = Answer(generations, is_chat=True, has_logprobs=candidates is not None, must_call=must_call)
        if body.echo and body.continues:
            answer.echo([body.messages[-1].text] * len(generations.generations))
        return await _respond(dispatcher, answer, body, request)

    return router


async def _respond(
    dispatcher: Dispatcher, answer: Answer, params: SamplingParams, request: Request
) -> Response:
    headers = dispatcher.ignored(params)
    if params.stream:
        include_usage = bool(params.stream_options and params.stream_options.include_usage)
        events = answer.stream(include_usage=include_usage)
        return EventStream(events, lambda: dispatcher.close(answer.request), headers)
    try:
        content = await until_disconnect(request.receive, answer.complete())
    finally:
        dispatcher.close(answer.request)
    # `content` is None only after a disconnect, when no client reads the response.
    return Json(content or {}, headers=headers)


def _info(backend: Backend) -> dict[str, Any]:
    return {"id": backend.id, "object": "model", "created": backend.created, "owned_by": "atlas"}
