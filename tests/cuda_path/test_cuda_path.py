"""Atlas's code for a GPU, run without one (`benchmarks/fake_cuda.py`): no tensor is on the wrong device, and the host
waits for the GPU only where the lists say so.

Each variant has a list of its waits. If a change adds or removes a wait, change the list and give the reason in the
commit. To see the lists: `python -m tests.cuda_path.child AdamW "server, modern, mixed"`.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from atlas.model.cost import Execution, trace_saved_tensors
from benchmarks.fake_cuda import why_not

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))

TO_DEVICE = "H2D async kv_cache.long_tensor"
UPDATE = {"H2D async step._to_device": 4, "WAIT step.apply_gradient": 1}
"""An update of two micro-batches: inputs and targets go to the device, and one wait reads the loss and the norm."""
WITH_DOCUMENTS = {"H2D async step._to_device": 6, "WAIT step.apply_gradient": 1}
GRAPH = "GRAPH decoder.replay"
NUMBERS = "H2D async sampling.draw"
TOKEN = {GRAPH: 1, "WAIT generate.generate": 1}
"""The model is one launch, and the host waits only for the chosen token."""
DRAWN = {NUMBERS: 1, **TOKEN}

WAITS: dict[str, dict[str, int]] = {
    "AdamW": UPDATE,
    "fp32": UPDATE,
    "fp16": UPDATE,
    "bf16-true": UPDATE,
    "Muon": UPDATE,
    "Adafactor": UPDATE,
    "gradient checkpointing": UPDATE,
    "LoRA": UPDATE,
    "modern": UPDATE,
    "Muon in bf16-true": UPDATE,
    "Adafactor in bf16-true": UPDATE,
    "documents": WITH_DOCUMENTS,
    "documents, modern": WITH_DOCUMENTS,
    "documents with dropout": WITH_DOCUMENTS,
    "documents, narrow heads": WITH_DOCUMENTS,
    "documents, narrow heads, bf16-true": WITH_DOCUMENTS,
    "dropout, untied head": UPDATE,
    "uneven micro-batches": UPDATE,
    "custom loss": UPDATE,
    "spikes": UPDATE,
    "trial of a micro-batch": {},
    "save": {
        "WAIT validate.are_finite": 1,
        "D2H async async_saver.copy": 64,
        "WAIT async_saver.take": 1,
    },
    "resume": UPDATE,
    "resume fp16": UPDATE,
    "resume bf16-true": UPDATE,
    "resume Muon": UPDATE,
    "evaluation": {
        "H2D async evaluate.evaluate": 4,
        "WAIT evaluate.evaluate": 1,
        "H2D wait evaluate.token_losses": 2,
        "D2H wait evaluate.token_losses": 1,
    },
    "evaluation, documents": {
        "H2D async evaluate.evaluate": 6,
        "WAIT evaluate.evaluate": 1,
        "H2D wait evaluate.token_losses": 3,
        "D2H wait evaluate.token_losses": 1,
    },
    "greedy": {TO_DEVICE: 1, **TOKEN},
    "sampling": {TO_DEVICE: 1, **DRAWN},
    "sampling, modern": {TO_DEVICE: 1, **DRAWN},
    "ragged, penalty, min_p": {TO_DEVICE: 3, **DRAWN},
    "ragged, modern": {TO_DEVICE: 3, **DRAWN},
    "prompt": {TO_DEVICE: 5, NUMBERS: 1, "WAIT generate.generate": 1},
    "window full": {TO_DEVICE: 4, "WAIT generate.generate": 1},
    "server": {TO_DEVICE: 1, NUMBERS: 1, GRAPH: 1, "WAIT engine._sample": 1},
    "server, modern, mixed": {
        TO_DEVICE: 7,
        NUMBERS: 2,
        GRAPH: 1,
        "WAIT engine._sample": 1,
        "WAIT sequence_state.top_logprobs": 3,
    },
    "server, joining and leaving": {TO_DEVICE: 9, NUMBERS: 3, GRAPH: 2, "WAIT engine._sample": 3},
    "look": {},
}

GRAPHS: dict[str, dict[str, int]] = {
    "first update, 3 + 2 sequences": {"block": 1, "loss": 1},
    "second update": {},
    "evaluation of 2 + 1": {"block": 1},
    "second evaluation": {},
    "third update": {},
    "waits of the third update": UPDATE,
    "less memory, 2 + 2 + 1": {"block": 1},
}
"""The graphs compiled, in this order: one for training and one for evaluation, for any size of the last micro-batch."""


def run_child(*variants: str, tree: Path = ROOT) -> dict[str, Any]:
    """The output of `child.py`, with the package `atlas` in `tree`."""
    path = os.pathsep.join([str(tree), str(ROOT)])
    child = subprocess.run(
        [sys.executable, "-m", "tests.cuda_path.child", *variants],
        cwd=tree,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout)  # type: ignore[no-any-return]


def once(
    factory: pytest.TempPathFactory, name: str, make: Callable[[Path], dict[str, Any]]
) -> dict[str, Any]:
    """The result of `make(folder)`, called by the first pytest worker that needs it; the others wait for it."""
    import fcntl

    folder = factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / name
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        file = folder / "results.json"
        if not file.exists():
            file.write_text(json.dumps(make(folder)), encoding="utf-8")
    return json.loads(file.read_text(encoding="utf-8"))  # type: ignore[no-any-return]


@pytest.fixture(scope="session")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The results of all variants, in one process: starting one takes as long as six variants."""
    return once(tmp_path_factory, "cuda_path", lambda folder: run_child())


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The bytes that blocks save for the backward pass."""
    return once(tmp_path_factory, "saved", lambda folder: run_child("saved")["saved"])


def seen_in(result: dict[str, Any]) -> dict[str, int]:
    if "error" in result:
        pytest.fail(result["error"], pytrace=False)
    return result["seen"]  # type: ignore[no-any-return]


def differences(seen: dict[str, int], listed: dict[str, int]) -> list[str]:
    """One line for each kind and place that differs from the list."""
    added, removed = Counter(seen) - Counter(listed), Counter(listed) - Counter(seen)
    return [f"{count} more: {place}" for place, count in added.items()] + [
        f"{count} fewer: {place}" for place, count in removed.items()
    ]


@pytest.mark.parametrize("variant", WAITS)
def test_the_host_waits_only_where_listed(variant: str, results: dict[str, Any]) -> None:
    assert differences(seen_in(results[variant]), WAITS[variant]) == []


def test_every_variant_is_listed(results: dict[str, Any]) -> None:
    assert list(results) == [*WAITS, "graphs"]


def test_the_number_of_compiled_graphs_is_as_listed(results: dict[str, Any]) -> None:
    assert seen_in(results["graphs"]) == GRAPHS


@pytest.mark.slow
@pytest.mark.parametrize("how", ["eager", "little", "all"])
@pytest.mark.parametrize("family", ["gpt2", "modern", "dropout"])
def test_a_block_saves_what_the_traced_estimate_says(family: str, how: str, saved: dict[str, Any]) -> None:
    """The rules for attention, dropout and compiled blocks on CUDA; the compiler also saves the norms' statistics."""
    from tests.cuda_path.variants import CONTEXT, SEQUENCES, block_config

    model = block_config(family).model
    compiled = None if how == "eager" else how
    traced = trace_saved_tensors(model, Execution("cuda", half=True, compiled=compiled))
    estimated = sum(tensor.bytes(SEQUENCES, CONTEXT) for tensor in traced.block if tensor.sequences)
    assert estimated == pytest.approx(seen_in(saved)[f"{family}, {how}"], rel=0.02)


FAULTS = (
    ("training/step.py", "figures = torch.stack(", "gradient.loss.item(); figures = torch.stack("),
    (
        "model/rope.py",
        "torch.arange(0, head_size, 2, device=positions.device)",
        "torch.arange(0, head_size, 2)",
    ),
)
"""The faults: an update reads one number too many, and angles are made on the CPU. The first is in every variant, the
second in `modern`."""


def run_faulty(folder: Path) -> dict[str, Any]:
    """Two variants of a copy of Atlas with these faults."""
    shutil.copytree(ROOT / "atlas", folder / "atlas")
    for name, good, bad in FAULTS:
        file = folder / "atlas" / name
        source = file.read_text(encoding="utf-8")
        assert source.count(good) == 1, f"{name}: {good}"
        file.write_text(source.replace(good, bad), encoding="utf-8")
    return run_child("AdamW", "modern", tree=folder)


@pytest.fixture(scope="session")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return once(tmp_path_factory, "cuda_path_faulty", run_faulty)


@pytest.mark.slow
def test_an_extra_wait_is_found(faulty: dict[str, Any]) -> None:
    assert differences(seen_in(faulty["AdamW"]), WAITS["AdamW"]) == ["1 more: WAIT step.apply_gradient"]


@pytest.mark.slow
def test_a_tensor_on_the_cpu_is_found(faulty: dict[str, Any]) -> None:
    assert "rope.py" in faulty["modern"]["error"]
    assert "found at least two devices, cuda:0 and cpu" in faulty["modern"]["error"]


def test_a_missing_wait_is_found() -> None:
    assert differences({}, {"WAIT step.apply_gradient": 1}) == ["1 fewer: WAIT step.apply_gradient"]
