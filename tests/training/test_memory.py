"""Out of memory: the same update with fewer sequences per micro-batch, remembered; and the advice when none fits."""

from __future__ import annotations

import gc
import os
import re
import subprocess
import sys
import weakref
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from atlas.config import AtlasConfig
from atlas.config.loader import resolve
from atlas.errors import AtlasError
from atlas.training.devices.memory import collector_spares_the_run, is_out_of_memory
from atlas.training.loss import compute_lm_loss
from atlas.training.micro_batch import _largest, _trial_fits
from atlas.training.run import Run
from atlas.training.train import train
from tests.runs import REPOSITORY, config_flags, layer, logged, on_updates, run_for, trained, write_config

CPU_MESSAGE = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
    "allocate 34359738368000 bytes. Error code 12 (Cannot allocate memory)"
)


@pytest.fixture(autouse=True)
def _nothing_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATLAS_CACHE_DIR", str(tmp_path / "cache"))


def short_of_memory(run: Run, fits: int, error: Callable[[], Exception]) -> list[int]:
    """From the third micro-batch on, let no more than `fits` sequences run; return the sizes that were tried."""
    tried: list[int] = []

    def loss(logits: torch.Tensor, targets: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        tried.append(len(logits))
        if len(tried) >= 3 and len(logits) > fits:
            raise error()
        return compute_lm_loss(logits, targets, mask)

    run.learner.objective.custom_loss = loss
    return tried


@pytest.mark.parametrize(
    "error", [lambda: RuntimeError(CPU_MESSAGE), lambda: torch.OutOfMemoryError("CUDA out of memory.")]
)
def test_the_losses_are_those_of_a_run_with_enough_memory(
    tmp_path: Path, text_file: Path, error: Callable[[], Exception]
) -> None:
    settings = {
        "training__batch_size": 8,
        "training__max_steps": 8,
        "training__gradient_accumulation_steps": 2,
    }
    trained(layer(tmp_path / "complete", text_file, **settings))
    run = run_for(layer(tmp_path / "short", text_file, **settings))
    tried = short_of_memory(run, 3, error)
    assert train(run).outcome == "finished"
    assert tried[:8] == [8, 8, 8, 4, 2, 2, 2, 2]  # the second update, begun again until it fits
    assert run.state.micro_batch_size == 2
    lines = [logged(tmp_path / name) for name in ("complete", "short")]
    for key in ("loss", "grad_norm"):
        assert [line[key] for line in lines[1]] == pytest.approx([line[key] for line in lines[0]], rel=1e-5)
    assert [line["sequences_consumed"] for line in lines[1]] == [16 * step for step in range(1, 9)]
    log = (tmp_path / "short" / "training.log").read_text()
    assert log.count("out of memory") == 1
    assert (
        "step 2: out of memory with 8 sequences per micro-batch: 2 from now on. An update still has 16 sequences"
        in log
    )


def test_what_fitted_is_remembered_for_the_machine_and_the_model(tmp_path: Path, text_file: Path) -> None:
    settings = {"model__hidden_size": 24, "training__batch_size": 8}
    run = run_for(layer(tmp_path / "first", text_file, **settings))
    short_of_memory(run, 2, lambda: RuntimeError(CPU_MESSAGE))
    train(run)
    again = run_for(layer(tmp_path / "again", text_file, **settings))
    assert again.state.micro_batch_size == 2
    assert again.config.training.micro_batch_size == "auto"  # runtime state, not a setting
    assert "2 sequences run per micro-batch" in (tmp_path / "again" / "training.log").read_text()
    asked = run_for(layer(tmp_path / "asked", text_file, training__micro_batch_size=8, **settings))
    assert asked.state.micro_batch_size == 8
    other = layer(tmp_path / "other", text_file, **{**settings, "model__hidden_size": 32})
    assert run_for(other).state.micro_batch_size == 8
    resumed = run_for(layer(tmp_path / "first", text_file, training__max_steps=9, **settings))
    assert resumed.state.micro_batch_size == 2  # from the checkpoint


def test_with_one_sequence_per_micro_batch_advice_is_listed_in_order(tmp_path: Path, text_file: Path) -> None:
    run = run_for(layer(tmp_path / "run", text_file, model__hidden_size=40))
    short_of_memory(run, 0, lambda: RuntimeError(CPU_MESSAGE))
    with pytest.raises(AtlasError, match="step 3: out of memory with one sequence per micro-batch"):
        train(run)
    log = (tmp_path / "run" / "training.log").read_text()
    places = [
        log.index(part)
        for part in (
            "1. batch_size",
            "2. --set training.gradient_checkpointing=true:",
            "3. --set model.max_seq_len=8",
            "6. --set training.optimizer=adafactor (needs a new run): ",
        )
    ]
    assert places == sorted(places)
    assert "GB less" in log


def test_another_error_is_not_mistaken_for_a_lack_of_memory(tmp_path: Path, text_file: Path) -> None:
    run = run_for(layer(tmp_path / "run", text_file))
    tried = short_of_memory(run, 0, lambda: RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="mat1"):
        train(run)
    assert tried[-1] == 4
    assert not is_out_of_memory(ValueError("out of memory"))


def test_onednn_says_in_its_own_words_that_memory_ran_out() -> None:
    """With `ulimit -d`, a matrix product in bf16 raised the first message."""
    assert is_out_of_memory(RuntimeError("could not create a primitive"))
    assert not is_out_of_memory(
        RuntimeError("could not create a primitive descriptor for a matmul primitive")
    )


def test_evaluation_has_its_own_batch_size_and_its_own_recovery(
    tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"training__eval_interval": 2, "training__eval_sequences": 13}
    complete, _ = trained(layer(tmp_path / "complete", text_file, **settings))
    run = run_for(layer(tmp_path / "short", text_file, training__eval_batch_size=7, **settings))
    forward, sizes = run.model.hidden_states, []

    def limited(tokens: torch.Tensor, *rest: object, **named: object) -> torch.Tensor:
        if not run.model.training:
            sizes.append(len(tokens))
            if len(tokens) > 3:
                raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(tokens, *rest, **named)

    monkeypatch.setattr(run.model, "hidden_states", limited)
    assert train(run).outcome == "finished"
    assert sizes[:3] == [7, 3, 3]
    assert (run.state.micro_batch_size, run.state.eval_batch_size) == (4, 3)
    losses = [
        [line["val_loss"] for line in logged(tmp_path / name, "validation")] for name in ("complete", "short")
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    assert complete.state.eval_batch_size == 4


CAPPED = """
import resource, sys
from atlas.cli import main
import torch, atlas.training.launch
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + int(sys.argv[1]), -1))
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a limit of address space is Linux's")
def test_a_run_adapts_to_a_true_limit_of_memory(tmp_path: Path, text_file: Path) -> None:
    """No injected error: the process may have 500 MB more, and 64 sequences need 3 times that."""
    explicit = layer(
        tmp_path / "run", text_file, training__batch_size=64, training__max_steps=2, model__max_seq_len=512
    )
    explicit["model"].update(num_layers=8, hidden_size=48)
    explicit["training"]["eval_sequences"] = 2
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(explicit), encoding="utf-8")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    ended = subprocess.run(
        [sys.executable, "-c", CAPPED, str(500_000_000), "train", *config_flags(config)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 0, ended.stderr
    assert "out of memory with 64 sequences per micro-batch" in ended.stderr
    assert [line["sequences_consumed"] for line in logged(tmp_path / "run")] == [64, 128]


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a limit of data is Linux's")
@pytest.mark.parametrize("gib", [2, 4, 8])
def test_auto_fills_a_limit_of_data(tmp_path: Path, gib: int) -> None:
    """What is found runs for 20 updates without running out, an eighth more does not (5 % are kept free), and the
    losses are those of the same number given by hand. The logits of a custom loss fill memory quickest."""
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{number * number} " for number in range(60_000)), encoding="utf-8")
    explicit = layer(tmp_path / "auto", text, training__max_steps=20, training__batch_size=16 * gib)
    explicit["model"] = {"hidden_size": 16, "num_layers": 1, "num_heads": 1, "max_seq_len": 128}
    explicit["data"]["tokenizer"] = "gpt2"
    explicit["training"] |= {"loss": "atlas.training.loss:compute_lm_loss", "eval_sequences": 4}

    def train(name: str, **settings: int) -> tuple[str, list[float]]:
        chosen = {**explicit, "training": {**explicit["training"], **settings}}
        chosen["checkpoint"] = {**explicit["checkpoint"], "output_dir": str(tmp_path / name)}
        environment = {**os.environ, "OMP_NUM_THREADS": "2", "PYTHONPATH": str(REPOSITORY)}
        config = write_config(tmp_path / f"{name}.yaml", chosen)
        command = [
            "prlimit",
            f"--data={gib << 30}",
            sys.executable,
            "-m",
            "atlas",
            "train",
            *config_flags(config),
        ]
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert ended.returncode == 0, ended.stderr
        return ended.stderr, [line["loss"] for line in logged(tmp_path / name)]

    said, losses = train("auto")
    found = re.search(r"(\d+) of \d+ sequences run per micro-batch", said)
    assert found, said
    assert "out of memory" not in said
    fits = int(found[1])
    assert 1 < fits < 16 * gib
    said, by_hand = train("fixed", micro_batch_size=fits)
    assert "out of memory" not in said
    assert len(losses) == 20
    assert losses == by_hand
    too_many = fits + max(2, fits // 8)
    said, _ = train("more", micro_batch_size=too_many, max_steps=1)
    assert f"out of memory with {too_many} sequences per micro-batch" in said


@pytest.mark.slow
def test_a_trial_for_one_of_several_ranks_runs_alone(text_file: Path, tmp_path: Path) -> None:
    config = resolve(layer(tmp_path, text_file, training__parallel="ddp", model__vocab_size=101))
    assert _trial_fits(config, 1, 4 * 10**9, lambda line: None)


@given(most=st.integers(1, 300), limit=st.integers(0, 400), guess=st.integers(1, 300))
def test_the_largest_that_fits_is_found_in_few_tries(most: int, limit: int, guess: int) -> None:
    tried: list[int] = []

    def fits(size: int) -> bool:
        tried.append(size)
        return size <= limit

    assert _largest(most, guess, fits) == min(most, limit)
    assert all(1 <= size <= most for size in tried)
    assert len(tried) == len(set(tried)) <= 20


@pytest.mark.slow
def test_a_try_that_fails_leaves_nothing_and_is_remembered(
    tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Children that really run; the second of two sequences is given no memory."""
    monkeypatch.setattr("atlas.training.micro_batch.measure_memory", lambda device: 400 * 10**6)
    sizes: list[int] = []

    def runs(config: AtlasConfig, size: int, limit: int, say: Callable[[str], None]) -> bool:
        sizes.append(size)
        return _trial_fits(config, size, 60 * 10**6 if size > 1 else 4 * 10**9, say)

    monkeypatch.setattr("atlas.training.micro_batch._trial_fits", runs)
    settings = {"training__batch_size": 2, "training__max_steps": 2}
    run = run_for(layer(tmp_path / "run", text_file, **settings))
    assert run.state.micro_batch_size == 1
    assert sizes == [2, 1]
    monkeypatch.setattr("atlas.training.micro_batch._trial_fits", lambda *_: pytest.fail("tried again"))
    assert run_for(layer(tmp_path / "next", text_file, **settings)).state.micro_batch_size == 1


# The garbage collector.


class Cycle:
    """Freed by the garbage collector alone."""

    def __init__(self) -> None:
        self.itself = self


def test_the_garbage_collector_spares_a_run_once_and_only_until_it_ends(
    tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_for(layer(tmp_path / "run", text_file))
    calls: list[int] = []
    freeze = gc.freeze
    made: list[weakref.ref[Cycle]] = []

    def frozen() -> None:
        calls.append(run.state.step)
        freeze()

    def make() -> None:
        made.append(weakref.ref(Cycle()))
        gc.collect()

    monkeypatch.setattr(gc, "freeze", frozen)
    as_on_a_gpu = partial(collector_spares_the_run, torch.device("cuda"))
    monkeypatch.setattr("atlas.training.train.collector_spares_the_run", lambda device: as_on_a_gpu())
    on_updates(run, before=make)
    train(run)
    assert calls == [1]
    assert len(made) == 6
    assert [cycle() for cycle in made] == [None] * 6
    assert gc.get_freeze_count() == 0


def test_what_the_garbage_collector_spared_is_freed_after_a_run_that_failed() -> None:
    old = Cycle()
    watched = weakref.ref(old)
    with suppress(RuntimeError), collector_spares_the_run(torch.device("cuda")) as after_update:
        after_update()
        del old
        gc.collect()
        assert watched() is not None
        raise RuntimeError
    gc.collect()
    assert watched() is None
