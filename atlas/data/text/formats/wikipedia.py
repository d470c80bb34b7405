"""Articles in the plain text of Simple English Wikipedia (Kaggle: plaintext-wikipedia-simpleenglish).

An article has a title line, an empty line, then paragraphs. If most groups of two or more empty lines precede a title,
these groups separate the articles. Otherwise an article begins at a line that has the form of a title: short, on its
own, and without closing punctuation. Headings and list entries have this form, too. Atlas distinguishes them from
titles by their context and by repetition, and reports doubtful cases.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from atlas.data.text.formats.decode import PIECE_CHARS, Piece, as_document

TITLE_CHARS = 150
# The size of the Kaggle archive, as its publisher states it.
WIKIPEDIA_CHARS, WIKIPEDIA_ARTICLES = 168_085_788, 249_396

_SAMPLE_CHARS = 4 * PIECE_CHARS
_LONGEST_MEAN_ARTICLE = 50_000
_HEADING_TIMES = 3
"""A short line that occurs `_HEADING_TIMES` times or more in the sample is a heading inside articles, such as
"History"."""
_DOUBTFUL_SHARE = 0.02
_UNNAMED_SHARE, _NAMED_WITHIN = 0.3, 300
_SHOWN = 3

_BLANKS = " \t\r\n"
_CLOSING = tuple(".!?:;,…")
# `_EMPTY_LINES` and `_BEFORE_SHORT_LINE` begin with a newline. A newline is rare in text, so the search is fast.
_EMPTY_LINES = re.compile(r"\n(?:[ \t\r]*\n){2,}")
_BEFORE_SHORT_LINE = re.compile(r"\n(?:[ \t\r]*\n)+(?=([^\n]{1,200})(?:\n[ \t\r]{0,50}\n|[\n \t\r]{0,50}\Z))")
_SHORT_LINE = re.compile(r"([^\n]{1,200})(?:\n[ \t\r]{0,50}\n|[\n \t\r]{0,50}\Z)")
_CONTEXT = 1000
"""`_CONTEXT` characters before and after a position are enough to decide whether an article begins there."""


@dataclass
class ArticleReport:
    """A report on how Atlas separated the articles, for the user to check."""

    rule: str = ""
    articles: int = 0
    chars: int = 0
    boundaries: list[str] = field(default_factory=list)
    """The first three boundaries, as `… last words ⏎⏎⏎ Title`."""
    doubt: str | None = None
    """Signs in the beginning of the text that the rule may be wrong, or None."""

    @property
    def warning(self) -> str | None:
        """A warning if a text of the size of the Kaggle archive has a different number of articles, else None."""
        like_wikipedia = abs(self.chars / WIKIPEDIA_CHARS - 1) < 0.02
        if not like_wikipedia or abs(self.articles / WIKIPEDIA_ARTICLES - 1) < 0.05:
            return None
        return (
            f"an archive of this size has about {WIKIPEDIA_ARTICLES:,} articles, but {self.articles:,} were found: "
            "look at the boundaries"
        )

    def merge(self, other: ArticleReport) -> None:
        """Add `other`, the report on the text that follows."""
        self.rule, self.doubt = self.rule or other.rule, self.doubt or other.doubt
        self.articles += other.articles
        self.chars += other.chars
        self.boundaries = [*self.boundaries, *other.boundaries][:_SHOWN]


@dataclass(frozen=True)
class _Rule:
    """The rule that decides where an article begins. If `by_title`, an article begins at a short line of its own,
    otherwise after a group of empty lines."""

    by_title: bool
    headings: frozenset[str] = frozenset()
    """Short lines that are not titles, because they occur repeatedly."""

    @property
    def name(self) -> str:
        """The rule in words."""
        if self.by_title:
            return "the title's form: a short line of its own without closing punctuation"
        return "two or more empty lines before a title"

    def gaps(self, text: str, *, at_beginning: bool) -> Iterator[re.Match[str]]:
        """Yield the gaps between the articles of `text`. If not `at_beginning`, `text` begins in the middle of an
        article."""
        if not self.by_title:
            yield from _EMPTY_LINES.finditer(text)
            return
        # A short line right below another short line is not a title, but a heading below a title or an entry of a list.
        # A short line below a known heading may be a title, because the last section of an article is often empty.
        first = _SHORT_LINE.match(text) if at_beginning else None
        end_of_short_line = first.end(1) if first and _is_title(first[1]) else -1
        for gap in _BEFORE_SHORT_LINE.finditer(text):
            if not _is_title(gap[1]) or gap[1].strip() in self.headings:
                continue
            below_another = gap.start() == end_of_short_line
            end_of_short_line = gap.end(1)
            begins_list = text.endswith((":", ":\r"), 0, gap.start())
            if not (below_another or begins_list):
                yield gap


def has_titles(chunks: Iterable[str]) -> bool:
    """Return whether the beginning of a text has a title. Without a title, the text has no articles to separate."""
    sample = "".join(_take_sample(iter(chunks))).lstrip("\r\n")
    rule, _ = _choose_rule(sample)
    return not rule.by_title or bool(_titles(sample, rule))


def _take_sample(chunks: Iterator[str]) -> list[str]:
    """Return the first chunks, as a sample. `chunks` then yields the later chunks."""
    sample, size = [], 0
    for chunk in chunks:
        sample.append(chunk)
        size += len(chunk)
        if size >= _SAMPLE_CHARS:
            break
    return sample


def split_articles(chunks: Iterable[str], report: ArticleReport) -> Iterator[Piece]:
    """Yield the articles of a text, without the empty lines between articles, and fill `report`."""
    chunks = iter(chunks)
    sample = _take_sample(chunks)
    rule, doubts = _choose_rule("".join(sample).lstrip("\r\n"))
    report.rule, report.doubt = rule.name, "; ".join(doubts) or None
    is_open, rest = False, ""  # whether the current article has yielded pieces; the text after these pieces
    searched = 0  # length of the beginning of `rest` in which all gaps are known
    all_chunks = ((chunk, False) for chunk in itertools.chain(sample, chunks))
    for chunk, at_end in itertools.chain(all_chunks, [("", True)]):
        report.chars += len(chunk)
        rest += chunk if rest or is_open else chunk.lstrip("\r\n")
        if not at_end and len(rest) < PIECE_CHARS:
            continue
        known, searched = searched, len(rest) if at_end else len(rest) - _CONTEXT
        start = 0
        for gap in rule.gaps(rest, at_beginning=not is_open):
            if gap.end() > searched:
                break
            if gap.end() <= known:  # an earlier search decided this, with the text before the gap in `rest`
                continue
            _show(report, rest, gap)
            yield from _article(rest[start : gap.start()], report, is_open=is_open)
            is_open, start = False, gap.end()
        rest, searched = rest[start:], searched - start
        if at_end:
            yield from _article(rest, report, is_open=is_open)
        elif searched - _CONTEXT > 2 * PIECE_CHARS:
            settled = searched - _CONTEXT
            *pieces, last = as_document([rest[:settled]], is_open=True)
            yield from pieces
            searched -= settled - len(last.text)
            is_open, rest = is_open or bool(pieces), last.text + rest[settled:]


def _article(text: str, report: ArticleReport, *, is_open: bool) -> Iterator[Piece]:
    text = text.rstrip(_BLANKS)
    if text or is_open:
        report.articles += 1
        yield from as_document([text], is_open=True)


def _choose_rule(sample: str) -> tuple[_Rule, list[str]]:
    """Choose the rule that separates the articles. Returns the rule and the doubts about the rule. Groups of empty
    lines separate articles if the sample has many such groups, and a title follows most of these groups."""
    lines = (_SHORT_LINE.match(sample, gap.end()) for gap in _EMPTY_LINES.finditer(sample))
    runs = [line[1] if line else "" for line in lines]
    titles = sum(map(_is_title, runs))
    if runs and len(sample) / (len(runs) + 1) <= _LONGEST_MEAN_ARTICLE and titles >= 0.8 * len(runs):
        return _Rule(by_title=False), [*_doubts_about_runs(runs)]
    times = Counter(gap[1].strip() for gap in _BEFORE_SHORT_LINE.finditer(sample) if _is_title(gap[1]))
    headings = Counter({line: count for line, count in times.items() if count >= _HEADING_TIMES})
    rule = _Rule(by_title=True, headings=frozenset(headings))
    doubts = [f"{titles:,} of {len(runs):,} groups of empty lines precede a title"] if titles else []
    if headings:
        doubts.append(
            f"short lines that occur repeatedly were taken for headings inside articles: {_most(headings)}"
        )
    return rule, [*doubts, *_doubts_about_titles(sample, rule)]


def _doubts_about_runs(lines: list[str]) -> Iterator[str]:
    """Yield the signs that some groups of empty lines do not precede an article. `lines` contains the first line after
    each group."""
    others = sum(not _is_title(line) for line in lines)
    if others > _DOUBTFUL_SHARE * len(lines):
        yield f"{others:,} of {len(lines):,} groups of empty lines in the beginning do not precede a title"
    times = Counter(line.strip() for line in lines if _is_title(line))
    recurring = Counter({line: count for line, count in times.items() if count >= _HEADING_TIMES})
    if recurring.total() > _DOUBTFUL_SHARE * len(lines):
        yield f"titles that occur repeatedly may be headings inside articles: {_most(recurring)}"


def _titles(sample: str, rule: _Rule) -> list[re.Match[str]]:
    """Return one match per title. If the first line is a title, its match is this line. For any other title, the match
    is the gap before the title. Group 1 is the title."""
    first = _SHORT_LINE.match(sample)
    return [*([first] if first and _is_title(first[1]) else []), *rule.gaps(sample, at_beginning=True)]


def _doubts_about_titles(sample: str, rule: _Rule) -> Iterator[str]:
    """Yield the signs that many titles found by `rule` may be lists, headings or sentences."""
    found = _titles(sample, rule)
    if not found:
        return
    in_all = f"of {len(found):,} titles in the beginning"
    below = (_BEFORE_SHORT_LINE.match(sample, title.end(1)) for title in found)
    followed = sum(_is_title(line[1]) for line in below if line)
    if followed > _DOUBTFUL_SHARE * len(found):
        yield f"{followed:,} {in_all} have another short line below them, as in a list"
    ends = [*(title.start() for title in found[1:]), len(sample)]
    unnamed = sum(
        not _is_named_in(sample[title.end(1) : min(end, title.end(1) + _NAMED_WITHIN)], title[1])
        for title, end in zip(found, ends, strict=True)
    )
    if unnamed > _UNNAMED_SHARE * len(found):
        yield f"{unnamed:,} {in_all} are not mentioned in the text below them, as is usual for section headings"
    exclaimed = sum(gap[1].rstrip().endswith(("?", "!")) for gap in _BEFORE_SHORT_LINE.finditer(sample))
    if exclaimed > _DOUBTFUL_SHARE * len(found):
        yield f"{exclaimed:,} short lines that end in ? or ! were not taken for titles"


def _most(lines: Counter[str]) -> str:
    return ", ".join(f"{line!r} ({times:,} times)" for line, times in lines.most_common(_SHOWN))


def _is_title(line: str) -> bool:
    line = line.strip()
    return 0 < len(line) <= TITLE_CHARS and not line.endswith(_CLOSING)


def _is_named_in(beginning: str, title: str) -> bool:
    """Return whether a word of the title occurs in the beginning of the text, as is usual in an encyclopedia."""
    words = re.findall(r"\w{3,}|\d+", title.casefold()) or [title.strip().casefold()]
    return any(word in beginning.casefold() for word in words)


def _show(report: ArticleReport, text: str, gap: re.Match[str]) -> None:
    if len(report.boundaries) < _SHOWN:
        before = text[: gap.start()].rstrip(_BLANKS).rpartition("\n")[2][-40:].strip()
        title = text[gap.end() : gap.end() + TITLE_CHARS].partition("\n")[0].strip()
        report.boundaries.append(f"…{before} {'⏎' * gap[0].count(chr(10))} {title}")
