"""The application: routes, what stands before them, and how what goes wrong is told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException

from atlas.errors import AtlasError
from atlas.serving.dispatcher import Dispatcher, Rules
from atlas.serving.errors import Refusal, of_validation, response
from atlas.serving.files import FILES, file_routes
from atlas.serving.limits import Auth, Limits
from atlas.serving.openai import openai_routes
from atlas.serving.pages import page_routes
from atlas.serving.runs import run_routes
from atlas.serving.schema import ErrorBody, Health
from atlas.serving.text import Backend, Generation, Piece, hand_out
from atlas.version import __version__

BODY_SECONDS = 10.0
"""For a body to arrive."""


def build_app(backends: Sequence[Backend], rules: Rules) -> FastAPI:
    """The application. The models begin when it does, and end with it."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        loop = asyncio.get_running_loop()

        def deliver(pieces: list[tuple[Generation, Piece]]) -> None:
            with suppress(RuntimeError):  # the loop has ended, and nobody waits any more
                loop.call_soon_threadsafe(hand_out, pieces)

        for backend in backends:
            backend.begin(deliver)
        yield
        for backend in backends:
            backend.close()

    app = FastAPI(
        title="Atlas",
        version=__version__,
        description="OpenAI's API over a model of one's own.",
        lifespan=lifespan,
        docs_url=None,  # its page is from a CDN
        redoc_url=None,
        responses={"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}},
    )
    _add_errors(app)
    dispatcher = Dispatcher(backends, rules)
    _add_supervision(app, dispatcher)
    app.include_router(openai_routes(dispatcher))
    app.include_router(file_routes())
    app.include_router(page_routes(dispatcher))
    app.include_router(run_routes(rules.runs))
    app.add_middleware(Limits, seconds=BODY_SECONDS)
    app.add_middleware(Auth, api_key=rules.api_key, is_open=lambda path: path in FILES or path == "/health")
    app.add_middleware(dispatcher.meter.counting)
    return app


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(Refusal)
    async def refused(request: Request, refusal: Refusal) -> JSONResponse:
        return response(refusal)

    @app.exception_handler(AtlasError)
    async def mistaken(request: Request, error: AtlasError) -> JSONResponse:
        return response(Refusal(400, str(error)))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return response(of_validation(error.errors()))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        message = f"{request.method} {request.url.path}: {error.detail}"
        return response(Refusal(error.status_code, message), error.headers)

    @app.exception_handler(Exception)
    async def bug(request: Request, error: Exception) -> JSONResponse:
        return response(Refusal(500, "a bug of the server's: its log says more"))


def _add_supervision(app: FastAPI, dispatcher: Dispatcher) -> None:
    @app.get("/health")
    async def health() -> Health:
        """200 while the server takes requests."""
        return Health(needs_key=dispatcher.rules.api_key is not None)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(dispatcher.meter.told(), media_type="text/plain; version=0.0.4; charset=utf-8")
