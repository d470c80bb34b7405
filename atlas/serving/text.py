"""What a client has asked for: one or more texts, and the pieces in which they come."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from atlas.inference.sampling import Sampling
from atlas.tokenizer.chat import Message


class Candidate(NamedTuple):
    """A token that the model thought of, and the natural logarithm of its probability before any sampling setting."""

    token: int
    logprob: float


class Piece(NamedTuple):
    """What one step adds. `token` is None at the end of text, which is not part of it; `text` may be empty, while a
    character or what may become a stop string is incomplete. `finish` ends it: `stop`, `length`, `error`, `timeout`."""

    token: int | None
    text: str
    logprob: float | None = None
    candidates: Sequence[Candidate] = ()
    finish: str | None = None
    num_tokens: int = 1
    """More than one where those before it were told by nobody."""


@dataclass(eq=False)
class Generation:
    """One text to write. Who no longer wants it sets `cancelled`."""

    prompt: list[int]
    sampling: Sampling
    max_tokens: int
    seed: int
    """Of its own: two texts of one request have different ones."""
    stop: tuple[str, ...] = ()
    num_candidates: int | None = None
    """Of each step; None: no log-probability at all, which saves the work."""
    index: int = 0
    """Among the texts of its request."""
    arrivals: asyncio.Queue[tuple[int, Piece]] | None = None
    """Where its pieces go, with its index."""
    cancelled: bool = False


def hand_out(pieces: Iterable[tuple[Generation, Piece]]) -> None:
    """Of a step, in the event loop, to those who wait."""
    for text, piece in pieces:
        if text.arrivals is not None and not text.cancelled:
            text.arrivals.put_nowait((text.index, piece))


Send = Callable[[list[tuple[Generation, Piece]]], None]
"""Takes the pieces of a step, from any thread, to whoever waits for them."""


class Busy(Exception):
    """As many texts wait as may wait."""


class Backend(Protocol):
    """A model that writes: Atlas's own, or llama.cpp."""

    id: str
    created: int
    """Seconds since 1970."""
    context: int
    vocab_size: int
    capacity: int
    """Texts that it takes at once: to write, or to wait."""

    def begin(self, send: Send) -> None:
        """Be ready for texts."""
        ...

    def encode(self, text: str) -> list[int]:
        """Ids, at least one."""
        ...

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Ids of a conversation up to where the answer begins; `AtlasError` of a model that learnt none."""
        ...

    def token_bytes(self, token: int) -> bytes: ...

    def submit(self, texts: Sequence[Generation]) -> None:
        """Take all of them or, as `Busy`, none."""
        ...

    @property
    def num_running(self) -> int: ...

    @property
    def num_waiting(self) -> int: ...

    def close(self) -> None:
        """End; what is unfinished stays so."""
        ...


class GenerationRequest:
    """The texts of one request, in the making."""

    def __init__(self, backend: Backend, texts: Sequence[Generation], count: Callable[[int], object]) -> None:
        """`count` is told of tokens as they come. Raises `Busy`."""
        self._count = count
        self.texts = texts
        self.backend = backend
        self.num_written = 0
        """Tokens so far, of all texts."""
        self.seconds_to_first: float | None = None
        self._arrivals: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()
        self._asked_at = time.perf_counter()
        for index, text in enumerate(texts):
            text.index, text.arrivals = index, self._arrivals
        backend.submit(texts)

    @property
    def num_prompt_tokens(self) -> int:
        """Each prompt once, however many texts continue it."""
        return sum(len(prompt) for prompt in {id(text.prompt): text.prompt for text in self.texts}.values())

    async def pieces(self, seconds: float) -> AsyncIterator[tuple[int, Piece]]:
        """(index of the text, what it gets) up to the end of all; when `seconds` are over, a last one says `timeout`.
        What is unfinished then goes on until `cancel`."""
        late = asyncio.get_running_loop().call_later(
            seconds, self._arrivals.put_nowait, (0, Piece(None, "", finish="timeout", num_tokens=0))
        )
        unfinished = len(self.texts)
        try:
            while unfinished:
                index, piece = await self._arrivals.get()
                if self.seconds_to_first is None and piece.num_tokens:
                    self.seconds_to_first = time.perf_counter() - self._asked_at
                self.num_written += piece.num_tokens
                self._count(piece.num_tokens)
                yield index, piece
                if piece.finish in ("error", "timeout"):
                    return
                unfinished -= piece.finish is not None
        finally:
            late.cancel()

    def cancel(self) -> None:
        """Free the places of what is unfinished."""
        for text in self.texts:
            text.cancelled = True
