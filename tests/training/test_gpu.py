"""What only a CUDA device can show: `pytest -m gpu`.

The runs are not compiled, but for the one test of it: compiling takes longer than all of them. A head is 16 wide, the
least that FlexAttention takes.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from atlas.config import GuardConfig
from atlas.inference.generate import generate
from atlas.inference.load import load_model
from atlas.inference.sampling import Sampling
from atlas.training.checkpoint.async_saver import Snapshot
from atlas.training.checkpoint.load import load_checkpoint
from atlas.training.devices.gpu_temperature import open_sensor
from atlas.training.step import apply_gradient
from atlas.training.train import train
from tests import runs
from tests.runs import gradient_of, logged, on_updates, run_for, same_bits, trained, update

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is here"),
]


def layer(folder: Path, text: Path, **settings: object) -> dict:
    """A small run on the GPU, with these `settings`."""
    shape = {"device": "cuda", "model__hidden_size": 32, "model__num_heads": 2, "training__compile": "off"}
    return runs.layer(folder, text, **shape | settings)


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in logged(folder)]


def test_fp32_on_the_gpu_follows_the_cpu(tmp_path: Path, text_file: Path) -> None:
    for device in ("cpu", "cuda"):
        trained(layer(tmp_path / device, text_file, device=device, training__precision="fp32"))
    assert losses(tmp_path / "cuda") == pytest.approx(losses(tmp_path / "cpu"), rel=1e-4)


@pytest.mark.parametrize("precision", ["bf16", "bf16-true", "fp16"])
def test_half_precision_learns_and_resumes(tmp_path: Path, text_file: Path, precision: str) -> None:
    options = {"training__precision": precision, "training__max_steps": 40, "checkpoint__save_interval": 20}
    explicit = layer(tmp_path / "run", text_file, **options, model__dropout=0.1)
    trained(explicit)
    uninterrupted = losses(tmp_path / "run")
    assert uninterrupted[-1] < uninterrupted[0] - 1
    trained(explicit, resume=str(tmp_path / "run" / "atlas_step_20.pt"))
    # A GPU adds up in no fixed order; noise of 0.1 % in the gradient moves these losses by 0.4 % at most.
    assert losses(tmp_path / "run") == pytest.approx(uninterrupted, rel=2e-2)


def test_a_gpu_checkpoint_speaks_and_resumes_on_the_cpu(tmp_path: Path, text_file: Path) -> None:
    explicit = layer(tmp_path / "run", text_file, training__max_steps=10)
    trained(explicit)
    texts = []
    for device in ("cuda", "cpu"):
        loaded = load_model(
            tmp_path / "run" / "atlas_best.pt", device=device, tokenizer="tests.toy:tokenizer"
        )
        steps = list(generate(loaded.model, [[84, 104, 101]], Sampling(temperature=0), max_tokens=40))
        texts.append([step[0] for step in steps])
    assert texts[0] == texts[1]
    on_cpu = layer(tmp_path / "run", text_file, device="cpu", training__max_steps=12)
    assert trained(on_cpu)[1].step == 12


@pytest.mark.parametrize("dtype", ["f16", "auto"])
def test_half_precision_weights_give_nearly_the_same(tmp_path: Path, text_file: Path, dtype: str) -> None:
    trained(layer(tmp_path / "run", text_file, training__max_steps=10))
    log_probs = []
    for kind in ("f32", dtype):
        loaded = load_model(
            tmp_path / "run" / "atlas_best.pt", device="cuda", tokenizer="tests.toy:tokenizer", dtype=kind
        )
        with torch.inference_mode():
            logits = loaded.model(torch.tensor([[84, 104, 101]], device="cuda"))
        log_probs.append(logits.float().log_softmax(-1))
        assert len(list(generate(loaded.model, [[84]], Sampling(temperature=0), max_tokens=40))) == 40
    assert logits.dtype in (torch.float16, torch.bfloat16)
    torch.testing.assert_close(log_probs[1], log_probs[0], atol=0.05, rtol=0)


def test_a_save_in_the_background_holds_the_state_of_its_step(tmp_path: Path, text_file: Path) -> None:
    options = {"checkpoint__background": True, "checkpoint__save_interval": 2}
    run = run_for(layer(tmp_path / "run", text_file, **options))
    states = []

    def remember() -> None:
        states.append({name: tensor.to("cpu", copy=True) for name, tensor in run.model.state_dict().items()})

    on_updates(run, after=remember)
    train(run)
    assert (tmp_path / "run" / "atlas_step_6.pt").exists()
    for step, state in enumerate(states, start=1):
        path = tmp_path / "run" / f"atlas_step_{step}.pt"
        if path.exists():  # a save is left out while the one before is being written
            assert same_bits(load_checkpoint(path)["model_state_dict"], state), f"step {step}"


def test_the_copy_is_in_pinned_memory_and_complete() -> None:
    state = {"weight": torch.randn(1000, 1000, device="cuda"), "step": torch.tensor(3.0)}
    copied = Snapshot().take(state)
    assert copied["weight"].is_pinned()
    assert torch.equal(copied["weight"], state["weight"].cpu())


def test_an_update_that_is_not_finite_moves_nothing_on_the_device(tmp_path: Path, text_file: Path) -> None:
    run = run_for(layer(tmp_path / "run", text_file, training__precision="fp32"))
    batches = run.batches()
    assert update(run, *next(batches)).fault is None
    before = copy.deepcopy((run.model.state_dict(), run.optimizer.state_dict()["state"]))
    gradient = gradient_of(run, next(batches))
    gradient = replace(gradient, loss=gradient.loss * float("nan"))
    assert apply_gradient(run.learner, gradient, run.state, rate=1e-3).fault is not None
    assert same_bits(before, (run.model.state_dict(), run.optimizer.state_dict()["state"]))


def test_a_run_adapts_to_a_full_gpu(tmp_path: Path, text_file: Path) -> None:
    """No injected error: the allocator may have 2 GB, and a micro-batch of 256 sequences needs several times that."""
    explicit = layer(tmp_path / "run", text_file, training__batch_size=256, training__max_steps=2)
    explicit["model"].update(hidden_size=256, num_layers=8, max_seq_len=256)
    explicit["training"].update(eval_sequences=2, precision="fp32")
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(2e9 / total)
    try:
        run, result = trained(explicit)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert result.step == 2
    assert run.state.micro_batch_size < 256
    assert run.state.sequences_consumed == 512


def test_the_temperature_of_the_card_is_read() -> None:
    sensor = open_sensor(torch.device("cuda"), GuardConfig(max_gpu_temp=83), say=pytest.fail)
    assert sensor is not None
    metrics = sensor.read().metrics()
    assert 10 <= metrics["gpu_temperature"] <= 110
    assert metrics["gpu_power"] > 0
    assert isinstance(metrics["gpu_throttle"], list)


def test_the_document_mask_on_the_gpu_follows_the_cpu(tmp_path: Path) -> None:
    """There FlexAttention computes, compiled, forward and backward; here one mask in SDPA."""
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(40):  # several documents in a sequence of two of FlexAttention's blocks
        words = " ".join(str(number * place) for place in range(1, 30 + number % 11))
        (texts / f"{number:02}.txt").write_text(words, encoding="utf-8")
    for device in ("cpu", "cuda"):
        options = {"device": device, "training__precision": "fp32", "model__max_seq_len": 256}
        trained(layer(tmp_path / device, texts, **options, data__document_mask=True))
    assert losses(tmp_path / "cuda") == pytest.approx(losses(tmp_path / "cpu"), rel=1e-4)


def test_a_compiled_run_follows_one_that_is_not(tmp_path: Path, text_file: Path) -> None:
    """Its evaluations and its last, smaller micro-batch, too."""
    for compiled in ("off", "on"):
        explicit = layer(
            tmp_path / compiled, text_file, training__precision="fp32", training__compile=compiled
        )
        explicit["training"].update(batch_size=5, micro_batch_size=3, eval_interval=3)
        trained(explicit)
    assert losses(tmp_path / "on") == pytest.approx(losses(tmp_path / "off"), rel=1e-4)
    on, off = ([line["val_loss"] for line in logged(tmp_path / name, "validation")] for name in ("on", "off"))
    assert len(on) == 2
    assert on == pytest.approx(off, rel=1e-4)
