"""Two "hosts" on one machine: network namespaces with a cable between them, which is unplugged and plugged in again."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.runs import REPOSITORY, config_flags, logged, trained, write_config
from tests.training.devices.test_distributed import assert_close, elsewhere, hard

FIRST, SECOND = "10.77.0.1", "10.77.0.2"
HOSTS = {"atlas-a": FIRST, "atlas-b": SECOND}


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


def cable(state: str) -> None:
    ip("-n", "atlas-a", "link", "set", "cable-a", state)


@pytest.fixture
def hosts() -> Iterator[None]:
    try:
        for name in HOSTS:
            ip("netns", "add", name)
        ip(
            "link",
            "add",
            "cable-a",
            "netns",
            "atlas-a",
            "type",
            "veth",
            "peer",
            "name",
            "cable-b",
            "netns",
            "atlas-b",
        )
        for name, address in HOSTS.items():
            device = f"cable-{name[-1]}"
            ip("-n", name, "address", "add", f"{address}/24", "dev", device)
            ip("-n", name, "link", "set", device, "up")
            ip("-n", name, "link", "set", "lo", "up")
    except (OSError, subprocess.CalledProcessError) as error:
        _remove_hosts()
        pytest.skip(f"no network namespaces here: {getattr(error, 'stderr', error)}")
    yield
    _remove_hosts()


def _remove_hosts() -> None:
    for name in HOSTS:
        subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def start(host: str, config: Path, *arguments: str, **variables: str) -> subprocess.Popen[str]:
    command = [
        *("ip", "netns", "exec", host, sys.executable, "-m", "torch.distributed.run"),
        *("--nnodes=2", "--nproc-per-node=1", "--max-restarts=3", f"--local-addr={HOSTS[host]}"),
        *("--rdzv-backend=c10d", f"--rdzv-endpoint={FIRST}:29500", "--rdzv-id=test"),
        f"--rdzv-conf=is_host={HOSTS[host] == FIRST}",  # a namespace has no host name
        *(str(REPOSITORY / "tests/ranks.py"), "none@0:0", "train", *config_flags(config), *arguments),
    ]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(REPOSITORY),
        "GLOO_SOCKET_IFNAME": f"cable-{host[-1]}",
        **variables,
    }
    log = open(config.with_suffix(f".{host}.log"), "a")  # noqa: SIM115
    return subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, text=True
    )


def both(config: Path, *arguments: str) -> list[subprocess.Popen[str]]:
    return [start(host, config, *arguments) for host in HOSTS]


def said_on_both(config: Path) -> str:
    return "\n".join(config.with_suffix(f".{host}.log").read_text() for host in HOSTS)


@pytest.mark.slow
@pytest.mark.usefixtures("hosts")
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_hosts_train_as_one_and_wait_for_an_unplugged_cable(
    tmp_path: Path, text_file: Path, parallel: str
) -> None:
    explicit = hard(tmp_path / "two", text_file, training__parallel=parallel, training__max_steps=300)
    explicit["training"] |= {"eval_interval": 100, "learning_rate": 1e-3}
    explicit["checkpoint"]["save_interval"] = 300
    config = write_config(tmp_path / "run.yaml", explicit)
    processes = both(config, "--timeout", "60")
    try:
        metrics = tmp_path / "two/metrics.jsonl"
        while not metrics.exists() or len(logged(tmp_path / "two")) < 5:
            assert all(process.poll() is None for process in processes), said_on_both(config)
            time.sleep(0.05)
        cable("down")
        time.sleep(1)
        stood_at = len(logged(tmp_path / "two"))
        time.sleep(4)
        assert len(logged(tmp_path / "two")) == stood_at < 300, "nothing goes on without the other"
        cable("up")
        assert [process.wait(120) for process in processes] == [0, 0], said_on_both(config)
    finally:
        for process in processes:
            process.kill()
    trained(elsewhere(explicit, tmp_path / "one"))
    assert_close(tmp_path / "one", tmp_path / "two", "atlas_step_300.pt")


@pytest.mark.slow
@pytest.mark.usefixtures("hosts")
def test_a_cable_unplugged_for_longer_than_the_timeout_costs_the_updates_since_the_last_save(
    tmp_path: Path, text_file: Path
) -> None:
    explicit = hard(tmp_path / "two", text_file, training__parallel="ddp", training__max_steps=300)
    explicit["training"] |= {"eval_interval": 100, "learning_rate": 1e-3}
    explicit["checkpoint"]["save_interval"] = 20
    config = write_config(tmp_path / "run.yaml", explicit)
    processes = both(config, "--timeout", "8")
    try:
        metrics = tmp_path / "two/metrics.jsonl"
        while not metrics.exists() or len(logged(tmp_path / "two")) < 30:
            assert all(process.poll() is None for process in processes), said_on_both(config)
            time.sleep(0.05)
        cable("down")
        time.sleep(20)
        cable("up")
        assert [process.wait(180) for process in processes] == [0, 0], said_on_both(config)
    finally:
        for process in processes:
            process.kill()
    said = said_on_both(config)
    assert "no answer from another rank within 8 s" in said
    assert "torchrun restarted the run" in said
    assert "resuming" in said
    trained(elsewhere(explicit, tmp_path / "one"))
    assert_close(tmp_path / "one", tmp_path / "two", "atlas_step_300.pt")


@pytest.mark.slow
@pytest.mark.usefixtures("hosts")
def test_a_replaced_host_joins_the_run(tmp_path: Path, text_file: Path) -> None:
    """The machine without the rendezvous is lost, with its torchrun, and a new one takes its place. The recipes set the
    same variable."""
    explicit = hard(tmp_path / "two", text_file, training__parallel="ddp", training__max_steps=300)
    explicit["training"] |= {"eval_interval": 100, "learning_rate": 1e-3}
    explicit["checkpoint"]["save_interval"] = 20
    config = write_config(tmp_path / "run.yaml", explicit)
    own_store = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    first, second = (start(host, config, "--timeout", "60", **own_store) for host in HOSTS)
    try:
        metrics = tmp_path / "two/metrics.jsonl"
        while not metrics.exists() or len(logged(tmp_path / "two")) < 30:
            assert first.poll() is second.poll() is None, said_on_both(config)
            time.sleep(0.05)
        for process in [*psutil.Process(second.pid).children(recursive=True), second]:
            process.kill()
        second.wait()
        second = start("atlas-b", config, "--timeout", "60", **own_store)
        assert [process.wait(180) for process in (first, second)] == [0, 0], said_on_both(config)
    finally:
        for process in (first, second):
            process.kill()
    assert "resuming" in said_on_both(config)
    trained(elsewhere(explicit, tmp_path / "one"))
    assert_close(tmp_path / "one", tmp_path / "two", "atlas_step_300.pt")
