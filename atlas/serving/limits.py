"""Checks of a request before the server processes it: size and arrival time of the body, API key, and host."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Container

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from atlas.serving.errors import ApiError, error_response

LARGEST_BODY = 1 << 20
"""The largest allowed body of a request, in bytes."""
_READ_AND_DROPPED = 64 << 20
"""The number of bytes that the server reads of a body that is too large. If the server read less, the client would
receive a connection reset instead of the error."""


def limit_body(app: ASGIApp, *, seconds: float) -> ASGIApp:
    """Add ASGI middleware: a body must arrive within `seconds` and have at most `LARGEST_BODY` bytes."""

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
    """Return the body of a request. Raises `ApiError` if the body is too large."""
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
    """Add ASGI middleware that checks who sends a request.

    With `api_key`, all paths except `open_paths` need the key. Without `api_key`, the server answers only clients on
    this machine and the server's own pages.
    """

    async def checked(scope: Scope, receive: Receive, send: Send) -> None:
        error = None
        if scope["type"] == "http" and (api_key is None or scope["path"] not in open_paths):
            error = _auth_error(Headers(scope=scope), api_key)
        await (error_response(error) if error else app)(scope, receive, send)

    return checked


def _auth_error(headers: Headers, api_key: str | None) -> ApiError | None:
    if api_key is not None:
        scheme, _, key = headers.get("authorization", "").partition(" ")
        # The comparison takes constant time, so that the time does not reveal how many characters of a guess are right.
        if scheme.lower() == "bearer" and hmac.compare_digest(key.strip().encode(), api_key.encode()):
            return None
        message = "Incorrect API key provided: send Authorization: Bearer KEY"
        return ApiError(401, message, code="invalid_api_key")
    # With DNS rebinding, a page of another site can make a browser send requests to a loopback address. `Host` then
    # contains the host name of that site.
    host, origin = headers.get("host", ""), headers.get("origin")
    name = host if host.endswith("]") else host.rpartition(":")[0] or host  # without the port
    if name not in ("localhost", "127.0.0.1", "[::1]"):
        return ApiError(
            403, "this server answers only requests from its own machine: use localhost or 127.0.0.1"
        )
    if origin is not None and origin.partition("://")[2] != host:
        return ApiError(403, f"this server answers only requests from its own pages, not from {origin[:100]}")
    return None
