"""The user's own tokenizer: any object with `encode`, `decode`, `vocab_size` and `eos_id`."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from atlas.errors import TokenizerError
from atlas.tokenizer.base import Tokenizer, fingerprint_of


def import_object(spec: str) -> Any:
    """Import and return `package.module:name`. The module may be in the working folder."""
    module_name, _, name = spec.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        found = importlib.import_module(module_name)
    except ImportError as error:
        raise TokenizerError(
            f"{spec}: cannot be imported: {error}; write it as package.module:name"
        ) from None
    for part in name.split("."):
        if not hasattr(found, part):
            raise TokenizerError(f"{spec}: module {module_name} has no {name}")
        found = getattr(found, part)
    return found


class CustomTokenizer(Tokenizer):
    """Wraps the user's object as a `Tokenizer`. A model can be trained with the object, but no file can contain it."""

    def __init__(self, custom: Any, name: str | None = None) -> None:
        kind = type(custom)
        self.name = name or f"{kind.__module__}:{kind.__qualname__}"
        for attribute in ("encode", "decode", "vocab_size", "eos_id"):
            if not hasattr(custom, attribute):
                raise self._error(f"has no {attribute}; it needs encode, decode, vocab_size and eos_id")
        self._custom, self.vocab_size, self.eos_id = custom, custom.vocab_size, custom.eos_id
        if not isinstance(self.vocab_size, int) or self.vocab_size < 1:
            raise self._error(f"vocab_size {self.vocab_size!r} must be an integer above 0")
        if not isinstance(self.eos_id, int) or not 0 <= self.eos_id < self.vocab_size:
            raise self._error(f"eos_id {self.eos_id!r} must be an id below vocab_size {self.vocab_size}")

    def _error(self, reason: str) -> TokenizerError:
        return TokenizerError(f"tokenizer {self.name}: {reason}")

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`. Raises `TokenizerError` for an id outside the vocabulary."""
        ids = [int(id) for id in self._custom.encode(text)]
        if ids and not 0 <= min(ids) <= max(ids) < self.vocab_size:
            wrong = max(ids) if min(ids) >= 0 else min(ids)
            raise self._error(f"gave id {wrong}, outside its vocab_size {self.vocab_size}")
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`."""
        return str(self._custom.decode([int(id) for id in ids]))

    @cached_property
    def fingerprint(self) -> str:
        """The object's own `fingerprint`, or else a hash of its type, its `vocab_size` and `eos_id`, and the ids of a
        probe text."""
        own = getattr(self._custom, "fingerprint", None)
        return own if isinstance(own, str) else fingerprint_of(self, type(self._custom))

    def token_bytes(self, id: int) -> bytes:
        """Return the bytes from the object's own `token_bytes`, or else the bytes of the decoded token."""
        own = getattr(self._custom, "token_bytes", None)
        return bytes(own(id)) if own else super().token_bytes(id)
