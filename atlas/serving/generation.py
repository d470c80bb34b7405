"""What a client requests, one or more generations, and the pieces in which they arrive."""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Iterable, Sequence, Sized
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

from atlas.inference.sampling import Sampling
from atlas.serving.errors import ApiError
from atlas.tokenizer.chat import Message


class Candidate(NamedTuple):
    """A token and its log-probability (natural logarithm) under the model, before any sampling setting."""

    token: int
    logprob: float


class Piece(NamedTuple):
    """The output of one step.

    `text` may be empty, while a character or a possible stop string is incomplete. `candidates`, if requested, are the
    chosen token and then the likeliest ones; none for the end of text, which is not part of the text. `finish` is set
    in the last piece: `stop`, `length`, `error` or `timeout`.
    """

    text: str
    candidates: Sequence[Candidate] = ()
    finish: str | None = None
    num_tokens: int = 1
    """More than one if the backend did not report the tokens before this one."""


@dataclass(eq=False)
class Generation:
    """One text to generate. Setting `cancelled` ends it."""

    prompt: list[int]
    sampling: Sampling
    max_tokens: int
    seed: int
    """Different for each generation of a request."""
    stop: tuple[str, ...] = ()
    num_candidates: int | None = None
    """Alternatives to report for each token; None: no log-probabilities, which saves their computation."""
    index: int = 0
    """Its place in its request."""
    queue: asyncio.Queue[tuple[int, Piece]] | None = None
    """Receives its pieces, each with `index`."""
    cancelled: bool = False


def _deliver(pieces: Iterable[tuple[Generation, Piece]]) -> None:
    """Put the pieces of a step into the queues of their requests; runs in the event loop."""
    for generation, piece in pieces:
        if generation.queue is not None and not generation.cancelled:
            generation.queue.put_nowait((generation.index, piece))


def failure(finish: str) -> Piece:
    """The last piece of a generation that ends with `error` or `timeout`."""
    return Piece("", finish=finish, num_tokens=0)


class Busy(ApiError):
    """The queue is full."""

    def __init__(self) -> None:
        message = "too many texts wait: try again in a moment, or ask for fewer"
        super().__init__(429, message, code="queue_full")


class Backend(ABC):
    """A model that generates text: Atlas's own, or llama.cpp."""

    _running: Sized
    _waiting: Sized

    def __init__(self, id: str, *, context: int, vocab_size: int, parallel: int, queue: int) -> None:
        """`parallel` sequences are generated in parallel, and at most `queue` wait."""
        self.id = id
        self.created = int(time.time())
        self.context = context
        self.vocab_size = vocab_size
        self.parallel = parallel
        self.capacity = parallel + queue

    @property
    def num_running(self) -> int:
        """Sequences that are being generated."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Sequences in the queue."""
        return len(self._waiting)

    def start(self) -> None:
        """Get ready for generations, whose pieces go to the running event loop."""
        self._loop = asyncio.get_running_loop()

    def _send(self, pieces: list[tuple[Generation, Piece]]) -> None:
        """Send the pieces of a step, from any thread, to the requests that wait for them."""
        with suppress(RuntimeError):  # the loop has ended, and no client waits any more
            self._loop.call_soon_threadsafe(_deliver, pieces)

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Ids of a text, at least one: an empty text begins a document."""

    @abstractmethod
    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Ids of a conversation up to where the answer begins. Raises `AtlasError` if it is not a chat model."""

    @abstractmethod
    def token_bytes(self, token: int) -> bytes:
        """The bytes of a token."""

    @abstractmethod
    def submit(self, generations: Sequence[Generation]) -> None:
        """Accept all of them or raise `Busy`."""

    @abstractmethod
    def close(self) -> None:
        """Stop; unfinished generations stay unfinished."""


@dataclass(eq=False)
class GenerationRequest:
    """The generations of one request and their progress. Raises `Busy`."""

    backend: Backend
    generations: Sequence[Generation]
    seconds: float
    """The time limit of `pieces`."""
    count: Callable[[int], object]
    """Receives the numbers of new tokens."""
    num_generated: int = 0
    """Tokens so far, of all generations."""
    seconds_to_first: float | None = None

    def __post_init__(self) -> None:
        self._queue: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()
        self._accepted_at = time.perf_counter()
        for index, generation in enumerate(self.generations):
            generation.index, generation.queue = index, self._queue
        self.backend.submit(self.generations)

    @property
    def num_prompt_tokens(self) -> int:
        """Each prompt counts once, however many generations continue it."""
        return sum(map(len, {id(each.prompt): each.prompt for each in self.generations}.values()))

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """(index of the generation, piece) until all have ended. Raises `ApiError` when one fails, and when time is up;
        unfinished generations then continue until they are `cancelled`."""
        timeout = (0, failure("timeout"))
        timer = asyncio.get_running_loop().call_later(self.seconds, self._queue.put_nowait, timeout)
        unfinished = len(self.generations)
        try:
            while unfinished:
                index, piece = await self._queue.get()
                if self.seconds_to_first is None and piece.num_tokens:
                    self.seconds_to_first = time.perf_counter() - self._accepted_at
                self.num_generated += piece.num_tokens
                self.count(piece.num_tokens)
                if piece.finish == "error":
                    raise ApiError(500, "the model failed here: the server's log has the reason")
                if piece.finish == "timeout":
                    late = f"not finished within {self.seconds:g} s: request fewer tokens, or raise --timeout"
                    raise ApiError(504, late)
                yield index, piece
                unfinished -= piece.finish is not None
        finally:
            timer.cancel()
