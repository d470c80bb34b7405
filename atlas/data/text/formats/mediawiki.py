"""A MediaWiki dump (`pages-articles.xml`), or the output of WikiExtractor → articles.

The export format: https://www.mediawiki.org/wiki/Help:Export#Export_format
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import IO, Any
from xml.etree import ElementTree

from atlas.data.text.formats.decode import Piece
from atlas.data.text.formats.rows import OnBad
from atlas.data.text.formats.separators import Boundaries, Separator, split_documents
from atlas.errors import DataError

_ARTICLES, _FILE, _CATEGORY = "0", "6", "14"
"""Numbers of namespaces. Only pages in the namespace of articles are read."""
_LONGEST_PAGE = 4 << 20
"""MediaWiki stores at most 2 MiB per page."""
_DROPPED_TAGS = (
    "ref", "table", "gallery", "math", "chem", "timeline", "score", "syntaxhighlight", "source", "imagemap",
)  # fmt: skip
_LINE_BREAK, _BREAK = re.compile(r"<[bh]r\b[^<>]*>", re.I), "\ufdd0"
"""The tag of a line break, and the character that stands for it while a page is parsed."""
_COMMENT, _STYLE = re.compile(r"(?s)<!--.*?(?:-->|\Z)"), re.compile(r"'{2,}")
_NOTHING_IN_BRACKETS = re.compile(r" ?\([\s,;:]*\)")
"""What a template in brackets leaves."""
_MOST_OPEN = 500
_BRACKETS = re.compile(r"(\{[{|]|\[\[|\[(?=\w+:)|<[a-z])|(\}\}|\|\}|\]|</|/>)", re.I)
"""What opens or closes a template, a table, a link or a tag."""
_LANGUAGE = re.compile(r"\s*[a-z]{2,3}(?:-[a-z-]+)?\s*:")
_SWITCH = re.compile(r"__[A-Z]+__")
_BLANKS = re.compile(r"[ \t]{2,}")
_MANY_LINES = re.compile(r"\n{3,}")
_DOC_ENDS = Separator("<doc> elements", re.compile(r"</doc>\s*(?:<doc id=\"[^>\n]*>)?"))
_DOC_BEGINS = re.compile(r"\s*<doc id=\"[^>\n]*>")


def dump_articles(stream: IO[bytes], name: str, on_bad: OnBad, left_out: Counter[str]) -> Iterator[str]:
    """Yield the articles of a dump as plain text, each with its title first. Redirects and pages about the wiki itself
    are left out, and counted in `left_out`. The error of a page with very many open brackets goes to `on_bad`.

    Raises `DataError` if the dump is damaged.
    """
    media = {"file", "image", "category"}
    try:
        events = ElementTree.iterparse(stream, events=("start", "end"))
        _, root = next(events)
        for event, node in events:
            tag = node.tag.rpartition("}")[2]
            if event == "end" and tag == "namespace" and node.get("key") in (_FILE, _CATEGORY):
                media.add((node.text or "").lower())
            elif event == "end" and tag == "page":
                fields = {child.tag.rpartition("}")[2]: child for child in node.iter()}
                wikitext, title = (
                    _simpler(_text_of(fields.get("text"), "")),
                    _text_of(fields.get("title"), ""),
                )
                if "redirect" in fields:
                    left_out["redirects"] += 1
                elif _text_of(fields.get("ns"), _ARTICLES) != _ARTICLES:
                    left_out["about the wiki itself"] += 1
                elif _has_too_many_open(wikitext):
                    reason = f"has more than {_MOST_OPEN} brackets or tags that do not end; correct the page"
                    on_bad(DataError(f"{name}, page {title!r:.80}: {reason}"))
                elif text := plain_text(wikitext, media):
                    yield f"{title}\n\n{text}".strip()
                else:
                    left_out["without text"] += 1
                root.clear()
    except (ElementTree.ParseError, StopIteration, LookupError, ValueError) as error:
        raise DataError(f"{name}: is not a complete dump ({error}); download it again") from None


def _text_of(node: ElementTree.Element | None, default: str) -> str:
    return default if node is None else node.text or default


def _simpler(wikitext: str) -> str:
    """Return the wikitext without comments and marks of bold and italic letters, for which the parser needs quadratic
    time if they do not end, and with `_BREAK` for each line break. A comment without an end takes the rest."""
    without = _STYLE.sub("", _COMMENT.sub("", wikitext[:_LONGEST_PAGE]))
    return _LINE_BREAK.sub(_BREAK, without)


def plain_text(wikitext: str, media: set[str]) -> str:
    """Return the text of a page without templates, tables, references, pictures and categories. `media` contains the
    names of the namespaces of files and categories, in small letters."""
    import mwparserfromhell

    page: Any = mwparserfromhell.parse(wikitext)
    # The contents are emptied, since removing each node from the page would take quadratic time.
    for tag in page.filter_tags(matches=lambda node: str(node.tag).strip().lower() in _DROPPED_TAGS):
        tag.contents = ""
    for link in page.filter_wikilinks():
        prefix, colon, _ = str(link.title).partition(":")
        if colon and (
            prefix.strip().lower() in media or (_LANGUAGE.match(str(link.title)) and not link.text)
        ):
            link.text = ""
        elif str(link.title).startswith(":"):
            link.title = str(link.title)[1:]
    text = _SWITCH.sub("", page.strip_code(normalize=True, collapse=True)).replace(_BREAK, "\n")
    text = _NOTHING_IN_BRACKETS.sub("", text)
    lines = (_BLANKS.sub(" ", line.strip()) for line in text.split("\n"))
    return _MANY_LINES.sub("\n\n", "\n".join(lines)).strip()


def _has_too_many_open(wikitext: str) -> bool:
    """Return whether very many brackets and tags of a page do not end. The parser needs quadratic time for them."""
    depth = 0
    for opens, _ in _BRACKETS.findall(wikitext):
        depth = depth + 1 if opens else max(0, depth - 1)
        if depth > _MOST_OPEN:
            return True
    return False


def extracted_articles(chunks: Iterable[str], found: Boundaries) -> Iterator[Piece]:
    """Yield the articles of WikiExtractor's output, without its tags, and fill `found`."""
    chunks = iter(chunks)
    beginning = next(chunks, "")
    rest = _DOC_BEGINS.sub("", beginning, count=1) if _DOC_BEGINS.match(beginning) else beginning

    def without_first_tag() -> Iterator[str]:
        yield rest
        yield from chunks

    yield from split_documents(without_first_tag(), _DOC_ENDS, found)
