"""Measure how long a save pauses training, and how fast updates are during a save.

    python benchmarks/checkpoint.py                 tiny (490 MB a checkpoint), on a GPU if there is one
    python benchmarks/checkpoint.py --config nano --rounds 9

In every round, the script saves the same state in three ways: in the background as `atlas train` does, blocking as with
`checkpoint.background=false`, and with `torch.save` in the loop. In the first two ways, Atlas hashes the file, flushes
it to the disk and commits it. The third way only calls `torch.save`, as other programs do. Then the script times
updates while a save is in progress and updates without a save, in turn.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from results import add_record_option, recorded

from atlas.config import AtlasConfig
from atlas.config.loader import overlay, read_yaml, resolve
from atlas.config.presets import find_config
from atlas.model import build_model
from atlas.process import keep_memory
from atlas.training.checkpoint.async_saver import BackgroundSaver
from atlas.training.checkpoint.atomic_write import tensor_bytes
from atlas.training.checkpoint.manager import CheckpointManager
from atlas.training.devices.device import setup_runtime
from atlas.training.loss import compute_lm_loss
from atlas.training.optimizers.build import build_optimizer


class Run:
    """A model and its optimizer, trained on random tokens."""

    def __init__(self, config: AtlasConfig, batch: int, length: int) -> None:
        self.runtime = setup_runtime(config)
        self.model = build_model(config.model, seed=0).to(self.runtime.device).train()
        self.optimizer = build_optimizer(self.model, config.training)
        shape = (batch, min(length, config.model.max_seq_len))
        self.tokens = torch.randint(0, config.model.vocabulary, shape, device=self.runtime.device)

    def update(self) -> float:
        start = time.perf_counter()
        with self.runtime.autocast():
            loss = compute_lm_loss(self.model(self.tokens), self.tokens)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.wait()
        return time.perf_counter() - start

    def wait(self) -> None:
        if self.runtime.device.type == "cuda":
            torch.cuda.synchronize()

    def contents(self, step: int = 1) -> dict[str, Any]:
        return {
            "step": step,
            "epoch": 0,
            "sequences_consumed": 0,
            "config": {},
            "data": {},
            "model_state_dict": dict(self.model.state_dict()),
            "optimizer_state_dict": self.optimizer.state_dict(),
        }


def timed(call: Any) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def stalls(run: Run, folder: Path, rounds: int) -> dict[str, list[float]]:
    """Return the seconds for which training pauses, for each way of saving."""
    background = BackgroundSaver(CheckpointManager(folder / "background"), in_background=True)
    blocking = BackgroundSaver(CheckpointManager(folder / "blocking"), in_background=False)
    times: dict[str, list[float]] = {"in the background": [], "blocking": [], "torch.save in the loop": []}
    for number in range(rounds + 1):
        measured = {
            "in the background": timed(
                lambda step=number: background.save(run.contents(step), ["step"], wait=False)
            )
        }
        background.join()
        measured["blocking"] = timed(
            lambda step=number: blocking.save(run.contents(step), ["step"], wait=False)
        )
        measured["torch.save in the loop"] = timed(
            lambda: torch.save(run.contents(), folder / f"peer_{os.getpid()}.pt")
        )
        if number > 0:  # the first round allocates
            for name, seconds in measured.items():
                times[name].append(seconds)
    return times


def updates_beside_a_save(
    run: Run, folder: Path, rounds: int, interval: int
) -> tuple[list[float], list[float], list[float]]:
    """Return the seconds of updates without a save, of updates during a save, and of the saves. A save is due every
    `interval` updates. The speed of a save depends on when the next save is due."""
    saver = BackgroundSaver(CheckpointManager(folder / "beside"), in_background=True)
    alone, beside, saves = [], [], []
    for number in range(rounds + 1):
        during, after = [], []
        for _ in range(interval):
            was_writing = saver.is_writing
            seconds = run.update()
            if was_writing == saver.is_writing:  # not the one in which a save ended
                (during if was_writing else after).append(seconds)
        if number > 0:  # before the first save, no save is in progress
            beside += during
            alone += after
            saves.append(saver.seconds)
        saver.save(run.contents(number), ["step"], wait=False)
    saver.join()
    return alone, beside, saves


def main() -> None:
    keep_memory()  # as the `atlas` command does
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="tiny", help="preset or config file")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--interval", type=int, default=100, help="updates between two saves")
    parser.add_argument(
        "--batch", type=int, default=1, help="sequences per update, small so that updates are short"
    )
    parser.add_argument("--length", type=int, default=64, help="tokens per sequence")
    parser.add_argument(
        "--folder", help="where to write; a temporary folder in the working folder by default"
    )
    add_record_option(parser)
    arguments = parser.parse_args()
    layer = read_yaml(find_config(arguments.config))
    config = resolve(overlay(layer, {"model": {"vocab_size": layer["model"].get("vocab_size") or 50257}}))
    run = Run(config, arguments.batch, arguments.length)
    for _ in range(3):
        run.update()
    arguments.device = run.runtime.device.type
    with tempfile.TemporaryDirectory(dir=arguments.folder or ".") as temporary, recorded("Saving", arguments):
        print(
            f"{arguments.config}, {tensor_bytes(run.contents()) / 1e6:,.0f} MB of state, {arguments.device}"
        )
        times = stalls(run, Path(temporary), arguments.rounds)
        beside = updates_beside_a_save(run, Path(temporary), arguments.rounds, arguments.interval)
        report(times, *beside)


def report(
    times: dict[str, list[float]], alone: list[float], beside: list[float], saves: list[float]
) -> None:
    blocking = statistics.median(times["blocking"])
    print(f"\n{'pause of training':<28}{'median':>10}{'of blocking':>14}")
    for name, seconds in times.items():
        median = statistics.median(seconds)
        print(f"{name:<28}{median * 1e3:>7.0f} ms{median / blocking:>13.1%}")
    alone_median, beside_median = statistics.median(alone), statistics.median(beside)
    print(f"\n{'time of an update':<28}{'median':>10}{'updates':>14}")
    print(f"{'without a save':<28}{alone_median * 1e3:>7.0f} ms{len(alone):>14}")
    print(f"{'with one in progress':<28}{beside_median * 1e3:>7.0f} ms{len(beside):>14}")
    print(
        f"throughput beside a save: {alone_median / beside_median:.2f} of that without; a save takes "
        f"{statistics.median(saves):.2f} s"
    )


if __name__ == "__main__":
    main()
