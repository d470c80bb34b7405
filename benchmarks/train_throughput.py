"""Measure the tokens per second and the peak memory of training, compared with other implementations of the same model.

    python benchmarks/train_throughput.py                                   tiny, beside transformers
    python benchmarks/train_throughput.py --preset nano --rounds 8
    python benchmarks/train_throughput.py --peer nanoGPT=../nanoGPT         beside nanoGPT too, eager and compiled
    python benchmarks/train_throughput.py --peer first=../Atlas-first       beside Atlas's first implementation
    python benchmarks/train_throughput.py --precision both                  each program in fp32 and in bf16
    python benchmarks/train_throughput.py --whole                           also a whole run of atlas train
    python benchmarks/train_throughput.py --device cuda --preset small --batch-size 16

Each program runs in a separate process, with the preset's shape and GPT-2's vocabulary of 50,257 tokens (nanoGPT has
50,304 embedding rows, as its author advises). Dropout is 0, biases are on, and the optimizer is AdamW with gradient
clipping. Each program trains on random tokens. By default, it computes in fp32 on a CPU and in bf16 (autocast) on a
GPU. After a warm-up, the processes take turns: one computes an update, while the others wait without computing. The
table shows medians. Peak memory is that of the process, or of the allocator on a GPU. A peer's folder contains a
`model.py` with nanoGPT's `GPT` and `GPTConfig`, or the package `atlas` of the first Atlas. The contender "atlas train"
is a run with data, log and progress bar, and with the copy of the state from which it saves in the background.

The row "matrix products alone" shows the speed at which an update would take only the time of its matrix products.
These products need 6 FLOPs per weight and token; attention counts as causal. The script measures the FLOP/s of a large
matrix product in the same precision, with `--precision both` in bf16. MFU (model FLOPs utilisation) is a program's
fraction of this speed. The last lines compare Atlas with the fastest way to run each peer.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from contenders import Contender, build_nanogpt, take_turns
from results import add_record_option, recorded

VOCABULARY = 50_257
WARM_UP = 2
PRODUCTS = 5


@dataclass(frozen=True)
class Shape:
    """The model and batch of all contenders."""

    hidden_size: int
    num_layers: int
    num_heads: int
    context: int
    batch_size: int
    device: str
    vocabulary: int = VOCABULARY
    micro_batches: int = 1
    precision: str = ""
    """`fp32` or `bf16`; by default bf16 on a GPU, and fp32 on a CPU."""

    @property
    def is_bf16(self) -> bool:
        return self.precision == "bf16" or (not self.precision and self.device == "cuda")

    @property
    def padded_vocabulary(self) -> int:
        return -(-self.vocabulary // 64) * 64

    @property
    def tokens(self) -> int:
        return self.batch_size * self.context

    @property
    def matrix_flops(self) -> float:
        """Return the FLOPs of an update, forward and backward: 6 per weight and token, plus attention's two products,
        counted as causal."""
        weights = 12 * self.num_layers * self.hidden_size**2 + self.vocabulary * self.hidden_size
        return 6 * self.tokens * (weights + self.num_layers * self.context * self.hidden_size)


Step = Callable[[], None]
# The contenders, each imported in its own process


def atlas(shape: Shape, folder: str) -> Step:
    from atlas.process import set_up_process

    set_up_process()  # as the `atlas` command does
    from atlas.config.loader import resolve

    model = {name: getattr(shape, name) for name in ("hidden_size", "num_layers", "num_heads")}
    model |= {"vocab_size": shape.vocabulary, "max_seq_len": shape.context}
    training = {
        "batch_size": shape.batch_size // shape.micro_batches,
        "gradient_accumulation_steps": shape.micro_batches,
        "precision": "bf16" if shape.is_bf16 else "fp32",
        "compile": "on" if folder == "compiled" else "off",
    }
    return atlas_step(resolve({"model": model, "training": training, "device": shape.device}))


def atlas_step(config: Any, micro_batch: int | None = None, *, keeps_little: bool = False) -> Step:
    """Return a function that runs an update of `atlas train` on random tokens. `micro_batch` defaults to the config's
    `batch_size`."""
    from dataclasses import replace

    import torch

    from atlas.training.devices.compile import choose_compile, compile_blocks
    from atlas.training.devices.device import setup_runtime
    from atlas.training.devices.signals import StopRequest
    from atlas.training.state import TrainState
    from atlas.training.step import accumulate_gradient, apply_gradient, fresh_learner

    runtime = setup_runtime(config)
    runtime = replace(runtime, compiles=choose_compile(config, runtime.device, say=print))
    learner = fresh_learner(config, runtime)
    if runtime.compiles:
        compile_blocks(learner.model, keeps_little=keeps_little)
    size = micro_batch or config.training.batch_size
    state = TrainState(horizon=10**9, micro_batch_size=size, eval_batch_size=size)
    stop = StopRequest(print)
    shape = (config.training.sequences_per_update, config.model.max_seq_len + 1)

    def step() -> None:
        tokens = torch.randint(0, config.model.vocabulary, shape)
        batch = tokens[:, :-1], tokens[:, 1:]
        gradient = accumulate_gradient(learner, batch, state, stop=stop)
        apply_gradient(learner, gradient, state, rate=3e-4)
        state.step += 1

    return step


def atlas_train(shape: Shape, folder: str) -> Step:
    """Return a function that runs an update of a run as `atlas train` starts it."""
    from atlas.process import set_up_process

    set_up_process()
    from atlas.training.launch import start_run
    from atlas.training.resume import Request, choose_start

    place = tempfile.TemporaryDirectory()
    text = Path(place.name, "text.txt")
    words = ["".join(random.choices("abcdefghijklmnopqrstuvwxyz", k=5)) for _ in range(9999)]
    text.write_text("\n".join(" ".join(random.choices(words, k=200)) for _ in range(2000)))
    model = {name: getattr(shape, name) for name in ("hidden_size", "num_layers", "num_heads")}
    explicit = {
        "device": shape.device,
        "model": {**model, "max_seq_len": shape.context},
        "data": {"train_data": str(text), "val_fraction": 0},
        "training": {
            "batch_size": shape.batch_size,
            "max_steps": 10**6,
            "precision": "bf16" if shape.is_bf16 else "fp32",
        },
        "checkpoint": {"output_dir": str(Path(place.name, "run")), "save_interval": 10**6},
        "tracking": {"samples": 0},
    }
    updates = _updates(start_run(choose_start(Request(explicit))), place)
    return lambda: next(updates)


def _updates(run: Any, place: Any) -> Iterator[None]:
    """Run the training loop, and yield after each update. `place` is a temporary folder that lives as long."""
    from atlas.training.train import _running, train_step

    with _running(run) as after_update:
        run.keep_snapshot()
        stream = run.batches()
        while Path(place.name).exists():
            train_step(run, stream)
            after_update()
            if run.state.step == 1:
                run.keep_snapshot()  # now with the optimizer's state, as in the first save
            yield


def nanogpt(shape: Shape, folder: str) -> Step:
    """Return a function that runs an update as in nanoGPT's train.py."""
    import torch

    folder, _, compiled = folder.partition(":")
    network, optimizer = build_nanogpt(
        folder,
        shape.device,
        block_size=shape.context,
        vocab_size=shape.padded_vocabulary,
        n_layer=shape.num_layers,
        n_head=shape.num_heads,
        n_embd=shape.hidden_size,
        dropout=0.0,
        bias=True,
    )
    run = torch.compile(network) if compiled else network
    return _plain_step(shape, network, optimizer, lambda inputs, targets: run(inputs, targets)[1])


def first_atlas(shape: Shape, folder: str) -> Step:
    """Return a function that runs an update of the first published Atlas, as in its trainer, but without the garbage
    collection after each update."""
    sys.path.insert(0, folder)  # its package has the same name as ours
    from atlas.config import ModelConfig
    from atlas.model import AtlasLM
    from atlas.training.loss import compute_lm_loss_with_logits_shift
    from atlas.training.optimizers.build import create_optimizer  # type: ignore[import-not-found]

    config = ModelConfig(
        vocab_size=shape.vocabulary,
        max_seq_len=shape.context,
        hidden_size=shape.hidden_size,
        num_layers=shape.num_layers,
        num_heads=shape.num_heads,
        dropout=0.0,
        attention_dropout=0.0,
    )
    network = AtlasLM(config).to(shape.device).train()
    optimizer = create_optimizer(network)
    return _plain_step(
        shape,
        network,
        optimizer,
        lambda inputs, targets: compute_lm_loss_with_logits_shift(
            model_output=network(inputs), input_ids=inputs
        ),
    )


def transformers(shape: Shape, folder: str) -> Step:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=shape.vocabulary,
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

    def loss_of(inputs: Any, targets: Any) -> Any:
        return network(inputs, labels=inputs, use_cache=False).loss

    return _plain_step(shape, network, optimizer, loss_of)


def _plain_step(shape: Shape, network: Any, optimizer: Any, loss_of: Callable[[Any, Any], Any]) -> Step:
    import torch

    bf16 = torch.autocast(shape.device, dtype=torch.bfloat16, enabled=shape.is_bf16)

    def step() -> None:
        tokens = torch.randint(0, shape.vocabulary, (shape.batch_size, shape.context + 1)).to(shape.device)
        for micro in tokens.chunk(shape.micro_batches):
            with bf16:
                loss = loss_of(micro[:, :-1].contiguous(), micro[:, 1:].contiguous()) / shape.micro_batches
            loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()

    return step


def products(shape: Shape, folder: str) -> Step:
    """Return a function that runs large matrix products without a model."""
    import torch

    size = 8192 if shape.device == "cuda" else 2048
    dtype = torch.bfloat16 if shape.is_bf16 else torch.float32
    a, b = (torch.randn(size, size, device=shape.device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)

    def step() -> None:
        for _ in range(PRODUCTS):
            torch.mm(a, b, out=out)

    return step


KINDS = {
    "atlas": atlas,
    "atlas train": atlas_train,
    "nanogpt": nanogpt,
    "first": first_atlas,
    "transformers": transformers,
    "products": products,
}


def prepare(kind: str, folder: str, shape: Shape) -> Callable[[Any], Any]:
    """Return a function that answers a turn in a child process: with the seconds of one update, and the peak memory so
    far."""
    step = KINDS[kind](shape, folder)
    import torch

    on_gpu = shape.device == "cuda"
    for _ in range(WARM_UP):
        step()

    def update(request: Any) -> tuple[float, int]:
        if on_gpu:
            torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        if on_gpu:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        return seconds, torch.cuda.max_memory_allocated() if on_gpu else peak_resident()

    return update


def peak_resident() -> int:
    """Return the peak memory in bytes. getrusage would include the peak of the parent process."""
    import psutil

    if psutil.LINUX:
        with open("/proc/self/status", encoding="ascii") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    memory = psutil.Process().memory_info()
    return int(getattr(memory, "peak_wset", memory.rss))


@dataclass
class Trainee:
    """A contender and its results."""

    contender: Contender
    seconds: list[float] = field(default_factory=list)
    peak: int = 0

    @property
    def name(self) -> str:
        return self.contender.name

    def step(self) -> None:
        seconds, self.peak = self.contender.ask()
        self.seconds.append(seconds)


def trainee(name: str, kind: str, shape: Shape, folder: str = "") -> Trainee:
    command = [sys.executable, __file__, "--child", kind, folder, json.dumps(asdict(shape))]
    return Trainee(Contender(name, command))


def in_both(shape: Shape, peers: list[str], *, compiled: bool, whole: bool = False) -> Iterator[Trainee]:
    """Yield Atlas in bf16 first, and every program in bf16 and in fp32. The first Atlas has no bf16."""
    for precision in ("bf16", "fp32"):
        for one in trainees(replace(shape, precision=precision), peers, compiled=compiled, whole=whole):
            one.contender.name += f", {precision}"
            if precision == "fp32" or "first" not in one.contender.command:
                yield one


def trainees(shape: Shape, peers: list[str], *, compiled: bool, whole: bool = False) -> Iterator[Trainee]:
    """Yield Atlas first, then the available peers."""
    yield trainee("Atlas", "atlas", shape)
    if whole:
        yield trainee("atlas train", "atlas train", shape)
    if compiled:
        yield trainee("Atlas, compiled", "atlas", shape, "compiled")
    for peer in peers:
        name, _, folder = peer.partition("=")
        if (Path(folder) / "atlas").is_dir():
            yield trainee(name, "first", shape, folder)
            continue
        yield trainee(name, "nanogpt", shape, folder)
        if compiled:
            yield trainee(f"{name}, compiled", "nanogpt", shape, f"{folder}:compiled")
    if importlib.util.find_spec("transformers"):
        yield trainee("transformers", "transformers", shape)
    else:
        print("transformers: is not installed and left out", file=sys.stderr)


def start(chosen: list[Trainee], *, at_once: bool) -> list[Trainee]:
    """Return the contenders that are ready. The output names the other contenders. With `at_once`, all contenders warm
    up in parallel."""
    for one in chosen if at_once else ():
        one.contender.launch()
    started = []
    for one in chosen:
        if not at_once:
            one.contender.launch()
        if one.contender.is_ready():
            started.append(one)
    return started


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
    parser.add_argument("--no-compile", action="store_true", help="leave out the compiled contenders")
    parser.add_argument("--precision", choices=["fp32", "bf16", "both"], default="")
    parser.add_argument("--whole", action="store_true", help="also a whole run of atlas train")
    add_record_option(parser)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        kind, folder, given = arguments.child
        take_turns(lambda: prepare(kind, folder, Shape(**json.loads(given))))
        return

    shape = shape_of(arguments.preset, arguments.batch_size, arguments.device, arguments.context)
    is_both = arguments.precision == "both"
    shape = replace(shape, precision="bf16" if is_both else arguments.precision)
    list_all = in_both if is_both else trainees
    chosen = list(list_all(shape, arguments.peer, compiled=not arguments.no_compile, whole=arguments.whole))
    ceiling = trainee("matrix products alone", "products", shape)
    with recorded("Training throughput", arguments):
        # On a GPU the compilation takes longest, and each contender has its own CPU core. On a CPU, contenders would
        # slow each other down.
        started = start([*chosen, ceiling], at_once=arguments.device == "cuda")
        if not {chosen[0].name, ceiling.name} <= {one.name for one in started}:
            raise SystemExit("nothing to compare")
        for turn in range(arguments.rounds):
            begin = turn % len(started)  # each contender is first in some rounds
            for one in started[begin:] + started[:begin]:
                one.step()
        for one in started:
            one.contender.stop()
        report(arguments.preset, shape, started[:-1], ceiling)


def shape_of(preset: str, batch_size: int, device: str, context: int | None = None) -> Shape:
    from atlas.config.loader import read_yaml, resolve
    from atlas.config.presets import preset_path

    model = resolve(read_yaml(preset_path(preset))).model
    context = context or model.max_seq_len
    return Shape(model.hidden_size, model.num_layers, model.num_heads, context, batch_size, device)


def report(preset: str, shape: Shape, contenders: list[Trainee], ceiling: Trainee) -> None:
    first = contenders[0]
    precision = "bf16" if shape.is_bf16 else "fp32"
    print(
        f"{preset}: {shape.num_layers} × {shape.hidden_size}, batch {shape.batch_size} × {shape.context}, "
        f"{shape.device}, {precision}, medians of {len(first.seconds)} updates\n"
    )
    side = 8192 if shape.device == "cuda" else 2048
    rate = PRODUCTS * 2 * side**3 / statistics.median(ceiling.seconds)
    bound = shape.tokens / (shape.matrix_flops / rate)
    print("| | tokens/s | Atlas ÷ it | MFU | peak memory | Atlas ÷ it |\n|---|---:|---:|---:|---:|---:|")
    speed = {one.name: shape.tokens / statistics.median(one.seconds) for one in contenders}
    for one in contenders:
        print(
            f"| {one.name} | {speed[one.name]:,.0f} | {speed[first.name] / speed[one.name]:.2f} "
            f"| {speed[one.name] / bound:.1%} | {one.peak / 1e6:,.0f} MB | {first.peak / one.peak:.2f} |"
        )
    print(f"| {ceiling.name} | {bound:,.0f} | {speed[first.name] / bound:.2f} | 100% | | |")
    print(
        f"\nA matrix product runs at {rate / 1e9:,.0f} GFLOP/s in {precision}; those of an update have "
        f"{shape.matrix_flops / 1e9:,.0f} GFLOP."
    )
    fastest: dict[str, Trainee] = {}
    for one in sorted(contenders, key=lambda one: speed[one.name]):
        fastest[one.name.split(",")[0]] = one
    ours = [fastest.pop(program) for program in ("Atlas", "atlas train") if program in fastest]
    for peer in fastest.values():
        for one in ours:
            print(
                f"{one.name} ÷ {peer.name}, the fastest way to run it: {speed[one.name] / speed[peer.name]:.2f} of its "
                f"tokens/s, {one.peak / peer.peak:.2f} of its memory"
            )


if __name__ == "__main__":
    main()
