"""Measure `atlas serve` under load: many parallel clients, half of which disconnect during a stream.

    python benchmarks/serve.py                              nano, 64 clients, three minutes
    python benchmarks/serve.py --checkpoint checkpoints/atlas_best.pt --clients 16 --seconds 30

`atlas serve` runs in a separate process. By default, the model has random weights, the preset's shape and, for `nano`,
a vocabulary of 2,048 tokens. First, one client requests texts, one after the other. Then N clients do the same in
parallel. Each request opens a new connection, sends a prompt of some words, and receives a stream of `--tokens` new
tokens. The clients run in the process of this script, which shares the cores with the server. To use little CPU time,
the clients use raw sockets and parse only the first and the last event.

The number of tokens comes from the server's /metrics. The time to the first token is from the request's first byte to
the first event, so this time includes the wait for a slot. Memory is the server's resident memory after each minute.
Finally, half of the clients disconnect during their streams. The script reports the time until their slots are free,
and the time of a decoding step, which is the time per token at this load.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import selectors
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
from results import add_record_option, recorded

WORDS = ["river", "old", "mill", "stone", "bridge", "water", "winter", "boat", "reeds", "town", "harbour"]
VOCABULARY = 2048


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="nano")
    parser.add_argument("--checkpoint", help="a trained model instead of random weights")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=180, help="seconds with all clients")
    parser.add_argument("--alone", type=float, default=20, help="seconds with one client")
    parser.add_argument("--tokens", type=int, default=100, help="new tokens of each text")
    parser.add_argument("--device", default="cpu")
    add_record_option(parser)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, recorded("Serving", arguments):
        checkpoint = arguments.checkpoint or random_checkpoint(arguments.preset, Path(folder))
        with served(checkpoint, arguments) as server:
            measure(server, arguments)


def measure(server: Served, arguments: argparse.Namespace) -> None:
    load(server, 1, 3, arguments.tokens)  # the first request loads and creates things
    alone = load(server, 1, arguments.alone, arguments.tokens)
    print(alone.line(1))
    minutes = []
    many = Measured()
    left = arguments.seconds
    with Clients(server, arguments.clients, arguments.tokens) as clients:
        while left > 0:
            many.add(clients.run(min(60, left)))
            minutes.append(server.memory())
            left -= 60
        print(many.line(arguments.clients))
        print(
            f"{many.rate / alone.rate:.1f} × one client's tokens/s; {many.failed} of {many.requests} requests failed"
        )
        print(
            "memory after each minute: "
            + ", ".join(f"{size / 1e6:,.1f} MB" for size in minutes)
            + f" (last ÷ first: {minutes[-1] / minutes[0]:.3f})"
        )
        step = arguments.clients / many.rate
        before = server.metric("atlas_running")
        seconds = clients.cut_off_half()
        print(
            f"{arguments.clients // 2} of {before:.0f} cut off in mid-stream: their places were free after "
            f"{seconds * 1e3:.0f} ms; a step takes {step * 1e3:.0f} ms, and asking the server is in it"
        )


class Measured:
    """The results of some seconds of load."""

    def __init__(self) -> None:
        self.seconds = self.tokens = 0.0
        self.requests = self.failed = 0
        self.first: list[float] = []

    def add(self, other: Measured) -> None:
        self.seconds += other.seconds
        self.tokens += other.tokens
        self.requests += other.requests
        self.failed += other.failed
        self.first += other.first

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds

    def line(self, clients: int) -> str:
        first = sorted(self.first)
        p99 = first[min(len(first) - 1, int(0.99 * len(first)))]
        return (
            f"{clients:3} clients: {self.rate:8,.0f} tokens/s; first token after {statistics.median(first) * 1e3:.1f} "
            f"ms, p99 {p99 * 1e3:.1f} ms; {self.requests} texts in {self.seconds:.0f} s"
        )


class Served:
    """A server process."""

    def __init__(self, process: subprocess.Popen[str], port: int) -> None:
        self.process = process
        self.port = port

    def metric(self, name: str) -> float:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics") as answer:
            lines = answer.read().decode().splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name + "{"))

    def memory(self) -> int:
        return int(psutil.Process(self.process.pid).memory_info().rss)


@contextlib.contextmanager
def served(checkpoint: str | Path, arguments: argparse.Namespace, *options: str) -> Iterator[Served]:
    command = [sys.executable, "-m", "atlas", "serve", "--checkpoint", str(checkpoint), "--port", "0"]
    command += ["--parallel", str(arguments.clients), "--device", arguments.device, *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        for line in process.stderr:
            print(line, end="", file=sys.stderr)
            if line.startswith("http://"):
                break
        else:
            raise SystemExit("the server did not start")
        yield Served(process, int(line.split()[0].rpartition(":")[2]))
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def random_checkpoint(preset: str, folder: Path) -> Path:
    """Save a model with random weights, and with a vocabulary of 2,048 tokens, like the demo's, trained on made-up
    words."""
    from atlas.config.loader import read_yaml, resolve
    from atlas.config.presets import preset_path
    from atlas.export.save_imported import save_imported
    from atlas.model import build_model
    from atlas.tokenizer import Tokenizer

    letters = random.Random(0)
    words = ["".join(letters.choices("etaoinshrdlu", k=letters.randint(2, 9))) for _ in range(4000)]
    tokenizer = Tokenizer.train([" ".join([*WORDS, *words])], VOCABULARY)
    config = resolve(read_yaml(preset_path(preset))).model
    model = build_model(config.model_copy(update={"vocab_size": tokenizer.vocab_size}), seed=0)
    return save_imported(model, tokenizer, folder, source="random weights")


class Clients:
    """N clients in one thread. Every text has a new connection."""

    def __init__(self, server: Served, number: int, tokens: int) -> None:
        self.server = server
        self.tokens = tokens
        self.random = random.Random(0)
        self.selector = selectors.DefaultSelector()
        self.measured = Measured()
        self.clients = [Client(self) for _ in range(number)]

    def __enter__(self) -> Clients:
        return self

    def __exit__(self, *_: object) -> None:
        for client in self.clients:
            client.close()
        self.selector.close()

    def request(self) -> bytes:
        prompt = " ".join(self.random.choices(WORDS, k=self.random.randint(2, 12)))
        body = json.dumps(
            {"prompt": prompt, "max_tokens": self.tokens, "stream": True, "top_k": 50, "temperature": 0.8}
        )
        head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{self.server.port}\r\nConnection: close\r\n"
        return f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()

    def run(self, seconds: float) -> Measured:
        measured = self.measured = Measured()
        tokens = self.server.metric("atlas_completion_tokens_total")
        start = time.perf_counter()
        while (now := time.perf_counter()) < start + seconds:
            for key, _ in self.selector.select(timeout=start + seconds - now):
                key.data.read()
        measured.seconds = time.perf_counter() - start
        measured.tokens = self.server.metric("atlas_completion_tokens_total") - tokens
        return measured

    def cut_off_half(self) -> float:
        """Disconnect half of the clients. Return the seconds until their slots are free."""
        half = len(self.clients) // 2
        # The other clients continue to read. Texts that end meanwhile free slots too, so all clients first start new
        # texts.
        for client in self.clients:
            client.begin()
        while not all(client.first_at for client in self.clients):
            for key, _ in self.selector.select(timeout=1):
                key.data.read()
        start = time.perf_counter()
        for client in self.clients[:half]:
            client.close()
        while self.server.metric("atlas_running") > len(self.clients) - half:
            pass
        return time.perf_counter() - start


class Client:
    def __init__(self, crowd: Clients) -> None:
        self.crowd = crowd
        self.socket: socket.socket | None = None
        self.begin()

    def begin(self) -> None:
        self.close()
        self.first_at, self.tail = 0.0, b""
        self.socket = socket.create_connection(("127.0.0.1", self.crowd.server.port))
        self.crowd.selector.register(self.socket, selectors.EVENT_READ, self)
        self.began_at = time.perf_counter()
        self.socket.sendall(self.crowd.request())

    def close(self) -> None:
        if self.socket is not None:
            self.crowd.selector.unregister(self.socket)
            self.socket.close()
            self.socket = None

    def read(self) -> None:
        assert self.socket is not None
        try:
            data = self.socket.recv(65536)
        except OSError:
            data = b""
        if not self.first_at and b"data:" in self.tail + data:
            self.first_at = time.perf_counter()
            self.crowd.measured.first.append(self.first_at - self.began_at)
        if not data:
            self.crowd.measured.requests += 1
            self.crowd.measured.failed += b"[DONE]" not in self.tail
            self.begin()
        self.tail = (self.tail + data)[-64:]


def load(server: Served, clients: int, seconds: float, tokens: int) -> Measured:
    with Clients(server, clients, tokens) as crowd:
        return crowd.run(seconds)


if __name__ == "__main__":
    main()
