"""The interface every tokenizer has, and the doors through which one is had.

A tokenizer is anything with `encode`, `decode`, `vocab_size` and `eos_id`. Atlas brings two: GPT-2's
vocabulary (`Tokenizer.gpt2()`, offline) and a byte-level BPE trained on one's own text
(`Tokenizer.train`). A third comes in as `package.module:factory` or as an object.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

END_OF_TEXT = "<|endoftext|>"


class Tokenizer(ABC):
    """Text ⇄ token ids. `<|endoftext|>` in a text is plain text; only `eos_id` marks a document's end."""

    name: str
    """`gpt2`, `bpe`, or the `package.module:factory` it came from."""
    vocab_size: int
    eos_id: int

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """The ids of `text`; never `eos_id`, whatever the text says."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD, and `eos_id` becomes `<|endoftext|>`."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each; in parallel where the implementation can."""
        return [self.encode(text) for text in texts]

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """A sha256 that two tokenizers share only if they give the same ids."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Plain values that a checkpoint or dataset.json keeps, and from which `from_state` rebuilds it."""

    def save(self, path: str | Path) -> None:
        """Write a `tokenizer.json` that `Tokenizer.load` reads."""
        raise NotImplementedError

    @staticmethod
    def gpt2() -> Tokenizer: ...
    @staticmethod
    def load(path: str | Path) -> Tokenizer: ...
    @staticmethod
    def train(texts: Iterable[str], vocab_size: int) -> Tokenizer: ...
    @staticmethod
    def from_state(state: dict[str, Any]) -> Tokenizer: ...
    @staticmethod
    def resolve(spec: str) -> Tokenizer: ...
    @staticmethod
    def wrap(custom: Any) -> Tokenizer: ...
