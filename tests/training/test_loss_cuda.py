"""The loss for CUDA, run on a CPU and compared with the loss of all logits: its arithmetic is the same there."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from atlas.training import loss_cuda
from atlas.training.loss_cuda import (
    linear_cross_entropy_on_cuda,
    softmax_gradient_,
    softmax_gradient_eagerly_,
)

IGNORED = -100


def head(rows: int, vocabulary: int, width: int = 48) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, a table padded with zeros to a multiple of 64 rows, and targets, some of which do not count."""
    torch.manual_seed(rows + vocabulary)
    padded = -(-vocabulary // 64) * 64
    hidden, table = torch.randn(rows, width), torch.randn(padded, width) / 4
    table[vocabulary:] = 0
    targets = torch.randint(0, vocabulary, (rows,))
    targets[rows // 3 : rows // 2] = IGNORED
    return hidden.requires_grad_(), table.requires_grad_(), targets


def gradients(
    loss: Callable[..., Tensor], hidden: Tensor, table: Tensor, targets: Tensor
) -> tuple[Tensor, ...]:
    hidden, table = (tensor.detach().requires_grad_() for tensor in (hidden, table))
    value = loss(hidden, table, targets)
    (value * 3).backward()  # a gradient of the loss other than 1
    assert hidden.grad is not None
    assert table.grad is not None
    return value.detach(), hidden.grad, table.grad


def expected(vocabulary: int, dtype: torch.dtype) -> Callable[..., Tensor]:
    def by_all_logits(hidden: Tensor, table: Tensor, targets: Tensor) -> Tensor:
        logits = F.linear(hidden.to(dtype), table[:vocabulary].to(dtype))
        return F.cross_entropy(logits.float(), targets, ignore_index=IGNORED, reduction="sum")

    return by_all_logits


def on_cuda(vocabulary: int, dtype: torch.dtype, *, compiled: bool) -> Callable[..., Tensor]:
    return lambda *tensors: linear_cross_entropy_on_cuda(
        *tensors, vocabulary=vocabulary, dtype=dtype, compiled=compiled
    )


def relative(found: Tensor, right: Tensor) -> float:
    return float((found.float() - right.float()).norm() / right.float().norm().clamp(min=1e-12))


@pytest.fixture(params=["compiled", "eager"])
def compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Run the kernel for the compiler without compiling it. A slow test compiles it."""
    monkeypatch.setattr(loss_cuda, "_compiled_kernel", lambda: softmax_gradient_)
    return bool(request.param == "compiled")


@pytest.mark.parametrize("vocabulary", [1, 63, 64, 65, 1000])
@pytest.mark.parametrize(("dtype", "off"), [(torch.float32, 2e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("chunks", [1, 5])
def test_loss_and_gradients_are_those_of_all_logits(
    vocabulary: int,
    dtype: torch.dtype,
    off: float,
    chunks: int,
    compiled: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hidden, table, targets = head(101, vocabulary)
    row = len(table) * (dtype.itemsize + (0 if compiled else 8))
    monkeypatch.setattr(loss_cuda, "CUDA_LOSS_BYTES", row * 101 // chunks)
    found = gradients(on_cuda(vocabulary, dtype, compiled=compiled), hidden, table, targets)
    right = gradients(expected(vocabulary, dtype), hidden, table, targets)
    assert float(found[0]) == pytest.approx(float(right[0]), rel=1e-6, abs=1e-5)
    if vocabulary > 1:  # with one token the loss is always 0
        assert relative(found[1], right[1]) < off
        assert relative(found[2], right[2]) < off
    assert float(found[2][vocabulary:].abs().sum()) == 0
    ignored = targets == IGNORED
    assert float(found[1][ignored].abs().sum()) == 0


def test_rows_that_do_not_count_add_nothing(compiled: bool) -> None:
    hidden, table, targets = head(10, 65)
    loss = on_cuda(65, torch.float32, compiled=compiled)
    value, by_hidden, by_table = gradients(loss, hidden, table, torch.full_like(targets, IGNORED))
    assert [float(tensor.abs().sum()) for tensor in (value, by_hidden, by_table)] == [0, 0, 0]


def test_a_table_that_is_frozen_gets_no_gradient(compiled: bool) -> None:
    """Low-rank updates train the hidden states alone; an evaluation trains nothing."""
    hidden, table, targets = head(40, 100)
    loss = on_cuda(100, torch.float32, compiled=compiled)
    right = gradients(loss, hidden, table, targets)
    value = loss(hidden, table.detach(), targets)
    (value * 3).backward()
    assert hidden.grad is not None
    assert torch.equal(hidden.grad, right[1])
    with torch.no_grad():
        assert float(loss(hidden, table, targets)) == float(right[0])
        assert not loss(hidden, table, targets).requires_grad


def test_a_second_backward_pass_is_refused(compiled: bool) -> None:
    hidden, table, targets = head(10, 65)
    loss = on_cuda(65, torch.float32, compiled=compiled)(hidden, table, targets)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward pass only"):
        loss.backward()


def test_both_kernels_leave_the_same_gradient() -> None:
    logits = torch.randn(7, 128)
    goals, counts = torch.randint(0, 100, (7, 1)), (torch.rand(7, 1) > 0.3).float()
    one, other = logits.clone(), logits.clone()
    losses = [
        float(kernel(mine, goals, counts, 100))
        for kernel, mine in ((softmax_gradient_, one), (softmax_gradient_eagerly_, other))
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_compiled_kernel(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the CPU's compiler, in chunks of two sizes, for which it compiles once."""
    hidden, table, targets = head(101, 1000)
    monkeypatch.setattr(loss_cuda, "CUDA_LOSS_BYTES", len(table) * dtype.itemsize * 101 // 4)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    loss_cuda._compiled_kernel.cache_clear()
    found = gradients(on_cuda(1000, dtype, compiled=True), hidden, table, targets)
    right = gradients(expected(1000, dtype), hidden, table, targets)
    assert float(found[0]) == pytest.approx(float(right[0]), rel=1e-6)
    assert relative(found[1], right[1]) < (2e-6 if dtype == torch.float32 else 1e-2)
    assert relative(found[2], right[2]) < (2e-6 if dtype == torch.float32 else 1e-2)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()
