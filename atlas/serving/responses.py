"""The route of OpenAI's Responses API, and its answers: a list of items, complete or as events.

Nothing is stored: the client sends all items of a conversation with each request.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from atlas.serving.answers import Answer
from atlas.serving.api.errors import ApiError
from atlas.serving.api.items import ResponseRequest
from atlas.serving.api.shapes import ResponseObject
from atlas.serving.backends.generation import GenerationRequest, Piece
from atlas.serving.dispatcher import Dispatcher
from atlas.serving.grammars import constraint_of
from atlas.serving.prompts import encode_conversation
from atlas.serving.stream import OR_STREAM, EventStream, Json, event, until_disconnect
from atlas.serving.tools import Call, CallStream, read_calls


def response_routes(dispatcher: Dispatcher) -> APIRouter:
    """Return the route /v1/responses."""
    router = APIRouter()

    @router.post("/v1/responses", response_model=ResponseObject, responses=OR_STREAM)
    async def responses(body: ResponseRequest, request: Request) -> Response:
        """Answer a conversation."""
        backend, chat, headers = dispatcher.model(body.model), body.as_chat(), dispatcher.ignored(body)
        prompt = await asyncio.to_thread(encode_conversation, chat, backend)
        constraint = await asyncio.to_thread(constraint_of, chat, backend, field="text.format")
        generation = dispatcher.submit(
            backend, [prompt], chat, max_tokens=chat.limit, candidates=chat.candidates, constraint=constraint
        )
        answer = ResponseAnswer(generation, body, must_call=chat.must_call if chat.offered else None)
        if body.stream:
            return EventStream(answer.events(), lambda: dispatcher.close(generation), headers)
        try:
            content = await until_disconnect(request.receive, answer.complete())
        finally:
            dispatcher.close(generation)
        return Json(content or {}, headers=headers)

    return router


class ResponseAnswer:
    """The answer to `body`: a message, calls of functions, or both. `must_call` is as in `Answer`."""

    def __init__(
        self, request: GenerationRequest, body: ResponseRequest, *, must_call: bool | None = None
    ) -> None:
        self.request = request
        self.body = body
        self.must_call = must_call
        self._chat = Answer(request, is_chat=True, has_logprobs=body.has_logprobs)
        self._head = _head(request.backend.id, body)
        self._message_id = f"msg_{uuid.uuid4().hex}"
        self._number = 0

    async def complete(self) -> dict[str, Any]:
        """Wait until the generation has ended, and return the answer. Raises `ApiError` if the generation fails or the
        time limit is over."""
        pieces = [piece async for _, piece in self.request.pieces()]
        text, calls = "".join(piece.text for piece in pieces), list[Call]()
        if self.must_call is not None:
            text, calls = read_calls(text, must_call=self.must_call)
        return self._ended(self._items(text, calls, pieces), pieces[-1].finish)

    async def events(self) -> AsyncIterator[str]:
        """Yield the answer as server-sent events. An error is the last event."""
        try:
            async for each in self._events():
                yield each
        except ApiError as error:
            # OpenAI's client looks for `error`, and other clients read the other fields.
            told = {name: error.body["error"][name] for name in ("code", "message", "param")}
            yield self._event("error", **told, **error.body)

    async def _events(self) -> AsyncIterator[str]:
        for kind in ("response.created", "response.in_progress"):
            yield self._event(
                kind, response={**self._head, "status": "in_progress", "output": [], "usage": None}
            )
        reader, pieces, text = CallStream(must_call=bool(self.must_call)), list[Piece](), ""
        unsent: list[Piece] = []  # pieces whose log-probabilities are sent with the next text
        async for _, piece in self.request.pieces():
            pieces.append(piece)
            unsent.append(piece)
            new = piece.text
            if self.must_call is not None:
                new = reader.add(new, is_last=piece.finish is not None)
            if new and not text:
                for each in self._begin_message():
                    yield each
            if new:
                text += new
                yield self._delta(new, unsent)
                unsent = []
        items = self._items(text, reader.calls, pieces)
        for index, item in enumerate(items):
            if item["type"] == "message" and not text:
                for each in self._begin_message():
                    yield each
            if item["type"] == "message" and self.body.has_logprobs and unsent:
                yield self._delta("", unsent)
            for each in self._end_message(item) if item["type"] == "message" else self._call(index, item):
                yield each
        ended = self._ended(items, pieces[-1].finish)
        yield self._event(f"response.{ended['status']}", response=ended)

    def _delta(self, text: str, pieces: Sequence[Piece]) -> str:
        delta = {"delta": text, "logprobs": self._logprobs(pieces)}
        return self._event("response.output_text.delta", **self._place, **delta)

    def _items(self, text: str, calls: Sequence[Call], pieces: Sequence[Piece]) -> list[dict[str, Any]]:
        items = []
        if text or not calls:
            content = [{**_part(text), "logprobs": self._logprobs(pieces)}]
            is_whole = pieces[-1].finish != "length"
            items.append(self._message("completed" if is_whole else "incomplete", content))
        for call in calls:
            shown = call.shown()
            head = {"id": f"fc_{uuid.uuid4().hex}", "type": "function_call", "status": "completed"}
            items.append({**head, "call_id": shown["id"], **shown["function"]})
        return items

    def _ended(self, items: Sequence[dict[str, Any]], finish: str | None) -> dict[str, Any]:
        usage = self._chat.usage
        status: dict[str, Any] = {"status": "completed"}
        if finish == "length":
            status = {"status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}}
        counts = {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": usage["prompt_tokens_details"],
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage["total_tokens"],
        }
        return {**self._head, **status, "output": list(items), "usage": counts}

    def _message(self, status: str, content: Sequence[dict[str, Any]]) -> dict[str, Any]:
        head = {"id": self._message_id, "type": "message", "role": "assistant"}
        return {**head, "status": status, "content": list(content)}

    def _logprobs(self, pieces: Sequence[Piece]) -> list[dict[str, Any]]:
        return self._chat.logprobs(0, pieces)["content"] if self.body.has_logprobs else []

    def _event(self, kind: str, **content: Any) -> str:
        number, self._number = self._number, self._number + 1
        return f"event: {kind}\n{event({'type': kind, 'sequence_number': number, **content})}"

    @property
    def _place(self) -> dict[str, Any]:
        return {"item_id": self._message_id, "output_index": 0, "content_index": 0}

    def _begin_message(self) -> Iterator[str]:
        item = self._message("in_progress", [])
        yield self._event("response.output_item.added", output_index=0, item=item)
        yield self._event("response.content_part.added", **self._place, part=_part(""))

    def _end_message(self, item: dict[str, Any]) -> Iterator[str]:
        (part,) = item["content"]
        text = {"text": part["text"], "logprobs": part["logprobs"]}
        yield self._event("response.output_text.done", **self._place, **text)
        yield self._event("response.content_part.done", **self._place, part=part)
        yield self._event("response.output_item.done", output_index=0, item=item)

    def _call(self, index: int, item: dict[str, Any]) -> Iterator[str]:
        begun = {**item, "status": "in_progress", "arguments": ""}
        place = {"item_id": item["id"], "output_index": index}
        yield self._event("response.output_item.added", output_index=index, item=begun)
        yield self._event("response.function_call_arguments.delta", **place, delta=item["arguments"])
        whole = {"name": item["name"], "arguments": item["arguments"]}
        yield self._event("response.function_call_arguments.done", **place, **whole)
        yield self._event("response.output_item.done", output_index=index, item=item)


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _head(model: str, body: ResponseRequest) -> dict[str, Any]:
    """Return the fields of a response that do not depend on the text: its id, and the request's settings."""
    settings = body.model_dump(by_alias=True, include={"tools", "tool_choice", "text"}, exclude_none=True)
    settings.setdefault("text", {"format": {"type": "text"}})
    return {
        "id": f"resp_{uuid.uuid4().hex}",
        "object": "response",
        "created_at": int(time.time()),
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {},
        "model": model,
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": None,
        "store": False,
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "top_p": 1.0 if body.top_p is None else body.top_p,
        "truncation": body.truncation or "disabled",
        "tools": [],
        "tool_choice": "auto",
        **settings,
    }
