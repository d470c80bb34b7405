"""Conversations: rows of messages → sequences in which only the answers are predicted.

The conversations are few compared with a text for pretraining, so Atlas keeps them in memory.
"""

from __future__ import annotations

import glob
import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from atlas.config.config import DataConfig
from atlas.data.prepare.dedup import fractions
from atlas.data.sequences.dataset import IGNORE_INDEX
from atlas.data.sequences.packing import pack
from atlas.data.shards import is_prepared
from atlas.data.text.documents import Reading, read_rows
from atlas.data.text.files import Advance, TextFile
from atlas.data.text.folders import Skipped, files_below
from atlas.data.text.formats.chats import ChatReport, is_empty, parse_layout, read_conversation
from atlas.data.text.formats.decode import replace_undecodable
from atlas.data.text.formats.rows import Row
from atlas.data.text.formats.sniff import ROW_ENDINGS, ROWS
from atlas.data.text.report import SourceReport, TooManyFaultsError
from atlas.data.text.search import PATTERN
from atlas.data.text.selection import kind_of_rows, refuse_conversations
from atlas.data.text.sources import Sources
from atlas.errors import DataError
from atlas.progress import byte_progress
from atlas.tokenizer import Tokenizer
from atlas.tokenizer.chat import Message, Turn, has_own_template, turns_of
from atlas.tokenizer.chat_template import encode_conversation

_ROWS_PER_STEP = 1024
_DEFAULT_FRACTION = DataConfig().val_fraction
FEWEST_HELD_OUT = 20
"""Atlas holds out at least this many conversations for validation, or none. With only two or three, chance would decide
which checkpoint is the best."""


@dataclass(frozen=True)
class Conversations:
    """The tokens of conversations, one after the other. Each conversation ends with an end-of-text token.

    `is_answer` marks the assistant's tokens, including the end-of-text token after each answer. Conversation i ends
    before token `ends[i]`.
    """

    name: str
    tokens: NDArray[np.uint32]
    is_answer: NDArray[np.bool_]
    ends: NDArray[np.int64]
    answer_bytes: int
    eos_id: int

    @property
    def fingerprint(self) -> str:
        """sha256 of the tokens, the answer marks and the ends of the conversations."""
        digest = hashlib.sha256()
        for array in (self.tokens, self.is_answer, self.ends):
            digest.update(hashlib.sha256(np.ascontiguousarray(array).tobytes()).digest())
        return digest.hexdigest()

    def some_answers(self, count: int) -> list[tuple[list[int], list[int]]]:
        """Return, for at most `count` conversations that are spread over all of them, the token ids before the first
        answer, and those of this answer. Only answers that the model learns count."""
        total = len(self.ends)
        count = min(count, total)
        return [self._first_answer(total * number // count) for number in range(count)]

    def _first_answer(self, conversation: int) -> tuple[list[int], list[int]]:
        start = int(self.ends[conversation - 1]) if conversation else 0
        is_answer = self.is_answer[start : self.ends[conversation]]
        begin = int(is_answer.argmax())
        length = int(np.append(is_answer[begin:], False).argmin())
        ids: list[int] = self.tokens[start : start + begin + length].tolist()
        return ids[:begin], ids[begin:]

    @property
    def longest(self) -> int:
        """The number of tokens of the longest conversation."""
        return int(np.diff(self.ends, prepend=0).max())

    def num_windows(self, max_seq_len: int) -> int:
        """Return about how many windows of a `ChatDataset` the conversations fill."""
        lengths = np.minimum(np.diff(self.ends, prepend=0), max_seq_len + 1)
        return max(1, round(int(lengths.sum()) / (max_seq_len + 1)))

    def answers_within(self, max_seq_len: int) -> NDArray[np.int64]:
        """Return (conversations,): for each conversation, the number of answer tokens with at most `max_seq_len` tokens
        of the conversation before them."""
        starts = np.concatenate([[0], self.ends[:-1]])
        before = np.concatenate([[0], np.cumsum(self.is_answer)])
        counts: NDArray[np.int64] = before[np.minimum(self.ends, starts + max_seq_len + 1)] - before[starts]
        return counts


def holds_conversations(path: str | Path, chat_format: str | None = None) -> bool:
    """Return whether the rows of a file, or most of the text in a folder, are conversations. `chat_format` is the
    layout that the user named.

    Raises `DataError` if one of the first rows has both a text and a list of messages, and the user named no layout.
    """
    if is_prepared(path) or not _may_hold_rows(path):
        return False
    sources = Sources([path], conversations=True)
    kinds = {file: kind_of_rows(file, sources.reading) for file in sources.files if file.format in ROWS}
    if chat_format is not None:
        return not {"conversation", "both"}.isdisjoint(kinds.values())
    for file, kind in kinds.items():
        if kind == "both":
            refuse_conversations(file, kind, sources.reading)
    return "conversation" in kinds.values() and sources.total_bytes > sources.choice.bytes_of_other_text


def _may_hold_rows(path: str | Path) -> bool:
    """Return whether a path can have rows, without a look into each of many files of a folder."""
    if not Path(path).is_dir():
        return Path(path).is_file() or bool(
            PATTERN.search(str(path)) and glob.glob(str(path), recursive=True)
        )
    return any(ROW_ENDINGS.search(name.lower()) for name, _ in files_below(str(path), Skipped()))


def read_conversations(
    path: str | Path,
    tokenizer: Tokenizer,
    *,
    val_fraction: float,
    chat_format: str | None = None,
    on_error: str | None = None,
) -> tuple[Conversations, Conversations | None, list[str]]:
    """Read the conversations of a file, a folder or a pattern. Returns the conversations to train on, the held-out
    conversations or None, and notes, one line each. The hash of each conversation decides whether the conversation is
    in the `val_fraction` that is held out. `chat_format` is the layout that the user named, and `on_error` is that of
    `Reading`.

    Raises `DataError` if too many rows are not conversations with an answer.
    """
    layout = parse_layout(chat_format) if chat_format is not None else None
    sources = Sources([path], reading=Reading(on_error=on_error), conversations=True)
    report, understood = SourceReport(), ChatReport()
    chats: list[_Chat] = []
    digests = b""
    with byte_progress(sources.total_bytes, "reading conversations") as advance:
        read = _conversations_in(sources, report, understood, layout, advance)
        while some := [*itertools.islice(read, _ROWS_PER_STEP)]:
            if has_own_template(tokenizer):
                some, encoded = _by_template(some, tokenizer, sources, report)
                chats += encoded
            else:
                turns = [turns_of(messages) for _, messages in some]
                ids = iter(
                    tokenizer.encode_arrays([text for chat in turns for turn in chat for text in turn[:2]])
                )
                chats += [_tokens_of(chat, ids, tokenizer.eos_id) for chat in turns]
            digests += b"".join(_digest_of(messages) for _, messages in some)
    report.check_faults(sources.reading.on_error, total_bytes=sources.total_bytes)
    if not chats:
        raise DataError(
            f"{path}: holds no conversations; give rows with messages, or a prompt and a response"
        )
    held_out, reason = _held_out(digests, val_fraction)
    train = _joined(str(path), itertools.compress(chats, ~held_out), tokenizer.eos_id)
    val_chats = [*itertools.compress(chats, held_out)]
    val = _joined(str(path), val_chats, tokenizer.eos_id) if val_chats else None
    notes = [
        f"{path}: {len(chats) - held_out.sum():,} conversations to train on, {held_out.sum():,} held out{reason}; the "
        f"loss counts only the answers, {train.is_answer.sum():,} of {len(train.tokens):,} tokens",
        *sources.notes(report),
        *understood.notes(),
        *report.fault_notes(),
    ]
    return train, val, notes


def _held_out(digests: bytes, val_fraction: float) -> tuple[NDArray[np.bool_], str]:
    """Return (n,): True for each conversation that is held out, and why none is, or an empty string."""
    shares = fractions(digests)[:, 0]
    held_out = shares < val_fraction
    if val_fraction == 0:
        return held_out, ""
    if val_fraction != _DEFAULT_FRACTION:  # the user asked for it
        if len(shares) > 1:
            held_out[shares.argmin()] = True
            held_out[shares.argmax()] = False
        return held_out, ""
    if held_out.sum() >= FEWEST_HELD_OUT:
        return held_out, ""
    return np.zeros_like(held_out), (
        f" (fewer than {FEWEST_HELD_OUT} are too few to choose a checkpoint by; for some, set another "
        "data.val_fraction or give --val-data)"
    )


def _rows_of(file: TextFile, reading: Reading, report: SourceReport, advance: Advance) -> Iterator[Row]:
    """Yield the rows of a file up to an error that ends it. The error is added to `report`."""
    try:
        yield from read_rows(file, reading, report, advance)
    except TooManyFaultsError:
        raise
    except DataError as error:
        report.add_fault(error, reading.on_error)
        report.bytes_unsure += file.size


def _conversations_in(
    sources: Sources, report: SourceReport, understood: ChatReport, layout: str | None, advance: Advance
) -> Iterator[_Conversation]:
    for file in sources.files:
        for row in _rows_of(file, sources.reading, report, advance):
            if is_empty(row.value):
                understood.empty += 1
                continue
            try:
                messages = read_conversation(row.value, row.place, understood, layout)
            except DataError as error:
                report.add_fault(error, sources.reading.on_error)
                continue
            report.documents[file.kind] += 1
            on_undecodable = partial(report.add_undecodable, file.name)
            yield (
                row.place,
                [
                    message._replace(content=replace_undecodable(message.content, on_undecodable))
                    for message in messages
                ],
            )


_Conversation = tuple[str, list[Message]]
"""Where a conversation is, as a file and a row, and its messages."""
_Chat = tuple[NDArray[np.uint32], NDArray[np.bool_], int]
"""The tokens of a conversation, the marks of the answer tokens, and the number of bytes in the answers."""


def _by_template(
    conversations: Sequence[_Conversation], tokenizer: Tokenizer, sources: Sources, report: SourceReport
) -> tuple[list[_Conversation], list[_Chat]]:
    """Return the conversations that the model's own chat template takes, and their tokens. The others are faults."""
    taken: list[_Conversation] = []
    chats: list[_Chat] = []
    for place, messages in conversations:
        try:
            tokens, is_answer = encode_conversation(messages, tokenizer)
        except DataError as error:
            report.add_fault(DataError(f"{place}: {error}"), sources.reading.on_error)
            continue
        learnt = [
            message.content.strip() for message in messages if message.role == "assistant" and message.learn
        ]
        num_bytes = sum(len(answer.encode()) for answer in learnt)
        chats.append((np.array(tokens, np.uint32), np.array(is_answer, np.bool_), num_bytes))
        taken.append((place, messages))
    return taken, chats


def _tokens_of(chat: Sequence[Turn], ids: Iterator[NDArray[np.uint32]], eos_id: int) -> _Chat:
    tokens, is_answer = [], []
    for turn in chat:
        prompt, answer = next(ids), next(ids)
        answer = answer if turn.answer else answer[:0]  # a custom tokenizer may have ids for an empty text
        tokens += [prompt, answer, np.array([eos_id], np.uint32)]
        learn = turn.learn and bool(turn.answer)
        is_answer += [np.zeros(len(prompt), np.bool_), np.full(len(answer) + 1, learn)]
    learnt = [turn.answer for turn in chat if turn.learn]
    return np.concatenate(tokens), np.concatenate(is_answer), sum(len(answer.encode()) for answer in learnt)


def _joined(name: str, chats: Iterable[_Chat], eos_id: int) -> Conversations:
    tokens, is_answer, answer_bytes = zip(*chats, strict=True)
    ends = np.cumsum([len(ids) for ids in tokens], dtype=np.int64)
    return Conversations(
        name, np.concatenate(tokens), np.concatenate(is_answer), ends, sum(answer_bytes), eos_id
    )


def _digest_of(messages: Sequence[Message]) -> bytes:
    """Return 16 bytes that identify a conversation. They decide whether it is held out, so they never change."""
    content = ", ".join(f"Message(role={m.role!r}, content={m.content!r})" for m in messages)
    return hashlib.blake2b(f"[{content}]".encode(), digest_size=16).digest()


class ChatDataset(Dataset[tuple[Tensor, ...]]):
    """`dataset[w]` is (inputs (T,), targets (T,)), both int64. With `with_documents` a third tensor (T,) holds the
    number of each input's conversation. Targets outside the answers are `IGNORE_INDEX`.

    Complete conversations are packed into windows by best fit. A conversation longer than a window loses its end, and
    `num_cut` counts such conversations. A conversation that loses all its answers is left out, and `num_left_out`
    counts such conversations.

    Raises `DataError` if no answer is left.
    """

    def __init__(
        self, conversations: Conversations, max_seq_len: int, *, with_documents: bool = False
    ) -> None:
        self.stream = conversations
        self.max_seq_len = max_seq_len
        self.with_documents = with_documents
        starts = np.concatenate([[0], conversations.ends[:-1]])
        full_lengths = conversations.ends - starts
        lengths = np.minimum(full_lengths, max_seq_len + 1)
        answers = conversations.answers_within(max_seq_len)
        has_answer = answers > 0
        self.num_targets = int(answers.sum())
        if not has_answer.any():
            raise DataError(
                f"{conversations.name}: no answer begins within max_seq_len {max_seq_len} tokens of the start of its "
                "conversation; set a larger model.max_seq_len, or shorten the prompts"
            )
        self.num_conversations = int(has_answer.sum())
        self.num_left_out = len(full_lengths) - self.num_conversations
        self.num_cut = int((has_answer & (full_lengths > lengths)).sum())
        self.num_tokens = int(lengths[has_answer].sum())
        """Number of tokens in the conversations that are kept. Tokens that were cut off do not count."""
        self.bytes_per_token = conversations.answer_bytes / int(conversations.is_answer.sum())
        """Mean number of bytes per answer token. Tokens that were cut off also count."""
        self._packing = pack(starts[has_answer], lengths[has_answer], max_seq_len + 1)
        self.files: list[tuple[Path, str]] = []
        """The files that the windows are read from: none, since the conversations are in memory."""

    def __len__(self) -> int:
        return len(self._packing.ends)

    def __getitem__(self, window: int) -> tuple[Tensor, ...]:
        if not 0 <= window < len(self):
            raise IndexError(f"window {window} of {len(self)}")
        pieces = self._packing.pieces(window)
        places = np.concatenate([np.arange(start, start + length) for start, length in pieces])
        tokens = np.full(self.max_seq_len + 1, self.stream.eos_id, np.int64)
        targets = np.full(self.max_seq_len + 1, IGNORE_INDEX, np.int64)
        numbers = np.full(self.max_seq_len + 1, len(pieces), np.int64)
        tokens[: len(places)] = self.stream.tokens[places]
        targets[: len(places)] = np.where(self.stream.is_answer[places], tokens[: len(places)], IGNORE_INDEX)
        numbers[: len(places)] = np.repeat(np.arange(len(pieces)), [length for _, length in pieces])
        columns = [torch.from_numpy(column) for column in (tokens[:-1], targets[1:], numbers[:-1])]
        return tuple(columns if self.with_documents else columns[:2])
