"""Simulate the speed of training on GPUs. No GPU is needed, and nothing is measured.

Atlas's own code runs on fake CUDA tensors. From the bytes and FLOPs of each kernel, the script computes the time of
this kernel on a card.

    python benchmarks/roofline.py small default --batch-size 8 --peer nanoGPT=../nanoGPT
    python benchmarks/roofline.py modern --gpu "RTX 3060" --set training.optimizer=adamw
    python benchmarks/roofline.py small --eager --kernels 20

The time of a kernel is the time to move its bytes or to compute its FLOPs, whichever is longer (Williams et al. 2009,
doi:10.1145/1498765.1498785). The time of an update is the total time of its kernels, or the time that the host needs to
launch these kernels, whichever is longer. `kernel_costs.py` defines what counts as a kernel. atlas/planning/speed.py
has the speeds that cards reach. MFU is relative to the speed of large matrix products, which is below the peak speed
that the maker states.

--peer NAME=FOLDER also simulates nanoGPT's class `GPT` in FOLDER/model.py, compiled as one graph. This model has the
preset's layers, width, heads and context length, and Atlas's padded vocabulary (50,304, as nanoGPT recommends). The
model trains with AdamW and the same micro-batches as Atlas.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import fake_cuda
from contenders import build_nanogpt
from results import add_record_option, recorded

if TYPE_CHECKING:
    from kernel_costs import Kernel, KernelLog

    from atlas.config import AtlasConfig
    from atlas.planning.cards import Card

PARTS = ("blocks forward", "blocks backward", "loss", "optimizer", "clip", "rest")
GPUS = ("H100", "H200", "RTX 4090", "RTX 3060")


class Update(NamedTuple):
    """The kernels of an update and their numbers: those that run `once`, and those that run in `each` micro-batch."""

    name: str
    once: Counter[Kernel]
    """The number is negative for kernels that the first micro-batch does not run, such as the accumulation of
    gradients."""
    each: Counter[Kernel]
    graphs_once: int
    graphs_each: int
    micro_batches: int
    tokens: int
    model_flops: int
    """The FLOPs of the model's matrix products and attention, without recomputation."""

    def total(self, value: Callable[[Kernel], float], part: str | None = None) -> float:
        def of(kernels: Counter[Kernel]) -> float:
            return sum(times * value(one) for one, times in kernels.items() if part in (None, one.part))

        return of(self.once) + self.micro_batches * of(self.each)

    @property
    def host_seconds(self) -> float:
        from atlas.planning.speed import COMPILED_KERNEL, GRAPH, OPERATOR

        launches = self.total(lambda kernel: COMPILED_KERNEL if kernel.is_compiled else OPERATOR)
        return launches + GRAPH * (self.graphs_once + self.micro_batches * self.graphs_each)


def count_update(name: str, step: Callable[[int], None], log: KernelLog, config: AtlasConfig) -> Update:
    """Count the kernels of `step(n)`, an update of n micro-batches. The first call compiles and creates optimizer
    states. The counts for one and two micro-batches then give the counts for any number."""
    from atlas.model.cost import training_flops_per_token

    counted = []
    for micro_batches in (2, 1, 2):
        log.kernels, log.graphs = Counter(), 0
        step(micro_batches)
        counted.append((log.kernels, log.graphs))
    _, (one, graphs_one), (two, graphs_two) = counted
    each, once = two.copy(), one.copy()
    each.subtract(one)
    once.subtract(each)
    training = config.training
    plain = config.model_copy(
        update={"training": training.model_copy(update={"gradient_checkpointing": False})}
    )
    tokens = training.sequences_per_update * config.model.max_seq_len
    return Update(
        name=name,
        once=once,
        each=each,
        graphs_once=2 * graphs_one - graphs_two,
        graphs_each=graphs_two - graphs_one,
        micro_batches=-(-training.sequences_per_update // training.sequences_at_once),
        tokens=tokens,
        model_flops=training_flops_per_token(plain) * tokens,
    )


def count_atlas(config: AtlasConfig, device: Any, log: KernelLog, *, eager: bool) -> Update:
    """Count the kernels of an update of Atlas's training code."""
    from dataclasses import replace

    import torch

    from atlas.training import loss
    from atlas.training.devices.device import setup_runtime
    from atlas.training.devices.signals import StopRequest
    from atlas.training.state import TrainState
    from atlas.training.step import accumulate_gradient, apply_gradient, fresh_learner

    size, length = config.training.sequences_at_once, config.model.max_seq_len
    with device, log.mode():
        runtime = replace(setup_runtime(config), compiles=not eager)
        learner = fresh_learner(config, runtime)
        log.label(learner.optimizer, "step", "optimizer")
        state = TrainState(horizon=100, micro_batch_size=size, eval_batch_size=1)
        stop = StopRequest(print)
        log.label(loss, "linear_cross_entropy", "loss")
        if eager:
            label_blocks(learner.model.blocks, log)

        def step(micro_batches: int) -> None:
            tokens = torch.randint(config.model.vocabulary, (size * micro_batches, length + 1))
            batch = tokens[:, :-1], tokens[:, 1:]
            gradient = accumulate_gradient(learner, batch, state, stop=stop)
            apply_gradient(learner, gradient, state, rate=1e-3)

        return count_update("Atlas", step, log, config)


def count_nanogpt(peer: str, config: AtlasConfig, device: Any, log: KernelLog, *, eager: bool) -> Update:
    """Count the kernels of an update as in nanoGPT's train.py, with the model of `peer`, a NAME=FOLDER."""
    import torch

    name, _, folder = peer.partition("=")
    shape, size = config.model, config.training.sequences_at_once
    with device, log.mode():
        with contextlib.redirect_stdout(io.StringIO()):
            model, optimizer = build_nanogpt(
                folder,
                "cuda",
                block_size=shape.max_seq_len,
                vocab_size=shape.padded_vocab_size,
                n_layer=shape.num_layers,
                n_head=shape.num_heads,
                n_embd=shape.hidden_size,
                dropout=shape.dropout,
                bias=shape.bias,
            )
        log.label(optimizer, "step", "optimizer")
        if eager:
            label_blocks(model.transformer.h, log)
        run = model if eager else torch.compile(model)

        def step(micro_batches: int) -> None:
            for _ in range(micro_batches):
                tokens = torch.randint(shape.vocabulary, (size, shape.max_seq_len)).to("cuda")
                with torch.autocast("cuda", dtype=torch.bfloat16):
                    loss = run(tokens, tokens)[1] / micro_batches
                loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return count_update(name, step, log, config)


def label_all(log: KernelLog) -> None:
    """Label the kernels that both programs run, and let clipping process all tensors together, as on a GPU."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensor
    from torch.utils import _foreach_utils

    _foreach_utils._foreach_supported_types.append(FakeTensor)
    log.label(torch.nn.utils, "clip_grad_norm_", "clip")


def label_blocks(blocks: Any, log: KernelLog) -> None:
    """Label blocks that are not compiled, and the full backward pass."""
    import torch

    for block in blocks:
        log.label(block, "forward", "blocks forward")
    log.label(torch.Tensor, "backward", "blocks backward")


def seconds_by_part(update: Update, card: Card) -> dict[str, float]:
    """Return the seconds of the GPU for each part."""
    from atlas.planning.speed import LAUNCH, card_speed

    speed = card_speed(card)

    def seconds(kernel: Kernel) -> float:
        rate = {"product": 1.0, "memory": 1.0, "attention": speed.attention, "misaligned": speed.misaligned}
        cost = kernel.cost
        at_rate = cost.flops / (speed.products * rate[cost.kind])
        # Clipping runs many small kernels, which overlap.
        return max(cost.bytes / speed.bandwidth, at_rate, 0.0 if kernel.part == "clip" else LAUNCH)

    return {part: update.total(seconds, part) for part in PARTS}


def simulate(arguments: argparse.Namespace, device: Any) -> Iterator[tuple[str, AtlasConfig, list[Update]]]:
    """Yield each config with its updates: Atlas's, and the peer's if there is one."""
    import torch
    from kernel_costs import KernelLog

    from atlas.config.loader import overlay, parse_overrides, read_yaml, resolve
    from atlas.config.presets import find_config
    from atlas.training.memory.presets import assume_vocabulary

    log = KernelLog(vocabulary=0)
    device.backend = log.backend()
    label_all(log)
    given: dict[str, Any] = {"device": "cuda"}
    if arguments.batch_size:
        given["training"] = {"batch_size": arguments.batch_size, "gradient_accumulation_steps": 1}
    for name in arguments.configs:
        written = overlay(overlay(read_yaml(find_config(name)), given), parse_overrides(arguments.settings))
        config = assume_vocabulary(resolve(written))
        if config.data.document_mask:
            raise SystemExit(f"{name}: data.document_mask: FlexAttention's kernels are not counted")
        log.vocabulary = config.model.padded_vocab_size
        torch._dynamo.reset()
        eager = arguments.eager or config.training.compile == "off"
        updates = [count_atlas(config, device, log, eager=eager)]
        if arguments.peer:
            torch._dynamo.reset()
            updates.append(count_nanogpt(arguments.peer, config, device, log, eager=eager))
        yield name, config, updates


def report(
    name: str, config: AtlasConfig, updates: list[Update], cards: list[Card], num_kernels: int
) -> None:
    """Print the tables of one config: by part, by card, and the kernels that move most bytes."""
    training = config.training
    print(
        f"{name}: {updates[0].micro_batches} × {training.sequences_at_once} × {config.model.max_seq_len:,} tokens "
        f"an update, {training.optimizer}\n"
    )
    print("| per token | " + " | ".join(f"{update.name}: kB | MFLOP | kernels" for update in updates) + " |")
    print("|---" + "|---:" * 3 * len(updates) + "|")
    for part in (*PARTS, None):
        cells = []
        for update in updates:
            moved = update.total(lambda kernel: kernel.cost.bytes, part) / update.tokens / 1e3
            flops = update.total(lambda kernel: kernel.cost.flops, part) / update.tokens / 1e6
            cells.append(f"{moved:,.1f} | {flops:,.1f} | {update.total(lambda kernel: 1, part):,.0f}")
        print(f"| {part or 'total'} | {' | '.join(cells)} |")
    has_peer = len(updates) > 1
    header = ["", "GPU ms", "host ms", "tokens/s", "MFU", *([f"× {updates[-1].name}"] if has_peer else [])]
    print(f"\n| {' | '.join(header)} |\n|---{'|---:' * (len(header) - 1)}|")
    for card in cards:
        speeds = [figures(update, card) for update in updates]
        for update, found in zip(updates, speeds, strict=True):
            ratio = found["tokens_per_second"] / speeds[-1]["tokens_per_second"]
            cells = [
                f"{card.name}, {update.name}",
                f"{found['gpu_seconds'] * 1e3:,.1f}",
                f"{found['host_seconds'] * 1e3:,.1f}",
                f"{found['tokens_per_second']:,.0f}",
                f"{found['mfu']:.0%}",
                *([f"{ratio:.2f}"] if has_peer else []),
            ]
            print(f"| {' | '.join(cells)} |")
    print()
    for update in updates if num_kernels else ():
        print_kernels(update, num_kernels)


def print_kernels(update: Update, number: int) -> None:
    """Print the kernels that move most bytes in an update."""
    moved: Counter[tuple[str, str]] = Counter()
    times: Counter[tuple[str, str]] = Counter()
    for kernels, repeated in ((update.once, 1), (update.each, update.micro_batches)):
        for kernel, count in kernels.items():
            moved[kernel.part, kernel.name] += kernel.cost.bytes * count * repeated
            times[kernel.part, kernel.name] += count * repeated
    print(f"| {update.name}: part | kernel | times | GB |\n|---|---|---:|---:|")
    for key, size in moved.most_common(number):
        print(f"| {key[0]} | {key[1]} | {times[key]:,} | {size / 1e9:.2f} |")
    print()


def figures(update: Update, card: Card) -> dict[str, Any]:
    """Return the times and speeds on one card."""
    from atlas.planning.speed import card_speed

    gpu = seconds_by_part(update, card)
    seconds = max(sum(gpu.values()), update.host_seconds)
    return {
        "gpu_seconds": sum(gpu.values()),
        "gpu_seconds_by_part": gpu,
        "host_seconds": update.host_seconds,
        "seconds": seconds,
        "tokens_per_second": update.tokens / seconds,
        "mfu": update.model_flops / seconds / card_speed(card).products,
    }


def as_json(name: str, updates: list[Update], cards: list[Card]) -> dict[str, Any]:
    """Return the bytes and FLOPs of an update by part, and the seconds by card."""
    return {
        "config": name,
        "updates": {
            update.name: {
                "tokens": update.tokens,
                "bytes": {part: update.total(lambda kernel: kernel.cost.bytes, part) for part in PARTS},
                "flops": {part: update.total(lambda kernel: kernel.cost.flops, part) for part in PARTS},
                "kernels": {part: update.total(lambda kernel: 1, part) for part in PARTS},
                "cards": {card.name: figures(update, card) for card in cards},
            }
            for update in updates
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("configs", nargs="*", default=["small", "default"], metavar="FILE|NAME")
    parser.add_argument(
        "--batch-size", type=int, help="run one micro-batch of N sequences an update", metavar="N"
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="settings")
    parser.add_argument(
        "--gpu", action="append", metavar="NAME", help=f"a card; may be repeated; default: {', '.join(GPUS)}"
    )
    parser.add_argument("--peer", metavar="NAME=FOLDER", help="nanoGPT, in a folder that holds its model.py")
    parser.add_argument("--eager", action="store_true", help="compile nothing")
    parser.add_argument(
        "--kernels", type=int, default=0, metavar="N", help="list the N kernels that move most bytes"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    add_record_option(parser)
    arguments = parser.parse_args()
    if reason := fake_cuda.why_not():
        raise SystemExit(reason)
    if arguments.batch_size is not None and arguments.batch_size < 1:
        parser.error(f"--batch-size {arguments.batch_size}: must be 1 or more")
    if arguments.peer and not (Path(arguments.peer.partition("=")[2]) / "model.py").is_file():
        parser.error(
            f"--peer {arguments.peer}: write it as nanoGPT=FOLDER, a folder that holds nanoGPT's model.py"
        )
    device = fake_cuda.FakeCuda()  # before anything imports PyTorch
    from atlas.errors import AtlasError
    from atlas.planning.cards import find_card

    try:
        run(arguments, device, [find_card(name) for name in arguments.gpu or GPUS])
    except AtlasError as error:
        parser.error(str(error))


def run(arguments: argparse.Namespace, device: fake_cuda.FakeCuda, cards: list[Card]) -> None:
    if arguments.json:
        found = [as_json(name, updates, cards) for name, _, updates in simulate(arguments, device)]
        print(json.dumps(found, indent=1))
        return
    with recorded("Roofline of training on GPUs, simulated", arguments):
        for name, config, updates in simulate(arguments, device):
            report(name, config, updates, cards, arguments.kernels)


if __name__ == "__main__":
    main()
