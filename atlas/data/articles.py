"""Articles in the plain text of Simple English Wikipedia (Kaggle: plaintext-wikipedia-simpleenglish).

An article is a title line, an empty line, then paragraphs. What sets articles apart is a run of two or
more empty lines, where the text has such runs, else the form of the title: a short line of its own
without closing punctuation.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from atlas.data.text import PIECE_CHARS, Piece, as_document

TITLE_CHARS = 150
# The real archive, as it is described where it is published.
WIKIPEDIA_CHARS, WIKIPEDIA_ARTICLES = 168_085_788, 249_396

_SAMPLE_CHARS = 4 * PIECE_CHARS
_LONGEST_MEAN_ARTICLE = 50_000
_SHOWN = 3

_BLANKS = " \t\r\n"
_EMPTY_LINES = re.compile(r"\r?\n(?:[ \t]*\r?\n)+")
_CLOSING = tuple(".!?:;,…")


@dataclass(frozen=True)
class Block:
    """Lines without an empty one among them, and the line ends before them."""

    separator: str
    text: str

    @property
    def empty_lines_before(self) -> int:
        return self.separator.count("\n") - 1

    @property
    def is_title(self) -> bool:
        line = self.text.strip()
        return 0 < len(line) <= TITLE_CHARS and "\n" not in line and not line.endswith(_CLOSING)


@dataclass
class ArticleReport:
    """How articles were told apart, for the user to judge."""

    rule: str = ""
    articles: int = 0
    chars: int = 0
    boundaries: list[str] = field(default_factory=list)
    """The first three, as `… last words ⏎⏎⏎ Title`."""

    @property
    def warning(self) -> str | None:
        """Set when this is the real archive by its size, but not by the number of its articles."""
        like_wikipedia = abs(self.chars / WIKIPEDIA_CHARS - 1) < 0.02
        if not like_wikipedia or abs(self.articles / WIKIPEDIA_ARTICLES - 1) < 0.05:
            return None
        return (
            f"an archive of this size has about {WIKIPEDIA_ARTICLES:,} articles, {self.articles:,} were found: "
            "look at the boundaries"
        )


def split_articles(chunks: Iterable[str], report: ArticleReport) -> Iterator[Piece]:
    """The articles of a text, each without the empty lines around it; `report` is filled on the way."""
    chunks = iter(chunks)
    sample, size = [], 0
    for chunk in chunks:
        sample.append(chunk)
        size += len(chunk)
        if size >= _SAMPLE_CHARS:
            break
    report.rule, starts_article = _choose_rule(list(_blocks(["".join(sample)])))
    numbered = _number(_blocks(itertools.chain(sample, chunks)), starts_article, report)
    for _, blocks in itertools.groupby(numbered, key=lambda pair: pair[0]):
        for piece in as_document(_texts(block for _, block in blocks)):
            report.articles += piece.ends_document
            yield piece


def _number(
    blocks: Iterable[Block], starts_article: Callable[[Block, Block], bool], report: ArticleReport
) -> Iterator[tuple[int, Block]]:
    """Each block with the number of its article."""
    article, previous = 0, None
    for block in blocks:
        report.chars += len(block.separator) + len(block.text)
        if previous is not None and starts_article(previous, block):
            article += 1
            _show(report, previous, block)
        yield article, block
        previous = block


def _texts(blocks: Iterable[Block]) -> Iterator[str]:
    for place, block in enumerate(blocks):
        yield block.separator + block.text if place else block.text


def _choose_rule(sample: list[Block]) -> tuple[str, Callable[[Block, Block], bool]]:
    """Empty lines, if in the sample their runs come often and a title follows most of them."""
    after_run = [block for block in sample if block.empty_lines_before >= 2]
    chars = sum(len(block.text) for block in sample)
    titles = sum(block.is_title for block in after_run)
    if after_run and chars / (len(after_run) + 1) <= _LONGEST_MEAN_ARTICLE and titles >= 0.8 * len(after_run):
        return "two or more empty lines before a title", lambda _, block: block.empty_lines_before >= 2
    return (
        "the title's form: a short line of its own without closing punctuation",
        # A heading right below a title belongs to it.
        lambda previous, block: block.is_title and not previous.is_title,
    )


def _show(report: ArticleReport, previous: Block, block: Block) -> None:
    if len(report.boundaries) < _SHOWN:
        before = previous.text[-40:].replace("\n", " ").strip()
        breaks = "⏎" * block.separator.count("\n")
        report.boundaries.append(f"…{before} {breaks} {block.text.strip()[:TITLE_CHARS]}")


def _blocks(chunks: Iterable[str]) -> Iterator[Block]:
    """The blocks of a text in order; a text without an empty line comes in parts, not as a whole."""
    rest, separator = "", ""
    for chunk in chunks:
        rest += chunk if rest or separator else chunk.lstrip("\r\n")
        complete = len(rest.rstrip(_BLANKS))  # blanks at the end may go on in the next chunk
        start = 0
        for match in _EMPTY_LINES.finditer(rest, 0, complete):
            yield Block(separator, rest[start : match.start()])
            separator, start = match.group(), match.end()
        rest = rest[start:]
        # Of blanks too no more than that is held: such a run parts no articles.
        if max(complete - start, len(rest) - 2 * PIECE_CHARS) > 2 * PIECE_CHARS:
            yield Block(separator, rest[:PIECE_CHARS])
            rest, separator = rest[PIECE_CHARS:], ""
    if text := rest.rstrip(_BLANKS):
        yield Block(separator, text)
