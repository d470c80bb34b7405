"""Tokens → sequences. Window w consists of tokens w·T to w·T + T of the stream. The targets are shifted by one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from atlas.data.prepare.pipeline import prepare_text_cached
from atlas.data.shards import TokenStream, open_dataset
from atlas.errors import DataError
from atlas.tokenizer import Tokenizer

IGNORE_INDEX = -100
"""The target of a position that the loss ignores, as in `torch.nn.functional.cross_entropy`."""


class SequenceDataset(Dataset[tuple[Tensor, ...]]):
    """Windows of `max_seq_len` tokens: `dataset[w]` is (inputs (T,), targets (T,)), both int64.

    With `with_documents` a third tensor (T,) holds the number of each input's document in the window, from 0 on. The
    token after an end of text begins the next document.

    Windows overlap by one token: the last target of a window is the first input of the next window. The tokens left
    over at the end are dropped. With `pad_last` these tokens form one more window, which is padded with end of text in
    the inputs and `IGNORE_INDEX` in the targets. With `pad_last`, every token except the first is a target exactly
    once.

    Raises `DataError` if the stream is too short for one window.
    """

    def __init__(
        self, stream: TokenStream, max_seq_len: int, *, pad_last: bool = False, with_documents: bool = False
    ) -> None:
        self.stream = stream
        self.max_seq_len = max_seq_len
        self.with_documents = with_documents
        self.num_tokens = self.num_targets = stream.num_tokens
        """Number of tokens in the stream. `num_targets` has this value, too, although slightly fewer are targets."""
        predicted = max(0, stream.num_tokens - 1)
        self._num_windows = -(-predicted // max_seq_len) if pad_last else predicted // max_seq_len
        if self._num_windows == 0:
            raise DataError(
                f"{stream.name}: {stream.num_tokens} tokens are too few for one sequence of "
                f"max_seq_len {max_seq_len} (it needs {2 if pad_last else max_seq_len + 1}); "
                "give more text, or set a smaller model.max_seq_len"
            )
        self.bytes_per_token = stream.num_bytes / stream.num_tokens
        """Mean number of bytes of UTF-8 text per token."""

    @property
    def files(self) -> list[tuple[Path, str]]:
        """The path and the sha256 of each file that the windows are read from."""
        return self.stream.files

    def __len__(self) -> int:
        return self._num_windows

    def __getitem__(self, window: int) -> tuple[Tensor, ...]:
        if not 0 <= window < len(self):
            raise IndexError(f"window {window} of {len(self)}")
        inputs, targets = self._read(window)
        if not self.with_documents:
            return inputs, targets
        return inputs, targets, documents_of(inputs, self.stream.eos_id)

    def _read(self, window: int) -> tuple[Tensor, Tensor]:
        start = window * self.max_seq_len
        stop = min(start + self.max_seq_len + 1, self.stream.num_tokens)
        tokens = torch.from_numpy(self.stream.read(start, stop).astype(np.int64))
        inputs, targets = tokens[:-1], tokens[1:]
        missing = self.max_seq_len - len(inputs)
        if missing:
            inputs = torch.nn.functional.pad(inputs, (0, missing), value=self.stream.eos_id)
            targets = torch.nn.functional.pad(targets, (0, missing), value=IGNORE_INDEX)
        return inputs, targets


def documents_of(inputs: Tensor, eos_id: int) -> Tensor:
    """Return (T,) int64: the number of end-of-text tokens before each token, not counting the token itself."""
    ends = inputs == eos_id
    return ends.cumsum(0) - ends.long()


class TextDataset(SequenceDataset):
    """Sequences from text files, with any tokenizer.

        TextDataset(["a.txt", "b.txt"], tokenizer=MyTokenizer(), max_seq_len=512)

    `tokenizer` is an Atlas tokenizer or any object with `encode`, `decode`, `vocab_size` and `eos_id`. The default is
    GPT-2's tokenizer. Atlas caches the tokens. The content of the files and the tokenizer identify them in the cache.
    """

    def __init__(
        self, files: str | Path | Sequence[str | Path], tokenizer: Any = None, max_seq_len: int = 1024
    ) -> None:
        self.tokenizer = Tokenizer.gpt2() if tokenizer is None else Tokenizer.wrap(tokenizer)
        paths = [files] if isinstance(files, (str, Path)) else list(files)
        stream = open_dataset(prepare_text_cached(paths, self.tokenizer, val_fraction=0.0)).train
        super().__init__(replace(stream, name=", ".join(map(str, paths))), max_seq_len)
