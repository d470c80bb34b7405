"""`atlas doctor`: its facts against other sources, what is broken on purpose is found, and nothing stays behind."""

from __future__ import annotations

import functools
import json
import os
import platform
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import psutil
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from atlas.cli import doctor_facts, main
from atlas.model.mlp import MLP
from atlas.planning import doctor as probes
from atlas.planning.doctor import Effort, time_attention, try_compile, working_attention
from atlas.training.devices.device import Runtime
from tests.runs import layer, run_for

LITTLE = Effort(seconds=0.01, matrix_size=64, copied=100_000, disk=100_000, compile_seconds=0.01)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _little_effort(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In an empty folder, with the system's temporary files in another."""
    (tmp_path / "here").mkdir()
    (tmp_path / "temporary").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr(doctor_facts, "examine", functools.partial(doctor_facts.examine, effort=LITTLE))


@pytest.fixture(scope="module")
def healthy() -> dict[str, Any]:
    """The facts of this machine, by the CPU."""
    with tempfile.TemporaryDirectory() as folder:
        return doctor_facts.examine("cpu", Path(folder, "not/there/yet"), LITTLE)


def doctor(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    """The exit code, and the facts as a strict reader of JSON sees them."""
    code = main(["doctor", "--json", "--device", "cpu", *arguments])
    output, errors = capsys.readouterr()
    assert errors == ""
    return code, json.loads(output, parse_constant=pytest.fail)


def only_problem(facts: dict[str, Any]) -> str:
    (problem,) = facts["problems"]
    return f"{problem['value']}: {problem['reason']}; {problem['remedy']}"


def test_the_facts_are_those_of_other_sources(healthy: dict[str, Any]) -> None:
    versions, machine = healthy["versions"], healthy["machine"]
    assert versions["torch"] == torch.__version__
    assert versions["cuda"] == torch.version.cuda
    assert versions["python"] == platform.python_version()
    assert versions["numpy"] == numpy.__version__
    assert machine["cpu_count"] == os.cpu_count()
    assert machine["memory_total"] == psutil.virtual_memory().total
    assert 0 < machine["memory_available"] <= machine["memory_total"]
    assert healthy["matrix_products"]["fp32"] > 0
    assert healthy["precision"]["fp32"]["product_times_fp32"] == 1
    assert healthy["copy"] > 0
    assert healthy["disk"]["write"] > 0
    assert healthy["attention_times"] is None
    assert healthy["problems"] == []


def test_the_optional_packages_are_those_of_the_extras(healthy: dict[str, Any]) -> None:
    safetensors = pytest.importorskip("safetensors")
    extras = healthy["versions"]["extras"]
    assert extras["hf"]["safetensors"] == safetensors.__version__
    assert "llama" in extras
    assert "dev" not in extras


def test_it_reports_what_a_run_uses(healthy: dict[str, Any], tmp_path: Path, text_file: Path) -> None:
    runtime = run_for(layer(tmp_path / "run", text_file, device="cpu")).runtime
    assert healthy["train"]["device"] == runtime.device.type
    assert healthy["train"]["precision"] == runtime.precision
    assert healthy["precision"][runtime.precision]["refusal"] is None


def test_the_screen_shows_the_same_facts(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--device", "cpu"]) == 0
    output, errors = capsys.readouterr()
    assert errors == ""
    for word in (torch.__version__, "Precision", "TFLOP/s", "attention", "compile", "MB/s", "--device cpu"):
        assert word in output
    assert output.endswith("Nothing to fix\n")
    assert len(output.splitlines()) < 40


def without_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "_COMPILED", "import sys; sys.exit('no compiler found')")
    effort = replace(LITTLE, compile_seconds=60)
    monkeypatch.setattr(doctor_facts, "examine", functools.partial(doctor_facts.examine, effort=effort))


def without_fp16(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU training does not take fp16 in any case."""

    def step(runtime: Runtime, *others: Any, **options: Any) -> dict[str, Any]:
        if runtime.dtype == torch.float16:
            raise RuntimeError('"addmm" not implemented for Half')
        return check_step(runtime, *others, **options)

    check_step = probes.check_step
    monkeypatch.setattr(doctor_facts, "check_step", step)


def with_wrong_fp16(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong_mlp(monkeypatch, torch.float16, 0.1)


@pytest.mark.parametrize(
    ("absent", "row"),
    [
        (lambda _: None, "attention         flash, math; not available: efficient, cudnn"),
        (without_compiler, "compile           not available: no compiler found; training runs without it"),
        (
            without_fp16,
            'fp16              not available: "addmm" not implemented for Half, and training does not use',
        ),
        (
            with_wrong_fp16,
            "fp16              wrong, and training does not use it (a CPU has no fast arithmetic for it): ",
        ),
    ],
)
def test_the_verdict_agrees_with_the_rows(
    absent: Callable[[pytest.MonkeyPatch], None],
    row: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What is optional and absent is not available, for a reason; nothing that "does not work" is left unfixed."""
    absent(monkeypatch)
    assert main(["doctor", "--device", "cpu"]) == 0
    output = capsys.readouterr().out
    assert f"\n  {row}" in output
    assert output.endswith("\nNothing to fix\n")
    for contradiction in ("does not work", "does not compute", "WRONG", "cannot be written"):
        assert contradiction not in output


def test_nothing_stays_behind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, facts = doctor(capsys, "--output-dir", "not/there/yet")
    assert code == 0
    assert facts["disk"]["folder"] == str(tmp_path / "here")
    assert facts["machine"]["cpu_threads"] == torch.get_num_threads()
    assert list((tmp_path / "here").iterdir()) == []
    assert list((tmp_path / "temporary").iterdir()) == []


@pytest.mark.skipif(os.name == "nt", reason="Windows removes the file when it is closed")
def test_the_file_has_no_name_while_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a kill leaves nothing, either."""
    seen = []
    sync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (seen.append(os.listdir(tmp_path / "here")), sync(file)))
    probes.measure_disk(tmp_path / "here", size=1000)
    assert seen == [[]]


def wrong_mlp(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, factor: float) -> None:
    """A matrix product that is off by `factor` in one precision."""
    right = MLP.forward

    def forward(self: MLP, x: Tensor) -> Tensor:
        computed = right(self, x)
        return computed * factor if computed.dtype == dtype else computed

    monkeypatch.setattr(MLP, "forward", forward)


@pytest.mark.parametrize("factor", [0.9, float("nan")])
def test_a_precision_that_computes_wrong_numbers_is_found(
    factor: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong_mlp(monkeypatch, torch.float32, factor)
    code, facts = doctor(capsys)
    assert code == 1
    assert [name for name, step in facts["precision"].items() if not step["right"]] == ["fp32"]
    assert only_problem(facts).startswith("precision fp32: computes wrong numbers on cpu")
    assert main(["doctor", "--device", "cpu"]) == 1
    assert "WRONG" in capsys.readouterr().out


@pytest.mark.parametrize("offered", [True, False])
def test_wrong_numbers_matter_where_training_would_take_them(
    offered: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("atlas.training.devices.device.cpu_computes_in_bf16", lambda: offered)
    wrong_mlp(monkeypatch, torch.bfloat16, 0.1)
    code, facts = doctor(capsys)
    assert not facts["precision"]["bf16"]["right"]
    assert facts["machine"]["cpu_bf16"] == offered
    assert code == int(offered)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_attention_that_sees_the_future_is_found(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    attend = F.scaled_dot_product_attention

    def leaking(query: Tensor, *others: Tensor, is_causal: bool, **options: Any) -> Tensor:
        return attend(query, *others, is_causal=query.dtype == torch.float64, **options)

    assert doctor_facts._precision(CPU, precision, LITTLE)["right"]
    monkeypatch.setattr(F, "scaled_dot_product_attention", leaking)
    monkeypatch.setattr("atlas.model.attention.attend_in_blocks", attend)  # not causal
    assert not doctor_facts._precision(CPU, precision, LITTLE)["right"]


def test_a_folder_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("river.txt").write_text("water", encoding="utf-8")
    code, facts = doctor(capsys, "--output-dir", "river.txt/run")
    assert code == 1
    assert only_problem(facts).startswith("--output-dir river.txt")
    assert "choose another --output-dir" in only_problem(facts)
    assert os.listdir() == ["river.txt"]


def test_a_full_disk(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    usage = psutil.disk_usage(".")._replace(free=LITTLE.disk)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: usage)
    code, facts = doctor(capsys)
    assert code == 1
    assert "No space left on device" in only_problem(facts)


def test_less_memory_than_the_smallest_preset_needs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor_facts, "measure_memory", lambda device: 2**28)
    code, facts = doctor(capsys)
    assert code == 1
    assert only_problem(facts).startswith("0.25 GiB of memory free on cpu: nano")


def test_a_wheel_without_cuda_beside_a_driver(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor_facts, "cpu_only_build_with_nvidia_driver", lambda: True)
    code, facts = doctor(capsys)
    assert code == 1
    assert "install the CUDA build" in only_problem(facts)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    ("newest", "hidden", "says"),
    [
        (
            "11.4",
            None,
            "supports CUDA up to 11.4, but this PyTorch is built with CUDA 13.0; update the driver",
        ),
        ("13.1", None, "PyTorch sees no CUDA device; check the GPU with nvidia-smi"),
        ("11.4", "", ""),
    ],
)
def test_a_driver_that_pytorch_cannot_use(
    newest: str, hidden: str | None, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor_facts, "cpu_only_build_with_nvidia_driver", lambda: False)
    monkeypatch.setattr(doctor_facts, "nvidia_driver", lambda: ("470.82", newest))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if hidden is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    problems = doctor_facts._wheel_and_driver()
    if says:
        assert only_problem({"problems": problems}).startswith("NVIDIA driver 470.82: ")
        assert says in only_problem({"problems": problems})
    else:
        assert problems == []


def test_a_device_that_fails_leaves_the_other_facts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = [doctor_facts.measure_memory("cpu")]  # of main memory; the device's comes second

    def failing(device: str) -> int:
        if not answers:
            raise RuntimeError("CUDA error: out of memory\nand more")
        return answers.pop()

    monkeypatch.setattr(doctor_facts, "measure_memory", failing)
    code, facts = doctor(capsys)
    assert code == 1
    assert "does not compute (CUDA error: out of memory)" in only_problem(facts)
    assert facts["disk"]["write"] > 0
    assert "precision" not in facts


def test_attention_kernels_of_a_cpu() -> None:
    assert working_attention(CPU, torch.float32) == {
        "flash": True,
        "efficient": False,
        "cudnn": False,
        "math": True,
    }


def test_attention_is_timed_by_kernel_and_the_one_that_pytorch_chooses_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a CPU, where `doctor` does not do so, since nothing is to be chosen."""
    monkeypatch.setattr(probes, "_ATTENTION", {"batch": 1, "heads": 2, "tokens": 16, "head_size": 8})
    times = time_attention(CPU, torch.float32, seconds=0.001)
    assert times["chosen"] == "flash"
    assert times["seconds"].keys() == {"flash", "math"}
    assert all(seconds > 0 for seconds in times["seconds"].values())


@pytest.mark.parametrize(
    ("chosen", "seconds", "says"),
    [
        ("flash", {"flash": 1e-3, "math": 9e-3}, "flash, chosen by PyTorch; "),
        ("flash", {"flash": 1e-3, "cudnn": 0.95e-3}, "flash, chosen by PyTorch; "),
        (
            "flash",
            {"flash": 1.5e-3, "cudnn": 1e-3},
            "flash, chosen by PyTorch, although cudnn is 1.5 times as fast; ",
        ),
        (None, {"math": 9e-3}, "an unknown kernel, chosen by PyTorch; "),
    ],
)
def test_a_kernel_that_is_clearly_faster_is_named(
    chosen: str | None,
    seconds: dict[str, float],
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shape = {"batch": 4, "heads": 12, "tokens": 1024, "head_size": 64}
    times = {"chosen": chosen, "seconds": seconds, "shape": shape}
    monkeypatch.setattr(doctor_facts, "_attention_times", lambda device, effort: times)
    assert main(["doctor", "--device", "cpu"]) == 0
    [row] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  attention time")]
    assert row.startswith(
        f"  attention time    {says}forward and backward of 4 × 1,024 tokens, 12 heads of 64: "
    )
    for name, each in seconds.items():
        assert f"{name} {each * 1e3:.2f} ms" in row


def test_a_compiler_that_takes_too_long_is_stopped() -> None:
    check = try_compile(CPU, seconds=0.01)
    assert check["reason"] == "did not finish in 0.01 seconds"


@pytest.mark.parametrize(
    ("ending", "reason"),
    [
        ("pass", None),
        ("sys.exit('no compiler found')", "no compiler found"),
        ("sys.exit(3)", "exit code 3"),
    ],
)
def test_why_compiling_failed_is_one_line(
    ending: str, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probes, "_COMPILED", f"import sys; {ending}")
    assert try_compile(CPU, seconds=60)["reason"] == reason


@pytest.mark.slow
def test_a_compiler_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    reason = try_compile(CPU, seconds=120)["reason"]
    assert reason is not None
    assert "compiler" in reason


@pytest.mark.slow
def test_a_compiler_that_works() -> None:
    assert try_compile(CPU, seconds=120)["reason"] is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is here")
def test_on_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["doctor", "--json", "--device", "cuda"])
    facts = json.loads(capsys.readouterr().out)
    assert code == 0, facts["problems"]
    assert facts["machine"]["gpus"][0]["name"] == torch.cuda.get_device_name()
    assert facts["machine"]["nvidia_driver"]
    assert facts["precision"]["fp32"]["right"]
    assert facts["precision"][facts["train"]["precision"]]["right"]
    assert facts["attention"]["math"]
    assert facts["attention_times"]["chosen"] in facts["attention_times"]["seconds"]
