"""Tokens become text as they come: whole characters only, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch

from atlas.errors import AtlasError
from atlas.inference.generate import generate
from atlas.inference.sampling import Sampling, row_generators
from atlas.model import AtlasLM
from atlas.tokenizer import Tokenizer
from atlas.tokenizer.chat import Message, encode_prompt

Prompt = str | Sequence[Message]
"""Text to continue, or a conversation to answer."""


class ModelAndTokenizer(Protocol):
    """What writing needs of a `LoadedModel`."""

    @property
    def model(self) -> AtlasLM:
        """In evaluation mode, on its device."""

    @property
    def tokenizer(self) -> Tokenizer:
        """The one that the model was trained with."""


class TextStream:
    """One text in the making. `add` returns what may be shown now; `finish` the rest.

    A character whose bytes are spread over several tokens is held back until it is whole, and so is
    whatever may be the beginning of a stop string; the stop string itself is never shown.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self.tokenizer = tokenizer
        self.stop = [text for text in stop if text]
        self.stopped = False
        self._pending_ids: list[int] = []
        self._shown_of_pending = 0
        self._held = ""

    def add(self, token: int) -> str:
        """The text that `token` makes certain; empty after a stop string."""
        if self.stopped:
            return ""
        self._pending_ids.append(token)
        text = self.tokenizer.decode(self._pending_ids)
        # Bytes that are no character yet decode to one U+FFFD at the end, which later bytes may change.
        certain = text.removesuffix("\ufffd")
        new, self._shown_of_pending = certain[self._shown_of_pending :], len(certain)
        if certain == text:
            self._pending_ids.clear()
            self._shown_of_pending = 0
        return self._release(new)

    def finish(self) -> str:
        """What is still held back when no more tokens come."""
        if self.stopped:
            return ""
        text = self._release(self.tokenizer.decode(self._pending_ids)[self._shown_of_pending :])
        self._pending_ids.clear()
        rest, self._held = ("", "") if self.stopped else (self._held, "")
        return text + rest

    def _release(self, text: str) -> str:
        """`text` and what was held before it, as far as no stop string can begin in it."""
        self._held += text
        # The one complete first decides, so that the split into tokens does not.
        found = [(start + len(stop), start) for stop in self.stop if (start := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            shown, self._held = self._held[: min(found)[1]], ""
            return shown
        keep = max((_overlap(self._held, stop) for stop in self.stop), default=0)
        shown = self._held[: len(self._held) - keep]
        self._held = self._held[len(shown) :]
        return shown


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that begins `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0


def stream_text(
    loaded: ModelAndTokenizer,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    *,
    max_tokens: int,
    stop: Sequence[str] = (),
    seed: int = 0,
    first_row: int = 0,
    count: Callable[[int], None] = lambda tokens: None,
) -> Iterator[list[str]]:
    """Continue every prompt; yield, per step, the new text of each row. An empty prompt begins a document.

    `first_row` numbers the rows on over several calls, since a row's random numbers follow from `seed`
    and its number. `count` is told how many tokens each step made.
    """
    tokenizer = loaded.tokenizer
    ids = [_encode(prompt, tokenizer) for prompt in prompts]
    generators = row_generators(seed, len(ids), first_row=first_row)
    yield from stream_ids(
        loaded, ids, sampling, max_tokens=max_tokens, stop=stop, generators=generators, count=count
    )


def stream_ids(
    loaded: ModelAndTokenizer,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    max_tokens: int,
    stop: Sequence[str],
    generators: list[torch.Generator],
    count: Callable[[int], None] = lambda tokens: None,
) -> Iterator[list[str]]:
    """The same for prompts that are ids already, at least one each, with the random numbers of each row."""
    if max_tokens < 1:
        raise AtlasError(f"--max-tokens {max_tokens}: must be at least 1")
    tokenizer = loaded.tokenizer
    streams = [TextStream(tokenizer, stop) for _ in prompts]
    ended = [False] * len(prompts)
    steps = generate(
        loaded.model, prompts, sampling, max_tokens=max_tokens, eos_id=tokenizer.eos_id, generators=generators
    )
    for step in steps:
        count(sum(token is not None for token in step))
        pieces = []
        for row, token in enumerate(step):
            pieces.append("" if ended[row] or token is None else streams[row].add(token))
            ended[row] = ended[row] or token is None or streams[row].stopped
        yield pieces
        if all(ended):
            break
    yield [stream.finish() for stream in streams]


def _encode(prompt: Prompt, tokenizer: Tokenizer) -> list[int]:
    if isinstance(prompt, str):
        return tokenizer.encode(prompt) or [tokenizer.eos_id]
    return encode_prompt(prompt, tokenizer)
