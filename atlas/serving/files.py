"""The files of the pages, all of them from this server."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from fastapi.responses import Response

_HEADERS = {
    # Nothing from anywhere else, whatever a model writes.
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}


def page_file(content: bytes, kind: str) -> Callable[[], Awaitable[Response]]:
    async def file() -> Response:
        return Response(content, media_type=kind, headers=_HEADERS)

    return file
