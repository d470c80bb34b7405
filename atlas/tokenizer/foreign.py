"""A tokenizer.json of another model, such as Llama or Qwen. Hugging Face's library `tokenizers` runs this file.

A model can be trained with such a tokenizer. Checkpoints and Hugging Face folders can contain the tokenizer. A GGUF
file cannot contain the tokenizer, because GGUF stores only the name of the split, and llama.cpp must know this name.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as HFTokenizer

from atlas.errors import AtlasError, TokenizerError
from atlas.files import read_limited
from atlas.tokenizer.base import MAX_FILE_BYTES
from atlas.tokenizer.byte_level import BYTE_OF_CHAR, HFTokenizerBase, token_bytes


class ForeignTokenizer(HFTokenizerBase):
    """A tokenizer from `text`, the content of a tokenizer.json. `vocab_size` can exceed the number of tokens, as in a
    model with unused embedding rows."""

    kind = name = "hf"

    def __init__(self, text: str, *, eos_id: Any, vocab_size: Any, origin: str) -> None:
        if type(eos_id) is not int or type(vocab_size) is not int:
            raise TokenizerError(f"{origin}: has no eos_id or vocab_size; the file is damaged or was edited")
        try:
            self.hf = HFTokenizer.from_str(text)
        except Exception as error:  # the library may raise anything for a broken file
            raise TokenizerError(f"{origin}: is not a tokenizer.json: {error!s:.200}") from None
        self.hf.no_truncation()
        self.hf.no_padding()
        self.hf.encode_special_tokens = True  # special tokens in a text are plain text
        self._text = text
        self.eos_id = eos_id
        tokens = max(self.hf.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.vocab_size = vocab_size
        if not 0 <= eos_id < tokens <= vocab_size:
            raise TokenizerError(
                f"{origin}: has {tokens:,} tokens, which does not fit vocab_size {vocab_size:,} and "
                f"eos_token_id {eos_id:,}: are both files from the same model?"
            )

    @classmethod
    def from_file(cls, path: Path, refusal: AtlasError) -> ForeignTokenizer:
        """Read a tokenizer.json, and `eos_id` and `vocab_size` from the config.json beside it. Raises `refusal` if that
        config.json is missing or incomplete."""
        try:
            config = json.loads(read_limited(path.with_name("config.json"), limit=MAX_FILE_BYTES))
            eos_id, rows = config["eos_token_id"], config["vocab_size"]
        except (OSError, ValueError, RecursionError, LookupError, TypeError):
            raise refusal from None
        if isinstance(eos_id, list) and eos_id:  # each id in the list ends a text; Atlas uses the first id
            eos_id = eos_id[0]
        if type(eos_id) is not int or type(rows) is not int:
            raise refusal
        text = read_limited(path, limit=MAX_FILE_BYTES).decode("utf-8-sig")
        return cls(text, eos_id=eos_id, vocab_size=rows, origin=str(path))

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`."""
        return self.hf.decode(ids, skip_special_tokens=False)

    def token_bytes(self, id: int) -> bytes:
        """Return the bytes of one token."""
        token = self.hf.id_to_token(id) or ""
        if "ByteLevel" in self._decoder and BYTE_OF_CHAR.keys() >= set(token):
            return token_bytes(token)
        if "ByteFallback" in self._decoder and (byte := re.fullmatch(r"<0x([0-9A-F]{2})>", token)):
            return bytes.fromhex(byte[1])
        # Decode the token in the middle of a text, since some decoders remove the blank at the beginning of a text.
        return self.decode([id, id]).removeprefix(self.decode([id])).encode("utf-8")

    @cached_property
    def _decoder(self) -> frozenset[str]:
        """The types of the steps in the tokenizer's decoder."""
        decoder = json.loads(self._text).get("decoder") or {}
        return frozenset(part.get("type") for part in (decoder, *decoder.get("decoders", ())))

    @cached_property
    def fingerprint(self) -> str:
        """The sha256 of the tokenizer.json and the sizes."""
        identity = json.dumps([json.loads(self._text), self.eos_id, self.vocab_size], sort_keys=True)
        return hashlib.sha256(identity.encode()).hexdigest()

    def state(self) -> dict[str, Any]:
        """Return the state of the base class, and the content of the tokenizer.json."""
        return super().state() | {"json": self._text}

    def save(self, path: str | Path) -> None:
        """Write the tokenizer.json."""
        Path(path).write_text(self._text, encoding="utf-8", newline="\n")
