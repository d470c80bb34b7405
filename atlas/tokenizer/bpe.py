"""A byte-level BPE, trained and run by Hugging Face `tokenizers` and stored as tokenizer.json.

Atlas uses only the vocabulary and the merges of a file, and rebuilds all other steps. So a truncation or a normalizer
hidden in a downloaded file cannot change an id.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as HFTokenizer
from tokenizers import models, pre_tokenizers, trainers

from atlas.errors import TokenizerError
from atlas.files import read_limited
from atlas.tokenizer.base import END_OF_TEXT, MAX_FILE_BYTES
from atlas.tokenizer.byte_level import (
    BYTE_OF_CHAR,
    SPLITS,
    ByteLevelTokenizer,
    Merge,
    pre_tokenizer,
    well_formed,
)

MAX_VOCAB_SIZE = 2**20
_LONGEST_TOKEN = 2**16
_LONGEST_WORD = 500
_LONG_RUN = re.compile(rf"(\S{{{_LONGEST_WORD}}})(?=\S)|(\s{{{_LONGEST_WORD}}})(?=\s)")
SMALLEST_VOCAB_SIZE = len(BYTE_OF_CHAR) + 1
_UNSUPPORTED = (
    "dropout",
    "continuing_subword_prefix",
    "end_of_word_suffix",
    "byte_fallback",
    "ignore_merges",
)

# Without this setting the library warns at every fork of a data-loading process, although that process never encodes.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")


class BPETokenizer(ByteLevelTokenizer):
    """A byte-level BPE with the vocabulary and the merges of a tokenizer.json."""

    kind = "bpe"

    def state(self) -> dict[str, Any]:
        """Return the state of the base class, and the content of the tokenizer.json."""
        return super().state() | {"json": self.hf.to_str()}

    @classmethod
    def from_file(cls, path: Path) -> BPETokenizer:
        """Read a tokenizer.json. Raises `TokenizerError` if the file cannot be read, or if `from_json` fails."""
        try:
            text = read_limited(path, limit=MAX_FILE_BYTES).decode("utf-8-sig")
        except FileNotFoundError:
            raise TokenizerError(f"{path}: no such tokenizer; give gpt2 or a tokenizer.json") from None
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            raise TokenizerError(
                f"{path}: cannot be read as a tokenizer: {reason}; give gpt2 or a tokenizer.json"
            ) from None
        return cls.from_json(text, origin=str(path))

    @classmethod
    def from_json(cls, text: str, origin: str) -> BPETokenizer:
        """Read the content of a tokenizer.json.

        Raises `TokenizerError` unless the content is a byte-level BPE with one of `SPLITS` and `<|endoftext|>`.
        """
        try:
            tokens, merges, eos_id, split = _read(json.loads(text))
        except (ValueError, RecursionError) as error:  # not JSON, or a number of thousands of digits
            raise TokenizerError(
                f"{origin}: is not a tokenizer.json: {error!s:.200}; give gpt2 or a tokenizer.json"
            ) from None
        except NotGPT2s as error:
            raise NotGPT2s(
                f"{origin}: {error}; Atlas reads byte-level BPE with GPT-2's or Qwen3.5's split; for another "
                "tokenizer.json, put the config.json of its model beside it, or give --tokenizer "
                "package.module:factory"
            ) from None
        return cls("bpe", tokens, merges, eos_id, split)


def check_vocab_size(vocab_size: int) -> None:
    """Raise `TokenizerError` if a byte-level BPE cannot have this many tokens."""
    if not SMALLEST_VOCAB_SIZE <= vocab_size <= MAX_VOCAB_SIZE:
        raise TokenizerError(
            f"--train-tokenizer {vocab_size}: a vocabulary must have at least {SMALLEST_VOCAB_SIZE} tokens "
            f"(256 bytes and end of text) and at most {MAX_VOCAB_SIZE:,}"
        )


def train_bpe(texts: Iterable[str], vocab_size: int, split: str = "gpt-2") -> BPETokenizer:
    """Train a byte-pair encoding (Sennrich et al. 2016, arXiv:1508.07909) on `texts`, which are read once, as a stream.
    `split` is a name in `SPLITS`.

    If the texts are too short for `vocab_size` tokens, the result has fewer tokens. A run of more than `_LONGEST_WORD`
    characters without a blank, as in base64 or DNA, or of blanks, is trained on in parts, since the time grows with the
    square of the length of a word.
    """
    check_vocab_size(vocab_size)
    tokenizer = HFTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer(split)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    parts = (part for text in texts for part in _LONG_RUN.split(well_formed(text)) if part)
    tokenizer.train_from_iterator(parts, trainer=trainer)
    return BPETokenizer.from_json(tokenizer.to_str(), origin="trained tokenizer")


class NotGPT2s(TokenizerError):
    """The file contains another kind of tokenizer. Perhaps `ForeignTokenizer` can run this tokenizer."""


def _demand(condition: bool, reason: str) -> None:
    if not condition:
        raise NotGPT2s(reason)


def _read(content: Any) -> tuple[list[str], list[Merge], int, str]:
    """Return the tokens in id order, the merges, the id of the end of text, and the name of the split. Raises
    `NotGPT2s`, whose message names the difference."""
    model: Any = content.get("model") if isinstance(content, dict) else None
    _demand(isinstance(model, dict), "is no tokenizer.json: it has no model")
    _demand(model.get("type") == "BPE", f"its model is {model.get('type')!s:.40}, not BPE")
    for option in _UNSUPPORTED:
        _demand(not model.get(option), f"its BPE sets {option}")
    _demand(content.get("normalizer") is None, "its normalizer changes the text")
    split = _read_split(content.get("pre_tokenizer"))
    tokens = _read_vocabulary(model.get("vocab"))
    merges = _read_merges(model.get("merges"), set(tokens))
    return tokens, merges, _read_end_of_text(content.get("added_tokens"), tokens), split


def _read_split(steps: Any) -> str:
    for name, pattern in SPLITS.items():
        split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
        for trims in (True, False):  # offsets do not matter
            if steps == {
                "type": "Sequence",
                "pretokenizers": [split, level | {"trim_offsets": trims}],
            }:
                return name
    _demand(
        isinstance(steps, dict) and steps.get("type") == "ByteLevel", "its pre-tokenizer is not ByteLevel"
    )
    _demand(steps.get("use_regex", True) is True, "its pre-tokenizer does not split like GPT-2's")
    _demand(steps.get("add_prefix_space") is False, "its pre-tokenizer puts a space before the text")
    return "gpt-2"


def _read_vocabulary(vocabulary: Any) -> list[str]:
    _demand(isinstance(vocabulary, dict), "has no vocabulary")
    _demand(len(vocabulary) <= MAX_VOCAB_SIZE, f"{len(vocabulary):,} tokens are more than {MAX_VOCAB_SIZE:,}")
    by_id = {id: token for token, id in vocabulary.items() if type(id) is int}
    _demand(set(by_id) == set(range(len(vocabulary))), "its ids are not 0, 1, 2 … without a gap")
    tokens = [by_id[id] for id in range(len(by_id))]
    are_of_bytes = all(token and BYTE_OF_CHAR.keys() >= set(token) for token in tokens)
    _demand(are_of_bytes, "its tokens are not byte-level")
    longest = max(map(len, tokens), default=0)
    _demand(longest <= _LONGEST_TOKEN, f"a token has more than {_LONGEST_TOKEN:,} bytes")
    _demand(BYTE_OF_CHAR.keys() <= set(tokens), "it lacks some of the 256 bytes")
    return tokens


def _read_merges(merges: Any, tokens: set[str]) -> list[Merge]:
    _demand(isinstance(merges, list), "has no merges")
    _demand(len(merges) <= MAX_VOCAB_SIZE, f"{len(merges):,} merges are more than {MAX_VOCAB_SIZE:,}")
    pairs: list[Merge] = []
    for merge in merges:
        pair = merge.split(" ") if isinstance(merge, str) else merge
        _demand(
            isinstance(pair, list) and len(pair) == 2 and all(isinstance(half, str) for half in pair),
            f"merge {merge!r:.60} is not a pair",
        )
        left, right = pair
        _demand({left, right, left + right} <= tokens, f"merge {merge!r:.60} is not in its vocabulary")
        pairs.append((left, right))
    return pairs


def _read_end_of_text(added_tokens: Any, tokens: list[str]) -> int:
    added = added_tokens if isinstance(added_tokens, list) else []
    contents = [entry.get("content") if isinstance(entry, dict) else None for entry in added]
    _demand(END_OF_TEXT in contents, f"it has no {END_OF_TEXT}")
    _demand(all(content == END_OF_TEXT for content in contents), f"it has added tokens besides {END_OF_TEXT}")
    _demand(END_OF_TEXT in tokens, f"{END_OF_TEXT} is not in its vocabulary")
    return tokens.index(END_OF_TEXT)
