"""A vocabulary of one's own, learnt from the text that will be trained on."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future

from atlas.data.prepare.cleaning import Cleaning, digest_of
from atlas.data.prepare.dedup import fractions
from atlas.data.prepare.split import SplitRule
from atlas.data.text.sources import Advance, Sources
from atlas.progress import byte_progress
from atlas.tokenizer import Tokenizer

SAMPLE_BYTES = 1 << 30
"""Of a larger text so much is learnt from, spread over all of it: word counts of more change no merge worth having."""


def learn_tokenizer(sources: Sources, rule: SplitRule, cleaning: Cleaning, vocab_size: int) -> Tokenizer:
    """A BPE learnt from the training part alone: validation text must be as new to it as to the model."""
    with byte_progress(sources.total_bytes, "learning the vocabulary") as advance:
        return _learn(_training_texts(sources, rule, cleaning, advance), vocab_size)


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


def _learn(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """`Tokenizer.train` in a thread beside this one: it is compiled code that would hear no signal for as
    long as it takes, minutes for a large text. An interrupt here leaves it without more text to read."""
    result: Future[Tokenizer] = Future()
    given_up = threading.Event()

    def learn() -> None:
        try:
            unless_given_up = itertools.takewhile(lambda _: not given_up.is_set(), texts)
            result.set_result(Tokenizer.train(unless_given_up, vocab_size))
        except BaseException as error:
            result.set_exception(error)

    thread = threading.Thread(target=learn, daemon=True)
    thread.start()
    try:
        while thread.is_alive():
            thread.join(0.2)  # Windows hears Ctrl-C only between two waits
    finally:
        given_up.set()
    return result.result()
