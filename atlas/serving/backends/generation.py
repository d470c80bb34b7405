"""The request of a client, the request's generations, and the pieces of text that generations return."""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence, Sized
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

from atlas.inference.sampling import Sampling
from atlas.serving.api.errors import ApiError
from atlas.serving.backends.grammar import TOO_COMPLEX, Grammar
from atlas.tokenizer.chat import Message

_SHORT_TEXT = 64 << 10
"""Texts up to this number of bytes are always tokenized, so that an error has the exact number of tokens."""


class Candidate(NamedTuple):
    """A token and its log-probability (natural logarithm) under the model, before any sampling setting."""

    token: int
    logprob: float


class Piece(NamedTuple):
    """The output of one step of a generation.

    `text` is empty while a character or a possible stop string is incomplete. If the client requested
    log-probabilities, `candidates` are the chosen token and then the likeliest tokens. The end-of-text token is not
    part of the text and has no candidates, except if the prompt is scored. `finish` is set in the last piece: `stop`,
    `length`, `error`, `timeout` or `too complex`.
    """

    text: str
    candidates: Sequence[Candidate] = ()
    finish: str | None = None
    num_tokens: int = 1
    """The number of new tokens. If the backend does not report some tokens, the next piece counts these tokens too."""
    prompt: Sequence[Sequence[Candidate]] = ()
    """In the first piece, if the prompt is scored: the candidates of each token of the prompt except the first."""


@dataclass(eq=False)
class Generation:
    """One text to generate. Setting `cancelled` ends the generation."""

    prompt: list[int]
    sampling: Sampling
    max_tokens: int
    seed: int
    """The random seed, which differs between the generations of a request."""
    stop: tuple[str, ...] = ()
    num_candidates: int | None = None
    """The number of alternatives to return for each token; None: compute no log-probabilities."""
    min_tokens: int = 0
    """The number of tokens before which no end-of-text token is chosen."""
    ignore_eos: bool = False
    """Whether an end-of-text token is never chosen."""
    scores_prompt: bool = False
    """Whether the first piece has the log-probabilities of the prompt's tokens."""
    constraint: Any = None
    """The grammar that the text follows, as `Backend.constrain` returned it; None: any text."""
    uses_known: bool = True
    """Whether the backend may use what it knows of earlier texts, and may keep this text for later ones."""
    num_reused: int = 0
    """The number of the prompt's tokens that were known from earlier texts. The backend sets it before the last
    piece."""
    index: int = 0
    """The position of this generation in its request."""
    queue: asyncio.Queue[tuple[int, Piece]] | None = None
    """The queue that receives (`index`, piece) for every piece of this generation."""
    cancelled: bool = False


def _deliver(pieces: Iterable[tuple[Generation, Piece]]) -> None:
    """Put the pieces of a step into the queues of their requests. Must run in the event loop."""
    for generation, piece in pieces:
        if generation.queue is not None and not generation.cancelled:
            generation.queue.put_nowait((generation.index, piece))


def failure(finish: str) -> Piece:
    """Return the last piece of a generation that ends with `error`, `timeout` or `too complex`."""
    return Piece("", finish=finish, num_tokens=0)


class TooLong(ApiError):
    """The error of a prompt with more tokens than the context."""

    def __init__(self, context: int, num_tokens: object, param: str = "prompt") -> None:
        sizes = f"maximum context length is {context} tokens, the {param} has {num_tokens}"
        super().__init__(400, f"This model's {sizes}", param=param, code="context_length_exceeded")


class Busy(ApiError):
    """The error of a full queue."""

    def __init__(self) -> None:
        message = "too many generations are queued: try again in a moment, or request fewer"
        super().__init__(429, message, code="queue_full")


class Backend(ABC):
    """A model that generates text, with Atlas's engine or with llama.cpp."""

    longest_token: int | None
    """The number of bytes of the longest token; None if a token may stand for a text of any length."""
    _running: Sized
    _waiting: Sized

    def __init__(self, id: str, *, context: int, vocab_size: int, parallel: int, queue: int) -> None:
        """Allow `parallel` sequences in generation and `queue` more sequences in the queue."""
        self.id = id
        self.created = int(time.time())
        self.context = context
        self.vocab_size = vocab_size
        self.parallel = parallel
        self.capacity = parallel + queue

    @property
    def num_running(self) -> int:
        """The number of sequences in generation."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """The number of sequences in the queue."""
        return len(self._waiting)

    def start(self) -> None:
        """Prepare the backend for generations, and send their pieces to the running event loop."""
        self._loop = asyncio.get_running_loop()

    def _send(self, pieces: list[tuple[Generation, Piece]]) -> None:
        """Send the pieces of a step to their requests. May run in any thread."""
        with suppress(RuntimeError):  # the event loop has ended, so no client waits for the pieces
            self._loop.call_soon_threadsafe(_deliver, pieces)

    def check_length(self, *texts: str) -> None:
        """Raise `TooLong` if the number of bytes shows that the texts have more tokens than the context. A tokenizer
        may need 150 bytes of memory for each byte of a text."""
        size = sum(len(text.encode("utf-8", "replace")) for text in texts)
        if size > _SHORT_TEXT and self.longest_token and size > self.context * self.longest_token:
            raise TooLong(self.context, f"at least {size // self.longest_token:,}")

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text. For an empty text, return the id that begins a document."""

    @abstractmethod
    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        """Return the token ids of a text, with the token that begins a text if `add_special` is true. If
        `parse_special` is true, special tokens in the text are read as such."""

    @property
    @abstractmethod
    def named_tokens(self) -> Mapping[str, str]:
        """`bos`, `eos` and so on → the special token with this meaning."""

    @abstractmethod
    def encode_chat(
        self,
        messages: Sequence[Message],
        *,
        continues_last: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Return the token ids of a conversation, up to the start of the answer. If `continues_last` is true, the last
        message is the start of the answer. `variables` are variables for the chat template. Raises `AtlasError` if the
        model has no chat template, or if the template refuses the conversation."""

    @property
    @abstractmethod
    def chat_template(self) -> str | None:
        """The model's chat template in Jinja; None if it has none."""

    @abstractmethod
    def constrain(self, grammar: Grammar) -> Any:
        """Return the value of `Generation.constraint` for a grammar. Raises `ApiError` if its schema is not valid or
        not supported."""

    @abstractmethod
    def token_bytes(self, token: int) -> bytes:
        """Return the bytes of a token."""

    @abstractmethod
    def submit(self, generations: Sequence[Generation]) -> None:
        """Put all generations into the queue. If the queue is too full, add no generation and raise `Busy`."""

    @abstractmethod
    def close(self) -> None:
        """Stop the backend. Running generations stop without a last piece."""


@dataclass(eq=False)
class GenerationRequest:
    """The generations of one request and their progress. The constructor submits the generations. It raises `Busy` if
    the queue is full."""

    backend: Backend
    generations: Sequence[Generation]
    seconds: float
    """The time limit of `pieces` in seconds."""
    count: Callable[[int], object]
    """A function that is called with the number of new tokens of each piece."""
    num_generated: int = 0
    """The number of tokens that all generations have generated so far."""
    seconds_to_first: float | None = None

    def __post_init__(self) -> None:
        self._queue: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()
        self._accepted_at = time.perf_counter()
        for index, generation in enumerate(self.generations):
            generation.index, generation.queue = index, self._queue
        self.backend.submit(self.generations)

    @property
    def num_prompt_tokens(self) -> int:
        """The number of tokens in all prompts. A prompt with several generations counts once."""
        return sum(map(len, {id(each.prompt): each.prompt for each in self.generations}.values()))

    @property
    def num_reused(self) -> int:
        """The number of tokens in all prompts that were known from earlier texts."""
        fewest: dict[int, int] = {}  # of a prompt's generations, the later ones may know the first one
        for each in self.generations:
            fewest[id(each.prompt)] = min(each.num_reused, fewest.get(id(each.prompt), each.num_reused))
        return sum(fewest.values())

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """Yield (index of the generation, piece) until all generations have ended. Raises `ApiError` if a generation
        fails or the time limit is over. Unfinished generations then continue until they are `cancelled`."""
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
                    raise ApiError(500, "the model failed: the server's log has the reason")
                if piece.finish == "too complex":
                    raise ApiError(400, TOO_COMPLEX)
                if piece.finish == "timeout":
                    late = f"not finished within {self.seconds:g} s: request fewer tokens, or raise --timeout"
                    raise ApiError(504, late)
                yield index, piece
                unfinished -= piece.finish is not None
        finally:
            timer.cancel()
