"""An HTTP server in its own thread, with a graceful shutdown and limits for slow clients."""

from __future__ import annotations

import asyncio
import logging
import socket
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from atlas.errors import AtlasError

HEAD_SECONDS = 10.0
"""The time limit for the arrival of a request's headers, in seconds. For the first request of a connection, the time
starts with the connection."""
LARGEST_HEAD = 64 << 10
"""The approximate limit for a request's headers in bytes. The parser itself has no limit."""
_PIECE = 4096
"""The number of bytes that the parser gets at a time. After each piece, the size of the headers is checked."""
READ_SECONDS = 30.0
"""The number of seconds for which the send buffers of a connection may stay full. After this time, the server closes
the connection, since the client does not read."""


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens on this address. Raises `AtlasError` if the address cannot be used."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(2048)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise AtlasError(
            f"--host {host} --port {port}: cannot listen ({reason}): set --host to an address of this machine, "
            "choose another --port, or stop the program that uses this port"
        ) from None
    return listener


class Server:
    """A server in its own thread. `drain` stops it."""

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

    def start(self) -> None:
        """Start the server's thread."""
        pool = ThreadPoolExecutor(1, thread_name_prefix="atlas-server")
        self._run = pool.submit(self._server.run, sockets=[self._listener])

    @property
    def is_ready(self) -> bool:
        """Whether the server accepts requests."""
        return self._server.started

    def drain(self) -> None:
        """Accept no more requests, and end the server after the current requests are answered. A second call ends the
        server immediately."""
        if self._server.should_exit:
            self._server.force_exit = True
            # Otherwise uvicorn would log a traceback for each task that it cancels.
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        self._server.should_exit = True

    def wait(self, seconds: float | None = None) -> bool:
        """Wait at most `seconds`, and return whether the server has ended. Raises the exception that ended the
        thread."""
        wait([self._run], seconds)
        if self._run.done():
            self._run.result()
        return self._run.done()


class _Protocol(HttpToolsProtocol):
    """An HTTP protocol with limits that uvicorn lacks.

    The server closes the connection of a client that sends its headers too slowly, sends too many bytes of headers, or
    does not read.
    """

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._stalled: asyncio.TimerHandle | None = None
        self._late: asyncio.TimerHandle | None = None
        self._await_head()

    def _await_head(self) -> None:
        if self._late is None:
            self._head_size = 0
            self._late = self.loop.call_later(HEAD_SECONDS, self._refuse, b"408 Request Timeout")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._await_head()

    def on_headers_complete(self) -> None:
        _cancel(self._late)
        self._late = None
        super().on_headers_complete()

    def data_received(self, data: bytes) -> None:
        for start in range(0, len(data), _PIECE):
            if self.transport.is_closing():
                return
            piece = data[start : start + _PIECE]
            super().data_received(piece)
            if self._late is not None:
                self._head_size += len(piece)
                if self._head_size > LARGEST_HEAD:
                    self._refuse(b"431 Request Header Fields Too Large")

    def _refuse(self, status: bytes) -> None:
        if self.transport.is_closing():
            return
        if self.cycle is None or self.cycle.response_complete:
            self.transport.write(
                b"HTTP/1.1 " + status + b"\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
            )
        self.transport.close()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stalled = self.loop.call_later(READ_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        _cancel(self._stalled)
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        _cancel(self._late)
        _cancel(self._stalled)
        super().connection_lost(exc)


def _cancel(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
