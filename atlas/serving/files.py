"""The static files of the pages, all served from this server."""

from __future__ import annotations

from importlib import resources

from fastapi import APIRouter
from fastapi.responses import Response
from starlette.routing import Route

_HEADERS = {
    # Nothing loads from another host, whatever a model generates.
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}
_PAGE, _REPORT = ("atlas.serving", "page"), ("atlas.reporting", "static")
FILES = {
    "/": (_PAGE, "index.html"),
    "/runs": (_PAGE, "runs.html"),
    **{f"/{name}": (_PAGE, name) for name in ("page.css", "page.js", "common.js", "views.js", "runs.js")},
    **{f"/{name}": (_REPORT, name) for name in ("charts.js", "report.css")},
    **{f"/uplot/{name}": (_REPORT, f"uplot/{name}") for name in ("uPlot.iife.min.js", "uPlot.min.css")},
}
"""Path → (package and folder, file)."""
_MEDIA_TYPES = {"js": "text/javascript", "css": "text/css", "html": "text/html"}


def file_routes() -> APIRouter:
    """A route for each file, which is read now."""
    router = APIRouter()
    for path, ((package, folder), name) in FILES.items():
        content = resources.files(package).joinpath(folder, *name.split("/")).read_bytes()
        response = Response(content, headers=_HEADERS, media_type=_MEDIA_TYPES[name.rpartition(".")[2]])
        router.routes.append(Route(path, response, methods=["GET"], include_in_schema=False))
    return router
