"""The routes of OpenAI's API: models, completions, chat completions."""

from __future__ import annotations

import asyncio
from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from atlas.serving.answers import Answer
from atlas.serving.api.errors import ApiError
from atlas.serving.api.requests import ChatRequest, CompletionRequest, SamplingParams
from atlas.serving.api.responses import ChatCompletion, Completion, ModelInfo, Models
from atlas.serving.backends.generation import Backend, TooLong
from atlas.serving.backends.grammar import CALL_BEGIN, Grammar
from atlas.serving.dispatcher import Dispatcher
from atlas.serving.stream import EventStream, until_disconnect
from atlas.serving.tools import call_grammar, described, knows_calls, with_instruction, written
from atlas.tokenizer.chat import Message

_DEFAULT_TOKENS = 16
"""The default of `max_tokens` for completions in OpenAI's API."""
_LIMITS = {"max_tokens", "max_completion_tokens", "n_predict"}
_ROLES = {"developer": "system"}
"""OpenAI's newer names of roles."""
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
        return _info(dispatcher.model(model, is_exact=True))

    @router.post("/completions", response_model=Completion, responses=_OR_STREAM)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue a text."""
        backend, n = dispatcher.model(body.model), body.n or 1
        choices = max(n, body.best_of or 1)
        if body.best_of is not None and (body.best_of < n or (body.best_of > n and body.stream)):
            rule = "only without stream" if body.stream else f"at least n, which is {n}"
            raise ApiError(400, f"best_of: {rule}", param="best_of")
        prompts = await asyncio.to_thread(_prompts, body, backend)  # tokenization may be slow
        constraint = await asyncio.to_thread(_constraint, body, backend)
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
            answer.echo([_text(prompt, backend) for prompt in _each(body.prompt) for _ in range(choices)])
        return await _respond(dispatcher, answer, body, request)

    @router.post("/chat/completions", response_model=ChatCompletion, responses=_OR_STREAM)
    async def chat(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation."""
        backend = dispatcher.model(body.model)
        if body.top_logprobs is not None and not body.logprobs:
            raise ApiError(400, "top_logprobs: only allowed with logprobs", param="top_logprobs")
        prompt = await asyncio.to_thread(_conversation, body, backend)
        constraint = await asyncio.to_thread(_constraint, body, backend)
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
    return JSONResponse(content or {}, headers=headers)


def _each(prompt: Any) -> list[str | list[int]]:
    """Return the prompts in the field `prompt`, each as a text or as token ids."""
    return [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt


def _text(prompt: str | list[int], backend: Backend) -> str:
    if isinstance(prompt, str):
        return prompt
    return b"".join(map(backend.token_bytes, prompt)).decode("utf-8", "replace")


def _prompts(body: CompletionRequest, backend: Backend) -> list[list[int]]:
    """Return the token ids of each prompt in the request."""
    encoded = [backend.encode(each) if isinstance(each, str) else each for each in _each(body.prompt)]
    return [_latest(ids, body, backend) for ids in encoded]


def _conversation(body: ChatRequest, backend: Backend) -> list[int]:
    """Return the token ids of a conversation, up to the beginning of the answer."""
    tools, continues = body.offered, body.continues
    messages = [
        Message(_ROLES.get(each.role, each.role), written(each.text, each.tool_calls or []))
        for each in body.messages
    ]
    variables = dict(body.chat_template_kwargs or {})
    if tools and knows_calls(backend.chat_template):
        variables["tools"] = described(tools)
    elif tools:
        messages = with_instruction(messages, tools)
    if tools and body.must_call:  # the answer begins inside of a call
        start = messages.pop().content + "\n" if continues else ""
        messages.append(Message("assistant", f"{start}{CALL_BEGIN}\n"))
        continues = True

    def encode(messages: Sequence[Message]) -> list[int]:
        return backend.encode_chat(messages, continues_last=continues, variables=variables)

    if body.truncation == "auto":
        ids = _newest_that_fit(messages, encode, _most_of_prompt(body, backend))
    else:
        ids = encode(messages)
    return _latest(ids, body, backend)


def _constraint(body: CompletionRequest | ChatRequest, backend: Backend) -> Any:
    """Return the grammar of the texts, as `Backend.constrain` returns it; None: any text."""
    if isinstance(body, ChatRequest) and (tools := body.offered):
        is_one = body.parallel_tool_calls is False
        return backend.constrain(call_grammar(tools, must_call=body.must_call, is_one=is_one))
    if body.json_schema:
        return backend.constrain(Grammar(body.json_schema, "json_schema"))
    form = body.response_format
    if form is None or (schema := form.schema_of_text) is None:
        return None
    return backend.constrain(Grammar(schema, "response_format", is_strict=form.is_strict))


def _newest_that_fit(
    messages: Sequence[Message], encode: Callable[[Sequence[Message]], list[int]], most: int
) -> list[int]:
    """Return the ids of a conversation without its oldest messages, so that it has at most `most` tokens. System
    messages at the beginning and the last message always stay."""
    system = next(
        place for place, each in enumerate([*messages, None]) if each is None or each.role != "system"
    )
    # An answer without its question would say little.
    starts = [place for place in range(system, len(messages)) if messages[place].role != "assistant"]
    starts = [system, *(start for start in starts if start > system)]

    def kept(start: int) -> list[int] | None:
        try:
            ids = encode([*messages[:system], *messages[start:]])
        except TooLong:
            return None
        return ids if len(ids) <= most else None

    first = bisect_left(starts, True, key=lambda start: kept(start) is not None)
    return encode([*messages[:system], *messages[starts[min(first, len(starts) - 1)] :]])


def _latest(ids: list[int], body: SamplingParams, backend: Backend) -> list[int]:
    """Return the latest ids of a prompt, if the request allows to leave out the others."""
    most = body.truncate_prompt_tokens
    if most == -1 or (most is None and body.truncation == "auto"):
        most = _most_of_prompt(body, backend)
    return ids if most is None else ids[max(0, len(ids) - most) :] or ids[-1:]


def _most_of_prompt(body: SamplingParams, backend: Backend) -> int:
    """The number of tokens that a prompt may have so that there is room for the answer: all that it may need, but at
    most half of the context."""
    return backend.context - min(body.limit or backend.context // 4, backend.context // 2)


def _info(backend: Backend) -> dict[str, Any]:
    return {"id": backend.id, "object": "model", "created": backend.created, "owned_by": "atlas"}
