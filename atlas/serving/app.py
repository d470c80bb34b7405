"""The FastAPI application: routes, middleware and error responses."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from atlas.errors import AtlasError
from atlas.serving.api.errors import ApiError, error_response, validation_error
from atlas.serving.api.requests import MOST_PROMPTS
from atlas.serving.api.shapes import ErrorBody, Health
from atlas.serving.backends.generation import Backend
from atlas.serving.dispatcher import Dispatcher, ServerSettings
from atlas.serving.files import FILES, file_routes
from atlas.serving.limits import limit_body, require_auth
from atlas.serving.openai import openai_routes
from atlas.serving.pages import MOST_KNOWN, page_routes
from atlas.serving.responses import response_routes
from atlas.serving.texts import text_routes
from atlas.version import __version__

BODY_SECONDS = 10.0
"""The time limit for the arrival of a request's body, in seconds."""


def build_app(backends: Sequence[Backend], settings: ServerSettings) -> FastAPI:
    """Return the application. The application starts the backends at its startup, and closes the backends at its
    shutdown."""

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
        docs_url=None,  # FastAPI's documentation page loads scripts from a CDN
        redoc_url=None,
        responses={"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}},
    )
    for kind in (ApiError, AtlasError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, _on_error)
    dispatcher = Dispatcher(backends, settings)

    @app.get("/health")
    async def health() -> Health:
        """Return status 200 while the server accepts requests."""
        return Health(needs_key=settings.api_key is not None)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Return the server's metrics in Prometheus's text format."""
        media_type = "text/plain; version=0.0.4; charset=utf-8"
        return Response(dispatcher.metrics.text(), media_type=media_type)

    app.router.routes += file_routes()
    app.include_router(openai_routes(dispatcher))
    app.include_router(response_routes(dispatcher))
    app.include_router(text_routes(dispatcher))
    app.include_router(page_routes(dispatcher))
    most_ids = max([MOST_KNOWN, *(MOST_PROMPTS * backend.context for backend in backends)])
    app.add_middleware(limit_body, seconds=BODY_SECONDS, most_numbers=most_ids)
    open_paths, origins = {*FILES, "/health"}, settings.origins
    app.add_middleware(require_auth, api_key=settings.api_key, open_paths=open_paths, origins=origins)
    app.add_middleware(dispatcher.metrics.middleware)
    if origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["X-Ignored-Fields"],
            allow_private_network=True,
        )
    return app


async def _on_error(request: Request, error: Exception) -> JSONResponse:
    if isinstance(error, (RequestValidationError, HTTPException)):
        _drop_tracebacks(error)
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


def _drop_tracebacks(error: BaseException | None) -> None:
    """Remove the tracebacks of an exception and of its causes. FastAPI's frames refer to the exception, and would keep
    the request's body in memory until the next garbage collection."""
    while error is not None:
        error.__traceback__ = None
        error = error.__context__
