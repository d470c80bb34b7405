"""torch.compile, and that no way of saving time or memory changes the losses of a run."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch._inductor.exc import InductorError

from atlas.config.loader import resolve
from atlas.errors import AtlasError
from atlas.training.devices.compile import choose_compile, refuse_failed_compilation
from tests.runs import layer, logged, start_process, trained, write_config

CPU = torch.device("cpu")
needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU"
)


def asked(value: str) -> object:
    return resolve({"training": {"compile": value}})


@pytest.mark.parametrize("value", ["auto", "off"])
def test_a_cpu_is_not_compiled_for_unless_asked(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda *_: pytest.fail("compiled"))
    assert not choose_compile(asked(value), CPU, say=lambda line: pytest.fail(line))


def test_without_a_compiler_on_is_refused_and_auto_continues_with_a_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(function: object) -> object:
        raise RuntimeError("Triton is not installed\nand more")

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(AtlasError, match=r"training\.compile: on: .*Triton is not installed\).* install"):
        choose_compile(asked("on"), CPU, say=print)
    said: list[str] = []
    monkeypatch.setattr(
        "atlas.training.devices.compile.why_not_compile", lambda device: "Triton is not installed"
    )
    assert not choose_compile(asked("auto"), torch.device("cuda"), say=said.append)
    assert len(said) == 1
    assert "Triton is not installed" in said[0]


@pytest.mark.slow
def test_a_missing_compiler_is_one_line_before_anything_is_written(tmp_path: Path, text_file: Path) -> None:
    explicit = layer(tmp_path / "run", text_file, training__compile="on")
    process = start_process(
        write_config(tmp_path / "c.yaml", explicit),
        CXX=str(tmp_path / "no-such-compiler"),
        TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "inductor"),
    )
    _, said = process.communicate(timeout=300)
    assert process.returncode == 2, said
    assert said.splitlines()[-1].startswith("error: training.compile: on: this machine cannot compile"), said
    assert not (tmp_path / "run").exists()


WAYS = {
    "compiled": {"training__compile": "on"},
    "all logits in memory": {"training__loss": "atlas.training.loss:compute_lm_loss"},
    "checkpointing": {"training__gradient_checkpointing": True},
    "one sequence per micro-batch": {"training__micro_batch_size": 1},
}


@pytest.mark.parametrize(
    "way",
    [
        pytest.param(way, marks=[pytest.mark.slow, needs_compiler] if way == "compiled" else [])
        for way in WAYS
    ],
)
def test_twenty_losses_are_those_of_the_plain_run(way: str, tmp_path: Path, text_file: Path) -> None:
    """Micro-batches of 8, eager, nothing recomputed, the loss in chunks, against each other way."""
    common = {
        "training__batch_size": 8,
        "training__micro_batch_size": 8,
        "training__max_steps": 20,
        "training__learning_rate": 1e-3,
        "model__hidden_size": 32,
        "model__max_seq_len": 64,  # 512 tokens an update: two chunks of the loss
    }
    trained(layer(tmp_path / "plain", text_file, **common))
    trained(layer(tmp_path / "other", text_file, **(common | WAYS[way])))
    plain, other = ([line["loss"] for line in logged(tmp_path / name)] for name in ("plain", "other"))
    assert len(plain) == 20
    assert other == pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize(
    ("error", "says"),
    [
        ("NotImplementedError: no such kernel\n  target: flex_attention", "data.document_mask=false"),
        ("NotImplementedError: no such kernel\n  target: aten.mm", "training.compile=off"),
    ],
)
def test_a_compilation_that_fails_names_the_setting_that_avoids_it(error: str, says: str) -> None:
    """FlexAttention is compiled whatever `training.compile` is."""
    with pytest.raises(AtlasError, match=rf"no such kernel.*--set {says}"):
        refuse_failed_compilation(InductorError(RuntimeError(error), None))
