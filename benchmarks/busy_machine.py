"""Compare the time of a training step of `nano` with spinning and with sleeping threads, alone and beside another
program.

    python benchmarks/busy_machine.py

PyTorch's threads wait for each other hundreds of times in a step. By default, a waiting thread spins. If the thread
that it waits for has lost its core to another program, the waiting thread spins until the scheduler returns that core.
With GOMP_SPINCOUNT=1000, a waiting thread soon sleeps instead. `atlas` sets this variable if another program is
computing when `atlas` starts. The runs take turns, and the table shows the medians of all steps.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

from results import add_record_option, recorded

STEPS, ROUNDS = 20, 3
SETTINGS = {"threads spin (alone)": {}, "threads sleep (beside another)": {"GOMP_SPINCOUNT": "1000"}}


def measure() -> None:
    """Print the seconds of each step. This function runs in a child process."""
    import torch

    from atlas.config import TrainingConfig
    from atlas.config.loader import overlay, read_yaml, resolve
    from atlas.config.presets import preset_path
    from atlas.model import build_model
    from atlas.training.loss import compute_lm_loss
    from atlas.training.optimizers.build import build_optimizer

    config = resolve(overlay(read_yaml(preset_path("nano")), {"model": {"vocab_size": 2048}}))
    model = build_model(config.model, seed=0).train()
    optimizer = build_optimizer(model, TrainingConfig())
    tokens = torch.randint(0, 2048, (config.training.batch_size, config.model.max_seq_len))
    times = []
    for _ in range(STEPS + 3):
        start = time.perf_counter()
        compute_lm_loss(model(tokens), tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - start)
    print(json.dumps(times[3:]))


def run(variables: dict[str, str]) -> list[float]:
    environment = {key: value for key, value in os.environ.items() if key != "GOMP_SPINCOUNT"} | variables
    command = [sys.executable, __file__, "--measure"]
    output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    return json.loads(output)  # type: ignore[no-any-return]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_record_option(parser)
    with recorded("A busy machine", parser.parse_args()):
        compare()


def compare() -> None:
    print(f"{'':<34}{'idle machine':>16}{'one core busy':>16}")
    times: dict[tuple[str, bool], list[float]] = {}
    for _ in range(ROUNDS):
        for busy in (False, True):
            neighbour = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if busy else None
            try:
                for name, variables in SETTINGS.items():
                    times.setdefault((name, busy), []).extend(run(variables))
            finally:
                if neighbour:
                    neighbour.kill()
    for name in SETTINGS:
        cells = [f"{statistics.median(times[name, busy]) * 1e3:,.0f} ms" for busy in (False, True)]
        print(f"{name:<34}{cells[0]:>16}{cells[1]:>16}")


if __name__ == "__main__":
    measure() if "--measure" in sys.argv else main()
