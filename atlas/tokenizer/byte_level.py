"""The base of GPT-2's tokenizer and of `BPETokenizer`: byte-level tokens, written in GPT-2's characters.

A token is a sequence of bytes. In files one printable character stands for each byte (Radford et al. 2019,
`bytes_to_unicode` in GPT-2's encoder). So a vocabulary is readable text. For example, `Ġ` stands for a space.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as HFTokenizer

from atlas.tokenizer.base import END_OF_TEXT, Tokenizer

Merge = tuple[str, str]

_PRINTABLE = [byte for byte in range(256) if chr(byte).isprintable() and chr(byte) != " "]
BYTE_ORDER = _PRINTABLE + [byte for byte in range(256) if byte not in set(_PRINTABLE)]
"""The bytes in the order of GPT-2's first 256 ids."""
CHAR_OF_BYTE = dict(
    zip(BYTE_ORDER, map(chr, itertools.chain(_PRINTABLE, itertools.count(256))), strict=False)
)
"""Byte → character. A printable byte maps to its own character. All other bytes map to characters from U+0100 on."""
SPLITS: dict[str, str | None] = {
    "gpt-2": None,
    "qwen35": r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
"""The splits of a text into words, by GGUF's names for them (`tokenizer.ggml.pre`), as regular expressions. None is
GPT-2's split, which the library has. It cuts words at combining marks, which most words of Hindi, Tamil and Thai have.
Qwen3.5's split does not. Each llama.cpp knows GPT-2's split, but an older one does not know Qwen3.5's."""
BYTE_OF_CHAR = {char: byte for byte, char in CHAR_OF_BYTE.items()}


def token_bytes(token: str) -> bytes:
    """Return the bytes of a byte-level token string. Raises `KeyError` for any other string."""
    return bytes([BYTE_OF_CHAR[char] for char in token])


class HFTokenizerBase(Tokenizer):
    """Encodes with Hugging Face's library `tokenizers`, on all cores. Pickling stores the tokenizer's `state`."""

    hf: HFTokenizer

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, encoded on all cores."""
        encodings = self.hf.encode_batch_fast([*map(well_formed, texts)], add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def encode_with_starts(self, text: str) -> list[tuple[int, int]]:
        """Return the ids of `text`, each with the index of the character where its token begins."""
        encoding = self.hf.encode(well_formed(text), add_special_tokens=False)
        return [(id, start) for id, (start, _) in zip(encoding.ids, encoding.offsets, strict=True)]

    def __reduce__(self) -> tuple[Any, ...]:
        return Tokenizer.from_state, (self.state(),)


class ByteLevelTokenizer(HFTokenizerBase):
    """A byte-level BPE with one of `SPLITS`: every text has ids, and the ids decode to exactly that text.

    Only such a tokenizer can be exported to GGUF. `token_strings`, `merges` and `split` are the values of the GGUF keys
    `tokenizer.ggml.tokens`, `tokenizer.ggml.merges` and `tokenizer.ggml.pre`.
    """

    def __init__(
        self, name: str, tokens: Sequence[str], merges: Sequence[Merge], eos_id: int, split: str = "gpt-2"
    ) -> None:
        self.name = name
        self.split = split
        self.vocab_size = len(tokens)
        self.eos_id = eos_id
        self._tokens = list(tokens)
        self._merges = list(merges)

    def token_strings(self) -> list[str]:
        """Return every token in id order, in GPT-2's characters for bytes. `<|endoftext|>` is at `eos_id`."""
        return list(self._tokens)

    def merges(self) -> list[Merge]:
        """Return the merges in the order of training, in GPT-2's characters for bytes."""
        return list(self._merges)

    @cached_property
    def _bytes(self) -> list[bytes]:
        # `<|endoftext|>` is plain ASCII, so its characters stand for themselves.
        return [token_bytes(token) for token in self._tokens]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`."""
        return b"".join([self._bytes[id] for id in ids]).decode("utf-8", errors="replace")

    def token_bytes(self, id: int) -> bytes:
        """Return the bytes of one token."""
        return self._bytes[id]

    @cached_property
    def longest_token(self) -> int:
        """The number of bytes of the longest token."""
        return max(map(len, self._bytes))

    @cached_property
    def fingerprint(self) -> str:
        """The sha256 of everything that affects the ids: the tokens, the merges, the end-of-text id, and a split other
        than GPT-2's."""
        identity = [self._tokens, self._merges, self.eos_id, *([self.split] if SPLITS[self.split] else [])]
        return hashlib.sha256(json.dumps(identity).encode()).hexdigest()

    @cached_property
    def hf(self) -> HFTokenizer:  # type: ignore[override]
        """This tokenizer as an object of Hugging Face's library `tokenizers`."""
        vocabulary = {token: id for id, token in enumerate(self._tokens)}
        tokenizer = HFTokenizer(models.BPE(vocab=vocabulary, merges=self._merges))
        tokenizer.pre_tokenizer = pre_tokenizer(self.split)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
        tokenizer.encode_special_tokens = True  # `<|endoftext|>` in a text is plain text
        return tokenizer

    def save(self, path: str | Path) -> None:
        """Write the tokenizer.json."""
        Path(path).write_text(self.hf.to_str(pretty=True), encoding="utf-8", newline="\n")


def pre_tokenizer(split: str) -> pre_tokenizers.PreTokenizer:
    """Return the library's object for a name in `SPLITS`."""
    if (pattern := SPLITS[split]) is None:
        return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    words = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def well_formed(text: str) -> str:
    """Return `text` with U+FFFD instead of lone surrogates, which have no UTF-8 form. tiktoken does the same."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
