"""What GPT-2's tokenizer and a BPE that Atlas trained share: byte-level tokens, written as GPT-2 writes them.

A token is a run of bytes. In files each byte is one printable character (Radford et al. 2019, `bytes_to_unicode` of
their encoder), so a vocabulary is readable text: a space is `Ġ`.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as HFTokenizer

from atlas.tokenizer.base import END_OF_TEXT, Tokenizer

Merge = tuple[str, str]

_PRINTABLE = [byte for byte in range(256) if chr(byte).isprintable() and chr(byte) != " "]
BYTE_ORDER = _PRINTABLE + [byte for byte in range(256) if byte not in set(_PRINTABLE)]
"""The bytes in the order of GPT-2's first 256 ids."""
CHAR_OF_BYTE = dict(
    zip(BYTE_ORDER, map(chr, itertools.chain(_PRINTABLE, itertools.count(256))), strict=False)
)
"""A printable byte is its own character, the others are those from U+0100 on."""
BYTE_OF_CHAR = {char: byte for byte, char in CHAR_OF_BYTE.items()}


def token_bytes(token: str) -> bytes:
    """The bytes of a byte-level token string. Raises `KeyError` if it is not one."""
    return bytes([BYTE_OF_CHAR[char] for char in token])


class HFTokenizerBase(Tokenizer):
    """Encodes by Hugging Face `tokenizers`, on all cores of one process. Its state holds the tokenizer."""

    hf: HFTokenizer

    def encode(self, text: str) -> list[int]:
        """The ids of `text`."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` each text, on all cores."""
        encodings = self.hf.encode_batch_fast([*map(well_formed, texts)], add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def __reduce__(self) -> tuple[Any, ...]:
        return Tokenizer.from_state, (self.state(),)


class ByteLevelTokenizer(HFTokenizerBase):
    """A byte-level BPE with GPT-2's pre-tokenizer: every text has ids, which decode to exactly that text.

    Only such a tokenizer can be saved and exported: `token_strings` and `merges` are the values of GGUF's
    `tokenizer.ggml.tokens` and `tokenizer.ggml.merges`, with the `gpt-2` pre-tokenizer.
    """

    def __init__(self, name: str, tokens: Sequence[str], merges: Sequence[Merge], eos_id: int) -> None:
        self.name = name
        self.vocab_size = len(tokens)
        self.eos_id = eos_id
        self._tokens = list(tokens)
        self._merges = list(merges)

    def token_strings(self) -> list[str]:
        """Every token in id order, in GPT-2's characters for bytes; `<|endoftext|>` at `eos_id`."""
        return list(self._tokens)

    def merges(self) -> list[Merge]:
        """The merges in the order of training, in the same characters."""
        return list(self._merges)

    @cached_property
    def _bytes(self) -> list[bytes]:
        # `<|endoftext|>` is plain ASCII, so its characters stand for themselves.
        return [token_bytes(token) for token in self._tokens]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`."""
        return b"".join([self._bytes[id] for id in ids]).decode("utf-8", errors="replace")

    def token_bytes(self, id: int) -> bytes:
        """The bytes of one token."""
        return self._bytes[id]

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of everything that decides the ids: tokens, merges, end of text."""
        vocabulary = json.dumps([self._tokens, self._merges, self.eos_id])
        return hashlib.sha256(vocabulary.encode()).hexdigest()

    @cached_property
    def hf(self) -> HFTokenizer:  # type: ignore[override]
        """The same tokenizer in Hugging Face `tokenizers`."""
        vocabulary = {token: id for id, token in enumerate(self._tokens)}
        tokenizer = HFTokenizer(models.BPE(vocab=vocabulary, merges=self._merges))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
        tokenizer.encode_special_tokens = True  # `<|endoftext|>` in a text is plain text
        return tokenizer

    def save(self, path: str | Path) -> None:
        """Write the tokenizer.json."""
        Path(path).write_text(self.hf.to_str(pretty=True), encoding="utf-8", newline="\n")


def well_formed(text: str) -> str:
    """Replace lone surrogates, which have no UTF-8 form, by U+FFFD, as tiktoken does."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
