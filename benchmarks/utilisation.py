"""Measure the FLOP/s of a training update as a fraction of the FLOP/s of a matrix product, for models of three widths.

    python benchmarks/utilisation.py --seconds 30

Updates and products of 1024 × 1024 matrices take turns in one process, so that other work on the machine slows both.
The table shows medians. `atlas plan` uses these fractions to estimate times, see `utilisation` in
atlas/planning/run.py.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time

import torch

from atlas.config import AtlasConfig
from atlas.config.loader import resolve
from atlas.model.cost import training_flops_per_token
from atlas.planning.run import utilisation
from atlas.process import keep_memory
from atlas.training.devices.device import setup_runtime
from atlas.training.devices.signals import StopRequest
from atlas.training.state import TrainState
from atlas.training.step import accumulate_gradient, apply_gradient, fresh_learner

BATCH, SIDE = 4, 1024
SHAPES = {
    "nano": {"hidden_size": 128, "num_layers": 4, "num_heads": 4, "max_seq_len": 256, "vocab_size": 2048},
    "between": {"hidden_size": 256, "num_layers": 6, "num_heads": 4, "max_seq_len": 256, "vocab_size": 8192},
    "tiny": {"hidden_size": 384, "num_layers": 12, "num_heads": 6, "max_seq_len": 512, "vocab_size": 50257},
}


def measure(config: AtlasConfig, seconds: float) -> tuple[float, float, int]:
    """Return (seconds of an update, FLOP/s of products, number of updates). The first two are medians."""
    learner = fresh_learner(config, setup_runtime(config))
    state = TrainState(horizon=10**9, micro_batch_size=BATCH, eval_batch_size=BATCH)
    stop = StopRequest(print)
    left, right = torch.randn(SIDE, SIDE), torch.randn(SIDE, SIDE)
    updates, products = [], []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(updates) < 3:
        tokens = torch.randint(0, config.model.vocabulary, (BATCH, config.model.max_seq_len + 1))
        start = time.perf_counter()
        batch = tokens[:, :-1], tokens[:, 1:]
        gradient = accumulate_gradient(learner, batch, state, stop=stop)
        apply_gradient(learner, gradient, state, rate=3e-4)
        state.step += 1
        updates.append(time.perf_counter() - start)
        for _ in range(4):
            start = time.perf_counter()
            torch.mm(left, right)
            products.append(time.perf_counter() - start)
    return statistics.median(updates), 2 * SIDE**3 / statistics.median(products), len(updates)


def main() -> None:
    keep_memory()  # as the `atlas` command does
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=30, help="for each shape")
    arguments = parser.parse_args()
    print(f"{os.cpu_count()} cores, PyTorch {torch.__version__}, Python {platform.python_version()}\n")
    print("| | width | updates | measured | planned |\n|---|---:|---:|---:|---:|")
    for name, model in SHAPES.items():
        training = {"batch_size": BATCH, "precision": "fp32"}
        config = resolve({"model": model, "training": training, "device": "cpu"})
        seconds, rate, count = measure(config, arguments.seconds)
        flops = BATCH * config.model.max_seq_len * training_flops_per_token(config)
        planned = utilisation(config.model, "cpu")
        reached = flops / seconds / rate
        print(f"| {name} | {model['hidden_size']} | {count} | {reached:.2f} | {planned:.2f} |", flush=True)


if __name__ == "__main__":
    main()
