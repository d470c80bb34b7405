"""Measure the LM head of `small`: its matrix products with 50,257 and with 50,304 rows, and the loss by rows per
chunk."""

from __future__ import annotations

from typing import Any

from gpu.figures import Figures, Setup
from gpu.timing import median_seconds, product_rate

LIMIT = 25
CHUNKS = (256, 2048, 8192)


def sizes(setup: Setup) -> tuple[int, int, int]:
    """Tokens, hidden size, vocabulary."""
    return (64, 32, 257) if setup.rehearse else (8192, 768, 50_257)


def padded(rows: int) -> int:
    return -(-rows // 64) * 64


def products(setup: Setup, figures: Figures) -> None:
    """TFLOP/s in bf16 of a large square product, and of the head's three products."""
    import torch

    device = setup.device
    if figures.get("square product") is None:
        figures.add("square product", tflops=round(product_rate(device) / 1e12, 1))
    tokens, width, vocabulary = sizes(setup)
    make: Any = {"device": device, "dtype": torch.bfloat16}
    for rows in (vocabulary, padded(vocabulary)):
        hidden, table = torch.randn(tokens, width, **make), torch.randn(rows, width, **make)
        logits = torch.randn(tokens, rows, **make)
        kinds = {
            "logits": lambda h=hidden, t=table: h @ t.T,
            "gradient by the hidden states": lambda g=logits, t=table: g @ t,
            "gradient by the table": lambda g=logits, h=hidden: g.T @ h,
        }
        for kind, work in kinds.items():
            name = f"{kind}, {rows} rows"
            if figures.get(name) is None:
                seconds = median_seconds(work, device, rounds=10)
                rate = 2 * tokens * rows * width / seconds
                figures.add(name, tflops=round(rate / 1e12, 3), milliseconds=round(1e3 * seconds, 4))


def loss(setup: Setup, figures: Figures) -> None:
    """Milliseconds and peak memory of the loss, forward and backward, in bf16 with the table in fp32 as in a run."""
    import torch

    from atlas.training.loss import linear_cross_entropy

    device = setup.device
    compiled = not setup.rehearse
    tokens, width, vocabulary = sizes(setup)
    hidden = torch.randn(8, tokens // 8, width, device=device).requires_grad_()
    table = torch.randn(padded(vocabulary), width, device=device).mul_(0.02).requires_grad_()
    targets = torch.randint(vocabulary, (8, tokens // 8), device=device)

    def step() -> None:
        hidden.grad = table.grad = None
        with torch.autocast(device, dtype=torch.bfloat16):
            total = linear_cross_entropy(hidden, table, targets, vocabulary=vocabulary, compiled=compiled)
        total.backward()

    for rows in CHUNKS:
        if figures.get(f"loss, {rows} rows a chunk") is not None:
            continue
        set_chunk(rows, padded(vocabulary))
        step()
        if device == "cuda":
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        seconds = median_seconds(step, device, rounds=10)
        flops = 6 * tokens * vocabulary * width
        peak: Any = torch.cuda.max_memory_allocated() - before if device == "cuda" else None
        figures.add(
            f"loss, {rows} rows a chunk",
            milliseconds=round(1e3 * seconds, 3),
            tflops=round(flops / seconds / 1e12, 3),
            peak_bytes=peak,
        )


def set_chunk(rows: int, columns: int) -> None:
    """Make the loss process `rows` rows of `columns` logits in bf16 at a time from now on."""
    from atlas.training import loss, loss_cuda

    loss_cuda.CUDA_LOSS_BYTES = 2 * rows * columns
    loss.LOSS_CHUNK_TOKENS = rows  # on a CPU


JOBS = {"products": products, "loss": loss}
