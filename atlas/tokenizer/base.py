"""The interface of every tokenizer.

A tokenizer is any object with `encode`, `decode`, `vocab_size` and `eos_id`. Atlas has two of its own: GPT-2's
vocabulary (`Tokenizer.gpt2()`, offline) and a byte-level BPE trained on your text (`Tokenizer.train`). Both are
`ByteLevelTokenizer`s, and only these can be exported to GGUF. The tokenizer.json of another model runs unchanged
(`ForeignTokenizer`). You give any other tokenizer as `package.module:factory` or as an object.
"""

from __future__ import annotations

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from atlas.errors import TokenizerError

_PROBE = "Fingerprint: the quick brown fox, 12 345.67 naïve œuvres — 漢字 🙂\n\ttabs\n\n  and <|endoftext|>."
END_OF_TEXT = "<|endoftext|>"
MAX_FILE_BYTES = 128 << 20
"""The largest size of a tokenizer.json. A file with a million tokens has about 100 MB."""

DOTTED_NAME = re.compile(r"[^\W\d][\w.]*:[^\W\d][\w.]*")


class Tokenizer(ABC):
    """Converts text to token ids and back. `<|endoftext|>` in a text is plain text; only `eos_id` ends a document.

    Your subclass needs `encode`, `decode`, `vocab_size` and `eos_id`. All other methods have defaults.
    """

    kind: str = "custom"
    """`gpt2`, `bpe`, `hf`, or `custom`. Only a custom tokenizer cannot be rebuilt from a file."""
    name: str = "custom"
    """`gpt2`, `bpe`, `hf`, or the `package.module:factory` that made the tokenizer."""
    vocab_size: int
    eos_id: int

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """The ids of `text`. `eos_id` is never among them."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`. Bytes that are not UTF-8 become U+FFFD, and `eos_id` becomes `<|endoftext|>`."""

    def token_bytes(self, id: int) -> bytes:
        """The bytes of one token. If the token is only a part of a character, return the bytes of that part, or the
        bytes of U+FFFD if the implementation does not know them."""
        return self.decode([id]).encode("utf-8")

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` each text, in parallel if the implementation can."""
        return [self.encode(text) for text in texts]

    def encode_arrays(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        """`encode` each text to an array, in this thread only, since many worker processes call this in parallel."""
        return [np.array(ids, dtype=np.uint32) for ids in self.encode_batch(texts)]

    @property
    def fingerprint(self) -> str:
        """A sha256 that is the same for two tokenizers only if they give the same ids. By default it is the hash of the
        class, the sizes and the ids of a probe text."""
        return fingerprint_of(self, type(self))

    def state(self) -> dict[str, Any]:
        """Plain values for a checkpoint or dataset.json. `from_state` rebuilds the tokenizer from them. For a custom
        tokenizer the values only name it, since a file contains no code."""
        sizes = {"vocab_size": self.vocab_size, "eos_id": self.eos_id}
        return {"kind": self.kind, "name": self.name, **sizes, "fingerprint": self.fingerprint}

    def save(self, path: str | Path) -> None:
        """Write a `tokenizer.json` that `Tokenizer.load` reads. The default raises `TokenizerError`."""
        raise TokenizerError(f"tokenizer {self.name}: is custom code and cannot be written to {path}")

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}, {self.vocab_size:,} tokens>"

    # Constructors. `load.py` adds them, so that this module imports no kind of tokenizer.
    gpt2: ClassVar[Callable[[], Tokenizer]]
    train: ClassVar[Callable[[Iterable[str], int], Tokenizer]]
    load: ClassVar[Callable[[str | Path], Tokenizer]]
    from_state: ClassVar[Callable[[Mapping[str, Any]], Tokenizer]]
    resolve: ClassVar[Callable[[str | Path], Tokenizer]]
    wrap: ClassVar[Callable[[Any], Tokenizer]]


def fingerprint_of(tokenizer: Any, kind: type) -> str:
    """The sha256 of a class, of the sizes of `tokenizer`, and of its ids for a probe text."""
    identity = [kind.__module__, kind.__qualname__, tokenizer.vocab_size, tokenizer.eos_id]
    ids = [int(id) for id in tokenizer.encode(_PROBE)]
    return hashlib.sha256(json.dumps([*identity, ids]).encode()).hexdigest()
