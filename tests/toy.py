"""A custom tokenizer as a user would write one: plain characters, nothing of Atlas in it."""

from __future__ import annotations

from collections.abc import Sequence


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
