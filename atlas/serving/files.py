"""Routes for the static files of the pages."""

from __future__ import annotations

from importlib import resources

from fastapi.responses import Response
from starlette.routing import Route

_HEADERS = {
    # The browser loads nothing from other hosts, even if generated text contains HTML.
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}
_PAGE, _REPORT = resources.files("atlas.serving") / "page", resources.files("atlas.reporting") / "static"
_CHARTS = ("charts.js", "report.css", "uplot/uPlot.iife.min.js", "uplot/uPlot.min.css")
_OWN = ("page.css", "page.js", "common.js", "tokens.js", "views.js", "runs.js", "chat.js")
FILES = {
    "/": _PAGE / "index.html",
    "/chat": _PAGE / "chat.html",
    "/runs": _PAGE / "runs.html",
    **{f"/{name}": _PAGE / name for name in _OWN},
    **{f"/{name}": _REPORT.joinpath(*name.split("/")) for name in _CHARTS},
}
"""URL path → file."""
_MEDIA_TYPES = {"js": "text/javascript", "css": "text/css", "html": "text/html"}


def file_routes() -> list[Route]:
    """Read the files and return a route for each file."""
    routes = []
    for path, file in FILES.items():
        media_type = _MEDIA_TYPES[file.name.rpartition(".")[2]]
        response = Response(file.read_bytes(), headers=_HEADERS, media_type=media_type)
        routes.append(Route(path, response, methods=["GET"], include_in_schema=False))
    return routes
