"""Loss, schedule, order of work: each against its definition, another implementation, or one big batch."""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from atlas.config import ModelConfig, TrainingConfig
from atlas.config.loader import nested, overlay, resolve
from atlas.data import IGNORE_INDEX
from atlas.errors import AtlasError
from atlas.model import AtlasLM, build_model
from atlas.training.devices.device import choose_device, seed_micro_step, setup_runtime
from atlas.training.loss import SummedLoss, compute_lm_loss, linear_cross_entropy, load_loss
from atlas.training.optimizers.build import build_optimizer
from atlas.training.schedule import horizon_steps, learning_rate_at
from atlas.training.train import train
from tests.runs import layer, logged, run_for, trained, update

# Loss.


def test_loss_is_cross_entropy_over_the_tokens_that_count() -> None:
    logits, targets = torch.randn(3, 7, 11), torch.randint(0, 11, (3, 7))
    mask = torch.rand(3, 7) > 0.4
    counted = [-logits[b, t].log_softmax(-1)[targets[b, t]] for b in range(3) for t in range(7) if mask[b, t]]
    torch.testing.assert_close(compute_lm_loss(logits, targets, mask), torch.stack(counted).mean())
    ignored = targets.masked_fill(~mask, IGNORE_INDEX)
    torch.testing.assert_close(compute_lm_loss(logits, ignored), torch.stack(counted).mean())


def test_loss_of_no_token_is_zero_with_zero_gradient() -> None:
    logits = torch.randn(2, 3, 5, requires_grad=True)
    loss = compute_lm_loss(logits, torch.full((2, 3), IGNORE_INDEX))
    loss.backward()
    assert loss.item() == 0
    assert not logits.grad.any()


def differentiated(loss: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    """The loss and its gradients, times 3."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    value = loss(*leaves)
    (3 * value).backward()
    return [value.detach(), *(leaf.grad for leaf in leaves)]


@settings(deadline=None, max_examples=60)
@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 9)),
    width=st.integers(1, 12),
    vocabulary=st.integers(1, 40),
    padding=st.integers(0, 5),
    chunk=st.integers(1, 20),
    ignored=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_loss_in_chunks_is_the_loss_on_all_logits(
    shape: tuple[int, int],
    width: int,
    vocabulary: int,
    padding: int,
    chunk: int,
    ignored: float,
    seed: int,
) -> None:
    """Rows that only pad the table have no part in it, and no gradient."""
    torch.manual_seed(seed)
    hidden, weight = torch.randn(*shape, width), torch.randn(vocabulary + padding, width)
    targets = torch.randint(0, vocabulary, shape).masked_fill(torch.rand(shape) < ignored, IGNORE_INDEX)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("atlas.training.loss.LOSS_CHUNK_TOKENS", chunk)
        chunked = differentiated(
            lambda h, w: linear_cross_entropy(h, w, targets, vocabulary=vocabulary), hidden, weight
        )
    complete = differentiated(
        lambda h, w: F.cross_entropy(
            (h @ w[:vocabulary].T).flatten(0, 1), targets.flatten(), reduction="sum"
        ),
        hidden,
        weight,
    )
    for ours, reference in zip(chunked, complete, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-5)


def test_loss_in_chunks_in_half_precision() -> None:
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(2, 7, 8), torch.randn(11, 8), torch.randint(0, 11, (2, 7))
    exact = differentiated(lambda h, w: linear_cross_entropy(h, w, targets), hidden, weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = differentiated(lambda h, w: linear_cross_entropy(h, w, targets), hidden, weight)
    assert {tensor.dtype for tensor in rounded} == {torch.float32}
    for ours, reference in zip(rounded, exact, strict=True):
        assert 0 < (ours - reference).norm() < 0.02 * reference.norm()


def test_loss_in_chunks_in_half_precision_is_computed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some rows of probabilities, and some rows of the head's gradient, at a time: the numbers stay the same."""
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(2, 7, 8), torch.randn(11, 8), torch.randint(0, 9, (2, 7))

    def rounded() -> list[Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return differentiated(
                lambda h, w: linear_cross_entropy(h, w, targets, vocabulary=9), hidden, weight
            )

    at_once = rounded()
    monkeypatch.setattr("atlas.training.loss.LOSS_CACHED_ROWS", 3)
    monkeypatch.setattr("atlas.training.loss._PRODUCT_ROWS", 4)
    for parts, whole in zip(rounded(), at_once, strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_loss_of_a_probability_too_small_for_fp32_is_right(dtype: torch.dtype) -> None:
    hidden, weight = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[500.0, 0.0], [0.0, 1.0]])
    loss = linear_cross_entropy(hidden.to(dtype), weight.to(dtype), torch.tensor([[1]]))
    assert float(loss) == pytest.approx(500)


@pytest.mark.parametrize("tied", [True, False])
def test_tables_give_the_gradients_of_the_logits(tied: bool, tiny_config: ModelConfig) -> None:
    """Of two micro-batches, and with tokens that occur several times."""
    model = build_model(tiny_config.model_copy(update={"tie_embeddings": tied}), seed=0)
    batches = torch.randint(0, 9, (2, 2, 3, 7))
    gradients = []
    for loss in (SummedLoss(model), lambda x, y: compute_lm_loss(model(x), y, reduction="sum")):
        model.zero_grad()
        for inputs, targets in batches:
            loss(inputs, targets).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-6, msg=name)
    with torch.no_grad():
        assert float(SummedLoss(model)(*batches[0])) == pytest.approx(float(loss(*batches[0])), rel=1e-5)


def test_loss_in_chunks_is_differentiable_once_and_not_without_need() -> None:
    hidden, weight, targets = torch.randn(1, 3, 4), torch.randn(5, 4), torch.tensor([[1, 2, 3]])
    assert not linear_cross_entropy(hidden, weight, targets).requires_grad
    weight.requires_grad_()
    with torch.no_grad():
        assert not linear_cross_entropy(hidden, weight, targets).requires_grad
    loss = linear_cross_entropy(hidden, weight, targets)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward pass"):
        loss.backward()


PEAK_OF_LOSS = """
import sys, torch
from atlas.training.loss import compute_lm_loss, linear_cross_entropy

def peak():
    status = dict(line.split(":", 1) for line in open("/proc/self/status", encoding="utf-8"))
    return int(status["VmHWM"].split()[0]) * 1024

N, V, C = 2048, 50304, 64
hidden = torch.randn(1, N, C, requires_grad=True)
weight = torch.randn(V, C, requires_grad=True)
targets = torch.randint(0, V, (1, N))
linear_cross_entropy(hidden[:, :1], weight, targets[:, :1]).backward()  # what is loaded at the first use
weight.grad = None
before = peak()
if sys.argv[1] == "chunks":
    linear_cross_entropy(hidden, weight, targets).backward()
else:
    compute_lm_loss(hidden @ weight.T, targets).backward()
print((peak() - before) / (N * V * 4))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is to be had from /proc only")
def test_loss_in_chunks_never_holds_the_logits() -> None:
    """In units of the logits' size: 412 MB."""

    def peak(kind: str) -> float:
        run = [sys.executable, "-c", PEAK_OF_LOSS, kind]
        return float(subprocess.run(run, check=True, capture_output=True, text=True).stdout)

    assert peak("complete") > 2
    assert peak("chunks") < 0.5


@settings(deadline=None, max_examples=8)
@given(data=st.data())
def test_micro_batches_make_the_same_gradient_as_one_batch(tmp_path_factory, data: st.DataObject) -> None:
    """Whatever the split and the padding: sum over valid tokens ÷ valid tokens of the whole update."""
    folder = tmp_path_factory.mktemp("micro")
    text = folder / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 40, encoding="utf-8")
    sequences = data.draw(st.integers(2, 9))
    micro = data.draw(st.integers(1, sequences))
    padded = data.draw(st.lists(st.integers(0, 16), min_size=sequences, max_size=sequences))
    gradients = []
    for size in (sequences, micro):
        run = run_for(layer(folder / str(size), text, training__batch_size=sequences), no_resume=True)
        run.state.micro_batch_size = size
        run.optimizer.step = lambda: None  # keep the gradients of the first update
        run.optimizer.zero_grad = lambda **how: None
        run.config.training.__dict__["grad_clip"] = 0.0
        inputs, targets = next(run.batches())
        for row, count in enumerate(padded):
            targets[row, 16 - count :] = IGNORE_INDEX
        assert update(run, inputs, targets)
        gradients.append({name: p.grad for name, p in run.model.named_parameters()})
    for name, one in gradients[0].items():
        assert (one - gradients[1][name]).abs().max() <= 1e-5 * one.abs().max() + 1e-12, name


def half_loss(logits: torch.Tensor, targets: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    return 0.5 * compute_lm_loss(logits, targets, mask)


def test_a_custom_loss_is_a_mean_that_the_loop_weights_by_tokens(tmp_path: Path, text_file: Path) -> None:
    options = {"training__micro_batch_size": 3, "training__grad_clip": 0}
    trained(layer(tmp_path / "a", text_file, training__loss=f"{__name__}:half_loss", **options))
    trained(layer(tmp_path / "b", text_file, **options))
    for half, complete in zip(logged(tmp_path / "a"), logged(tmp_path / "b"), strict=True):
        # Adam does not see the scale of the loss, so the weights move alike.
        assert half["loss"] == pytest.approx(complete["loss"] / 2, rel=1e-3)


@pytest.mark.parametrize(
    "wrong", ["nowhere", "no.such.module:f", f"{__name__}:no_such", f"{__name__}:__doc__"]
)
def test_a_custom_loss_that_is_not_there_is_refused(wrong: str) -> None:
    with pytest.raises(AtlasError, match=r"training\.loss"):
        load_loss(wrong)


# Schedule and optimizer.


def test_schedule_equals_pytorch_s_own() -> None:
    config = TrainingConfig(learning_rate=2e-3, warmup_steps=10, min_learning_rate_ratio=0.1)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2e-3)
    warm = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=9)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=90, eta_min=2e-4)
    for step in range(100):
        assert learning_rate_at(step, config, 100) == pytest.approx(
            optimizer.param_groups[0]["lr"], rel=1e-9
        ), step
        optimizer.step()
        if step < 9:
            warm.step()
        elif step >= 10:
            cosine.step()


@pytest.mark.parametrize(
    ("schedule", "fraction", "decay"), [("linear", 0.2, 90), ("wsd", 0.25, 25), ("wsd", 1.0, 90)]
)
def test_linear_and_wsd_are_transformers_after_warm_up(schedule: str, fraction: float, decay: int) -> None:
    from transformers import get_wsd_schedule

    config = TrainingConfig(
        learning_rate=2e-3,
        warmup_steps=10,
        min_learning_rate_ratio=0.1,
        schedule=schedule,
        decay_fraction=fraction,
    )
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2e-3)
    theirs = get_wsd_schedule(
        optimizer,
        num_warmup_steps=10,
        num_decay_steps=decay,
        num_training_steps=100,
        min_lr_ratio=0.1,
        decay_type="linear",
    )
    for step in range(105):
        if step >= 10:
            assert learning_rate_at(step, config, 100) == pytest.approx(theirs.get_last_lr()[0], rel=1e-9), (
                step
            )
        optimizer.step()
        theirs.step()


@given(
    st.integers(1, 50),
    st.integers(1, 9),
    st.integers(1, 4),
    st.none() | st.integers(1, 5),
    st.none() | st.integers(1, 99),
)
def test_horizon_is_the_smaller_of_epochs_and_steps(
    sequences: int, batch: int, accumulation: int, epochs: int | None, steps: int | None
) -> None:
    config = TrainingConfig(
        batch_size=batch, gradient_accumulation_steps=accumulation, epochs=epochs, max_steps=steps
    )
    end = horizon_steps(config, sequences)
    per_update = batch * accumulation
    wanted = (epochs or (None if steps else 1)) and (epochs or 1) * sequences
    assert steps is None or end <= steps
    if wanted is None:
        assert end == steps
    elif end != steps:
        assert (end - 1) * per_update < wanted <= end * per_update


def test_matrices_decay_and_the_rest_does_not(tiny_model: AtlasLM) -> None:
    optimizer = build_optimizer(tiny_model, TrainingConfig(weight_decay=0.3))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in tiny_model.named_parameters():
        assert decay[id(parameter)] == (0.3 if parameter.dim() == 2 else 0.0), name


# Runtime.


def test_a_device_or_precision_that_is_not_there_is_refused() -> None:
    if not torch.cuda.is_available():
        with pytest.raises(AtlasError, match="--device cpu"):
            choose_device("cuda")
    with pytest.raises(AtlasError, match="a CPU has no fast arithmetic for it"):
        setup_runtime(resolve({"device": "cpu", "training": {"precision": "fp16"}}))


def test_bf16_is_refused_on_a_cpu_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    with pytest.raises(AtlasError, match="lacks bf16"):
        setup_runtime(resolve({"device": "cpu", "training": {"precision": "bf16"}}))
    assert setup_runtime(resolve({"device": "cpu"})).precision == "fp32"


def test_seeds_differ_by_place_and_repeat() -> None:
    def draw(*place: int) -> float:
        seed_micro_step(*place)
        return torch.rand(1).item()

    places = [(s, u, p) for s in range(2) for u in range(3) for p in (0, 4)]
    first = [draw(*place) for place in places]
    assert len(set(first)) == len(places)
    assert first == [draw(*place) for place in places]


# Whole runs.


def test_a_run_learns_and_leaves_what_it_promises(tmp_path: Path, text_file: Path) -> None:
    folder = tmp_path / "run"
    run, result = trained(
        layer(
            folder,
            text_file,
            training__max_steps=40,
            training__eval_interval=20,
            checkpoint__save_interval=20,
        )
    )
    assert (result.outcome, result.step) == ("finished", 40)
    losses = [line["loss"] for line in logged(folder)]
    assert losses[0] == pytest.approx(math.log(run.config.model.vocab_size), rel=0.1)
    assert losses[-1] < losses[0] - 1
    assert [line["step"] for line in logged(folder)] == list(range(1, 41))
    assert [line["step"] for line in logged(folder, "validation")] == [20, 40]
    assert {"atlas_step_20.pt", "atlas_step_40.pt", "atlas_best.pt"} <= {
        path.name for path in folder.iterdir()
    }
    assert "step 40/40" in (folder / "training.log").read_text(encoding="utf-8")


def test_accumulation_equals_a_larger_batch(tmp_path: Path, text_file: Path) -> None:
    trained(layer(tmp_path / "a", text_file, training__batch_size=8))
    trained(layer(tmp_path / "b", text_file, training__batch_size=2, training__gradient_accumulation_steps=4))
    for one, other in zip(logged(tmp_path / "a"), logged(tmp_path / "b"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)


def test_gradient_checkpointing_changes_no_loss_even_with_dropout(tmp_path: Path, text_file: Path) -> None:
    for name, on in (("a", False), ("b", True)):
        trained(layer(tmp_path / name, text_file, model__dropout=0.2, training__gradient_checkpointing=on))
    assert [line["loss"] for line in logged(tmp_path / "a")] == [
        line["loss"] for line in logged(tmp_path / "b")
    ]


@pytest.mark.parametrize(("seconds", "low", "high", "updates"), [(0.0, 0, 0.5, 21), (0.06, 0.6, 1, 4)])
def test_the_wait_for_data_is_measured(
    seconds: float,
    low: float,
    high: float,
    updates: int,
    tmp_path: Path,
    text_file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Eight sequences of 0.06 s are far more than the update of a tiny model takes."""
    run = run_for(layer(tmp_path / "run", text_file, training__batch_size=8, data__num_workers=0))
    read = type(run.data.train).__getitem__

    def slow(self: object, window: int) -> tuple[torch.Tensor, ...]:
        time.sleep(seconds)
        return read(self, window)  # type: ignore[arg-type]

    monkeypatch.setattr(type(run.data.train), "__getitem__", slow)
    run.state.horizon = updates
    run.data.val = None
    train(run)
    # The first update also loads parts of PyTorch, for seconds.
    waits = [line["data_wait"] for line in logged(tmp_path / "run")][1:]
    assert len(waits) == updates - 1
    assert low <= statistics.median(waits) <= high, waits


def test_reading_threads_change_nothing(tmp_path: Path, text_file: Path) -> None:
    for name, workers in (("a", 0), ("b", 1)):
        trained(layer(tmp_path / name, text_file, model__dropout=0.2, data__num_workers=workers))
    assert [line["loss"] for line in logged(tmp_path / "a")] == [
        line["loss"] for line in logged(tmp_path / "b")
    ]


def test_seed_decides_the_run(tmp_path: Path, text_file: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        trained(layer(tmp_path / name, text_file, seed=seed))
    a, b, c = ([line["loss"] for line in logged(tmp_path / name)] for name in "abc")
    assert a == b
    assert a != c


def test_epochs_end_the_run_and_are_saved(tmp_path: Path, text_file: Path) -> None:
    explicit = layer(tmp_path / "run", text_file, training__epochs=2, training__batch_size=64)
    del explicit["training"]["max_steps"]
    run, result = trained(explicit)
    per_epoch = len(run.data.train)
    assert result.step == math.ceil(2 * per_epoch / 64)
    first = math.ceil(per_epoch / 64)
    assert (tmp_path / "run" / f"atlas_epoch_1_step_{first}.pt").exists()
    assert (tmp_path / "run" / f"atlas_epoch_2_step_{result.step}.pt").exists()


def test_best_follows_validation_loss(tmp_path: Path, text_file: Path) -> None:
    folder = tmp_path / "run"
    trained(
        layer(
            folder, text_file, training__max_steps=30, training__eval_interval=5, training__learning_rate=0.05
        )
    )
    losses = {line["step"]: line["val_loss"] for line in logged(folder, "validation")}
    best = json.loads((folder / "atlas_best.json").read_text())
    assert best["step"] == min(losses, key=losses.get)
    assert best["val_loss"] == min(losses.values())


def test_without_validation_data_the_best_follows_training_loss(tmp_path: Path, text_file: Path) -> None:
    folder = tmp_path / "run"
    trained(
        layer(folder, text_file, data__val_fraction=0, training__max_steps=9, checkpoint__save_interval=3)
    )
    losses = [line["loss"] for line in logged(folder)]
    means = {step: sum(losses[step - 3 : step]) / 3 for step in (3, 6, 9)}
    assert json.loads((folder / "atlas_best.json").read_text())["step"] == min(means, key=means.get)
    assert not logged(folder, "validation")


def test_patience_ends_a_run_that_no_longer_improves(tmp_path: Path, text_file: Path) -> None:
    explicit = layer(
        tmp_path / "run",
        text_file,
        training__max_steps=200,
        training__eval_interval=1,
        training__early_stopping_patience=3,
        training__learning_rate=0.3,  # jumps about
    )
    _, result = trained(explicit)
    losses = [line["val_loss"] for line in logged(tmp_path / "run", "validation")]
    assert result.outcome == "stopped early"
    assert min(losses) == losses[-4]  # the best, then three that were not better
    assert (tmp_path / "run" / f"atlas_step_{result.step}.pt").exists()


@pytest.mark.slow
def test_memorizing_the_text_gives_a_warning(tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text(
        "abcdefghij klmnop qrstuv wxyz " * 12 + "zyxw vuts rqpo nmlk jihg fedc ba " * 3, encoding="utf-8"
    )
    explicit = layer(
        tmp_path / "run",
        text,
        data__val_fraction=0.2,
        training__max_steps=120,
        training__eval_interval=10,
        model__hidden_size=64,
    )
    trained(explicit)
    assert "memorizes its text" in (tmp_path / "run" / "training.log").read_text(encoding="utf-8")


def test_a_profile_is_a_trace_of_an_update_and_changes_nothing(text_file: Path, tmp_path: Path) -> None:
    from atlas.training.diagnostics import profile_update

    explicit = layer(tmp_path / "run", text_file, training__gradient_accumulation_steps=2)
    profile = profile_update(explicit, say=print)
    assert profile.tokens == 4 * 2 * 16
    assert profile.seconds > 0
    names = [name for name, _, _ in profile.operations]
    events = json.loads((tmp_path / "run" / "profile.json").read_text(encoding="utf-8"))["traceEvents"]
    traced = {event.get("name") for event in events}
    for name in ("aten::addmm", "aten::_fused_adamw_"):
        assert name in names
        assert name in traced
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["profile.json"]


@pytest.mark.slow
def test_overfit_batch_distinguishes_a_model_that_learns_from_one_that_cannot(
    text_file: Path, tmp_path: Path
) -> None:
    from atlas.training.diagnostics import overfit_one_batch

    said: list[str] = []
    explicit = layer(tmp_path / "run", text_file, model__hidden_size=64, training__learning_rate=1e-2)
    assert overfit_one_batch(explicit, say=said.append)
    assert "goes to zero" in said[-1]
    hopeless = overlay(explicit, nested("training.learning_rate", 1e-9))
    assert not overfit_one_batch(hopeless, say=said.append, updates=20)
    assert "does not go to zero" in said[-1]
    assert not (tmp_path / "run").exists()
