"""The interface of every tokenizer.

A tokenizer is any object with `encode`, `decode`, `vocab_size` and `eos_id`. Atlas contains two tokenizers: GPT-2's
(`Tokenizer.gpt2()`, offline) and a byte-level BPE trained on your text (`Tokenizer.train`). Both tokenizers are
`ByteLevelTokenizer`s, and only a `ByteLevelTokenizer` can be exported to GGUF. `ForeignTokenizer` runs the
tokenizer.json of another model unchanged. You name any other tokenizer as `package.module:factory`, or pass an object.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from atlas.errors import TokenizerError

_PROBE = "Fingerprint: the quick brown fox, 12 345.67 naïve œuvres — 漢字 🙂\n\ttabs\n\n  and <|endoftext|>."
END_OF_TEXT = "<|endoftext|>"
STORED_AS_FILE = ("bpe", "hf")
"""The kinds of tokenizers whose vocabulary a dataset stores in its tokenizer.json."""
MAX_FILE_BYTES = 128 << 20
"""The largest allowed size of a tokenizer.json, in bytes. A file with a million tokens has about 100 MB."""


class Tokenizer(ABC):
    """Converts text to token ids and back. `<|endoftext|>` in a text is plain text. Only `eos_id` ends a document.

    Your subclass needs `encode`, `decode`, `vocab_size` and `eos_id`. All other methods have defaults.
    """

    kind: str = "custom"
    """`gpt2`, `bpe`, `hf`, or `custom`. Only a custom tokenizer cannot be rebuilt from a file."""
    name: str = "custom"
    """`gpt2`, `bpe`, `hf`, or the `package.module:factory` that made the tokenizer."""
    vocab_size: int
    eos_id: int
    chat_template: str | None = None
    """The model's template for conversations, in Jinja. A file of the tokenizer or a checkpoint holds it."""
    without_blanks_after: frozenset[str] = frozenset()
    """Special tokens after which blanks are no part of the text."""

    @property
    def stop_ids(self) -> frozenset[int]:
        """The ids that end a text or an answer."""
        return frozenset([self.eos_id])

    @property
    def begin_ids(self) -> list[int]:
        """The ids that the model expects before a text: none, or the token that begins a text."""
        return []

    @property
    def special_strings(self) -> dict[str, int]:
        """The special tokens, as a chat template writes them → their ids."""
        return {END_OF_TEXT: self.eos_id}

    def named_tokens(self) -> dict[str, str]:
        """Return `bos`, `eos` and so on → the special token with this meaning, for chat templates."""
        return {"bos": END_OF_TEXT, "eos": END_OF_TEXT}

    def encode_with_starts(self, text: str) -> list[tuple[int, int]]:
        """Return the ids of `text`, each with the index of the character where its token begins. The default raises
        `TokenizerError`."""
        raise TokenizerError(
            f"tokenizer {self.name}: is custom code, which runs only with Atlas's own chat template"
        )

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`. `eos_id` is never among these ids."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`. Bytes that are not UTF-8 become U+FFFD, and `eos_id` becomes `<|endoftext|>`."""

    def token_bytes(self, id: int) -> bytes:
        """Return the bytes of one token. A token can be only a part of a character. If the implementation does not know
        the bytes of such a token, the method returns the bytes of U+FFFD."""
        return self.decode([id]).encode("utf-8")

    @property
    def longest_token(self) -> int | None:
        """The number of bytes of the longest token; None if a token may stand for a text of any length."""
        return None

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text. An implementation may encode several texts in parallel."""
        return [self.encode(text) for text in texts]

    def encode_arrays(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        """Return the ids of each text as an array. Worker processes call this method, so one thread is enough."""
        return [np.array(ids, dtype=np.uint32) for ids in self.encode_batch(texts)]

    @property
    def fingerprint(self) -> str:
        """A sha256 that is the same for two tokenizers only if they give the same ids. The default is a hash of the
        class, the sizes and the ids of a probe text."""
        return fingerprint_of(self, type(self))

    def state(self) -> dict[str, Any]:
        """Return plain values for a checkpoint or dataset.json. `from_state` rebuilds the tokenizer from these values.
        The values of a custom tokenizer only identify the tokenizer, since a file contains no code."""
        sizes = {"vocab_size": self.vocab_size, "eos_id": self.eos_id}
        state = {"kind": self.kind, "name": self.name, **sizes, "fingerprint": self.fingerprint}
        return state if self.chat_template is None else {**state, "chat_template": self.chat_template}

    def save(self, path: str | Path) -> None:
        """Write a `tokenizer.json` that `Tokenizer.load` reads. The default raises `TokenizerError`."""
        raise TokenizerError(f"tokenizer {self.name}: is custom code and cannot be written to {path}")

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}, {self.vocab_size:,} tokens>"

    # Constructors. `load.py` adds them, so that this module does not import the subclasses.
    gpt2: ClassVar[Callable[[], Tokenizer]]
    train: ClassVar[Callable[..., Tokenizer]]
    load: ClassVar[Callable[[str | Path], Tokenizer]]
    from_state: ClassVar[Callable[[Mapping[str, Any]], Tokenizer]]
    from_checkpoint: ClassVar[Callable[[Mapping[str, Any]], Tokenizer]]
    resolve: ClassVar[Callable[[str | Path], Tokenizer]]
    wrap: ClassVar[Callable[[Any], Tokenizer]]


def fingerprint_of(tokenizer: Any, kind: type) -> str:
    """Return the sha256 of a class, of the sizes of `tokenizer`, and of the ids of a probe text."""
    identity = [kind.__module__, kind.__qualname__, tokenizer.vocab_size, tokenizer.eos_id]
    ids = [int(id) for id in tokenizer.encode(_PROBE)]
    return hashlib.sha256(json.dumps([*identity, ids]).encode()).hexdigest()
