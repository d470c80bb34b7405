"""Checks before a request is read: the size of its body, the time it takes, its key and its host."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Container

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from atlas.serving.errors import ApiError, error_response

LARGEST_BODY = 1 << 20
"""Bytes: more text than any context holds."""
_READ_AND_DROPPED = 64 << 20
"""Bytes of a larger body that are read, so that its sender gets the answer instead of a broken connection."""
_LOOPBACK = ("localhost", "127.0.0.1", "[::1]")


class BodyLimits:
    """ASGI middleware: a body must arrive within `seconds` and be at most `LARGEST_BODY` large."""

    def __init__(self, app: ASGIApp, *, seconds: float) -> None:
        self.app = app
        self.seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            body = await asyncio.wait_for(_read(receive), self.seconds)
        except ApiError as large:
            await error_response(large, {"Connection": "close"})(scope, receive, send)
        except (TimeoutError, asyncio.TimeoutError):
            late = ApiError(408, f"the body did not arrive within {self.seconds:g} s: send it faster")
            await error_response(late, {"Connection": "close"})(scope, receive, send)
        else:
            first: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

            async def replay() -> Message:
                return first.pop() if first else await receive()

            await self.app(scope, replay, send)


async def _read(receive: Receive) -> bytes:
    """The body. Raises `ApiError` if it is too large."""
    body, size, more = bytearray(), 0, True
    while more and size <= _READ_AND_DROPPED:
        message = await receive()
        part = message.get("body", b"")
        size += len(part)
        if size <= LARGEST_BODY:
            body += part
        more = message.get("more_body", False)
    if size > LARGEST_BODY:
        raise ApiError(413, f"the body is larger than {LARGEST_BODY:,} bytes: send less text")
    return bytes(body)


class Auth:
    """ASGI middleware: with `api_key`, all paths but the `open_paths` need the key; without one, only clients of this
    machine and this server's own pages are served.

    A page from elsewhere can make a browser request a loopback address, under its own host name, which is in `Host`.
    """

    def __init__(self, app: ASGIApp, *, api_key: str | None, open_paths: Container[str]) -> None:
        self.app = app
        self.api_key = api_key
        self.open_paths = open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        error = self._error(scope["path"], Headers(scope=scope)) if scope["type"] == "http" else None
        await (error_response(error) if error else self.app)(scope, receive, send)

    def _error(self, path: str, headers: Headers) -> ApiError | None:
        if self.api_key is None:
            host, origin = headers.get("host", ""), headers.get("origin")
            name = host if host.endswith("]") else host.rpartition(":")[0] or host  # without the port
            if name not in _LOOPBACK:
                return ApiError(403, "this server is for its own machine: ask it as localhost or 127.0.0.1")
            if origin is not None and origin.partition("://")[2] != host:
                return ApiError(403, f"this server answers its own pages, not those of {origin[:100]}")
            return None
        if path in self.open_paths:
            return None
        scheme, _, key = headers.get("authorization", "").partition(" ")
        # In constant time, so that the time does not reveal how much of a guess is right.
        if scheme.lower() == "bearer" and hmac.compare_digest(key.strip().encode(), self.api_key.encode()):
            return None
        message = "Incorrect API key provided: send Authorization: Bearer KEY"
        return ApiError(401, message, code="invalid_api_key")
