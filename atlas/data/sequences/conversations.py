"""Conversations: JSONL rows of messages → sequences in which only the answers are predicted.

A file of them is small beside a text to learn a language from, so that it is read whole and kept in memory.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from atlas.data.prepare.dedup import fractions
from atlas.data.sequences.dataset import IGNORE_INDEX
from atlas.data.sequences.packing import best_fit_decreasing
from atlas.data.text.decode import replace_undecodable
from atlas.data.text.documents import holds_rows, json_name, read_rows
from atlas.data.text.files import TextFile, format_of, is_json
from atlas.errors import DataError
from atlas.progress import byte_progress
from atlas.tokenizer import Tokenizer
from atlas.tokenizer.chat import ROLES, Message, Turn, turns_of

_EXAMPLE = (
    '{"prompt": …, "response": …} or {"messages": [{"role": "user", "content": …}, {"role": "assistant", '
    '"content": …}]}'
)
_ROWS_AT_ONCE = 1024
FEWEST_HELD_OUT = 20
"""Conversations held out for validation, at least: the loss on two or three of them selects the best checkpoint by
chance, and each is missing from training."""


@dataclass(frozen=True)
class Conversations:
    """Tokens of conversations one after the other, each ending with the end of text, in which `is_answer` marks what
    the assistant says, its end of text included. Conversation i begins where the one before ends, at `ends[i - 1]`."""

    name: str
    tokens: NDArray[np.uint32]
    is_answer: NDArray[np.bool_]
    ends: NDArray[np.int64]
    answer_bytes: int
    eos_id: int

    @property
    def fingerprint(self) -> str:
        """sha256 of what is trained on."""
        digest = hashlib.sha256()
        for array in (self.tokens, self.is_answer, self.ends):
            digest.update(hashlib.sha256(np.ascontiguousarray(array).tobytes()).digest())
        return digest.hexdigest()

    def answers_within(self, max_seq_len: int) -> NDArray[np.int64]:
        """(conversations,): how many tokens of each are answers that `max_seq_len` tokens before them reach."""
        starts = np.concatenate([[0], self.ends[:-1]])
        before = np.concatenate([[0], np.cumsum(self.is_answer)])
        counts: NDArray[np.int64] = before[np.minimum(self.ends, starts + max_seq_len + 1)] - before[starts]
        return counts


def holds_conversations(path: str | Path) -> bool:
    """Whether this is a file of JSON rows whose first row has messages, or a prompt, and no text."""
    if not Path(path).is_file() or format_of(Path(path).name) != "rows":
        return False
    if is_json(Path(path).name) and not holds_rows(_file(path), at_least=1):
        return False
    _, first = next(_rows(path), ("", {}))
    return "text" not in first and ("messages" in first or "prompt" in first)


def read_conversations(
    path: str | Path, tokenizer: Tokenizer, *, val_fraction: float
) -> tuple[Conversations, Conversations | None, list[str]]:
    """Those of a JSONL file to train on, those held out (by the hash of each, `val_fraction` of them), and what was met
    on the way, a line each.

    Raises `DataError` for a row that is not a conversation with an answer.
    """
    texts: list[list[Turn]] = []
    digests = []
    ids: list[list[NDArray[np.uint32]]] = []
    undecodable = 0

    def count(replaced: int) -> None:
        nonlocal undecodable
        undecodable += replaced

    with byte_progress(Path(path).stat().st_size, "reading conversations") as advance:
        rows = _rows(path, advance)
        while some := [
            messages_of(row, place, count) for place, row in itertools.islice(rows, _ROWS_AT_ONCE)
        ]:
            digests += [
                hashlib.blake2b(repr(messages).encode(), digest_size=16).digest() for messages in some
            ]
            turns = [turns_of(messages) for messages in some]
            parts = iter(tokenizer.encode_arrays([part for chat in turns for turn in chat for part in turn]))
            ids += [[next(parts) for _ in range(2 * len(chat))] for chat in turns]
            texts += turns
    held_out = fractions(b"".join(digests))[:, 0] < val_fraction
    if not FEWEST_HELD_OUT <= held_out.sum() < len(texts):
        held_out[:] = False
    parts_of = [
        _assembled(
            str(path),
            [chat for chat, out in zip(texts, held_out, strict=True) if out == wanted],
            [chat for chat, out in zip(ids, held_out, strict=True) if out == wanted],
            tokenizer.eos_id,
        )
        for wanted in (False, True)
    ]
    none = (
        f" (fewer than {FEWEST_HELD_OUT} are too few to judge by)"
        if val_fraction and not held_out.any()
        else ""
    )
    notes = [
        f"{path}: {len(texts) - held_out.sum():,} conversations to train on, {held_out.sum():,} held out{none}; the "
        "loss is that of the answers"
    ]
    if undecodable:
        notes.append(f"{path}: {undecodable:,} bytes are not UTF-8 and became U+FFFD")
    return parts_of[0], parts_of[1] if held_out.any() else None, notes


def _assembled(
    name: str, texts: Sequence[Sequence[Turn]], ids: Sequence[Sequence[NDArray[np.uint32]]], eos_id: int
) -> Conversations:
    tokens, is_answer, lengths = [], [], []
    for chat, parts in zip(texts, ids, strict=True):
        length = 0
        for turn, given, said in zip(chat, parts[::2], parts[1::2], strict=True):
            said = said if turn.said else said[:0]  # a custom tokenizer may have ids for nothing
            tokens += [given, said, np.array([eos_id], np.uint32)]
            is_answer += [np.zeros(len(given), np.bool_), np.full(len(said) + 1, bool(turn.said))]
            length += len(given) + len(said) + 1
        lengths.append(length)
    answer_bytes = sum(len(turn.said.encode()) for chat in texts for turn in chat)
    empty: list[Any] = [np.zeros(0, np.uint32)]
    return Conversations(
        name,
        np.concatenate(tokens or empty),
        np.concatenate(is_answer or empty).astype(np.bool_),
        np.cumsum(lengths, dtype=np.int64),
        answer_bytes,
        eos_id,
    )


def _rows(path: str | Path, advance: Any = lambda _: None) -> Iterator[tuple[str, dict[str, Any]]]:
    return read_rows(_file(path), advance, like=_EXAMPLE)


def _file(path: str | Path) -> TextFile:
    return TextFile(str(path), "rows", Path(path).stat().st_size)


def messages_of(row: dict[str, Any], place: str, on_undecodable: Callable[[int], None]) -> list[Message]:
    """The conversation of a row, up to its last answer; `on_undecodable` is told the bytes that were not UTF-8. Raises
    `AtlasError` that names `place`."""
    if "messages" not in row:
        missing = [key for key in ("prompt", "response") if not isinstance(row.get(key), str)]
        if missing:
            what = "no answer" if missing == ["response"] else f"no text in {' and '.join(missing)}"
            raise DataError(f"{place}: has {what}; a row is like {_EXAMPLE}")
        messages = [Message("user", row["prompt"]), Message("assistant", row["response"])]
    else:
        if not isinstance(row["messages"], list):
            raise DataError(f"{place}: messages is {json_name(row['messages'])}; a row is like {_EXAMPLE}")
        messages = [
            _message(message, f"{place}, message {n}") for n, message in enumerate(row["messages"], 1)
        ]
    while messages and not (messages[-1].role == "assistant" and messages[-1].content.strip()):
        messages.pop()
    if not messages:
        raise DataError(f"{place}: has no answer; a row is like {_EXAMPLE}")
    return [Message(role, replace_undecodable(content, on_undecodable)) for role, content in messages]


def _message(value: object, place: str) -> Message:
    if not isinstance(value, dict) or not isinstance(value.get("content"), str):
        raise DataError(
            f'{place}: has no text in content; a message is like {{"role": "user", "content": …}}'
        )
    if value.get("role") not in ROLES:
        raise DataError(f"{place}: has the role {value.get('role')!r:.40}; roles are {', '.join(ROLES)}")
    return Message(value["role"], value["content"])


class ChatDataset(Dataset[tuple[Tensor, ...]]):
    """`dataset[w]` is (inputs (T,), targets (T,)), both int64, with `with_documents` also the number of each input's
    conversation (T,). Targets are `IGNORE_INDEX` but for answers.

    Whole conversations are packed into windows, best fit. One that is longer than a window loses its end, and is left
    out if all its answers go with it: `num_cut` and `num_left_out`.

    Raises `DataError` if no answer is left.
    """

    def __init__(
        self, conversations: Conversations, max_seq_len: int, *, with_documents: bool = False
    ) -> None:
        self.stream = conversations
        self.max_seq_len = max_seq_len
        self.with_documents = with_documents
        starts = np.concatenate([[0], conversations.ends[:-1]])
        whole = conversations.ends - starts
        lengths = np.minimum(whole, max_seq_len + 1)
        answers = conversations.answers_within(max_seq_len)
        has_answer = answers > 0
        self.num_targets = int(answers.sum())
        if not has_answer.any():
            raise DataError(
                f"{conversations.name}: no answer begins within max_seq_len {max_seq_len} tokens of its conversation; "
                "set a larger model.max_seq_len, or give shorter prompts"
            )
        self.num_conversations = int(has_answer.sum())
        self.num_left_out = len(whole) - self.num_conversations
        self.num_cut = int((has_answer & (whole > lengths)).sum())
        starts, lengths = starts[has_answer], lengths[has_answer]
        window_of = best_fit_decreasing(lengths, max_seq_len + 1)
        by_window = np.argsort(window_of, kind="stable")
        self._starts, self._lengths = starts[by_window], lengths[by_window]
        self._ends = np.cumsum(np.bincount(window_of))

    @property
    def num_tokens(self) -> int:
        return int(self._lengths.sum())

    @property
    def bytes_per_token(self) -> float:
        """Of the answers, those that were cut off as well."""
        return self.stream.answer_bytes / int(self.stream.is_answer.sum())

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, window: int) -> tuple[Tensor, ...]:
        if not 0 <= window < len(self):
            raise IndexError(f"window {window} of {len(self)}")
        first, last = self._ends[window - 1] if window else 0, self._ends[window]
        tokens = np.full(self.max_seq_len + 1, self.stream.eos_id, np.int64)
        targets = np.full(self.max_seq_len + 1, IGNORE_INDEX, np.int64)
        numbers = np.full(self.max_seq_len + 1, last - first, np.int64)
        at = 0
        for number, (start, length) in enumerate(
            zip(self._starts[first:last].tolist(), self._lengths[first:last].tolist(), strict=True)
        ):
            said = self.stream.is_answer[start : start + length]
            tokens[at : at + length] = self.stream.tokens[start : start + length]
            targets[at : at + length] = np.where(said, tokens[at : at + length], IGNORE_INDEX)
            numbers[at : at + length] = number
            at += length
        columns = (tokens[:-1], targets[1:], *([numbers[:-1]] if self.with_documents else []))
        return tuple(torch.from_numpy(column.copy()) for column in columns)
