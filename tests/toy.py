"""A custom tokenizer and loss as a user would write them, a loss that stalls until a kill, a slow disk."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from atlas.training.loss import compute_lm_loss


class CharacterTokenizer:
    """One id per byte, and one for the end of a document."""

    vocab_size = 257
    eos_id = 256

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def decode(self, ids: Sequence[int]) -> str:
        return b"".join(b"<|endoftext|>" if i == 256 else bytes([i]) for i in ids).decode("utf-8", "replace")


def tokenizer() -> CharacterTokenizer:
    return CharacterTokenizer()


_calls = 0


def stalling_loss(
    logits: torch.Tensor, targets: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """The default loss. The call number ATLAS_TEST_STALL_AT creates a file and waits to be killed."""
    global _calls
    _calls += 1
    if os.environ.get("ATLAS_TEST_STALL_AT") == str(_calls):
        Path(os.environ["ATLAS_TEST_STALL_FILE"]).touch()
        for _ in range(1200):  # the wait ends if a signal only sets a flag
            time.sleep(0.05)
            if Path(os.environ["ATLAS_TEST_STALL_FILE"] + ".go").exists():
                break
    return compute_lm_loss(logits, targets, mask)


def _slow_disk(seconds: float) -> None:
    """Slow down every fsync, so that a test can kill the process between two of them."""
    fsync = os.fsync

    def slow(descriptor: int) -> None:
        time.sleep(seconds)
        fsync(descriptor)

    os.fsync = slow


if "ATLAS_TEST_SLOW_DISK" in os.environ:
    _slow_disk(float(os.environ["ATLAS_TEST_SLOW_DISK"]))


def slow_loss(logits: torch.Tensor, targets: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """The default loss, slowed down so that a test can act meanwhile."""
    time.sleep(0.02)
    return compute_lm_loss(logits, targets, mask)
