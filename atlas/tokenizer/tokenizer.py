"""The interface every tokenizer has, and the doors through which one is had.

A tokenizer is anything with `encode`, `decode`, `vocab_size` and `eos_id`. Atlas brings two: GPT-2's
vocabulary (`Tokenizer.gpt2()`, offline) and a byte-level BPE trained on one's own text
(`Tokenizer.train`). Both are `ByteLevelTokenizer`s, and only those can be exported. The tokenizer.json of
another model is run as it is (`ForeignTokenizer`), and any other comes in as `package.module:factory` or as
an object.
"""

from __future__ import annotations

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atlas.errors import AtlasError
from atlas.files import read_limited

_PROBE = "Fingerprint: the quick brown fox, 12 345.67 naïve œuvres — 漢字 🙂\n\ttabs\n\n  and <|endoftext|>."
END_OF_TEXT = "<|endoftext|>"
MAX_FILE_BYTES = 128 << 20
"""Of a tokenizer.json: one of a million tokens has about 100 MB."""
DOTTED_NAME = re.compile(r"[^\W\d][\w.]*:[^\W\d][\w.]*")


class Tokenizer(ABC):
    """Text ⇄ token ids. `<|endoftext|>` in a text is plain text; only `eos_id` marks a document's end.

    A subclass of your own needs `encode`, `decode`, `vocab_size` and `eos_id`. The rest has defaults.
    """

    name: str = "custom"
    """`gpt2`, `bpe`, `hf`, or the `package.module:factory` it came from."""
    vocab_size: int
    eos_id: int

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """The ids of `text`; never `eos_id`, whatever the text says."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD, and `eos_id` becomes `<|endoftext|>`."""

    def token_bytes(self, id: int) -> bytes:
        """What one token stands for. A character may be spread over several tokens: then a part of its bytes, or those
        of U+FFFD where the implementation tells no more."""
        return self.decode([id]).encode("utf-8")

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each; in parallel where the implementation can."""
        return [self.encode(text) for text in texts]

    def encode_arrays(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        """`encode` of each as an array, in this thread: for workers, of which there are many."""
        return [np.array(ids, dtype=np.uint32) for ids in self.encode_batch(texts)]

    @property
    def fingerprint(self) -> str:
        """A sha256 that two tokenizers share only if they give the same ids. By default it is that of the class, of its
        sizes and of the ids of a probe text."""
        return fingerprint_of(self, type(self))

    def state(self) -> dict[str, Any]:
        """Plain values that a checkpoint or dataset.json keeps, and from which `from_state` rebuilds it. By default
        they only name it: code does not travel with a file."""
        sizes = {"vocab_size": self.vocab_size, "eos_id": self.eos_id}
        return {"kind": "custom", "name": self.name, **sizes, "fingerprint": self.fingerprint}

    def save(self, path: str | Path) -> None:
        """Write a `tokenizer.json` that `Tokenizer.load` reads. Raises `AtlasError` by default."""
        raise AtlasError(f"tokenizer {self.name}: is custom code and cannot be written to {path}")

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}, {self.vocab_size:,} tokens>"

    @staticmethod
    def gpt2() -> Tokenizer:
        """GPT-2's 50,257 tokens, from package data."""
        from atlas.tokenizer.gpt2 import gpt2_tokenizer

        return gpt2_tokenizer()

    @staticmethod
    def train(texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """A byte-level BPE learnt from `texts`, which are read once, as a stream.

        A text too small for `vocab_size` gives a smaller vocabulary; `vocab_size` of the result says so.
        """
        from atlas.tokenizer.bpe import train_bpe

        return train_bpe(texts, vocab_size)

    @staticmethod
    def load(path: str | Path) -> Tokenizer:
        """The tokenizer of a `tokenizer.json`, of a folder that holds one, or of a prepared dataset."""
        from atlas.tokenizer.bpe import BPETokenizer, NotGPT2s
        from atlas.tokenizer.foreign import ForeignTokenizer

        path = Path(path)
        if path.is_dir():
            if not (path / "tokenizer.json").is_file() and (path / "dataset.json").is_file():
                return Tokenizer.from_state(_state_in_dataset(path / "dataset.json"))
            path = path / "tokenizer.json"
        try:
            return BPETokenizer.from_file(path)
        except NotGPT2s as refusal:
            return ForeignTokenizer.from_file(path, refusal)

    @staticmethod
    def from_state(state: Mapping[str, Any]) -> Tokenizer:
        """The tokenizer that `state()` described, its fingerprint checked.

        Nothing is imported for it: a custom tokenizer's code does not travel with a file, so that its
        owner has to name it.
        """
        from atlas.tokenizer.bpe import BPETokenizer
        from atlas.tokenizer.foreign import ForeignTokenizer

        kind, name = state.get("kind"), state.get("name")
        if kind == "custom":
            raise AtlasError(
                f"tokenizer {name!s:.200}: is custom code, which a file does not bring along; "
                "name it with --tokenizer package.module:factory"
            )
        if kind == "gpt2":
            tokenizer = Tokenizer.gpt2()
        elif kind == "bpe" and isinstance(state.get("json"), str):
            tokenizer = BPETokenizer.from_json(state["json"], origin="stored tokenizer")
        elif kind == "hf" and isinstance(state.get("json"), str):
            tokenizer = ForeignTokenizer.from_state_dict(state)
        else:
            raise AtlasError(
                f"stored tokenizer: kind {kind!r:.40} is not one Atlas knows; was it made by a later version?"
            )
        stated = {
            "fingerprint": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "eos_id": tokenizer.eos_id,
        }
        for fact, value in stated.items():
            if state.get(fact) != value:
                raise AtlasError(
                    f"stored tokenizer {name!s:.80}: its vocabulary has {fact} {value}, not {state.get(fact)!s:.80}; "
                    "the file is damaged or was edited"
                )
        return tokenizer

    @staticmethod
    def resolve(spec: str | Path) -> Tokenizer:
        """`gpt2`, the path of a tokenizer.json (or a folder with one), or `package.module:factory`."""
        from atlas.tokenizer.custom import CustomTokenizer, import_object

        if spec == "gpt2":
            return Tokenizer.gpt2()
        if Path(spec).exists():
            return Tokenizer.load(spec)
        if isinstance(spec, str) and DOTTED_NAME.fullmatch(spec):
            made = import_object(spec)()
            return made if _is_known(made) else CustomTokenizer(made, name=spec)
        raise AtlasError(
            f"tokenizer {spec}: no such file; give gpt2, a tokenizer.json, or package.module:factory"
        )

    @staticmethod
    def wrap(custom: Any) -> Tokenizer:
        """Any object with `encode`, `decode`, `vocab_size` and `eos_id`, as a `Tokenizer`."""
        from atlas.tokenizer.custom import CustomTokenizer

        return custom if _is_known(custom) else CustomTokenizer(custom)


def _is_known(tokenizer: Any) -> bool:
    """Whether its ids need no check: it is wrapped already, or has a state of its own to be rebuilt from."""
    from atlas.tokenizer.custom import CustomTokenizer

    if isinstance(tokenizer, CustomTokenizer):
        return True
    return isinstance(tokenizer, Tokenizer) and type(tokenizer).state is not Tokenizer.state


def fingerprint_of(tokenizer: Any, kind: type) -> str:
    """sha256 of a class, the sizes of its tokenizer, and the ids of a probe text."""
    identity = [kind.__module__, kind.__qualname__, tokenizer.vocab_size, tokenizer.eos_id]
    ids = [int(id) for id in tokenizer.encode(_PROBE)]
    return hashlib.sha256(json.dumps([*identity, ids]).encode()).hexdigest()


def _state_in_dataset(path: Path) -> dict[str, Any]:
    try:
        state = json.loads(read_limited(path, limit=MAX_FILE_BYTES).decode("utf-8"))["tokenizer"]
    except (OSError, ValueError, RecursionError, KeyError, TypeError) as error:
        raise AtlasError(
            f"{path}: does not describe a tokenizer ({error!s:.200}); prepare the dataset again"
        ) from None
    if not isinstance(state, dict):
        raise AtlasError(f"{path}: does not describe a tokenizer; prepare the dataset again")
    return state
