"""`atlas doctor --distributed`: two processes that sum numbers, one that waits for another in vain, and what goes wrong
between four, three of which are simulated."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from atlas.cli import main
from atlas.training.devices import network_check as connection
from atlas.training.devices.world import World
from tests.runs import REPOSITORY

DOCTOR = ["-m", "atlas", "doctor", "--distributed"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def ended(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=REPOSITORY,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def only_line(errors: str) -> str:
    (line,) = errors.splitlines()
    assert line.startswith("error: ")
    return line


@pytest.mark.slow
def test_two_processes_sum_numbers() -> None:
    done = ended([*TORCHRUN, *DOCTOR, "--json", "--device", "cpu"])
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout, parse_constant=pytest.fail)  # so only one rank printed it
    assert facts["ranks"] == 2
    assert facts["hosts"] == [socket.gethostname()] * 2
    assert facts["left_out"] == {"nccl": "--device cpu"}
    sums = facts["all_reduce"]
    assert [entry["bytes"] for entry in sums] == [1_000, 1_000_000, 64_000_000]
    assert {(entry["backend"], entry["device"]) for entry in sums} == {("gloo", "cpu")}
    for entry in sums:
        assert 0 < entry["seconds"] < 60
        assert entry["bus_bandwidth"] == pytest.approx(entry["bytes"] / entry["seconds"])  # of two


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="a GPU for each of two ranks is not here")
def test_two_gpus_sum_numbers() -> None:
    done = ended([*TORCHRUN, *DOCTOR, "--json"])
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["left_out"] == {}
    assert [entry["backend"] for entry in facts["all_reduce"]] == ["gloo"] * 3 + ["nccl"] * 3


@pytest.mark.slow
def test_a_rank_that_never_comes() -> None:
    port = str(free_port())
    place = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    done = ended([sys.executable, *DOCTOR, "--timeout", "3"], **place)
    assert done.returncode == 2
    assert done.stdout == ""
    line = only_line(done.stderr)
    assert f"rank 0 of 2 on {socket.gethostname()}: the other ranks could not be reached within 3 s" in line
    assert f"MASTER_ADDR:MASTER_PORT, 127.0.0.1:{port}" in line
    assert "GLOO_SOCKET_IFNAME=<interface>" in line
    assert "(127.0.0.1)" in line


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--distributed"], "torchrun --nproc-per-node=2 -m atlas doctor --distributed"),
        (["--distributed", "--output-dir", "here"], "--output-dir here: --distributed measures no disk"),
        (["--timeout", "3"], "--timeout 3: is for --distributed"),
    ],
)
def test_options_that_exclude_each_other_are_refused(
    arguments: list[str], says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert main(["doctor", *arguments]) == 2
    assert says in only_line(capsys.readouterr().err)


class Done:
    def wait(self) -> None:
        pass


@pytest.fixture
def first_of_four(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Tensor], object]], None]:
    """Be rank 0, and let a function of its tensor simulate the sum of the four ranks: 1 + 2 + 3 + 4."""

    def play(add_up: Callable[[Tensor], object]) -> None:
        def all_reduce(tensor: Tensor, op: Any = dist.ReduceOp.SUM, async_op: bool = False) -> Done:
            if op == dist.ReduceOp.SUM:
                add_up(tensor)
            return Done()

        monkeypatch.setattr(dist, "all_reduce", all_reduce)

    def join_world(timeout: float) -> World:
        return World(0, 4, timeout=timeout)

    def all_gather(rows: list[Tensor], own: Tensor) -> None:
        for number, row in enumerate(rows):
            row.copy_(own)
            row[0] = ord("ab"[number // 3])

    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("TORCH_NCCL_BLOCKING_WAIT", "1")
    monkeypatch.setattr(connection, "join_world", join_world)
    monkeypatch.setattr(dist, "all_gather", all_gather)
    monkeypatch.setattr(connection, "ROUNDS", {1_000: 2, 1_000_000: 1})
    monkeypatch.setattr(connection, "_MARGIN", 0)
    return play


def doctor(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(["doctor", "--distributed", "--device", "cpu", *arguments])
    return code, *capsys.readouterr()


Play = Callable[[Callable[[Tensor], object]], None]


def test_the_screen(first_of_four: Play, capsys: pytest.CaptureFixture[str]) -> None:
    first_of_four(lambda tensor: tensor.fill_(10))
    code, output, errors = doctor(capsys)
    assert (code, errors) == (0, "")
    name = socket.gethostname()[1:]
    lines = output.splitlines()
    assert lines[:3] == ["ranks  host", f"0-2    a{name}", f"3      b{name}"]
    assert lines[4].split("  ")[0] == "backend"
    assert lines[4].endswith("latency, 1 kB  GB/s, 1 MB")
    assert lines[5].split()[:2] == ["gloo", "cpu"]
    assert lines[6] == "nccl was not tested: --device cpu"


def test_each_rank_sends_and_receives_three_halves(
    first_of_four: Play, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a ring of four: three quarters of the bytes to sum them, and three quarters to pass the sums on."""
    first_of_four(lambda tensor: tensor.fill_(10))
    _, output, _ = doctor(capsys, "--json")
    for entry in json.loads(output)["all_reduce"]:
        assert entry["bus_bandwidth"] == pytest.approx(1.5 * entry["bytes"] / entry["seconds"])


def test_a_wrong_sum(first_of_four: Play, capsys: pytest.CaptureFixture[str]) -> None:
    def forget_the_end(tensor: Tensor) -> None:
        tensor[: 250 * 999].fill_(10)

    first_of_four(forget_the_end)
    code, output, errors = doctor(capsys)
    assert (code, output) == (2, "")
    line = only_line(errors)
    assert "gloo: 250 of 250000 sums are wrong, 1 instead of 10: " in line
    assert "GLOO_SOCKET_IFNAME=<interface>" in line


def test_a_rank_that_stops_answering(first_of_four: Play, capsys: pytest.CaptureFixture[str]) -> None:
    """In a way that the backend does not notice."""
    end = threading.Event()
    first_of_four(lambda tensor: end.wait(30) if len(tensor) > 1 else tensor.fill_(10))
    code, _, errors = doctor(capsys, "--timeout", "1")
    end.set()
    assert code == 2
    assert "gloo: no answer within 1 s: " in only_line(errors)


def test_the_backends_error_is_reported(first_of_four: Play, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(tensor: Tensor) -> None:
        raise RuntimeError(
            "[/some/gloo/pair.cc:553] Connection closed by peer [127.0.0.1]:10662. Look\nand more"
        )

    first_of_four(fail)
    code, _, errors = doctor(capsys)
    assert code == 2
    assert "gloo: Connection closed by peer [127.0.0.1]:10662. Look: " in only_line(errors)


def test_the_error_names_settings_that_help_nccl() -> None:
    said = str(connection._refusal("nccl", "nothing comes"))
    for name in (
        "NCCL_SOCKET_IFNAME=",
        "NCCL_P2P_DISABLE=1",
        "NCCL_IB_DISABLE=1",
        "NCCL_DEBUG=INFO",
        "firewall",
    ):
        assert name in said
