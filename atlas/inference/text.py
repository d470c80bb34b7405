"""Decode tokens to text during generation: only complete characters, and no part of a stop string."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from atlas.config import TrackingConfig
from atlas.errors import AtlasError
from atlas.inference.generate import generate
from atlas.inference.sampling import Sampling, row_generators
from atlas.model import AtlasLM
from atlas.tokenizer import Tokenizer
from atlas.tokenizer.chat import Message, encode_chat

Prompt = str | Sequence[Message]
"""Text to continue, or a conversation to answer."""


@dataclass(frozen=True, repr=False)
class ModelAndTokenizer:
    """A model in evaluation mode, on its device, and the tokenizer that the model was trained with."""

    model: AtlasLM
    tokenizer: Tokenizer


class TextStream:
    """Incremental detokenization of one generation. `add` returns the text that may be shown now, and `finish` returns
    the rest.

    A character whose bytes are spread over several tokens is held back until it is complete. Text that may be the
    beginning of a stop string is also held back. The stop string itself is never shown.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self.tokenizer = tokenizer
        self.stop = [text for text in stop if text]
        self.stopped = False
        self._pending_ids: list[int] = []
        self._shown_of_pending = 0
        self._held = ""

    def add(self, token: int) -> str:
        """Return the text that `token` completes; empty after a stop string."""
        if self.stopped:
            return ""
        self._pending_ids.append(token)
        text = self.tokenizer.decode(self._pending_ids)
        # An incomplete character decodes to one U+FFFD at the end, which later bytes may change.
        complete = text.removesuffix("\ufffd")
        new, self._shown_of_pending = complete[self._shown_of_pending :], len(complete)
        if complete == text:
            self._pending_ids.clear()
            self._shown_of_pending = 0
        return self._release(new)

    def finish(self) -> str:
        """Return the text that is still held back after the last token."""
        if self.stopped:
            return ""
        text = self._release(self.tokenizer.decode(self._pending_ids)[self._shown_of_pending :])
        return text if self.stopped else text + self._held

    def _release(self, text: str) -> str:
        """Return the held text and `text`, up to the position where a stop string may begin. Hold back the rest."""
        self._held += text
        # The stop string that ends first in the text counts, so the result does not depend on the split into tokens.
        found = [(start + len(stop), start) for stop in self.stop if (start := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            return self._held[: min(found)[1]]
        keep = max((_overlap(self._held, stop) for stop in self.stop), default=0)
        shown = self._held[: len(self._held) - keep]
        self._held = self._held[len(shown) :]
        return shown


def _overlap(text: str, stop: str) -> int:
    """The length of the longest suffix of `text` that is a proper prefix of `stop`."""
    lengths = range(min(len(text), len(stop) - 1), 0, -1)
    return next((length for length in lengths if text.endswith(stop[:length])), 0)


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
    """Continue every prompt. Yield, at each step, the new text of each row. An empty prompt begins a document.

    A row's random numbers follow from `seed` and the row's number. `first_row` is the number of the first row, for a
    caller that spreads its prompts over several calls. `count` is called at each step with the number of new tokens.
    """
    tokenizer = loaded.tokenizer
    ids = [
        encode_prompt(prompt, tokenizer) if isinstance(prompt, str) else encode_chat(prompt, tokenizer)
        for prompt in prompts
    ]
    generators = row_generators(seed, len(ids), first_row=first_row)
    yield from stream_ids(loaded, ids, sampling, generators, max_tokens=max_tokens, stop=stop, count=count)


def stream_ids(
    loaded: ModelAndTokenizer,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    generators: list[torch.Generator],
    *,
    max_tokens: int,
    stop: Sequence[str] = (),
    count: Callable[[int], None] = lambda tokens: None,
) -> Iterator[list[str]]:
    """Like `stream_text`, but each prompt is a list of at least one id, and each row has its own generator."""
    if max_tokens < 1:
        raise AtlasError(f"--max-tokens {max_tokens}: must be at least 1")
    model, stop_ids = loaded.model, loaded.tokenizer.stop_ids
    streams = [TextStream(loaded.tokenizer, stop) for _ in prompts]
    steps = generate(model, prompts, sampling, max_tokens=max_tokens, eos_id=stop_ids, generators=generators)
    for step in steps:
        count(sum(token is not None for token in step))
        rows = list(zip(streams, step, strict=True))
        yield ["" if token is None else stream.add(token) for stream, token in rows]
        if all(token is None or stream.stopped for stream, token in rows):
            break
    yield [stream.finish() for stream in streams]


def sample_texts(
    model: AtlasLM,
    tokenizer: Tokenizer,
    tracking: TrackingConfig,
    seed: int,
    should_stop: Callable[[], bool] = lambda: False,
) -> list[str]:
    """Generate `tracking.samples` continuations of `tracking.sample_prompt`, which a run shows while it trains. Return
    an empty list if `should_stop` returned true between two tokens.

    The model must be in evaluation mode. The same model and `seed` give the same texts. The global random number
    generators are not used.
    """
    texts = [""] * tracking.samples
    prompts, loaded = [tracking.sample_prompt] * len(texts), ModelAndTokenizer(model, tokenizer)
    for pieces in stream_text(loaded, prompts, Sampling(), max_tokens=tracking.sample_tokens, seed=seed):
        if should_stop():
            return []
        texts = [text + piece for text, piece in zip(texts, pieces, strict=True)]
    return texts


def encode_prompt(text: str, tokenizer: Tokenizer) -> list[int]:
    """The token ids of a text, after the token that the model expects at the beginning, if any. An empty text gives the
    one id that begins a document."""
    return [*tokenizer.begin_ids, *tokenizer.encode(text)] or [tokenizer.eos_id]
