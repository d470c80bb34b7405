"""torch.compile: whether this run is compiled, and what to say where it cannot be."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch._functorch.config
import torch.nn.functional as F
from torch import Tensor

from atlas.config import AtlasConfig
from atlas.data.sequences.dataset import IGNORE_INDEX
from atlas.errors import AtlasError
from atlas.model import AtlasLM

_INSTALL = "install a C++ compiler (and Triton, on a GPU)"


def choose_compile(config: AtlasConfig, device: torch.device, *, say: Callable[[str], None]) -> bool:
    """What `training.compile` comes to on `device`.

    `auto` compiles on CUDA. On a CPU it does not pay: compiled, `tiny` ran at 0.83 of its eager speed, since there the
    matrix products are most of the time (benchmarks/RESULTS.md).
    Raises `AtlasError` where `on` cannot be had; `auto` says so and goes on without.
    """
    asked = config.training.compile
    if asked == "off" or (asked == "auto" and device.type != "cuda"):
        return False
    problem = why_not_compile(device)
    if problem is None:
        return True
    if asked == "on":
        raise AtlasError(
            f"training.compile: on: this machine cannot ({problem}): {_INSTALL}, or --set training.compile=auto"
        )
    say(f"training without torch.compile, slower, since this machine cannot ({problem}): {_INSTALL}")
    return False


def why_not_compile(device: torch.device) -> str | None:
    """A step of one weight, compiled on `device`, forward and backward; what is missing, or None."""
    torch._dynamo.reset()
    weight = torch.ones(8, device=device, requires_grad=True)
    try:
        torch.compile(_step)(weight).backward()  # type: ignore[no-untyped-call]
    except Exception as error:
        return _first_line(error)
    finally:
        torch._dynamo.reset()  # so that the run's own compilations do not count this one
    return None


def _step(weight: torch.Tensor) -> torch.Tensor:
    return F.gelu(weight * 2).sum()


def compile_blocks(model: AtlasLM, *, keeps_little: bool = False) -> None:
    """Compile each block in place: state-dict keys stay as they are, and equal blocks compile once, for each shape.

    Left to itself the compiler keeps the outputs of norms and of the MLP's activation for the backward pass. With
    `keeps_little` it makes them again from what the matrix products gave, which keeps two thirds and takes 3 % more
    memory traffic; products are taken once either way.
    """
    torch._functorch.config.aggressive_recomputation = keeps_little
    torch._dynamo.config.optimize_ddp = (
        False  # it would split blocks to send gradients sooner, which blocks do anyway
    )
    for block in model.blocks:
        block.compile(dynamic=False)


def filled_up(columns: Sequence[Tensor], size: int) -> list[Tensor]:
    """Inputs, targets and, where there are any, documents, (N, T) each, as (`size`, T): the rows added do not count.
    For another number of rows what is compiled would be compiled once more."""
    missing = size - len(columns[0])
    if missing == 0:
        return list(columns)  # `F.pad` would copy them out of pinned memory
    fillings = (0, IGNORE_INDEX, 0)
    return [
        F.pad(column, (0, 0, 0, missing), value=filling)
        for column, filling in zip(columns, fillings, strict=False)
    ]


def refuse_failed_compilation(
    error: BaseException,
    *,
    what: str = "training.compile: the model",
    instead: str = "--set training.compile=off",
) -> None:
    """A compiler that fails on what a run needs is the user's to fix; other errors are not this function's."""
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        if "flex_attention" in str(error):  # compiled whatever training.compile says
            what = "data.document_mask: FlexAttention"
            instead = "--set data.document_mask=false"
        raise AtlasError(
            f"{what} cannot be compiled here ({_first_line(error)}): {_INSTALL}, or {instead}"
        ) from error


def _first_line(error: BaseException) -> str:
    """That has a reason: PyTorch begins with the name of the backend that raised."""
    lines = [line for line in str(error).splitlines() if line.strip() and not line.endswith("raised:")]
    return (lines or [type(error).__name__])[0]
