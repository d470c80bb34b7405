"""Measure tokens per second of training: Atlas's training code compared with compiled nanoGPT, one model at a time.

Both programs are compiled, and train on random tokens in bf16 (autocast). In one comparison, both have a micro-batch of
8 sequences, and an update has one micro-batch. In the other comparison, an update has the 32 sequences of the preset
`small`; Atlas uses the micro-batch that `auto` chooses, and nanoGPT its fastest one.
"""

from __future__ import annotations

import functools
import gc
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from gpu.figures import Figures, LeftOut, Setup
from gpu.timing import product_rate, seconds_of_each

LIMIT = 140
EQUAL = 8
"""The micro-batch at which both are compared."""
SEQUENCES = 32
"""Sequences of an update if the micro-batch is chosen: the preset's."""
TINY = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "max_seq_len": 32, "vocab_size": 257}


def config_of(preset: str, setup: Setup, **training: Any) -> Any:
    """The preset with other settings of `training`; its shape is tiny in a rehearsal."""
    from atlas.config.loader import overlay, read_yaml, resolve
    from atlas.config.presets import preset_path

    changes: dict[str, Any] = {"training": training, "device": setup.device}
    if setup.rehearse:
        changes |= {"model": TINY, "training": {"compile": "off", **training}}
    return resolve(overlay(read_yaml(preset_path(preset)), changes))


def shape_of(config: Any, setup: Setup) -> Any:
    """For peers, and the FLOPs of an update."""
    from train_throughput import Shape

    model, training = config.model, config.training
    return Shape(
        hidden_size=model.hidden_size,
        num_layers=model.num_layers,
        num_heads=model.num_heads,
        context=model.max_seq_len,
        batch_size=training.sequences_per_update,
        device=setup.device,
        vocabulary=model.vocabulary,
        micro_batches=training.gradient_accumulation_steps,
    )


def measure(name: str, make: Callable[[], Callable[[], None]], shape: Any, figures: Figures) -> None:
    """Add the figure `name`: the median of some updates that `make` returns, after compilation."""
    import torch

    rate = product_rate(shape.device)
    if shape.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    step = make()
    for _ in range(3):
        step()
    warm_up = time.perf_counter() - start
    seconds = seconds_of_each(step, shape.device, rounds=20 if shape.device == "cuda" else 3)
    median = statistics.median(seconds)
    figures.add(
        name,
        tokens_per_second=round(shape.tokens / median),
        milliseconds=round(1e3 * median, 3),
        fastest_milliseconds=round(1e3 * min(seconds), 3),
        sequences=shape.batch_size,
        micro_batches=shape.micro_batches,
        mfu=round(shape.matrix_flops / median / rate, 4),
        product_tflops=round(rate / 1e12, 1),
        peak_bytes=torch.cuda.max_memory_allocated() if shape.device == "cuda" else None,
        warm_up_seconds=round(warm_up, 1),
    )


def atlas(preset: str, batch_size: int, setup: Setup, figures: Figures) -> None:
    from train_throughput import atlas_step

    config = config_of(preset, setup, batch_size=batch_size, gradient_accumulation_steps=1)
    name = f"{preset}: Atlas, {batch_size} x {config.model.max_seq_len}"
    measure(name, lambda: atlas_step(config), shape_of(config, setup), figures)


def atlas_auto(setup: Setup, figures: Figures) -> None:
    """With the micro-batch that `training.micro_batch_size: auto` chooses for the preset `small`."""
    from train_throughput import atlas_step

    from atlas.training.devices.compile import choose_compile
    from atlas.training.devices.device import setup_runtime
    from atlas.training.micro_batch import fit_micro_batch

    config = config_of("small", setup, micro_batch_size="auto")
    runtime = setup_runtime(config)
    runtime = replace(runtime, compiles=choose_compile(config, runtime.device, say=print))
    start = time.perf_counter()
    chosen = fit_micro_batch(config, runtime, say=print, may_exceed=True)
    figures.add("small: auto", micro_batch=chosen, seconds=round(time.perf_counter() - start, 1))
    shape = replace(shape_of(config, setup), micro_batches=-(-SEQUENCES // chosen))
    measure("small: Atlas, auto", lambda: atlas_step(config, chosen), shape, figures)


def nanogpt(micro_batch: int, setup: Setup, figures: Figures) -> None:
    """Compiled nanoGPT in the shape of `small`, its table padded to 50,304 rows."""
    if setup.nanogpt is None:
        raise LeftOut("--nanogpt names no folder with nanoGPT's model.py")
    import torch
    from train_throughput import nanogpt as nanogpt_step

    folder = f"{setup.nanogpt}{'' if setup.rehearse else ':compiled'}"
    updates = ({"": 1} if micro_batch == EQUAL else {}) | {f" of {SEQUENCES}": SEQUENCES // micro_batch}
    for ending, micro_batches in updates.items():
        training = {"batch_size": micro_batch, "gradient_accumulation_steps": micro_batches}
        shape = shape_of(config_of("small", setup, **training), setup)
        name = f"small: nanoGPT, {micro_batch} x {shape.context}{ending}"
        if figures.get(name) is None:
            measure(name, functools.partial(nanogpt_step, shape, folder), shape, figures)
            torch._dynamo.reset()  # its cache refers to the model
            gc.collect()


JOBS = {
    "small: Atlas, 8": functools.partial(atlas, "small", 8),
    "small: nanoGPT, 8": functools.partial(nanogpt, 8),
    "small: Atlas, auto": atlas_auto,
    "default: Atlas, 4": functools.partial(atlas, "default", 4),
    "small: nanoGPT, 16": functools.partial(nanogpt, 16),
    "small: nanoGPT, 32": functools.partial(nanogpt, 32),
}


def ratios(figures: Figures) -> dict[str, float]:
    """Atlas's tokens a second as multiples of nanoGPT's, as far as both were measured."""
    speeds = {
        line["figure"]: line["tokens_per_second"] for line in figures.lines() if "tokens_per_second" in line
    }
    best = max((speed for name, speed in speeds.items() if name.endswith(f" of {SEQUENCES}")), default=None)
    equal = [
        next(
            (speed for name, speed in speeds.items() if re.fullmatch(rf"small: {who}, {EQUAL} x \d+", name)),
            None,
        )
        for who in ("Atlas", "nanoGPT")
    ]
    pairs = {"small, equal micro-batch": equal, "small, auto": [speeds.get("small: Atlas, auto"), best]}
    return {name: round(ours / theirs, 3) for name, (ours, theirs) in pairs.items() if ours and theirs}
