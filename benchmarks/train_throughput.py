"""Tokens a second and peak memory of training, beside other implementations of the same model.

    python benchmarks/train_throughput.py                                   tiny, beside transformers
    python benchmarks/train_throughput.py --preset nano --rounds 8
    python benchmarks/train_throughput.py --peer nanoGPT=../nanoGPT         beside nanoGPT too, eager and compiled
    python benchmarks/train_throughput.py --device cuda --preset small --batch-size 16

Every contender is a process of its own with the preset's shape and GPT-2's vocabulary (50,304 rows in all of them, so
that the work is the same), dropout 0, biases on, and AdamW with clipping, on random tokens. It trains some updates to
warm up; then the processes take turns, one update each, and the others wait without computing. Medians count. Peak
memory is the process's own (resident; on a GPU the allocator's). A peer's folder holds a `model.py` with nanoGPT's
`GPT` and `GPTConfig`.

The ceiling is what the matrix products alone allow: their FLOPs in an update, at the rate of a large one measured here.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

ROWS = 50_304
WARM_UP = 2


@dataclass(frozen=True)
class Shape:
    """What all contenders train."""

    hidden_size: int
    num_layers: int
    num_heads: int
    context: int
    batch_size: int
    device: str

    @property
    def tokens(self) -> int:
        return self.batch_size * self.context

    @property
    def matrix_flops(self) -> float:
        """Of an update, forward and backward: 6 for each weight and token, and attention's two products, causal."""
        weights = 12 * self.num_layers * self.hidden_size**2 + ROWS * self.hidden_size
        return 6 * self.tokens * (weights + self.num_layers * self.context * self.hidden_size)


Step = Callable[[], None]


# The contenders, each imported in its own process


def atlas(shape: Shape, folder: str) -> Step:
    import torch

    from atlas.config.loader import resolve
    from atlas.model import build_model
    from atlas.training.compilation import compile_blocks
    from atlas.training.interrupt import StopRequest
    from atlas.training.runtime import setup_runtime
    from atlas.training.state import TrainState
    from atlas.training.update import Updater

    model = {name: getattr(shape, name) for name in ("hidden_size", "num_layers", "num_heads")} | {
        "vocab_size": ROWS,
        "max_seq_len": shape.context,
    }
    training = {"batch_size": shape.batch_size}
    config = resolve({"model": model, "training": training, "device": shape.device})
    runtime = setup_runtime(config)
    network = build_model(config.model, seed=0).to(runtime.device).train()
    if folder == "compiled":
        compile_blocks(network)
    updater = Updater(network, config, runtime, None, say=print)
    state = TrainState(horizon=10**9, micro_batch_size=shape.batch_size, eval_batch_size=shape.batch_size)
    stop = StopRequest(print)

    def step() -> None:
        tokens = torch.randint(0, ROWS, (shape.batch_size, shape.context + 1))
        loss = updater.gradient(tokens[:, :-1], tokens[:, 1:], state, stop=stop)
        assert loss is not None
        updater.apply(loss, state, rate=3e-4)
        state.step += 1

    return step


def nanogpt(shape: Shape, folder: str) -> Step:
    """As nanoGPT's train.py does it."""
    import torch

    folder, _, compiled = folder.partition(":")
    sys.path.insert(0, folder)
    from model import GPT, GPTConfig  # type: ignore[import-not-found]

    config = GPTConfig(
        block_size=shape.context,
        vocab_size=ROWS,
        n_layer=shape.num_layers,
        n_head=shape.num_heads,
        n_embd=shape.hidden_size,
        dropout=0.0,
        bias=True,
    )
    network = GPT(config).to(shape.device)
    optimizer = network.configure_optimizers(0.1, 3e-4, (0.9, 0.95), shape.device)
    run = torch.compile(network) if compiled else network
    return _plain_step(shape, network, optimizer, lambda inputs, targets: run(inputs, targets)[1])


def transformers(shape: Shape, folder: str) -> Step:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=ROWS,
        n_positions=shape.context,
        n_embd=shape.hidden_size,
        n_layer=shape.num_layers,
        n_head=shape.num_heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    network = GPT2LMHeadModel(config).to(shape.device).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-4, fused=True)  # the Trainer's default
    return _plain_step(
        shape,
        network,
        optimizer,
        lambda inputs, targets: network(inputs, labels=inputs, use_cache=False).loss,
    )


def _plain_step(shape: Shape, network: Any, optimizer: Any, loss_of: Callable[[Any, Any], Any]) -> Step:
    import contextlib

    import torch

    bf16 = (
        torch.autocast("cuda", dtype=torch.bfloat16) if shape.device == "cuda" else contextlib.nullcontext()
    )

    def step() -> None:
        tokens = torch.randint(0, ROWS, (shape.batch_size, shape.context + 1)).to(shape.device)
        with bf16:
            loss = loss_of(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()

    return step


def products(shape: Shape, folder: str) -> Step:
    """No model: the matrix products of an update, at the rate of one well-shaped product."""
    import torch

    size = 8192 if shape.device == "cuda" else 2048
    dtype = torch.bfloat16 if shape.device == "cuda" else torch.float32
    a, b = (torch.randn(size, size, device=shape.device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)

    def step() -> None:
        torch.mm(a, b, out=out)

    return step


KINDS = {"atlas": atlas, "nanogpt": nanogpt, "transformers": transformers, "products": products}


def child(kind: str, folder: str, shape: Shape) -> None:
    """One update for each line that comes in; its seconds and the peak memory go out."""
    import torch

    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a peer prints is no figure
    step = KINDS[kind](shape, folder)
    on_gpu = shape.device == "cuda"
    for _ in range(WARM_UP):
        step()
    print("ready", file=out, flush=True)
    for _ in sys.stdin:
        if on_gpu:
            torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        if on_gpu:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        peak = torch.cuda.max_memory_allocated() if on_gpu else _peak_resident()
        print(json.dumps([seconds, peak]), file=out, flush=True)


def _peak_resident() -> int:
    """Bytes. Not getrusage: its peak begins with that of the process that started this one."""
    import psutil

    if psutil.LINUX:
        with open("/proc/self/status", encoding="ascii") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    memory = psutil.Process().memory_info()
    return int(getattr(memory, "peak_wset", memory.rss))


@dataclass
class Contender:
    """A process that waits for its turn."""

    name: str
    kind: str
    folder: str = ""
    seconds: list[float] = field(default_factory=list)
    peak: int = 0
    process: subprocess.Popen[str] | None = None

    def start(self, shape: Shape) -> None:
        # What `atlas` sets for itself, see busy_machine.py; a peer has PyTorch's default.
        environment = os.environ | ({"GOMP_SPINCOUNT": "1000"} if self.kind == "atlas" else {})
        command = [sys.executable, __file__, "--child", self.kind, self.folder, json.dumps(asdict(shape))]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        assert self.process.stdout
        if self.process.stdout.readline().strip() != "ready":
            raise SystemExit(f"{self.name}: did not start; its own words are above")

    def step(self) -> None:
        assert self.process
        assert self.process.stdin
        assert self.process.stdout
        print(file=self.process.stdin, flush=True)
        seconds, self.peak = json.loads(self.process.stdout.readline())
        self.seconds.append(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--context", type=int, help="default: the preset's")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--no-compile", action="store_true", help="without the compiled contenders")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        kind, folder, shape = arguments.child
        child(kind, folder, Shape(**json.loads(shape)))
        return

    from atlas.config.loader import read_yaml, resolve
    from atlas.config.presets import preset_path

    model = resolve(read_yaml(preset_path(arguments.preset))).model
    shape = Shape(
        model.hidden_size,
        model.num_layers,
        model.num_heads,
        arguments.context or model.max_seq_len,
        arguments.batch_size,
        arguments.device,
    )
    contenders = [Contender("Atlas", "atlas")]
    contenders += [] if arguments.no_compile else [Contender("Atlas, compiled", "atlas", "compiled")]
    for peer in arguments.peer:
        name, _, folder = peer.partition("=")
        contenders.append(Contender(name, "nanogpt", folder))
        if not arguments.no_compile:
            contenders.append(Contender(f"{name}, compiled", "nanogpt", f"{folder}:compiled"))
    contenders.append(Contender("transformers", "transformers"))
    ceiling = Contender("matrix products alone", "products")
    for contender in (*contenders, ceiling):
        contender.start(shape)
    for _ in range(arguments.rounds):
        for contender in (*contenders, ceiling):
            contender.step()
    report(arguments.preset, shape, contenders, ceiling)


def report(preset: str, shape: Shape, contenders: list[Contender], ceiling: Contender) -> None:
    import torch

    first = contenders[0]
    print(
        f"{preset}: {shape.num_layers} × {shape.hidden_size}, batch {shape.batch_size} × {shape.context}, "
        f"{shape.device}, {os.cpu_count()} cores, PyTorch {torch.__version__}, Python {platform.python_version()}, "
        f"medians of {len(first.seconds)} updates\n"
    )
    print("| | tokens/s | Atlas ÷ it | peak memory | Atlas ÷ it |\n|---|---:|---:|---:|---:|")
    speed = {one.name: shape.tokens / statistics.median(one.seconds) for one in contenders}
    for one in contenders:
        print(
            f"| {one.name} | {speed[one.name]:,.0f} | {speed[first.name] / speed[one.name]:.2f} "
            f"| {one.peak / 1e6:,.0f} MB | {first.peak / one.peak:.2f} |"
        )
    side = 8192 if shape.device == "cuda" else 2048
    rate = 2 * side**3 / statistics.median(ceiling.seconds)
    bound = shape.tokens / (shape.matrix_flops / rate)
    print(f"| {ceiling.name} | {bound:,.0f} | {speed[first.name] / bound:.2f} | | |")
    print(
        f"\nA matrix product runs at {rate / 1e9:,.0f} GFLOP/s; those of an update have "
        f"{shape.matrix_flops / 1e9:,.0f} GFLOP."
    )


if __name__ == "__main__":
    main()
