"""What a refusal costs: the worst bodies of 1 MiB on every route, and minutes of abuse beside a good client.

    python -m tests.faults.refusal                 every field of every route
    python -m tests.faults.refusal --minutes 3     random abuse of `atlas serve`, in its own process

The first form serves a tiny model in this process. A body may block the event loop for less than 0.1 s, and may need
less than 50 MB. Other programs on the machine must not count as a block. So a block is the time between two turns of
the event loop, but at most the CPU time that this process used between them. A body that costs too much is sent again,
up to `TRIES` times, since a garbage collection may happen at any moment.

The second form starts a server, four clients that send bad requests, and one client that measures the time to its first
token. The 99th percentile must be below 0.5 s; if other programs use the machine too, in proportion to the load average
per core. Afterwards, the server's memory may be at most 10 % larger than before.
"""

from __future__ import annotations

import json
import random
import re
import socket
import subprocess
import sys
import threading
import time
import typing
from asyncio import AbstractEventLoop
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import psutil
from fastapi.routing import APIRoute

from atlas.export.save_imported import save_imported
from atlas.serving.api.body import Body
from atlas.serving.api.requests import ChatMessage
from atlas.serving.dispatcher import Dispatcher, ServerSettings
from atlas.serving.limits import LARGEST_BODY
from atlas.serving.openai import openai_routes
from atlas.serving.pages import page_routes
from atlas.serving.responses import response_routes
from atlas.serving.texts import text_routes
from tests.faults.runs import Broken, command, options, shown
from tests.served import random_model, served_model

MOST_SECONDS, MOST_BYTES, TRIES = 0.1, 50e6, 5
MOST_SECONDS_TO_FIRST, MOST_GROWTH = 0.5, 1.1
ABUSERS = 4
ITEMS = ("{}", "[]", "[7]", '{"a":7}', "0.5", "7", "7.0", "null", '"a"')
PARTS = ('{"type":"text","text":""}', '{"role":"user","content":""}')
CHARACTERS = ("a", " ", "The river ", "\\u0000", "\\ud800", '\\"', "漢")
SAMPLES = {
    "messages": [{"role": "user", "content": "a"}],
    "prompt": "a",
    "max_tokens": 1,
    "max_completion_tokens": 1,
    "input": "a",
    "max_output_tokens": 1,
    "tokens": [1],
}
HERE = "the value"
TEXTS = r"/completions (prompt|.*content)$|/api/(write|read) prompt$|/tokenize (content|prompt)$|/responses input$"
"""A pattern for the fields that may be as large as the body, one for each way in which the server reads it."""


def values(size: int) -> dict[str, str]:
    """JSON values of about `size` bytes, or as deep as the parser allows, by name."""
    many = {f"list of {item}": f"[{_repeated(item + ',', size)}{item}]" for item in (*ITEMS, *PARTS)}
    texts = {f"text of {each!r}": f'"{_repeated(each, size)}"' for each in CHARACTERS}
    return {
        **many,
        **texts,
        "many fields": "{" + ",".join(f'"{number:07}":0' for number in range(size // 12)) + "}",
        "one field again and again": "{" + _repeated('"a":0,', size) + '"a":0}',
        "deep lists": "[" * 900 + "]" * 900,
        "deeper lists": "[" * (size // 2) + "]" * (size // 2),
        "deep objects": '{"a":' * 900 + "0" + "}" * 900,
        "digits": "7" * size,
        "4,000 digits": "7" * 4000,
    }


def _repeated(text: str, size: int) -> str:
    return text * (size // len(text.encode()) - 1)


class Place(NamedTuple):
    """A place in the body of a route; `HERE` in `body` stands for the value."""

    route: str
    field: str
    body: str

    def filled(self, value: str) -> bytes:
        return self.body.replace(f'"{HERE}"', value).encode()


def places() -> list[Place]:
    """Every field of every route that takes a body, the items of its lists, and the body itself."""
    dispatcher = Dispatcher([], ServerSettings())
    found = []
    routers = (openai_routes, response_routes, text_routes, page_routes)
    for route in [route for router in routers for route in router(dispatcher).routes]:
        assert isinstance(route, APIRoute)
        model = typing.get_type_hints(route.endpoint).get("body")
        if model is not None:
            found += [Place(route.path, *place) for place in _fields(model)]
    return found


def _fields(model: type[Body]) -> Iterator[tuple[str, str]]:
    sample = {name: value for name, value in SAMPLES.items() if name in model.model_fields}
    if "content" in model.model_fields:  # /tokenize takes one of content, prompt and messages
        sample = {}
    yield "", f'"{HERE}"'
    for name in (*model.model_fields, "unknown"):
        yield name, json.dumps({**sample, name: HERE})
    for name in ("messages", "prompt", "stop", "input", "tokens"):
        if name in model.model_fields:
            yield f"{name}[0]", json.dumps({**sample, name: [HERE]})
    if "messages" in model.model_fields:
        for name in (*ChatMessage.model_fields, "unknown"):
            message = {"role": "user", "content": "a", name: HERE}
            yield f"messages[0].{name}", json.dumps({**sample, "messages": [message]})


class Watch:
    """The longest block of an event loop since the last `reset`, in seconds."""

    def __init__(self, loop: AbstractEventLoop) -> None:
        self.loop = loop
        self.longest = 0.0
        self.is_over = False
        self._last = (0.0, 0.0)
        self.loop.call_soon_threadsafe(self._turn)

    def reset(self) -> None:
        self.longest = 0.0

    def _turn(self) -> None:
        now = time.perf_counter(), time.process_time()
        if self._last[0]:
            wall, cpu = now[0] - self._last[0], now[1] - self._last[1]
            self.longest = max(self.longest, min(wall, cpu))
        self._last = now
        if not self.is_over:
            self.loop.call_later(0.001, self._turn)


@contextmanager
def peak_memory() -> Iterator[Callable[[], float]]:
    """Give a function that returns by how many bytes the memory of this process has grown at most; 0 if only Linux can
    tell."""
    status, forget = Path("/proc/self/status"), Path("/proc/self/clear_refs")

    def read(name: str) -> float:
        return int(re.search(rf"{name}:\s+(\d+) kB", status.read_text())[1]) * 1024.0  # type: ignore[index]

    if not forget.exists():
        yield lambda: 0.0
        return
    forget.write_text("5")  # forget the peak so far
    before = read("VmRSS")
    yield lambda: read("VmHWM") - before


class Cost(NamedTuple):
    seconds: float
    bytes: float
    status: int

    @property
    def is_small(self) -> bool:
        return self.seconds < MOST_SECONDS and self.bytes < MOST_BYTES


def cost_of(address: str, route: str, body: bytes, watch: Watch) -> Cost:
    with peak_memory() as peak:
        watch.reset()
        status = status_of(address, post(route, body))
        time.sleep(0.003)  # so that the event loop has a last turn
        return Cost(watch.longest, peak(), status)


def post(route: str, body: bytes) -> bytes:
    head = (
        f"POST {route} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
    )
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def status_of(address: str, request: bytes) -> int:
    """Send a request, read the answer to its end, and return the status; 0 if the server closed the connection."""
    host, _, port = address.removeprefix("http://").rpartition(":")
    with socket.create_connection((host, int(port)), timeout=60) as client:
        answer = b""
        try:
            client.sendall(request)
            answer = client.recv(1 << 16)
            while client.recv(1 << 16):
                pass
        except OSError:  # the server did not read everything
            pass
    return int(answer[9:12] or 0)


def refuse(*, fields: str = "", seed: int = 0) -> list[str]:
    """Send every value in every place whose route and field match the pattern `fields`. Return the counts as lines."""
    matching = [place for place in places() if re.search(fields, f"{place.route} {place.field}")]
    attacks = [(place, *value) for place in matching for value in values(LARGEST_BODY - 400).items()]
    random.Random(seed).shuffle(attacks)
    statuses: Counter[int] = Counter()
    slowest = largest = Cost(0.0, 0.0, 0)
    with served_model(random_model(chat=True)) as (address, engine):
        good = post("/v1/completions", b'{"prompt":"a","max_tokens":1}')
        status_of(address, good)
        watch = Watch(engine._loop)
        for number in shown(len(attacks), "refusals"):
            place, name, value = attacks[number]
            body = place.filled(value)
            assert len(body) <= LARGEST_BODY
            tries = [cost_of(address, place.route, body, watch)]
            while not tries[-1].is_small and len(tries) < TRIES:
                tries.append(cost_of(address, place.route, body, watch))
            cost = tries[-1]
            if not cost.is_small or not 200 <= cost.status < 500:
                raise Broken(f"{place.route} {place.field}: {name}: {_line(cost)}, status {cost.status}")
            statuses[cost.status] += 1
            slowest = max(slowest, cost)
            largest = max(largest, cost, key=lambda each: each.bytes)
        watch.is_over = True
        if status_of(address, good) != 200:
            raise Broken("the server no longer answers a good request")
    return [
        f"refusals: {len(attacks)} bodies in {len(matching)} places (--seed {seed}), statuses {dict(statuses)}: "
        f"at most {_line(Cost(slowest.seconds, largest.bytes, 0))}"
    ]


def _line(cost: Cost) -> str:
    return f"the event loop is blocked for {cost.seconds * 1e3:.0f} ms, {cost.bytes / 1e6:.0f} MB"


# Minutes of abuse


def abuse(folder: Path, *, minutes: float, seed: int) -> list[str]:
    """Abuse a server beside a good client. Return the counts as lines."""
    loaded = random_model(max_seq_len=512)
    checkpoint = save_imported(loaded.model, loaded.tokenizer, folder, source="random weights")
    chance, attacks = random.Random(seed), bad_requests(seed)
    with _serving(checkpoint) as (address, process), ThreadPoolExecutor(ABUSERS) as pool:
        alone = time_to_first(address, min(20, minutes * 20))
        before, is_over = process.memory_info().rss, threading.Event()

        def send_bad(seed: int) -> Counter[int]:
            order, statuses = random.Random(seed), Counter[int]()
            while not is_over.is_set():
                statuses[status_of(address, order.choice(attacks))] += 1
            return statuses

        abusers = [pool.submit(send_bad, chance.random()) for _ in range(ABUSERS)]
        try:
            firsts = time_to_first(address, minutes * 60)
        finally:
            is_over.set()
        statuses = sum((abuser.result() for abuser in abusers), Counter())
        after = process.memory_info().rss
    busy = max(1.0, psutil.getloadavg()[0] / (psutil.cpu_count() or 1))
    median, p99 = firsts[len(firsts) // 2], firsts[int(0.99 * len(firsts))]
    line = (
        f"abuse: {sum(statuses.values())} bad requests in {minutes:g} minutes (--seed {seed}), statuses "
        f"{dict(statuses)}; the first token of {len(firsts)} good requests after {median * 1e3:.0f} ms, p99 "
        f"{p99 * 1e3:.0f} ms (without abuse: {alone[len(alone) // 2] * 1e3:.0f} ms, p99 "
        f"{alone[int(0.99 * len(alone))] * 1e3:.0f} ms); memory {before / 1e6:.0f} MB before, "
        f"{after / 1e6:.0f} MB after; load average per core {busy:.1f}"
    )
    if (
        p99 >= MOST_SECONDS_TO_FIRST * busy
        or after > MOST_GROWTH * before
        or any(each >= 500 for each in statuses)
    ):
        raise Broken(line)
    return [line]


def bad_requests(seed: int) -> list[bytes]:
    """Requests of every kind: a value of each kind in random places, too many headers, two hosts, half a request."""
    chance, everywhere = random.Random(seed), places()
    requests = [
        post(place.route, place.filled(value))
        for value in values(LARGEST_BODY - 400).values()
        for place in chance.sample(everywhere, 3)
    ]
    headers = b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + b"X-Number: 1\r\n" * 10_000 + b"\r\n"
    hosts = b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    return [*requests, *[headers, hosts, post("/v1/completions", b"x" * 2 * LARGEST_BODY)] * 5]


@contextmanager
def _serving(checkpoint: Path) -> Iterator[tuple[str, psutil.Process]]:
    arguments = [sys.executable, "-m", "atlas", "serve", "--checkpoint", str(checkpoint), "--port", "0"]
    with subprocess.Popen([*arguments, "--device", "cpu"], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            said = iter(process.stderr.readline, "")
            yield (
                next(line.split()[0] for line in said if line.startswith("http://")),
                psutil.Process(process.pid),
            )
        finally:
            process.terminate()
            process.communicate(timeout=60)


def time_to_first(address: str, seconds: float) -> list[float]:
    """Request short texts for some time, one after the other. Return the sorted seconds until their first tokens."""
    host, _, port = address.removeprefix("http://").rpartition(":")
    request = post("/v1/completions", b'{"prompt":"The river","max_tokens":8,"stream":true}')
    end, taken = time.monotonic() + seconds, []
    while time.monotonic() < end:
        begun = time.perf_counter()
        with socket.create_connection((host, int(port)), timeout=60) as client:
            client.sendall(request)
            answer = b""
            while b"data:" not in answer:
                answer += client.recv(4096) or b"data: none, the connection was closed"
            taken.append(time.perf_counter() - begun)
            while part := client.recv(1 << 16):
                answer += part
        if b"[DONE]" not in answer:
            raise Broken(f"a good client was not answered: {answer[-200:]!r}")
        time.sleep(0.02)
    return sorted(taken)


def main() -> int:
    parser = options("refusal", rounds=1)
    parser.add_argument("--minutes", type=float, help="abuse a server for some minutes instead")
    parser.add_argument("--fields", default="", help="a pattern: only these routes and fields")
    asked = parser.parse_args()
    if asked.minutes:
        return command("refusal", lambda folder: abuse(folder, minutes=asked.minutes, seed=asked.seed))
    return command("refusal", lambda folder: refuse(fields=asked.fields, seed=asked.seed))


if __name__ == "__main__":
    sys.exit(main())
