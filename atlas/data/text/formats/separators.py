"""One text → its documents, by what separates them."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from atlas.data.text.formats.decode import PIECE_CHARS, Piece, as_document
from atlas.errors import DataError

END_OF_TEXT = "<|endoftext|>"
LINE = "line"
_BY_PATTERN = "re:"
_SAMPLE_CHARS = 1 << 18
_CONTEXT = 1000
"""The longest separator that a pattern may match, in characters."""
_SHOWN, _SHOWN_CHARS = 3, 40
_FEWEST_MARKS, _FEWEST_LINES = 3, 50
_LONGEST_GAP = 50_000
_PERCENT = re.compile(r"^%[ \t]*\r?$", re.MULTILINE)
_COMMENT = re.compile(r"^%[ \t]*[^%\s]", re.MULTILINE)
_EMPTY_LINES = re.compile(r"\n[ \t\r]*\n[ \t\r]*\n")
_ESCAPES = {r"\n": "\n", r"\t": "\t", r"\r": "\r", r"\f": "\f", r"\0": "\0"}


@dataclass(frozen=True)
class Separator:
    """What separates the documents of a text."""

    name: str
    """The separator in messages."""
    pattern: re.Pattern[str]


@dataclass
class Boundaries:
    """How a text was separated, for the user to check."""

    documents: int = 0
    gaps: int = 0
    shown: list[str] = field(default_factory=list)


@functools.lru_cache(maxsize=8)
def parse(separator: str) -> Separator:
    """Return the separator that a user wrote: `line`, `re:` and a regular expression, or the text between two
    documents, in which `\\\\n` and `\\\\t` stand for a newline and a tab."""
    if separator == LINE:
        return Separator(LINE, re.compile("\n"))
    if separator.startswith(_BY_PATTERN):
        written = separator.removeprefix(_BY_PATTERN)
        try:
            pattern = re.compile(written, re.MULTILINE)
        except (re.error, RecursionError, OverflowError) as error:
            raise DataError(f"--separator {separator}: is not a regular expression: {error}") from None
        if pattern.match(""):
            raise DataError(
                f"--separator {separator}: matches nothing between two letters; write what is between two documents"
            )
        return Separator(separator, pattern)
    text = re.sub(r"\\[ntrf0]", lambda found: _ESCAPES[found[0]], separator)
    if not text:
        raise DataError(f'--separator "{separator}": is empty; write what is between two documents, or line')
    return Separator(separator, re.compile(re.escape(text)))


def find(sample: str) -> Separator | None:
    """Return the separator that the beginning of a text plainly shows, or None.

    It is GPT-2's end-of-text mark if this is on a line of its own or repeated, or lines that are `%`, as in the files
    of `fortune`.
    """
    if sample.count(END_OF_TEXT) > 1 or re.search(rf"(?m)^{re.escape(END_OF_TEXT)}\s*$", sample):
        return Separator(END_OF_TEXT, re.compile(re.escape(END_OF_TEXT)))
    marks = len(_PERCENT.findall(sample))
    comments = len(_COMMENT.findall(sample))  # as in TeX
    if marks >= _FEWEST_MARKS and comments < marks / 2 and len(sample) / marks < _LONGEST_GAP:
        return Separator("lines that are %", _PERCENT)
    return None


def hint_at(sample: str) -> str | None:
    """Return what may separate the documents in a text that has no plain separator, or None."""
    lines = sample.split("\n")[:-1]
    texts = [line for line in lines if line.strip()]
    if len(texts) >= _FEWEST_LINES and len(texts) == len(lines):
        closed = sum(
            line.rstrip().endswith((".", "!", "?", "…", '"', "”", "»", "。", "！", "？")) for line in texts
        )
        if closed > 0.9 * len(texts):
            return "every line looks like a document: --separator line makes each line one"
    groups = len(_EMPTY_LINES.findall(sample))
    if groups >= _FEWEST_MARKS and len(sample) / groups < _LONGEST_GAP:
        return r"two empty lines may separate documents: --separator '\n\n\n' separates there"
    return None


def take_sample(chunks: Iterator[str]) -> list[str]:
    """Return the first chunks of a text. `chunks` then yields the later chunks."""
    sample, size = [], 0
    while size < _SAMPLE_CHARS and (chunk := next(chunks, None)) is not None:
        sample.append(chunk)
        size += len(chunk)
    return sample


def split_documents(chunks: Iterable[str], separator: Separator, found: Boundaries) -> Iterator[Piece]:
    """Yield the documents between the separators, without blanks and line ends around them, and fill `found`."""
    rest, is_open = "", False  # the text that was not yielded; whether its document has yielded pieces

    def document(text: str) -> Iterator[Piece]:
        text = text.rstrip() if is_open else text.strip()
        pieces = [*as_document([text], is_open=is_open)]
        found.documents += bool(pieces)
        yield from pieces

    for chunk in chunks:
        rest += chunk
        start = 0
        for gap in separator.pattern.finditer(rest):
            if gap.end() > len(rest) - _CONTEXT:
                break  # more text can change the match
            _show(found, rest, gap)
            yield from document(rest[start : gap.start()])
            is_open, start = False, gap.end()
        rest = rest[start:]
        if len(rest) > PIECE_CHARS + 2 * _CONTEXT:
            *pieces, last = as_document([rest[: -2 * _CONTEXT]], is_open=True)
            yield from pieces
            is_open, rest = is_open or bool(pieces), last.text + rest[-2 * _CONTEXT :]
    start = 0
    for gap in separator.pattern.finditer(rest):
        _show(found, rest, gap)
        yield from document(rest[start : gap.start()])
        is_open, start = False, gap.end()
    yield from document(rest[start:])


def _show(found: Boundaries, text: str, gap: re.Match[str]) -> None:
    found.gaps += 1
    before = (
        text[max(0, gap.start() - 500) : gap.start()].rstrip().rpartition("\n")[2][-_SHOWN_CHARS:].strip()
    )
    after = text[gap.end() : gap.end() + 500].lstrip().partition("\n")[0][:_SHOWN_CHARS].strip()
    if len(found.shown) < _SHOWN and before and after:
        found.shown.append(f"…{before} | {after}…")
