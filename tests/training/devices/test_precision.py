"""Which precision a run has: what the processor computes in, and what the run had before."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from atlas import machine
from atlas.config.loader import resolve
from atlas.errors import AtlasError
from atlas.machine import cpu_computes_in_bf16
from atlas.training.checkpoint.load import load_checkpoint
from atlas.training.devices.device import computes_in_half, setup_runtime, why_not_in
from tests.runs import layer, logged, resumes_with_the_same_bits, start_process, trained, write_config

ZEN_4 = "processor\t: 0\nflags\t\t: fpu avx2 avx512f avx512_bf16 avx512_vnni\nbugs\t\t:\n"
XEON = "flags : fpu avx512f amx_bf16 amx_tile"
OLDER = "flags : fpu avx512f avx512_vnni\nnote : amx_bf16"


@pytest.fixture
def computes(monkeypatch: pytest.MonkeyPatch) -> object:
    """Let this CPU compute in bf16, or not."""

    def decide(here: bool) -> None:
        monkeypatch.setattr("atlas.training.devices.device.cpu_computes_in_bf16", lambda: here)

    return decide


@pytest.mark.parametrize(
    ("info", "capability", "limit", "expected"),
    [
        (ZEN_4, "AVX512", None, True),
        (XEON, "AVX512", None, True),
        (XEON, "AVX512", "avx512_core_amx", True),
        (OLDER, "AVX512", None, False),
        ("", "AVX512", None, False),
        (ZEN_4, "AVX2", None, False),
        (ZEN_4, "AVX512", "avx512_core_vnni", False),
        (ZEN_4, "AVX512", "AVX2", False),
    ],
)
def test_the_flags_of_the_processor_decide(
    info: str, capability: str, limit: str | None, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also PyTorch's own limit on instructions, and oneDNN's."""
    monkeypatch.setattr(machine, "cpu_info", lambda: info)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA")
    if limit:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    assert cpu_computes_in_bf16() == expected
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    if limit:
        monkeypatch.setenv("DNNL_MAX_CPU_ISA", limit)
    assert cpu_computes_in_bf16() == expected


@pytest.mark.parametrize("here", [True, False])
def test_auto_is_bf16_where_the_cpu_computes_in_it(computes: object, here: bool) -> None:
    computes(here)  # type: ignore[operator]
    assert setup_runtime(resolve({"device": "cpu"})).precision == ("bf16" if here else "fp32")
    assert computes_in_half("auto", "cpu") == here
    assert computes_in_half("auto", "cuda")
    assert not computes_in_half("fp32", "cuda")
    in_fp32 = {"device": "cpu", "training": {"precision": "fp32"}}
    assert setup_runtime(resolve(in_fp32)).precision == "fp32"


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_resumed_run_in_bf16_has_the_same_bits(
    optimizer: str, computes: object, tmp_path: Path, text_file: Path
) -> None:
    computes(True)  # type: ignore[operator]
    folder = tmp_path / "run"
    explicit = layer(folder, text_file, model__dropout=0.2, training__optimizer=optimizer)
    explicit["checkpoint"]["save_interval"] = 3
    saved = resumes_with_the_same_bits(explicit, folder)
    assert saved["machine"]["precision"] == "bf16"
    assert {tensor.dtype for tensor in saved["model_state_dict"].values()} == {torch.float32}
    kept = [value for state in saved["optimizer_state_dict"]["state"].values() for value in state.values()]
    assert {tensor.dtype for tensor in kept} == {torch.float32}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_bf16_learns_as_fp32_does(optimizer: str, computes: object, tmp_path: Path, text_file: Path) -> None:
    losses = []
    for here in (True, False):
        computes(here)  # type: ignore[operator]
        folder = tmp_path / str(here)
        trained(layer(folder, text_file, training__max_steps=60, training__optimizer=optimizer))
        losses.append([line["loss"] for line in logged(folder)])
    in_bf16, in_fp32 = losses
    assert in_bf16 != in_fp32
    assert in_fp32[-1] < in_fp32[0] - 1
    assert in_bf16 == pytest.approx(in_fp32, rel=0.02)


@pytest.mark.parametrize(("before", "precision"), [(True, "bf16"), (False, "fp32")])
def test_a_run_keeps_its_precision(
    before: bool, precision: str, computes: object, tmp_path: Path, text_file: Path
) -> None:
    """A run in fp32 keeps fp32 on a processor with bf16, and a line names the option. A run in bf16 continues without
    it, with one line."""
    folder = tmp_path / "run"
    computes(before)  # type: ignore[operator]
    trained(layer(folder, text_file, training__max_steps=2))
    computes(True)  # type: ignore[operator]
    trained(layer(folder, text_file, training__max_steps=4))
    assert load_checkpoint(folder / "atlas_step_4.pt")["machine"]["precision"] == precision
    log = (folder / "training.log").read_text()
    assert "when saved" not in log
    hint = "fp32, as when the run was saved; to train in bf16, add --set training.precision=bf16"
    assert log.count(hint) == (0 if before else 1)
    computes(False)  # type: ignore[operator]
    trained(layer(folder, text_file, training__max_steps=6))
    saved = load_checkpoint(folder / "atlas_step_6.pt")
    assert saved["machine"]["precision"] == "fp32"
    assert saved["config"]["training"]["precision"] == "auto"
    log = (folder / "training.log").read_text()
    line = "precision: bf16 when saved, fp32 here (this CPU lacks bf16 arithmetic, and would be slower than in fp32)"
    assert log.count(line) == (1 if before else 0)


def test_a_precision_that_was_set_is_refused_only_where_it_is_set_anew(
    computes: object, tmp_path: Path, text_file: Path
) -> None:
    folder = tmp_path / "run"
    computes(True)  # type: ignore[operator]
    trained(layer(folder, text_file, training__max_steps=2, training__precision="bf16"))
    computes(False)  # type: ignore[operator]
    trained(layer(folder, text_file, training__max_steps=4))
    assert load_checkpoint(folder / "atlas_step_4.pt")["machine"]["precision"] == "fp32"
    with pytest.raises(AtlasError, match=r"lacks bf16 arithmetic, .* use fp32 or auto"):
        trained(layer(tmp_path / "new", text_file, training__precision="bf16"))
    computes(True)  # type: ignore[operator]
    trained(layer(folder, text_file, training__max_steps=6, training__precision="auto"))
    assert load_checkpoint(folder / "atlas_step_6.pt")["machine"]["precision"] == "bf16"


def test_an_apple_gpu_has_half_precision_but_no_weights_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    mps = torch.device("mps")
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda major, minor: True)
    reasons = {name: why_not_in(name, mps) for name in ("fp32", "fp16", "bf16", "bf16-true")}
    assert reasons == {"fp32": None, "fp16": None, "bf16": None, "bf16-true": "is not supported on mps"}
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda major, minor: False)
    assert why_not_in("bf16", mps) == "needs macOS 14"


@pytest.mark.skipif(not torch.backends.mps.is_available(), reason="needs an Apple GPU")
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_on_an_apple_gpu_learns_as_fp32_does(
    precision: str, tmp_path: Path, text_file: Path
) -> None:
    losses = []
    for name in (precision, "fp32"):
        folder = tmp_path / name
        explicit = layer(folder, text_file, training__max_steps=30, training__precision=name)
        trained(explicit | {"device": "mps"})
        losses.append([line["loss"] for line in logged(folder)])
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


@pytest.mark.slow
@pytest.mark.skipif(
    "avx512_bf16" not in machine.cpu_info() and "amx_bf16" not in machine.cpu_info(),
    reason="this CPU does not compute in bf16",
)
def test_a_killed_run_in_the_bf16_of_this_cpu_has_the_same_bits(tmp_path: Path, text_file: Path) -> None:
    """In processes of their own, whose oneDNN may use all instructions."""
    environment = {"ONEDNN_MAX_CPU_ISA": "DEFAULT"}
    folders = [tmp_path / name for name in ("whole", "killed")]
    config = write_config(
        tmp_path / "config.yaml",
        layer(folders[0], text_file, training__max_steps=40, checkpoint__save_interval=10),
    )
    assert start_process(config, **environment).wait() == 0
    to_killed = ["--output-dir", str(folders[1])]
    process = start_process(config, *to_killed, **environment)
    while not (folders[1] / "atlas_step_20.json").exists():
        assert process.poll() is None
    process.kill()
    process.wait()
    assert not (folders[1] / "atlas_step_40.json").exists()
    assert start_process(config, *to_killed, "--resume", "auto", **environment).wait() == 0
    whole, resumed = (load_checkpoint(folder / "atlas_step_40.pt") for folder in folders)
    assert whole["machine"]["precision"] == resumed["machine"]["precision"] == "bf16"
    assert os.environ["ONEDNN_MAX_CPU_ISA"] != "DEFAULT"
    for name, tensor in whole["model_state_dict"].items():
        assert torch.equal(tensor, resumed["model_state_dict"][name]), name
