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


def limit_body(app: ASGIApp, *, seconds: float) -> ASGIApp:
    """ASGI middleware: a body must arrive within `seconds` and be at most `LARGEST_BODY` large."""

    async def limited(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        late = ApiError(408, f"the body did not arrive within {seconds:g} s: send it faster")
        try:
            body = await asyncio.wait_for(_read(receive), seconds)
        except (ApiError, asyncio.TimeoutError) as error:
            refusal = error if isinstance(error, ApiError) else late
            await error_response(refusal, {"Connection": "close"})(scope, receive, send)
        else:
            first: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

            async def replay() -> Message:
                return first.pop() if first else await receive()

            await app(scope, replay, send)

    return limited


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


def require_auth(app: ASGIApp, *, api_key: str | None, open_paths: Container[str]) -> ASGIApp:
    """ASGI middleware: with `api_key`, all paths but the `open_paths` need the key; without one, only clients of this
    machine and this server's own pages are served."""

    async def checked(scope: Scope, receive: Receive, send: Send) -> None:
        error = None
        if scope["type"] == "http" and (api_key is None or scope["path"] not in open_paths):
            error = _auth_error(Headers(scope=scope), api_key)
        await (error_response(error) if error else app)(scope, receive, send)

    return checked


def _auth_error(headers: Headers, api_key: str | None) -> ApiError | None:
    if api_key is not None:
        scheme, _, key = headers.get("authorization", "").partition(" ")
        # In constant time, so that the time does not reveal how much of a guess is right.
        if scheme.lower() == "bearer" and hmac.compare_digest(key.strip().encode(), api_key.encode()):
            return None
        message = "Incorrect API key provided: send Authorization: Bearer KEY"
        return ApiError(401, message, code="invalid_api_key")
    # A page from elsewhere can make a browser request a loopback address, under its own host name, which is in `Host`.
    host, origin = headers.get("host", ""), headers.get("origin")
    name = host if host.endswith("]") else host.rpartition(":")[0] or host  # without the port
    if name not in ("localhost", "127.0.0.1", "[::1]"):
        return ApiError(403, "this server is for its own machine: ask it as localhost or 127.0.0.1")
    if origin is not None and origin.partition("://")[2] != host:
        return ApiError(403, f"this server answers its own pages, not those of {origin[:100]}")
    return None
