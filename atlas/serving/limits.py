"""Checks of a request before the server processes it: size, parts and arrival time of the body, API key, and host."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Container

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from atlas.serving.api.errors import ApiError, error_response

LARGEST_BODY = 1 << 20
"""The largest allowed body of a request, in bytes."""
MOST_PARTS = 32_768
"""The largest allowed number of strings, objects and lists in a body."""
_KEY_HEADERS = ("api-key", "x-api-key")
_READ_AND_DROPPED = 64 << 20
"""The number of bytes that the server reads of a body that is too large. If the server read less, the client would
receive a connection reset instead of the error."""


def limit_body(app: ASGIApp, *, seconds: float, most_numbers: int) -> ASGIApp:
    """Add ASGI middleware that limits the body of a request before the body is parsed.

    A body must arrive within `seconds`, and have at most `LARGEST_BODY` bytes, `MOST_PARTS` strings, objects and lists,
    and `most_numbers` numbers. Every body is read as JSON, whatever its declared type, since all routes take JSON.
    """

    async def limited(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        try:
            body, size = await asyncio.wait_for(_read(receive), seconds)
            error = _body_error(body, size, most_numbers)
        except asyncio.TimeoutError:
            error = ApiError(408, f"the body did not arrive within {seconds:g} s: send it faster")
        if error is not None:
            await error_response(error, {"Connection": "close"})(scope, receive, send)
            return
        first: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return first.pop() if first else await receive()

        headers = [header for header in scope["headers"] if header[0] != b"content-type"]
        await app({**scope, "headers": [*headers, (b"content-type", b"application/json")]}, replay, send)

    return limited


async def _read(receive: Receive) -> tuple[bytes, int]:
    """Return the body of a request, and its size in bytes. A body that is too large is cut."""
    body, size, more = bytearray(), 0, True
    while more and size <= _READ_AND_DROPPED:
        message = await receive()
        part = message.get("body", b"")
        size += len(part)
        if size <= LARGEST_BODY:
            body += part
        more = message.get("more_body", False)
    return bytes(body), size


def _body_error(body: bytes, size: int, most_numbers: int) -> ApiError | None:
    """Return an error if a body is too large, is not UTF-8, or has too many values.

    The error is returned, not raised: an exception and the frames in its traceback refer to each other, and would keep
    the body in memory until the next garbage collection.
    """
    if size > LARGEST_BODY:
        return ApiError(413, f"the body is larger than {LARGEST_BODY:,} bytes: send less text")
    if b"\0" in body:  # UTF-16 or UTF-32, whose quotes the following lines would not find
        return ApiError(400, "the body is not UTF-8: send JSON in UTF-8")
    unescaped = body.replace(b"\\\\", b"").replace(b'\\"', b"")  # only the quotes around strings remain
    num_strings = unescaped.count(b'"') // 2
    outside = b"".join(unescaped.split(b'"', 2 * MOST_PARTS)[::2])
    if num_strings + outside.count(b"{") + outside.count(b"[") > MOST_PARTS:
        return ApiError(400, f"the body has more than {MOST_PARTS:,} strings, objects and lists: send fewer")
    if b"NaN" in outside or b"Infinity" in outside:  # Python's parser would take them
        return ApiError(400, "the body is not JSON: it has NaN or Infinity")
    if outside.count(b",") > most_numbers + MOST_PARTS:
        return ApiError(400, f"the body has more than {most_numbers:,} numbers: send fewer token ids")
    return None


def require_auth(
    app: ASGIApp, *, api_key: str | None, open_paths: Container[str], origins: Container[str]
) -> ASGIApp:
    """Add ASGI middleware that checks who sends a request.

    With `api_key`, all paths except `open_paths` need the key. Without `api_key`, the server answers only clients on
    this machine, the server's own pages, and the pages of `origins`; `*` stands for all origins.
    """

    async def checked(scope: Scope, receive: Receive, send: Send) -> None:
        error = None
        if scope["type"] == "http":
            is_open = api_key is not None and scope["path"] in open_paths
            error = _auth_error(Headers(scope=scope), api_key, origins, is_open=is_open)
        await (error_response(error) if error else app)(scope, receive, send)

    return checked


def _auth_error(
    headers: Headers, api_key: str | None, origins: Container[str], *, is_open: bool
) -> ApiError | None:
    if len(headers.getlist("host")) > 1:  # a proxy could check one of them, and this server another one
        return ApiError(400, "the request has more than one Host header: send one")
    if is_open:
        return None
    if api_key is not None:
        scheme, _, key = headers.get("authorization", "").partition(" ")
        # Azure's and Anthropic's clients have their own headers.
        keys = [key if scheme.lower() == "bearer" else "", *(headers.get(name, "") for name in _KEY_HEADERS)]
        # The comparison takes constant time, so that the time does not reveal how many characters of a guess are right.
        if any(hmac.compare_digest(each.strip().encode(), api_key.encode()) for each in keys):
            return None
        which = "Incorrect API key" if any(keys) else "No API key"
        message = f"{which} provided: send Authorization: Bearer KEY, api-key: KEY or x-api-key: KEY"
        return ApiError(401, message, code="invalid_api_key")
    # With DNS rebinding, a page of another site can make a browser send requests to a loopback address. `Host` then
    # contains the host name of that site.
    host, origin = headers.get("host", ""), headers.get("origin")
    name = host if host.endswith("]") else host.rpartition(":")[0] or host  # without the port
    if name not in ("localhost", "127.0.0.1", "[::1]"):
        return ApiError(
            403, "this server answers only requests from its own machine: use localhost or 127.0.0.1"
        )
    if "*" in origins or origin in origins:
        return None
    if origin is not None and origin.partition("://")[2] != host:
        message = f"this server answers only requests from its own pages, not from {origin[:100]}"
        return ApiError(403, f"{message}: start atlas serve with --allow-origin")
    return None
