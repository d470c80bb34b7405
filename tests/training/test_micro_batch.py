"""How many sequences run per micro-batch on a GPU, as far as it is decided without one; equal ones where compiled."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from atlas.config import AtlasConfig
from atlas.config.loader import read_yaml, resolve
from atlas.config.presets import leaves_batch_size_open, preset_path
from atlas.errors import AtlasError
from atlas.training import micro_batch
from atlas.training.devices.compile import filled_up
from atlas.training.devices.device import Runtime
from atlas.training.devices.signals import StopRequest
from atlas.training.evaluate import evaluate
from atlas.training.memory.estimate import estimate_training_memory
from atlas.training.micro_batch import fit_micro_batch, is_short_of_memory
from atlas.training.run import Learner
from atlas.training.state import TrainState
from atlas.training.step import accumulate_gradient, fresh_learner
from tests.runs import layer, run_for

GiB = 1 << 30
ON_CUDA = Runtime(torch.device("cuda"), "bf16", compiles=True)


class Gpu:
    """A GPU of which so much is free, where so many sequences fit; what was tried and what is remembered."""

    def __init__(self, gibibytes: int, fits: int) -> None:
        self.free, self.fits = gibibytes * GiB, fits
        self.tried: list[int] = []
        self.known: int | None = None

    def runs(self, config: AtlasConfig, size: int, *rest: object) -> bool:
        self.tried.append(size)
        return size <= self.fits

    def remember(self, config: AtlasConfig, device: torch.device, size: int) -> None:
        self.known = size


@pytest.fixture
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Gpu:
    one = Gpu(*request.param)
    monkeypatch.setattr(micro_batch, "measure_memory", lambda device: one.free)
    monkeypatch.setattr(micro_batch, "remembered_micro_batch", lambda config, runtime: one.known)
    monkeypatch.setattr(micro_batch, "remember_micro_batch", one.remember)
    monkeypatch.setattr(micro_batch, "_trial_fits", one.runs)
    return one


def preset(name: str) -> AtlasConfig:
    return resolve(read_yaml(preset_path(name)))


def fitted(config: AtlasConfig, *, may_exceed: bool = True, runtime: Runtime = ON_CUDA) -> int:
    return fit_micro_batch(config, runtime, say=lambda line: None, may_exceed=may_exceed)


@pytest.mark.parametrize("gpu", [(80, 1000)], indirect=True)
def test_a_large_gpu_runs_an_update_as_one_micro_batch(gpu: Gpu) -> None:
    """`small` is 2 × 16 sequences."""
    assert fitted(preset("small")) == 32
    assert fitted(preset("small")) == 32
    assert gpu.tried == [32]  # remembered
    assert not is_short_of_memory(preset("small"), ON_CUDA, 32)


@pytest.mark.parametrize("gpu", [(80, 1000)], indirect=True)
def test_who_wrote_a_batch_size_gets_no_more(gpu: Gpu) -> None:
    assert fitted(preset("small"), may_exceed=False) == 2
    assert fitted(preset("small"), runtime=Runtime(torch.device("cpu"), "fp32")) == 2
    assert gpu.tried == []


@pytest.mark.parametrize("gpu", [(80, 16)], indirect=True)
def test_what_does_not_fit_is_split_into_equal_parts(gpu: Gpu) -> None:
    assert fitted(preset("small")) == 16
    assert gpu.tried == [32, 16]


@pytest.mark.parametrize("gpu", [(80, 1000)], indirect=True)
def test_what_ran_out_of_memory_once_is_not_tried_again(gpu: Gpu) -> None:
    gpu.known = 11  # as a run leaves it that ran out
    assert fitted(preset("small")) == 11  # of three parts; the second has 11 as well
    assert gpu.tried == []


@pytest.mark.parametrize("gpu", [(12, 1000), (8, 1000), (6, 1000)], indirect=True)
@pytest.mark.parametrize("name", ["small", "modern", "default"])
def test_no_more_than_is_comfortable(gpu: Gpu, name: str) -> None:
    """At most 60 % of the memory, with all that compiled blocks keep; on a small card `batch_size`."""
    config = preset(name)
    size = fitted(config)
    if size > config.training.batch_size:
        training = config.training.model_copy(update={"micro_batch_size": size})
        needed = estimate_training_memory(
            config.model_copy(update={"training": training}), device="cuda", keeps_all=True
        )
        assert needed.total <= 0.6 * gpu.free
        assert not is_short_of_memory(config, ON_CUDA, size)
    assert -(-config.training.sequences_per_update // size) * size < 34  # parts of one size


@pytest.mark.parametrize("gpu", [(4, 1000)], indirect=True)
def test_where_memory_is_short_compiled_blocks_keep_little(gpu: Gpu) -> None:
    assert is_short_of_memory(preset("small"), ON_CUDA, 2)


@pytest.mark.parametrize(
    ("config", "written", "is_open"),
    [
        (None, {}, True),
        ("small", {}, True),
        ("SMALL", {"model": {"dropout": 0.1}}, True),
        (str(preset_path("small")), {}, True),
        ("small", {"training": {"batch_size": 2}}, False),
        (None, {"training": {"batch_size": 2}}, False),
    ],
)
def test_a_presets_batch_size_is_not_the_users(config: str | None, written: dict, is_open: bool) -> None:
    assert leaves_batch_size_open(config, written) is is_open


def test_a_config_file_of_the_user_decides(tmp_path: Path) -> None:
    own = tmp_path / "small.yaml"
    own.write_text(preset_path("small").read_text(encoding="utf-8"), encoding="utf-8")
    assert not leaves_batch_size_open(own, {})
    own.write_text("training:\n  max_steps: 5\n", encoding="utf-8")
    assert leaves_batch_size_open(own, {})
    with pytest.raises(AtlasError, match="no such config file"):
        leaves_batch_size_open(tmp_path / "none.yaml", {})


# Parts of one size, where the blocks are compiled


def learner_for(explicit: dict, *, compiles: bool) -> Learner:
    """With blocks that are not compiled, so that only the split differs."""
    learner = fresh_learner(resolve(explicit), Runtime(torch.device("cpu"), "fp32"))
    learner.runtime = replace(learner.runtime, compiles=compiles)
    return learner


def test_compiled_micro_batches_have_one_shape_and_give_the_same(tmp_path: Path, text_file: Path) -> None:
    explicit = layer(tmp_path, text_file, training__batch_size=7)
    explicit["model"]["vocab_size"] = 101
    tokens = torch.randint(0, 101, (7, 17), generator=torch.Generator().manual_seed(0))
    targets = tokens[:, 1:].clone()
    targets[2, 5:] = -100
    losses, gradients, shapes = [], [], []
    for compiles in (False, True):
        learner = learner_for(explicit, compiles=compiles)
        seen: list[int] = []
        learner.objective.register_forward_pre_hook(
            lambda module, columns, seen=seen: seen.append(len(columns[0]))
        )
        batch, state = (tokens[:, :-1], targets), TrainState(horizon=1, micro_batch_size=5)
        losses.append(float(accumulate_gradient(learner, batch, state, stop=StopRequest(pytest.fail)).loss))
        gradients.append([parameter.grad for parameter in learner.model.parameters()])
        shapes.append(seen)
    assert shapes == [[5, 2], [4, 4]]  # 4 and 3, filled up
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)


def test_an_evaluation_has_one_shape_and_gives_the_same(tmp_path: Path, text_file: Path) -> None:
    run = run_for(layer(tmp_path, text_file))
    seen: list[int] = []
    run.learner.objective.register_forward_pre_hook(lambda module, columns: seen.append(len(columns[0])))
    results = [
        evaluate(
            run.learner.objective,
            run.data.train,
            list(range(7)),
            batch_size=4,
            runtime=replace(run.runtime, compiles=compiles),
        )
        for compiles in (False, True)
    ]
    assert seen == [4, 3, 4, 4]
    assert results[0] is not None
    assert results[1] is not None
    assert results[1].tokens == results[0].tokens
    assert results[1].loss == pytest.approx(results[0].loss, rel=1e-6)


def test_rows_that_fill_up_do_not_count() -> None:
    inputs, targets = torch.ones(2, 3, dtype=torch.long), torch.ones(2, 3, dtype=torch.long)
    columns = filled_up([inputs, targets, inputs], 4)
    assert [tuple(column.shape) for column in columns] == [(4, 3)] * 3
    assert columns[1][2:].tolist() == [[-100] * 3] * 2
    assert filled_up([inputs, targets], 2)[0].tolist() == inputs.tolist()
