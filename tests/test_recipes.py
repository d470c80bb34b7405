"""The launch recipes, as far as one machine allows: Slurm's script with stand-ins, the Kubernetes job's command
line."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from atlas.training.checkpoint.load import load_checkpoint
from tests.runs import REPOSITORY, config_flags, layer, write_config

RECIPES = REPOSITORY / "scripts/launch"


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


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("bash") is None, reason="the script is bash's")
def test_the_slurm_script_trains(tmp_path: Path, text_file: Path) -> None:
    variables = environment(
        tmp_path,
        SLURM_NNODES="1",
        SLURM_GPUS_ON_NODE="2",
        SLURM_JOB_ID="77",
        SLURM_JOB_NODELIST="host[1-2]",
        ATLAS_PORT=str(free_port()),
    )
    for name, body in {
        "scontrol": '[ "$*" = "show hostnames host[1-2]" ] && printf "localhost\\nother\\n"',
        "srun": 'exec "$@"',
    }.items():
        tool = tmp_path / "bin" / name
        tool.write_text(f"#!/bin/sh\n{body}\n")
        tool.chmod(0o755)
    config = write_config(tmp_path / "run.yaml", layer(tmp_path / "run", text_file))
    command = ["bash", str(RECIPES / "slurm.sbatch"), *config_flags(config)]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert load_checkpoint(tmp_path / "run/atlas_step_6.pt")["step"] == 6
    assert (tmp_path / "run/training.rank-1.log").exists()


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
