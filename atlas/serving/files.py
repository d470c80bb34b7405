"""The files of the pages, all of them from this server."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from importlib import resources

from fastapi import APIRouter
from fastapi.responses import Response

_HEADERS = {
    # Nothing from anywhere else, whatever a model writes.
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}
_PAGE, _REPORT = ("atlas.serving", "page"), ("atlas.reporting", "static")
FILES = {
    "/": (_PAGE, "index.html"),
    "/page.css": (_PAGE, "page.css"),
    "/page.js": (_PAGE, "page.js"),
    "/common.js": (_PAGE, "common.js"),
    "/views.js": (_PAGE, "views.js"),
    "/runs": (_PAGE, "runs.html"),
    "/runs.js": (_PAGE, "runs.js"),
    "/charts.js": (_REPORT, "charts.js"),
    "/report.css": (_REPORT, "report.css"),
    "/uplot/uPlot.iife.min.js": (_REPORT, "uplot/uPlot.iife.min.js"),
    "/uplot/uPlot.min.css": (_REPORT, "uplot/uPlot.min.css"),
}


def file_routes() -> APIRouter:
    router = APIRouter(include_in_schema=False)
    for path, ((package, folder), name) in FILES.items():
        content = resources.files(package).joinpath(folder, *name.split("/")).read_bytes()
        router.add_api_route(path, _answer(content, name), methods=["GET"], response_class=Response)
    return router


def _answer(content: bytes, name: str) -> Callable[[], Awaitable[Response]]:
    kind = {".js": "text/javascript", ".css": "text/css", ".html": "text/html"}[name[name.rindex(".") :]]

    async def file() -> Response:
        return Response(content, media_type=kind, headers=_HEADERS)

    return file
