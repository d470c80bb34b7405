"""GPT-2's tokenizer. It needs no download, because the package contains the merge table, which determines all ids."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from functools import cache, cached_property
from importlib import resources

import numpy as np
import tiktoken
from numpy.typing import NDArray

from atlas.errors import TokenizerError
from atlas.tokenizer.base import END_OF_TEXT
from atlas.tokenizer.byte_level import BYTE_ORDER, CHAR_OF_BYTE, ByteLevelTokenizer, Merge, token_bytes

MERGES_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"

# OpenAI's own revision of GPT-2's pattern. It gives the same pieces with less backtracking.
GPT2_SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"

# A pattern without the lookahead, because the lookahead takes half of tiktoken's time. Each blank that precedes no word
# is a separate piece. So the pieces are the same as GPT-2's if at most two blanks precede a word and at most one blank
# ends the text.
_QUICK_SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s"
_BLANKS = b"\t\n\v\f\r "
_WIDE_BLANKS = [chr(code) for code in range(0x80, 0x3001) if chr(code).isspace()]
"""Blanks of several bytes. A token may hold only a part of such a blank."""

# tiktoken's regex engine aborts in `\s+(?!\S)` at about a million white characters in a row.
_LONG_BLANK_LENGTH = 200_000
_LONG_BLANK = re.compile(rf"\s{{{_LONG_BLANK_LENGTH},}}")


class GPT2Tokenizer(ByteLevelTokenizer):
    """GPT-2's tokenizer: 256 byte tokens, 50,000 merges, and `<|endoftext|>` with id 50256."""

    kind = "gpt2"

    def __init__(self, merges: Sequence[Merge]) -> None:
        tokens = [CHAR_OF_BYTE[byte] for byte in BYTE_ORDER]
        tokens += [left + right for left, right in merges]
        eos_id = len(tokens)
        super().__init__("gpt2", [*tokens, END_OF_TEXT], merges, eos_id)
        self._ranks = {token_bytes(token): id for id, token in enumerate(tokens)}
        # 2: a token of blanks only. 1: a token that begins with a blank, or the end of text. 0: any other token. If two
        # tokens of kind 2 precede a token of kind 1 or 2, GPT-2's pattern may split the blanks differently.
        self._blankness = np.array([*map(_blankness, self._ranks), 1], dtype=np.uint8)

    @cached_property
    def _tiktoken(self) -> tiktoken.Encoding:
        return self._encoding(GPT2_SPLIT)

    @cached_property
    def _quick(self) -> tiktoken.Encoding:
        return self._encoding(_QUICK_SPLIT)

    def _encoding(self, pattern: str) -> tiktoken.Encoding:
        special = {END_OF_TEXT: self.eos_id}
        return tiktoken.Encoding("gpt2", pat_str=pattern, mergeable_ranks=self._ranks, special_tokens=special)

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`."""
        if len(text) >= _LONG_BLANK_LENGTH and (blank := _LONG_BLANK.search(text)):
            # In GPT-2's pattern, the run of blanks without its last character is one piece. At the end of a text, the
            # full run is one piece.
            end = blank.end() if blank.end() == len(text) else blank.end() - 1
            run = self._tiktoken._encode_single_piece(text[blank.start() : end])
            return self._tiktoken.encode_ordinary(text[: blank.start()]) + run + self.encode(text[end:])
        return self._tiktoken.encode_ordinary(text)

    def encode_arrays(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        """Return the ids of each text as an array. The quicker pattern encodes all texts. If GPT-2's pattern may split
        a text differently, that pattern encodes the text again."""
        arrays = [self._quick.encode_to_numpy(text, disallowed_special=()) for text in texts]
        # The indexes of texts with a run of blanks that GPT-2's pattern may split differently.
        wide = {
            place
            for place, text in enumerate(texts)
            if not text.isascii() and any(blank in text for blank in _WIDE_BLANKS)
        }
        end = np.array([self.eos_id], dtype=np.uint32)
        kinds = self._blankness[np.concatenate([ids for array in arrays for ids in (array, end)] or [end])]
        runs = np.flatnonzero((kinds[:-2] == 2) & (kinds[1:-1] == 2) & (kinds[2:] >= 1))
        ends = np.cumsum([len(array) + 1 for array in arrays])
        for place in wide.union(np.searchsorted(ends, runs, side="right").tolist()):
            arrays[place] = np.array(self.encode(texts[place]), dtype=np.uint32)
        return arrays

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, encoded on all cores."""
        if any(len(text) >= _LONG_BLANK_LENGTH for text in texts):
            return [self.encode(text) for text in texts]
        return self._tiktoken.encode_ordinary_batch(list(texts))


def _blankness(token: bytes) -> int:
    return 2 if not token.strip(_BLANKS) else int(token[0] in _BLANKS)


@cache
def gpt2_tokenizer() -> GPT2Tokenizer:
    """Return GPT-2's tokenizer of 50,257 tokens, from the merge table in the package."""
    table = (resources.files("atlas.tokenizer") / "assets" / "vocab.bpe").read_bytes()
    if hashlib.sha256(table).hexdigest() != MERGES_SHA256:
        raise TokenizerError(
            "atlas/tokenizer/assets/vocab.bpe: is not GPT-2's merge table; install Atlas again"
        )
    _version, *lines = table.decode("utf-8").splitlines()
    merges = [(left, right) for left, _, right in (line.partition(" ") for line in lines)]
    return GPT2Tokenizer(merges)
