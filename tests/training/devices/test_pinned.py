"""Pinned memory: laid out without gaps, locked once, freed with its last tensor. CUDA is a fake."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from torch import Tensor

from atlas.training.checkpoint import async_saver as background
from atlas.training.checkpoint.async_saver import Snapshot
from atlas.training.devices.pinned import pinned_like
from tests.runs import same_bits

SHAPES = [torch.randn(50_257, 8), torch.tensor(3.0), torch.randn(7, dtype=torch.float64), torch.empty(0, 4)]


class Cuda:
    """Records what is locked, as [begin, end) by begin, and returns `error`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: int = 0) -> None:
        self.locked: dict[int, int] = {}
        self.error = error
        monkeypatch.setattr(torch.cuda, "cudart", lambda: self)

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        if self.error == 0:
            self.locked[address] = address + size
        return self.error

    def cudaHostUnregister(self, address: int) -> int:
        del self.locked[address]
        return 0


def test_tensors_share_one_block_that_wastes_no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Cuda(monkeypatch)
    buffers = pinned_like(SHAPES, say=pytest.fail)
    [(begin, end)] = cuda.locked.items()
    assert begin % 4096 == 0
    assert end - begin < sum(tensor.nbytes for tensor in SHAPES) + 2 * 4096
    taken = []
    for buffer, tensor in zip(buffers, SHAPES, strict=True):
        assert (buffer.shape, buffer.dtype) == (tensor.shape, tensor.dtype)
        buffer.copy_(tensor)
        if buffer.numel():
            assert buffer.data_ptr() % 64 == 0
            assert begin <= buffer.data_ptr() <= buffer.data_ptr() + buffer.nbytes <= end
            taken += [buffer.data_ptr(), buffer.data_ptr() + buffer.nbytes]
            assert (
                buffer.untyped_storage().nbytes() == buffer.nbytes
            )  # which a file and a deep copy would hold
    assert taken == sorted(taken)
    assert same_bits(buffers, SHAPES)
    assert same_bits(copy.deepcopy(buffers), SHAPES)


def test_a_block_is_unlocked_with_its_last_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Cuda(monkeypatch)
    first, second = pinned_like(SHAPES, say=pytest.fail), pinned_like(SHAPES, say=pytest.fail)
    (one, one_end), (other, other_end) = sorted(cuda.locked.items())
    assert one < one_end <= other < other_end
    kept = first.pop(0)
    del first, second
    gc.collect()
    assert len(cuda.locked) == 1
    assert next(iter(cuda.locked)) <= kept.data_ptr()
    del kept
    gc.collect()
    assert cuda.locked == {}


def test_memory_that_cuda_does_not_lock_is_still_used_and_reported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object, **__: object) -> Tensor:
        raise RuntimeError("part or all of the requested memory range is already mapped")

    Cuda(monkeypatch, error=712)
    monkeypatch.setattr(torch, "ones", fail)  # as the next kernel after CUDA's refusal does
    said: list[str] = []
    buffers = pinned_like(SHAPES, say=said.append)
    [line] = said
    assert "error 712" in line
    for buffer, tensor in zip(buffers, SHAPES, strict=True):
        buffer.copy_(tensor)
    assert same_bits(buffers, SHAPES)


def test_a_snapshot_allocates_each_tensor_on_a_gpu_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights before the first update, the optimizer's state when it exists, nothing after that."""
    blocks: list[int] = []

    def counted(tensors: list[Tensor], *, say: object) -> list[Tensor]:
        blocks.append(len(tensors))
        return [torch.empty_like(tensor) for tensor in tensors]

    monkeypatch.setattr(background, "pinned_like", counted)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(Tensor, "is_cuda", property(lambda tensor: tensor.dim() > 0))
    snapshot = Snapshot()
    state = {"model": {"a.weight": torch.ones(2, 3), "b": torch.zeros(4)}, "optimizer": {}}
    snapshot.take(state)
    state["optimizer"] = {"state": {0: {"step": torch.tensor(1.0), "moment": torch.full((2, 3), 2.0)}}}
    taken = snapshot.take(state)
    assert same_bits(snapshot.take(state), state)
    assert same_bits(taken, state)
    assert blocks == [2, 1]
