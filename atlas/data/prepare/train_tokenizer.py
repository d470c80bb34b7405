"""Train a tokenizer on the text that the model will be trained on."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, wait

from atlas.data.prepare.cleaning import Cleaning, digest_of
from atlas.data.prepare.dedup import fractions
from atlas.data.prepare.split import SplitRule
from atlas.data.text.sources import Advance, Sources
from atlas.errors import INTERRUPTED, Interrupted
from atlas.process import abandon
from atlas.progress import byte_progress
from atlas.tokenizer import Tokenizer

SAMPLE_BYTES = 1 << 30
"""From a text of more bytes, Atlas takes a sample of about this size, spread over the complete text. A larger sample
would not change the frequent merges."""


def train_tokenizer_on(sources: Sources, rule: SplitRule, cleaning: Cleaning, vocab_size: int) -> Tokenizer:
    """Train a BPE on the training split alone, because the tokenizer, like the model, must not see validation text."""
    with byte_progress(sources.total_bytes, "training the tokenizer") as advance:
        return _train(_training_texts(sources, rule, cleaning, advance), vocab_size)


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


def _train(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Run `Tokenizer.train` in another thread, because its compiled code would not react to signals for minutes.

    If this thread is interrupted, the other thread is abandoned and gets no more text.
    """
    result: Future[Tokenizer] = Future()
    stopped = threading.Event()

    def until_stopped() -> Iterator[str]:
        for text in texts:
            if stopped.is_set():
                raise Interrupted
            yield text

    def train() -> None:
        try:
            result.set_result(Tokenizer.train(until_stopped(), vocab_size))
        except BaseException as error:
            result.set_exception(error)

    thread = threading.Thread(target=train, daemon=True)
    thread.start()
    try:
        while not wait([result], timeout=0.2).done:  # Windows reacts to Ctrl-C only between two waits
            pass
    except KeyboardInterrupt:
        stopped.set()
        abandon(thread, INTERRUPTED)
        raise
    return result.result()
