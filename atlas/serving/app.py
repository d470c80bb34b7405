"""The application: its routes, its middleware, and the form of its errors."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException

from atlas.errors import AtlasError
from atlas.serving.dispatcher import Dispatcher, ServerSettings
from atlas.serving.errors import ApiError, error_response, validation_error
from atlas.serving.files import FILES, file_routes
from atlas.serving.generation import Backend
from atlas.serving.limits import limit_body, require_auth
from atlas.serving.openai import openai_routes
from atlas.serving.pages import page_routes
from atlas.serving.schema import ErrorBody, Health
from atlas.version import __version__

BODY_SECONDS = 10.0
"""The time limit for a body to arrive."""


def build_app(backends: Sequence[Backend], settings: ServerSettings) -> FastAPI:
    """The application. It starts the models when it starts, and closes them when it ends."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        for backend in backends:
            backend.start()
        yield
        for backend in backends:
            backend.close()

    app = FastAPI(
        title="Atlas",
        version=__version__,
        description="An OpenAI-compatible API for your own models.",
        lifespan=lifespan,
        docs_url=None,  # its page loads from a CDN
        redoc_url=None,
        responses={"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}},
    )
    for kind in (ApiError, AtlasError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, _on_error)
    dispatcher = Dispatcher(backends, settings)

    @app.get("/health")
    async def health() -> Health:
        """200 while the server accepts requests."""
        return Health(needs_key=settings.api_key is not None)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """For Prometheus."""
        media_type = "text/plain; version=0.0.4; charset=utf-8"
        return Response(dispatcher.metrics.text(), media_type=media_type)

    app.router.routes += file_routes()
    app.include_router(openai_routes(dispatcher))
    app.include_router(page_routes(dispatcher))
    app.add_middleware(limit_body, seconds=BODY_SECONDS)
    app.add_middleware(require_auth, api_key=settings.api_key, open_paths={*FILES, "/health"})
    app.add_middleware(dispatcher.metrics.middleware)
    return app


async def _on_error(request: Request, error: Exception) -> JSONResponse:
    match error:
        case ApiError():
            return error_response(error)
        case AtlasError():
            return error_response(ApiError(400, str(error)))
        case RequestValidationError():
            return error_response(validation_error(error.errors()))
        case HTTPException():
            message = f"{request.method} {request.url.path}: {error.detail}"
            return error_response(ApiError(error.status_code, message), error.headers)
        case _:
            return error_response(ApiError(500, "an internal error: the server's log has the traceback"))
