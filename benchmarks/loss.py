"""Measure time and memory of the LM head and the cross entropy, forward and backward: Atlas's code, PyTorch's function,
full logits.

    python benchmarks/loss.py
    python benchmarks/loss.py --tokens 8192 --width 768 --device cuda

Each implementation runs in a separate process with the same inputs. The processes take turns, and the table shows
medians. Memory is the peak of the process, minus its memory before the loss, with the hidden states, the LM head and
the targets. So this figure includes the gradients. `difference` is the distance between an implementation's gradient of
the LM head and Atlas's, divided by the norm of Atlas's gradient.

`F.linear_cross_entropy` exists in PyTorch 2.13 and later. The benchmark runs this function with Atlas's chunk size, and
with the chunk size that the function itself chooses.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from contenders import Contender, take_turns
from results import add_record_option, recorded
from train_throughput import peak_resident

ROWS = 50_304
"""GPT-2's vocabulary, rounded up as in other programs."""
KINDS = {
    "atlas": "Atlas, in chunks",
    "torch": "`F.linear_cross_entropy`, the same chunks",
    "torch auto": "`F.linear_cross_entropy`, its own chunks",
    "full": "full logits, `F.cross_entropy`",
}


@dataclass(frozen=True)
class Shape:
    tokens: int
    width: int
    device: str


def loss_of(kind: str) -> Callable[[Any, Any, Any], Any]:
    """Takes (hidden (N, C), head (V, C), targets (N,)) and returns the summed loss."""
    import torch
    import torch.nn.functional as F

    from atlas.config.config import LOSS_CHUNK_TOKENS
    from atlas.training.loss import linear_cross_entropy

    if kind == "atlas":
        return lambda hidden, head, targets: linear_cross_entropy(hidden[None], head, targets[None])
    if kind == "full":
        return lambda hidden, head, targets: F.cross_entropy(F.linear(hidden, head), targets, reduction="sum")
    if not hasattr(F, "linear_cross_entropy"):
        raise SystemExit(f"PyTorch {torch.__version__} has no F.linear_cross_entropy")
    options = torch.nn.LinearCrossEntropyOptions()
    if kind == "torch":
        options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=LOSS_CHUNK_TOKENS, chunking_method=None)
    return lambda hidden, head, targets: F.linear_cross_entropy(
        hidden, head, targets, reduction="sum", options=options
    )


def prepare(kind: str, shape: Shape) -> Callable[[Any], Any]:
    """Return the child's answer: the seconds, the bytes in addition to the inputs, and numbers for the comparison of
    gradients."""
    from atlas.process import set_up_process

    set_up_process()  # the same for all processes
    import psutil
    import torch

    torch.manual_seed(0)
    dtype = torch.bfloat16 if shape.device == "cuda" else torch.float32
    make = {"device": shape.device, "dtype": dtype}
    hidden = torch.randn(shape.tokens, shape.width, **make).requires_grad_()
    head = torch.randn(ROWS, shape.width, **make).mul_(0.02).requires_grad_()
    targets = torch.randint(ROWS, (shape.tokens,), device=shape.device)
    probe = torch.randn(ROWS, shape.width, **make)
    loss = loss_of(kind)

    def step() -> None:
        hidden.grad = head.grad = None
        loss(hidden, head, targets).backward()
        if shape.device == "cuda":
            torch.cuda.synchronize()

    # Run a few rows first, so that the memory of the libraries does not count as memory of the loss.
    loss(hidden[:8], head[:8], targets[:8] % 8).backward()
    hidden.grad = head.grad = None
    if shape.device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    else:
        before = psutil.Process().memory_info().rss
    step()
    peak = torch.cuda.max_memory_allocated() if shape.device == "cuda" else peak_resident()

    def answer(request: Any) -> Any:
        start = time.perf_counter()
        step()
        seconds = time.perf_counter() - start
        assert head.grad is not None
        gradient = head.grad.float()
        return seconds, peak - before, [float((gradient * probe).sum()), float(gradient.norm())]

    return answer


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=7)
    add_record_option(parser)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        kind, given = arguments.child
        take_turns(lambda: prepare(kind, Shape(**json.loads(given))))
        return

    shape = Shape(arguments.tokens, arguments.width, arguments.device)
    with recorded("The loss", arguments):
        contenders = {}
        for kind in KINDS:
            one = Contender(
                KINDS[kind], [sys.executable, __file__, "--child", kind, json.dumps(asdict(shape))]
            )
            one.launch()
            if one.is_ready():
                contenders[kind] = one
        answers: dict[str, list[Any]] = {kind: [] for kind in contenders}
        for _ in range(arguments.rounds):
            for kind, one in contenders.items():
                answers[kind].append(one.ask())
        for one in contenders.values():
            one.stop()
        report(shape, answers)


def report(shape: Shape, answers: dict[str, list[Any]]) -> None:
    seconds = {kind: statistics.median(one[0] for one in given) for kind, given in answers.items()}
    rounds = len(answers["atlas"])
    print(
        f"{shape.tokens:,} tokens × {ROWS:,}, width {shape.width}, {shape.device}, forward and backward, "
        f"medians of {rounds}\n"
    )
    print("| | ms | Atlas ÷ it | memory | difference |\n|---|---:|---:|---:|---:|")
    projected, norm = answers["atlas"][0][2]
    for kind, given in answers.items():
        difference = abs(given[0][2][0] - projected) / norm
        print(
            f"| {KINDS[kind]} | {seconds[kind] * 1e3:,.0f} | {seconds['atlas'] / seconds[kind]:.2f} "
            f"| {given[0][1] / 1e6:,.0f} MB | {difference:.1e} |"
        )


if __name__ == "__main__":
    main()
