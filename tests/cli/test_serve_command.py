"""`atlas serve` as a process: its output, its shutdown, and that its text equals that of `atlas generate`."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from atlas.export.save_imported import save_imported
from tests.runs import REPOSITORY
from tests.served import random_model
from tests.serving.test_serving import post

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    loaded = random_model(max_seq_len=128)
    return save_imported(loaded.model, loaded.tokenizer, tmp_path_factory.mktemp("model"), source="random")


def atlas(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "atlas", *arguments],
        env=ENVIRONMENT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@contextmanager
def serving(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process and its address."""
    process = subprocess.Popen(
        [sys.executable, "-m", "atlas", "serve", "--port", "0", *arguments],
        env=ENVIRONMENT,
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    try:
        said = ""
        for line in process.stderr:
            said += line
            if found := re.match(r"http://\S+", line):
                yield process, found[0]
                return
        pytest.fail(f"it did not start: {said}")
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def test_text_equals_that_of_generate_and_sigterm_lets_it_finish(checkpoint: Path) -> None:
    prompt = "The river runs"
    generated = atlas(
        "generate",
        "--checkpoint",
        str(checkpoint),
        "--prompt",
        prompt,
        "--temperature",
        "0",
        "--max-tokens",
        "300",
    )
    assert generated.returncode == 0, generated.stderr
    with serving("--checkpoint", str(checkpoint)) as (process, address):
        with urllib.request.urlopen(f"{address}/v1/models") as answer:
            assert [model["id"] for model in json.load(answer)["data"]] == ["atlas_best"]
        answers: list[tuple[int, dict]] = []
        body = {"prompt": prompt, "temperature": 0, "max_tokens": 300, "stream": False}
        thread = threading.Thread(target=lambda: answers.append(post(address, body)))
        thread.start()
        while True:  # until it is running
            with urllib.request.urlopen(f"{address}/metrics") as told:
                if b'atlas_running{model="atlas_best"} 1.0' in told.read():
                    break
            assert not answers, "the text is too short for this test"
        process.send_signal(signal.SIGTERM)
        thread.join()
        assert process.wait(30) == 0
        [(status, answer)] = answers
        assert status == 200
        assert prompt + answer["choices"][0]["text"] + "\n" == generated.stdout


def test_a_second_signal_does_not_wait(checkpoint: Path) -> None:
    with serving("--checkpoint", str(checkpoint), "--max-tokens", "1000000") as (process, address):
        host, _, port = address.removeprefix("http://").rpartition(":")
        body = json.dumps({"prompt": "The", "max_tokens": 10**6, "temperature": 0, "stream": True})
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        with socket.create_connection((host, int(port))) as client:
            client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
            assert client.recv(100).startswith(b"HTTP/1.1 200")
            process.send_signal(signal.SIGTERM)
            assert process.stderr is not None
            assert process.stderr.readline().startswith("shutting down: ")
            process.send_signal(signal.SIGTERM)
            assert process.wait(10) == 0
        assert process.stderr.read().splitlines() == [
            "shutting down: current generations finish; a second Ctrl-C or signal ends them"
        ]


def test_two_checkpoints_with_one_name_get_different_names(checkpoint: Path, tmp_path: Path) -> None:
    other = random_model(seed=1)
    second = save_imported(other.model, other.tokenizer, tmp_path / "later", source="random")
    with serving("--checkpoint", str(checkpoint), "--checkpoint", str(second)) as (process, address):
        with urllib.request.urlopen(f"{address}/v1/models") as answer:
            names = [model["id"] for model in json.load(answer)["data"]]
        assert names == [f"{checkpoint.parent.name}/atlas_best", "later/atlas_best"]
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0


MISTAKES = {
    "an address for all": (["--host", "0.0.0.0"], "set --api-key"),
    "an empty key": (["--api-key", " "], "--api-key: must be"),
    "no such checkpoint": (["--checkpoint", "none.pt"], "none.pt"),
    "no such file": (["--gguf", "none.gguf"], "none.gguf: no such file"),
    "no such address": (["--host", "203.0.113.77", "--api-key", "x"], "--host 203.0.113.77"),
    "not a number": (["--parallel", "many"], "--parallel many"),
    "no end": (["--timeout", "inf"], "--timeout inf"),
    "none in parallel": (["--parallel", "0"], "--parallel 0"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_user_error_is_one_line(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from atlas.cli import main

    arguments, says = MISTAKES[name]
    monkeypatch.chdir(tmp_path)
    out = []
    monkeypatch.setattr("typer.echo", lambda message="", **_: out.append(str(message)))
    assert main(["serve", "--port", "0", *arguments]) == 2
    assert len(out) == 1
    assert out[0].startswith("error: ")
    assert says in out[0]


def test_a_taken_port_is_reported_before_a_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from atlas.cli import main

    monkeypatch.chdir(tmp_path)
    out = []
    monkeypatch.setattr("typer.echo", lambda message="", **_: out.append(str(message)))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["serve", "--port", str(port)]) == 2
    assert f"--port {port}: cannot listen" in out[0]
