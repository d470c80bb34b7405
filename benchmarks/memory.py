"""Compare the measured peak memory of training with the estimate of `atlas plan`, and with other implementations.

    python benchmarks/memory.py                                     nano, tiny, small: those that fit this machine
    python benchmarks/memory.py --presets tiny --micro-batch 2
    python benchmarks/memory.py --peer nanoGPT=../nanoGPT           also the peers' peak
    python benchmarks/memory.py --device cuda                       all seven presets

For each preset, a separate process performs two updates on random tokens, with the preset's dropout, precision,
gradient checkpointing and micro-batch. An update has at most two micro-batches: with more, an update takes longer but
needs no more memory.

On a CPU, the peak is the largest resident memory of the process. On a GPU, the peak is the allocator's peak plus the
memory outside the allocator: the CUDA context, kernels and workspaces of libraries. The memory outside the allocator is
the card's used memory after the updates, minus the allocator's memory, and minus the card's used memory before the
process started. So no other program may start or end on the card during a measurement.

An estimate passes if it is within 10 % of the measured peak. The peers train as in train_throughput.py.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from typing import Any

from results import add_record_option, recorded
from train_throughput import atlas_step, peak_resident, shape_of, start, trainees

TOLERANCE = 0.10
ON_A_CPU = ["nano", "tiny", "small"]
PEERS = {"preset": "tiny", "batch_size": 4}


def config_of(preset: str, micro_batch: int | None, device: str, compiled: bool = False) -> Any:
    """Return the config of a preset, with at most two micro-batches per update."""
    from atlas.config.loader import overlay, read_yaml, resolve
    from atlas.config.presets import preset_path
    from atlas.training.memory.presets import assume_vocabulary

    layer = read_yaml(preset_path(preset))
    training: dict[str, Any] = {
        "gradient_accumulation_steps": min(2, layer["training"]["gradient_accumulation_steps"])
    }
    training["compile"] = "on" if compiled else "off"
    if micro_batch:
        training["batch_size"] = micro_batch
    return assume_vocabulary(resolve(overlay(layer, {"training": training, "device": device})))


def child(preset: str, micro_batch: int | None, device: str, compiled: bool, free_before: int) -> None:
    """Print the bytes of each part of the peak. `free_before` is the free memory of the device before this process
    started."""
    from atlas.process import set_up_process

    set_up_process()  # as the `atlas` command does
    import torch

    from atlas.machine import measure_memory

    step = atlas_step(config_of(preset, micro_batch, device, compiled), keeps_little=True)
    for _ in range(2):
        step()
    if device == "cuda":
        torch.cuda.synchronize()
        used = free_before - measure_memory("cuda")
        outside = max(0, used - torch.cuda.memory_reserved())
        print(json.dumps({"allocator": torch.cuda.max_memory_allocated(), "outside": outside}))
    else:
        print(json.dumps({"resident": peak_resident()}))


def measure(
    preset: str, micro_batch: int | None, device: str, free: int, *, compiled: bool = False
) -> dict[str, int] | str:
    """Return the parts of the peak, or the reason why the child failed."""
    wanted = json.dumps([preset, micro_batch, device, compiled, free])
    done = subprocess.run(
        [sys.executable, __file__, "--child", wanted], capture_output=True, encoding="utf-8"
    )
    if done.returncode:
        return (done.stderr.strip().splitlines() or [f"ended with {done.returncode}"])[-1]
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def compare_with_estimates(presets: list[str], arguments: argparse.Namespace) -> None:
    from atlas.machine import measure_memory
    from atlas.training.memory.estimate import estimate_training_memory

    device = arguments.device
    print("| | micro-batch | measured | estimated | error | within 10 % |\n|---|---:|---:|---:|---:|---|")
    passed = []
    left_out = []
    for preset in presets:
        config = config_of(preset, arguments.micro_batch, device)
        estimate = estimate_training_memory(config, device=device).total
        available = measure_memory(device)
        if estimate > available:
            left_out.append(f"{preset}: needs {estimate / 1e9:.1f} GB, {available / 1e9:.1f} GB are free")
            continue
        print(f"{preset} …", file=sys.stderr)
        parts = measure(preset, arguments.micro_batch, device, available)
        if isinstance(parts, str):
            left_out.append(f"{preset}: {parts}")
            continue
        peak = sum(parts.values())
        error = estimate / peak - 1
        passed.append(abs(error) <= TOLERANCE)
        outside = f" ({parts['outside'] / 1e6:,.0f} outside the allocator)" if "outside" in parts else ""
        print(
            f"| {preset} | {config.training.batch_size} × {config.model.max_seq_len:,} | {peak / 1e6:,.0f} MB{outside} "
            f"| {estimate / 1e6:,.0f} MB | {error:+.1%} | {'yes' if passed[-1] else 'NO'} |",
            flush=True,
        )
    print(f"\n{sum(passed)} of {len(passed)} within {TOLERANCE:.0%}")
    for line in left_out:
        print(f"left out: {line}")


def compare_with_peers(arguments: argparse.Namespace) -> None:
    shape = shape_of(PEERS["preset"], PEERS["batch_size"], arguments.device)
    chosen = list(trainees(shape, arguments.peer, compiled=False))
    print(
        f"\n| {PEERS['preset']}, {shape.batch_size} × {shape.context} | peak memory | Atlas ÷ it |\n|---|---:|---:|"
    )
    peaks: dict[str, int] = {}
    for one in chosen:
        if start([one], at_once=False):
            one.step()
            one.contender.stop()
            peaks[one.name] = one.peak
            print(f"| {one.name} | {one.peak / 1e6:,.0f} MB | {peaks['Atlas'] / one.peak:.2f} |", flush=True)
    if arguments.device == "cuda":
        print("\nThese are the figures of the allocator alone; the memory outside of it is the same for all.")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--presets", nargs="+", help="default: nano, tiny and small on a CPU, all on a GPU")
    parser.add_argument("--micro-batch", type=int, help="sequences per micro-batch; default: the preset's")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--no-peers", action="store_true", help="the estimates only")
    add_record_option(parser)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(*json.loads(arguments.child))
        return

    from atlas.config.presets import preset_names

    presets = arguments.presets or (list(preset_names()) if arguments.device == "cuda" else ON_A_CPU)
    with recorded("Memory of training", arguments):
        compare_with_estimates(presets, arguments)
        if not arguments.no_peers:
            compare_with_peers(arguments)


if __name__ == "__main__":
    main()
