"""Decide whether a run uses torch.compile, compile the blocks, and report why a machine cannot compile."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch._functorch.config
import torch.nn.functional as F
from torch import Tensor

from atlas.config import AtlasConfig
from atlas.data.sequences.dataset import IGNORE_INDEX
from atlas.errors import AtlasError, first_line
from atlas.model import AtlasLM

_INSTALL = "install a C++ compiler (and Triton, on a GPU)"


def choose_compile(config: AtlasConfig, device: torch.device, *, say: Callable[[str], None]) -> bool:
    """Whether to compile the model's blocks on `device` according to `training.compile`.

    `auto` compiles on CUDA only. On a CPU, the compiled preset `tiny` had 0.83 of its eager throughput, since matrix
    products take most of the time there (benchmarks/RESULTS.md). If this machine cannot compile, `on` raises
    `AtlasError`, and `auto` logs a line and trains without compilation.
    """
    asked = config.training.compile
    if asked == "off" or (asked == "auto" and device.type != "cuda"):
        return False
    problem = why_not_compile(device)
    if problem is None:
        return True
    if asked == "on":
        raise AtlasError(
            f"training.compile: on: this machine cannot compile ({problem}): {_INSTALL}, or --set training.compile=auto"
        )
    say(f"training without torch.compile (slower): this machine cannot compile ({problem}): {_INSTALL}")
    return False


def why_not_compile(device: torch.device) -> str | None:
    """Compile a small forward and backward pass on `device` as a test. Return the first line of the error, or None if
    the test succeeds."""
    torch._dynamo.reset()
    weight = torch.ones(8, device=device, requires_grad=True)
    try:
        step = torch.compile(lambda weight: F.gelu(weight * 2).sum())
        step(weight).backward()  # type: ignore[no-untyped-call]
    except Exception as error:
        return first_line(error)
    finally:
        torch._dynamo.reset()  # so that this test does not count among the run's compilations
    return None


def compile_blocks(model: AtlasLM, *, keeps_little: bool = False) -> None:
    """Compile each block in place. State-dict keys stay as they are. PyTorch compiles equal blocks only once for each
    shape.

    By default, the compiled forward pass saves the outputs of norms and of the MLP's activation for the backward pass.
    With `keeps_little`, the backward pass recomputes these outputs from the outputs of the matrix products. The saved
    activations then need a third less memory, but the memory traffic is 3 % higher. In both cases, matrix products are
    computed once.
    """
    torch._functorch.config.aggressive_recomputation = keeps_little
    # This option would split each compiled graph so that DDP sends gradients earlier. Blocks that are compiled one by
    # one need no such split.
    torch._dynamo.config.optimize_ddp = False
    for block in model.blocks:
        block.compile(dynamic=False)


def filled_up(columns: Sequence[Tensor], size: int) -> list[Tensor]:
    """Return inputs, targets and, if given, document numbers, padded from (N, T) to (`size`, T). The added rows do not
    affect the loss.

    Without padding, PyTorch would compile the blocks again for each new number of rows.
    """
    missing = size - len(columns[0])
    if missing == 0:
        return list(columns)  # `F.pad` would copy the columns out of pinned memory
    pairs = zip(columns, (0, IGNORE_INDEX, 0), strict=False)
    return [F.pad(column, (0, 0, 0, missing), value=filling) for column, filling in pairs]


def refuse_failed_compilation(
    error: BaseException,
    *,
    what: str = "training.compile: the model",
    instead: str = "--set training.compile=off",
) -> None:
    """Raise `AtlasError` if `error` comes from the compiler; otherwise do nothing. In the message, `what` names the
    code that cannot be compiled, and `instead` is a remedy."""
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        if "flex_attention" in str(error):  # Atlas always compiles FlexAttention
            what = "data.document_mask: FlexAttention"
            instead = "--set data.document_mask=false"
        reason = f"cannot be compiled here ({first_line(error)})"
        raise AtlasError(f"{what} {reason}: {_INSTALL}, or {instead}") from error
