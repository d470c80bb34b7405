"""What every request meets before it is read: its size, its slowness, its key and its host."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Callable, Iterable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from atlas.serving.errors import Refusal, response

LARGEST_BODY = 1 << 20
"""Bytes: more text than any context holds."""
_READ_AND_DROPPED = 64 << 20
"""Of a larger body, so that its sender gets to the answer instead of a broken connection."""


class Limits:
    """ASGI middleware: `seconds` for a body to arrive, `LARGEST_BODY` for its size."""

    def __init__(self, app: ASGIApp, *, seconds: float) -> None:
        self.app = app
        self.seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            body = await asyncio.wait_for(_read(receive), self.seconds)
        except (TimeoutError, asyncio.TimeoutError):
            late = Refusal(408, f"the body did not arrive within {self.seconds:g} s: send it faster")
            await response(late, {"Connection": "close"})(scope, receive, send)
            return
        if body is None:
            large = Refusal(413, f"the body is larger than {LARGEST_BODY:,} bytes: send less text")
            await response(large, {"Connection": "close"})(scope, receive, send)
            return
        first: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def again() -> Message:
            return first.pop() if first else await receive()

        await self.app(scope, again, send)


async def _read(receive: Receive) -> bytes | None:
    """The body; None of one that is too large."""
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return b"".join(parts)
        part = message.get("body", b"")
        size += len(part)
        if size <= LARGEST_BODY:
            parts.append(part)
        if not message.get("more_body") or size > _READ_AND_DROPPED:
            return None if size > LARGEST_BODY else b"".join(parts)


class Auth:
    """ASGI middleware: the key, where there is one, of all paths but `is_open`; without one only this machine's own
    names and pages.

    A page from elsewhere can make a browser ask a loopback address, under a name of its own; that name is in `Host`.
    """

    def __init__(self, app: ASGIApp, *, api_key: str | None, is_open: Callable[[str], bool]) -> None:
        self.app = app
        self.api_key = api_key
        self.is_open = is_open

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._refusal(scope) if scope["type"] == "http" else None
        if refusal:
            await response(refusal)(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    def _refusal(self, scope: Scope) -> Refusal | None:
        headers, path = Headers(scope=scope), scope["path"]
        if self.api_key is None:
            if _host(headers.get("host", "")) not in _LOOPBACK:
                return Refusal(403, "this server is for its own machine: ask it as localhost or 127.0.0.1")
            origin = headers.get("origin")
            if origin is not None and origin.partition("://")[2] != headers["host"]:
                return Refusal(403, f"this server answers its own pages, not those of {origin[:100]}")
            return None
        if self.is_open(path):
            return None
        scheme, _, key = headers.get("authorization", "").partition(" ")
        # In constant time, so that the time tells nothing of how much of a guess was right.
        if scheme.lower() == "bearer" and hmac.compare_digest(key.strip().encode(), self.api_key.encode()):
            return None
        return Refusal(
            401, "Incorrect API key provided: send Authorization: Bearer KEY", code="invalid_api_key"
        )


_LOOPBACK: Iterable[str] = frozenset({"localhost", "127.0.0.1", "[::1]"})


def _host(header: str) -> str:
    """Without the port."""
    return header if header.endswith("]") else header.rpartition(":")[0] or header
