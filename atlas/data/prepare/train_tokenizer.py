"""Train a tokenizer on the text that the model will be trained on."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, wait
from typing import TypeVar

from atlas.data.prepare.cleaning import Cleaning, digest_of
from atlas.data.prepare.dedup import fractions
from atlas.data.prepare.split import SplitRule
from atlas.data.text.sources import Advance, Sources
from atlas.errors import INTERRUPTED, Interrupted
from atlas.process import abandon
from atlas.progress import byte_progress, notify
from atlas.tokenizer import Tokenizer
from atlas.tokenizer.bpe import train_bpe

SAMPLE_BYTES = 1 << 30
"""From a text of more bytes, Atlas takes a sample of about this size, spread over the complete text. A larger sample
would not change the frequent merges."""
_COMPARED_CHARS, _COMPARED_TOKENS = 1 << 20, 4096
"""Atlas compares splits by vocabularies of at most `_COMPARED_TOKENS` tokens, trained on about `_COMPARED_CHARS`
characters."""
_EXCERPT_CHARS = 2000
_WORTH = 0.05
"""The share of tokens that Qwen3.5's split must save. With less, GPT-2's is better, which older programs know too."""
_LONG = 1 << 24
"""After so many characters, choosing the tokens takes more than about ten seconds."""
Result = TypeVar("Result")


def train_tokenizer_on(
    sources: Sources, rule: SplitRule, cleaning: Cleaning, vocab_size: int
) -> tuple[Tokenizer, list[str]]:
    """Train a BPE on the training split alone, because the tokenizer, like the model, must not see validation text.
    Returns the tokenizer, and notes on the split that was chosen, one line each."""

    def texts(advance: Advance) -> Iterator[str]:
        return _training_texts(sources, rule, cleaning, advance)

    with byte_progress(sources.total_bytes, "comparing splits") as advance:
        share = _COMPARED_CHARS / max(1, sources.total_bytes)
        sample = [*excerpts(texts(advance), share)]
        split, notes = _in_thread(lambda: choose_split(sample, vocab_size))
    with byte_progress(sources.total_bytes, "training the tokenizer") as advance:
        stopped = threading.Event()
        tokenizer = _in_thread(lambda: train_bpe(_until(stopped, texts(advance)), vocab_size, split), stopped)
    return tokenizer, notes


def excerpts(texts: Iterable[str], share: float) -> Iterator[str]:
    """Yield about this share of the characters of all texts, spread over them: the beginnings of long texts, and some
    of the short ones as a whole, since a few characters of each would cut their words."""
    owed = 0.0
    for text in texts:
        owed += share * len(text)
        if text and owed >= min(len(text), _EXCERPT_CHARS):
            excerpt = text[: int(owed)]
            owed -= len(excerpt)
            yield excerpt


def choose_split(sample: Iterable[str], vocab_size: int) -> tuple[str, list[str]]:
    """Return the split that suits a sample of a text, and a note if it is not GPT-2's.

    GPT-2's split cuts a word at each combining mark, so that Hindi, Tamil and Bengali need more than twice as many
    tokens as with Qwen3.5's, and Thai about twice as many.
    """
    sample = [*sample]
    size = min(vocab_size, _COMPARED_TOKENS)
    tokens = {}
    for split in ("gpt-2", "qwen35"):
        tokenizer = train_bpe(sample, size, split)
        tokens[split] = sum(map(len, tokenizer.encode_batch(sample)))
    saved = 1 - tokens["qwen35"] / max(1, tokens["gpt-2"])
    if saved < _WORTH:
        return "gpt-2", []
    num_bytes = sum(len(text.encode(errors="replace")) for text in sample)
    before, after = (num_bytes / max(1, tokens[split]) for split in ("gpt-2", "qwen35"))
    return "qwen35", [
        f"the new vocabulary splits words as Qwen3.5's does: in a sample, {after:.2f} bytes per token, with GPT-2's "
        f"split {before:.2f}; a GGUF file then needs a llama.cpp that knows Qwen3.5"
    ]


def _training_texts(sources: Sources, rule: SplitRule, cleaning: Cleaning, advance: Advance) -> Iterator[str]:
    share = SAMPLE_BYTES / max(1, sources.total_bytes)
    is_wanted = True
    for part in rule.parts(sources.documents(advance=advance)):
        text, _ = cleaning.clean(part.text, starts_document=part.starts_document)
        if part.starts_document:
            digest = digest_of(text.strip().encode())
            held_out = part.split == "val" if part.split else rule.holds_out(digest)[0]
            is_wanted = not held_out and fractions(digest)[0, 1] <= share
        if is_wanted:
            yield text


def _until(stopped: threading.Event, texts: Iterable[str]) -> Iterator[str]:
    """Yield the texts until `stopped` is set. After a long text, say that it is read, since nothing shows the progress
    of what follows."""
    chars = 0
    for text in texts:
        if stopped.is_set():
            raise Interrupted
        yield text
        chars += len(text)
    if chars >= _LONG:
        notify("the text is read; choosing the tokens")


def _in_thread(work: Callable[[], Result], stopped: threading.Event | None = None) -> Result:
    """Do work of compiled code in another thread, because it would not react to signals for minutes.

    If this thread is interrupted, `stopped` is set, and the other thread is abandoned.
    """
    result: Future[Result] = Future()

    def run() -> None:
        try:
            result.set_result(work())
        except BaseException as error:
            result.set_exception(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        while not wait([result], timeout=0.2).done:  # Windows reacts to Ctrl-C only between two waits
            pass
    except KeyboardInterrupt:
        if stopped:
            stopped.set()
        abandon(thread, INTERRUPTED)
        raise
    return result.result()
