"""The launch recipes, as far as one machine allows: Slurm's script with stand-ins, the Kubernetes job's command
line."""

from __future__ import annotations

import inspect
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from atlas.training.checkpoint.load import load_checkpoint
from tests.runs import REPOSITORY, config_flags, layer, logged, write_config

RECIPES = REPOSITORY / "scripts/launch"
needs_bash = pytest.mark.skipif(shutil.which("bash") is None, reason="the script is bash's")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def environment(folder: Path, **variables: str) -> dict[str, str]:
    """The environment, with this Python's `torchrun` first on PATH."""
    torchrun = folder / "bin/torchrun"
    torchrun.parent.mkdir(exist_ok=True)
    torchrun.write_text(f'#!/bin/sh\nexec {sys.executable} -m torch.distributed.run "$@"\n')
    torchrun.chmod(0o755)
    path = f"{torchrun.parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "PATH": path, **variables}


def objects() -> list[dict]:
    return list(yaml.safe_load_all((RECIPES / "kubernetes.yaml").read_text(encoding="utf-8")))


STAND_INS = {
    "scontrol": 'if [ "$1" = show ]; then printf "localhost\\nother\\n"; else echo "$*" >> "$0.calls"; fi',
    # srun's options come before the command; the process is the step.
    "srun": 'while [ "${1#--}" != "$1" ]; do echo "$1" >> "$0.options"; shift; done; echo $$ > "$0.pid"; exec "$@"',
    # As Slurm does, send the signal to every process of the step, and not to the script.
    "scancel": f'exec {sys.executable} -c "{{}}" "$(dirname "$0")/srun.pid" "$@"'.format(
        "import psutil, sys; "
        "assert sys.argv[2:] == ['--signal=TERM', '77']; "
        "step = psutil.Process(int(open(sys.argv[1]).read())); "
        "[process.terminate() for process in [step, *step.children(recursive=True)]]"
    ),
}


def slurm_job(folder: Path, config: Path) -> subprocess.Popen[str]:
    """The Slurm script as job 77 with two GPUs on one machine."""
    variables = environment(
        folder,
        SLURM_NNODES="1",
        SLURM_GPUS_ON_NODE="2",
        SLURM_CPUS_PER_TASK="2",
        SLURM_JOB_ID="77",
        SLURM_JOB_NODELIST="host[1-2]",
        ATLAS_PORT=str(free_port()),
    )
    for name, body in STAND_INS.items():
        tool = folder / "bin" / name
        tool.write_text(f"#!/bin/sh\n{body}\n")
        tool.chmod(0o755)
    command = ["bash", str(RECIPES / "slurm.sbatch"), *config_flags(config)]
    return subprocess.Popen(
        command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=folder
    )


@pytest.mark.slow
@needs_bash
def test_the_slurm_script_trains(tmp_path: Path, text_file: Path) -> None:
    job = slurm_job(tmp_path, write_config(tmp_path / "run.yaml", layer(tmp_path / "run", text_file)))
    said, _ = job.communicate(timeout=120)
    assert job.returncode == 0, said
    assert load_checkpoint(tmp_path / "run/atlas_step_6.pt")["step"] == 6
    assert (tmp_path / "run/training.rank-1.log").exists()
    options = (tmp_path / "bin/srun.options").read_text().split()
    assert options == ["--cpus-per-task=2", "--kill-on-bad-exit=1"]
    assert not (tmp_path / "bin/scontrol.calls").exists(), "a finished job is not requeued"


@pytest.mark.slow
@needs_bash
def test_the_slurm_script_saves_and_requeues_at_the_time_limit(tmp_path: Path, text_file: Path) -> None:
    explicit = layer(
        tmp_path / "run", text_file, training__max_steps=100_000, checkpoint__save_interval=10**6
    )
    explicit["training"]["eval_interval"] = 10**6
    job = slurm_job(tmp_path, write_config(tmp_path / "run.yaml", explicit))
    metrics = tmp_path / "run/metrics.jsonl"
    while not metrics.exists() or len(logged(tmp_path / "run")) < 3:
        assert job.poll() is None
        time.sleep(0.1)
    job.send_signal(signal.SIGUSR1)
    said, _ = job.communicate(timeout=60)
    assert job.returncode == 1, said
    (saved,) = (tmp_path / "run").glob("atlas_interrupt_step_*.pt")
    assert load_checkpoint(saved)["step"] == logged(tmp_path / "run")[-1]["step"]
    assert (tmp_path / "bin/scontrol.calls").read_text() == "requeue 77\n"


@needs_bash
def test_the_slurm_script_is_valid_and_leaves_time_to_save() -> None:
    script = RECIPES / "slurm.sbatch"
    subprocess.run(["bash", "-n", str(script)], check=True)
    text = script.read_text(encoding="utf-8")
    (signalled,) = re.findall(r"^#SBATCH --signal=B:USR1@(\d+)$", text, re.MULTILINE)
    (timeout,) = re.findall(r"^export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=(\d+)$", text, re.MULTILINE)
    assert 30 < int(timeout) < int(signalled)


def test_torchrun_knows_the_variables_of_the_recipes() -> None:
    """A variable that PyTorch no longer reads would have no effect, without a message."""
    from torch.distributed.elastic.rendezvous import dynamic_rendezvous
    from torch.distributed.launcher import api

    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE" in inspect.getsource(dynamic_rendezvous)
    if tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 12):
        assert "TORCH_ELASTIC_SHUTDOWN_TIMEOUT" in inspect.getsource(api)


@pytest.mark.slow
def test_the_kubernetes_command_trains(tmp_path: Path, text_file: Path) -> None:
    (container,) = objects()[1]["spec"]["template"]["spec"]["containers"]
    config = write_config(tmp_path / "run.yaml", layer(tmp_path / "run", text_file))
    here = {
        "--nnodes=2": "--nnodes=1",
        "--nproc-per-node=8": "--nproc-per-node=2",
        "--rdzv-endpoint=atlas-0.atlas:29500": f"--rdzv-endpoint=localhost:{free_port()}",
        "--config=large": f"--config={config}",
        "--train-data=/data/wikipedia": f"--train-data={text_file}",
        "--output-dir=/data/checkpoints": f"--output-dir={tmp_path / 'run'}",
    }
    assert here.keys() <= set(container["command"])
    command = [here.get(word, word) for word in container["command"]]
    variables = environment(tmp_path)
    torchrun = shutil.which(command[0], path=variables["PATH"])
    assert torchrun is not None
    done = subprocess.run(
        [torchrun, *command[1:], *config_flags(config)],
        env=variables,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert load_checkpoint(tmp_path / "run/atlas_step_6.pt")["step"] == 6


def test_the_kubernetes_objects_fit_together() -> None:
    service, job = objects()
    pods = job["spec"]["template"]["spec"]
    (container,) = pods["containers"]
    assert service["spec"]["clusterIP"] == "None", "each pod has its own address"
    assert service["spec"]["publishNotReadyAddresses"], "a pod finds the first pod before it is ready"
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert pods["subdomain"] == service["metadata"]["name"]
    assert job["spec"]["completions"] == job["spec"]["parallelism"]
    assert f"--nnodes={job['spec']['parallelism']}" in container["command"]
    assert f"--nproc-per-node={container['resources']['limits']['nvidia.com/gpu']}" in container["command"]
    first = f"{job['metadata']['name']}-0.{pods['subdomain']}"
    assert f"--rdzv-endpoint={first}:29500" in container["command"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {
        volume["name"] for volume in pods["volumes"]
    }
    (rule,) = job["spec"]["podFailurePolicy"]["rules"]
    assert rule == {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    assert pods["restartPolicy"] == "Never", "podFailurePolicy requires it"
    variables = {variable["name"]: variable["value"] for variable in container["env"]}
    assert 30 < int(variables["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) < pods["terminationGracePeriodSeconds"]
    assert variables["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"


@pytest.mark.parametrize("version", ["1.26", "1.31", "1.35"])
def test_kubernetes_accepts_the_objects(version: str) -> None:
    """By the JSON schemas of Kubernetes. 1.26 is the first version with podFailurePolicy on by default."""
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    for definition in objects():
        kubernetes_validate.validate(definition, version, strict=True)
