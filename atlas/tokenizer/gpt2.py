"""GPT-2's tokenizer, offline: the ids follow from its merge table alone, which is package data."""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Sequence
from importlib import resources

import numpy as np
import tiktoken
from numpy.typing import NDArray

from atlas.errors import AtlasError
from atlas.tokenizer.byte_level import BYTE_ORDER, CHAR_OF_BYTE, ByteLevelTokenizer, Merge, token_bytes
from atlas.tokenizer.tokenizer import END_OF_TEXT

MERGES_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"

# OpenAI's own rewriting of GPT-2's pattern: the same pieces, less backtracking.
GPT2_SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"

# tiktoken's regex engine aborts in `\s+(?!\S)` at about a million white characters in a row.
_LONG_BLANK_LENGTH = 200_000
_LONG_BLANK = re.compile(rf"\s{{{_LONG_BLANK_LENGTH},}}")


class GPT2Tokenizer(ByteLevelTokenizer):
    """50,000 merges over 256 bytes, and `<|endoftext|>` = 50256; encoded by tiktoken."""

    kind = "gpt2"

    def __init__(self, merges: Sequence[Merge]) -> None:
        tokens = [CHAR_OF_BYTE[byte] for byte in BYTE_ORDER]
        tokens += [left + right for left, right in merges]
        eos_id = len(tokens)
        super().__init__("gpt2", [*tokens, END_OF_TEXT], merges, eos_id)
        self._tiktoken = tiktoken.Encoding(
            "gpt2",
            pat_str=GPT2_SPLIT,
            mergeable_ranks={token_bytes(token): id for id, token in enumerate(tokens)},
            special_tokens={END_OF_TEXT: eos_id},
        )

    def encode(self, text: str) -> list[int]:
        if len(text) >= _LONG_BLANK_LENGTH and (blank := _LONG_BLANK.search(text)):
            # The pattern gives the run but its last character as one piece, or all of it at the end.
            end = blank.end() if blank.end() == len(text) else blank.end() - 1
            run = self._tiktoken._encode_single_piece(text[blank.start() : end])
            return self._tiktoken.encode_ordinary(text[: blank.start()]) + run + self.encode(text[end:])
        return self._tiktoken.encode_ordinary(text)

    def encode_arrays(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        return [
            np.array(self.encode(text), dtype=np.uint32)
            if len(text) >= _LONG_BLANK_LENGTH
            else self._tiktoken.encode_to_numpy(text, disallowed_special=())
            for text in texts
        ]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        if any(len(text) >= _LONG_BLANK_LENGTH for text in texts):
            return [self.encode(text) for text in texts]
        return self._tiktoken.encode_ordinary_batch(list(texts))


@functools.cache
def gpt2_tokenizer() -> GPT2Tokenizer:
    table = (resources.files("atlas.tokenizer") / "assets" / "vocab.bpe").read_bytes()
    if hashlib.sha256(table).hexdigest() != MERGES_SHA256:
        raise AtlasError("atlas/tokenizer/assets/vocab.bpe: is not GPT-2's merge table; install Atlas again")
    _version, *lines = table.decode("utf-8").splitlines()
    merges = [(left, right) for left, _, right in (line.partition(" ") for line in lines)]
    return GPT2Tokenizer(merges)
