"""A listening socket, the application behind it, and an end that lets texts finish."""

from __future__ import annotations

import asyncio
import socket
import threading
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from atlas.errors import AtlasError

HEAD_SECONDS = 10.0
"""For the head of a connection's first request to arrive."""
_BACKLOG = 2048


def listen(host: str, port: int) -> socket.socket:
    """Raises `AtlasError`."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(_BACKLOG)
    except (OSError, OverflowError) as error:
        raise AtlasError(
            f"--host {host} --port {port}: cannot be listened on ({getattr(error, 'strerror', None) or error}): choose "
            "another --port, or end what listens there"
        ) from None
    return listener


class Server:
    """Serves in a thread of its own, until `drain`."""

    def __init__(self, app: FastAPI, listener: socket.socket, *, seconds_to_drain: float) -> None:
        config = uvicorn.Config(
            app,
            http=_Protocol,
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=max(1, round(seconds_to_drain)),
            server_header=False,
        )
        self._server = uvicorn.Server(config)
        self._listener = listener
        self.failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="atlas-server")

    def _run(self) -> None:
        try:
            self._server.run(sockets=[self._listener])
        except BaseException as error:  # told by `wait`
            self.failure = error

    def start(self) -> None:
        self._thread.start()

    @property
    def is_ready(self) -> bool:
        return self._server.started

    def drain(self) -> None:
        """Take no more requests, and end when those that are there have their answers; at once, if called again."""
        if self._server.should_exit:
            self._server.force_exit = True
        self._server.should_exit = True

    def wait(self, seconds: float | None = None) -> bool:
        """Whether it has ended within that time."""
        self._thread.join(seconds)
        if self.failure is not None:
            raise self.failure
        return not self._thread.is_alive()


class _Protocol(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
    """Whoever connects and says nothing, or half a head, is not waited for; uvicorn itself waits for ever."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        loop = asyncio.get_running_loop()
        self._too_late = loop.call_later(HEAD_SECONDS, self._give_up)

    def _give_up(self) -> None:
        if self.cycle is None and not self.transport.is_closing():
            self.transport.write(
                b"HTTP/1.1 408 Request Timeout\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
            )
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._too_late.cancel()
        super().connection_lost(exc)
