"""Robustness: clients that send too much, read nothing or disconnect, and generations that fail."""

from __future__ import annotations

import json
import socket
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

from atlas.inference.load import LoadedModel
from atlas.serving import server as server_module
from atlas.serving.dispatcher import ServerSettings
from tests.served import random_model, served_model, until
from tests.serving.test_serving import generated, post

ENDLESS = {"prompt": "The", "max_tokens": 10**6, "temperature": 0, "stream": True}


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return random_model()


def place_of(address: str) -> tuple[str, int]:
    host, _, port = address.removeprefix("http://").rpartition(":")
    return host, int(port)


def request_of(address: str, body: dict[str, object]) -> bytes:
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {address.removeprefix('http://')}\r\n"
    return f"{head}Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data


def everything(client: socket.socket) -> bytes:
    """All bytes up to the end of the connection."""
    client.settimeout(10)
    parts = []
    try:
        while part := client.recv(65536):
            parts.append(part)
    except ConnectionResetError:  # the server did not read all that was sent
        pass
    return b"".join(parts)


def test_an_endless_head_is_refused(loaded: LoadedModel) -> None:
    with served_model(loaded) as (address, _):
        with socket.create_connection(place_of(address)) as client:
            sent = 0
            try:
                client.sendall(b"GET /health HTTP/1.1\r\n")
                while sent < 64 << 20:
                    sent += client.send(b"X-Long: " + b"x" * 8000 + b"\r\n")
            except (BrokenPipeError, ConnectionResetError):
                pass
        assert sent < 16 << 20  # what fits into the buffers on the way
        with socket.create_connection(place_of(address)) as client:
            client.sendall(b"GET /health HTTP/1.1\r\n" + b"X-Long: " + b"x" * 70_000)
            assert everything(client).startswith(b"HTTP/1.1 431")
        assert post(address, {"prompt": "x", "max_tokens": 1})[0] == 200


@pytest.mark.parametrize("header", [b"X-1: 1\r\n", b"X-Long: " + b"x" * 7000 + b"\r\n"])
def test_the_size_of_a_head_counts_however_it_arrives(loaded: LoadedModel, header: bytes) -> None:
    """The server receives such a head in one or two pieces, with or without a body behind it."""
    start = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    with served_model(loaded) as (address, _):
        for size, status in ((60_000, b"HTTP/1.1 200"), (80_000, b"HTTP/1.1 431")):
            for ending in (b"\r\n", b"Content-Length: 5000\r\n\r\n" + b"x" * 5000):
                with socket.create_connection(place_of(address)) as client:
                    client.sendall(start + header * (size // len(header)) + ending)
                    assert everything(client).startswith(status)


def test_two_hosts_are_refused(loaded: LoadedModel) -> None:
    """A proxy and this server could each believe another one."""
    head = b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: %s\r\nConnection: close\r\n\r\n"
    for settings in (ServerSettings(), ServerSettings(api_key="secret")):
        with served_model(loaded, settings=settings) as (address, _):
            for second in (b"evil.example", b"localhost"):
                with socket.create_connection(place_of(address)) as client:
                    client.sendall(head % second)
                    assert everything(client).startswith(b"HTTP/1.1 400")


def test_large_good_bodies_are_parsed() -> None:
    """The limits on the parts of a body do not count what is inside of strings, and refuse no long conversation."""
    part = {"type": "text", "text": ""}
    conversation = [{"role": role, "content": [part] * 3} for role in ("user", "assistant")] * 512
    with served_model(random_model(chat=True)) as (address, _):
        for path, body in (
            ("/v1/completions", {"prompt": list(range(300)) * 100}),
            ("/v1/completions", {"prompt": 'if (a["b"]) {\n\tc[0] = "\\\\", {};\n}\n' * 1500}),
            ("/v1/chat/completions", {"messages": conversation}),
        ):
            assert post(address, body, path)[1]["error"]["code"] == "context_length_exceeded"


def test_an_incomplete_second_head_times_out(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "HEAD_SECONDS", 0.3)
    with served_model(loaded) as (address, _), socket.create_connection(place_of(address)) as client:
        client.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert client.recv(1000).startswith(b"HTTP/1.1 200")
        client.sendall(b"GET /hea")
        assert b"HTTP/1.1 408" in everything(client)


def test_a_client_that_reads_nothing_is_disconnected(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "READ_SECONDS", 0.3)
    with served_model(loaded, settings=ServerSettings(max_tokens=10**6), parallel=16) as (address, engine):
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(place_of(address))
        client.sendall(request_of(address, {**ENDLESS, "n": 16, "logprobs": 20}))
        until(lambda: engine.num_running == 16)
        until(lambda: engine.num_running == 0, seconds=60)
        client.close()


def test_a_client_that_leaves_the_queue_frees_its_slot(loaded: LoadedModel) -> None:
    with served_model(loaded, settings=ServerSettings(max_tokens=10**6), parallel=1, queue=2) as (
        address,
        engine,
    ):
        clients = [socket.create_connection(place_of(address)) for _ in range(3)]
        clients[0].sendall(request_of(address, ENDLESS))
        until(lambda: engine.num_running == 1)
        for client in clients[1:]:
            client.sendall(request_of(address, ENDLESS))
        until(lambda: engine.num_waiting == 2)
        assert post(address, {"prompt": "x", "max_tokens": 1})[0] == 429
        for client in clients[1:]:
            client.close()
        until(lambda: sum(row.generation.cancelled for row in list(engine._waiting)) == 2)
        with ThreadPoolExecutor(1) as pool:
            late = pool.submit(post, address, {"prompt": "x", "max_tokens": 1})  # is queued, not refused
            until(lambda: late.done() or engine.num_waiting == 1)
            clients[0].close()
            assert late.result()[0] == 200


def test_more_generations_than_the_capacity_are_refused_with_400(loaded: LoadedModel) -> None:
    with served_model(loaded, parallel=2, queue=1) as (address, _):
        status, answer = post(address, {"prompt": "x", "n": 4, "max_tokens": 1})
        assert (status, answer["error"]["param"]) == (400, "n")
        assert post(address, {"prompt": "x", "n": 3, "max_tokens": 1})[0] == 200


def test_a_generation_with_nan_logits_ends_alone(loaded: LoadedModel) -> None:
    """Its cache entries would spoil the sequences that take its row: 0 × NaN is NaN."""
    spoilt = random_model()
    [bad] = spoilt.tokenizer.encode("ß")[:1]

    def poison(module: nn.Module, arguments: tuple[Tensor], embedded: Tensor) -> Tensor:
        return torch.where((arguments[0] == bad)[..., None], torch.nan, embedded)

    embedding = next(module for module in spoilt.model.modules() if isinstance(module, nn.Embedding))
    embedding.register_forward_hook(poison)
    params = {"max_tokens": 40, "temperature": 0}
    expected = generated(loaded, "The river", max_tokens=40, temperature=0.0)
    with served_model(spoilt, parallel=2) as (address, _):
        short = spoilt.tokenizer.encode("The river")
        long = spoilt.tokenizer.encode("In winter the river is a road of ice.")
        assert post(address, {"prompt": [*long, bad], **params})[0] == 500
        # A long sequence keeps the cache as long as the spoilt one was; a short sequence takes the spoilt row.
        status, answer = post(address, {"prompt": [short, long, short, short], **params})
        assert status == 200
        assert [answer["choices"][place]["text"] for place in (0, 2, 3)] == [expected] * 3
        status, answer = post(address, {"prompt": [[bad], [bad]], **params})
        assert status == 500
        assert post(address, {"prompt": "The river", **params})[1]["choices"][0]["text"] == expected
