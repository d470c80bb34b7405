"""Write responses as JSON or as events, and end the work for a response when the client disconnects."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from typing import Any, TypeVar

from fastapi.responses import JSONResponse, StreamingResponse
from starlette.types import Receive, Scope, Send

from atlas.serving.api.errors import ApiError

T = TypeVar("T")
_EVENT = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
OR_STREAM: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {"schema": _EVENT}}}}
"""The media type of `EventStream`, for the OpenAPI document of a route that answers with JSON or with events."""


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, T]) -> T | None:
    """Return the result of `work`. If the client disconnects first, cancel `work` and return None."""

    async def disconnected() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task, watcher = asyncio.ensure_future(work), asyncio.ensure_future(disconnected())
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        watcher.cancel()
        if task.cancel():
            await asyncio.wait({task})


class Json(JSONResponse):
    """JSON in ASCII, so that a text of the client with half a surrogate pair can be returned."""

    def render(self, content: Any) -> bytes:
        """Return the JSON of `content`."""
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode()


class EventStream(StreamingResponse):
    """Server-sent events (https://html.spec.whatwg.org/multipage/server-sent-events.html) until the client disconnects.

    If `events` raises an `ApiError`, the error's body is the last event. `on_end` is called at the end, also after a
    disconnect or an error.
    """

    def __init__(
        self, events: AsyncIterator[str], on_end: Callable[[], None], headers: Mapping[str, str] | None = None
    ) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **(headers or {})}
        super().__init__(_until_error(events), headers=headers, media_type="text/event-stream")
        self.on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events as an ASGI response."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.on_end()


async def _until_error(events: AsyncIterator[str]) -> AsyncIterator[str]:
    try:
        async for each in events:
            yield each
    except ApiError as error:
        yield event(error.body)


def event(data: dict[str, Any]) -> str:
    """Return a server-sent event with `data` as JSON."""
    return f"data: {json.dumps(data)}\n\n"  # in ASCII, since some clients treat U+2028 as the end of a line
