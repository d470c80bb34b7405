"""HTML, EPUB and PDF → text.

The main part of a page is read, without menus, scripts and forms. Paragraphs are separated by an empty line. Text in
`<pre>` keeps its line ends and blanks.
"""

from __future__ import annotations

import logging
import posixpath
import re
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import suppress
from typing import IO, Any
from urllib.parse import unquote
from xml.etree import ElementTree

from atlas.data.text.formats.decode import codec_of_mark
from atlas.errors import DataError, first_line

LARGEST_PAGE, LARGEST_BOOK = 64 << 20, 512 << 20
_CHUNK = 1 << 20
_MAIN = "main, [role=main], article, #content"
_DROPPED = (
    "script, style, noscript, template, nav, header, footer, aside, form, button, svg, math, iframe, object, "
    "[hidden], [aria-hidden=true], [role=navigation], .headerlink, .sphinxsidebar"
)
_BLOCK_NAMES = """
    address article blockquote body caption dd details div dl dt fieldset figcaption figure h1 h2 h3 h4 h5 h6 hr html
    li main ol p pre section summary table tbody td tfoot th thead title tr ul
"""
_PARAGRAPH_NAMES = "p h1 h2 h3 h4 h5 h6 pre blockquote table ul ol dl figure section article hr"
_PARAGRAPHS = frozenset(_PARAGRAPH_NAMES.split())
_BLOCKS = frozenset(_BLOCK_NAMES.split())
_CELLS = frozenset(("td", "th"))
_BLANKS = re.compile(r"[ \t\r\n\f]+")
_OPENED = re.compile(rb"<(/?)([a-z][a-z0-9]*)", re.I)
_MAY_STAY_OPEN_NAMES = """
    area base body br col colgroup dd dt embed head hr html img input li link meta optgroup option p param source tbody
    td tfoot th thead tr track wbr
"""
_MAY_STAY_OPEN = frozenset(_MAY_STAY_OPEN_NAMES.encode().split())
_CHARSET = re.compile(rb"(?i)charset=[\"']?([\w-]+)")
_DEEPEST, _MOST_ATTRIBUTES = 2000, 5000
_LONG_TAG = re.compile(rb"<[a-zA-Z][^<>]{10000,}")
_QUOTED = re.compile(rb"\"[^\"]*\"|'[^']*'")
_MANY_LINES = re.compile(r"\n{3,}")
_BLANKS_AT_LINE_END = re.compile(r"(?<![ \t])[ \t]+(?=\n)")


def read_page(stream: IO[bytes], name: str) -> bytes:
    """Return the bytes of a page. Raises `DataError` if it has more than `LARGEST_PAGE` bytes."""
    return _read(stream, name, LARGEST_PAGE)


def read_book(stream: IO[bytes], name: str) -> bytes:
    """Return the bytes of a book. Raises `DataError` if it has more than `LARGEST_BOOK` bytes."""
    return _read(stream, name, LARGEST_BOOK)


def _read(stream: IO[bytes], name: str, limit: int) -> bytes:
    parts: list[bytes] = []
    size = 0
    while part := stream.read(_CHUNK):  # a read reserves memory for all bytes that it asks for
        parts.append(part)
        size += len(part)
        if size > limit:
            raise DataError(f"{name}: has more than {limit >> 20} MiB; split it, or convert it to text")
    return b"".join(parts)


def html_text(page: bytes, name: str, encoding: str | None = None) -> str:
    """Return the text of an HTML page. Without `encoding`, the page's own statement counts, or UTF-8.

    Raises `DataError` if the page has very many open elements, or attributes of one element.
    """
    from selectolax.lexbor import LexborHTMLParser

    page = _as_utf8(page, encoding)
    if _depth(page) > _DEEPEST:
        raise DataError(f"{name}: has more than {_DEEPEST:,} open elements; it is no page for readers")
    if _has_many_attributes(page):
        raise DataError(
            f"{name}: has an element with more than {_MOST_ATTRIBUTES:,} attributes; it is no page for readers"
        )
    tree = LexborHTMLParser(page)
    for node in tree.css(_DROPPED):
        node.decompose()
    main = tree.css(_MAIN)
    # A page can have several articles, and a main part that is only a frame.
    root = (
        main[0]
        if main and len(main[0].text()) > 0.3 * len(tree.body.text() if tree.body else "")
        else tree.body
    )
    return "" if root is None else _text_below(root)


def _as_utf8(page: bytes, encoding: str | None) -> bytes:
    """Return the page in UTF-8. A mark of Unicode counts more than what the page states."""
    stated = _CHARSET.search(page[:4096])
    codec = codec_of_mark(page) or encoding or (stated[1].decode("ascii") if stated else "utf-8")
    with suppress(LookupError, UnicodeError):
        return page.decode(codec, errors="replace").encode(errors="replace")
    return page


def _has_many_attributes(page: bytes) -> bool:
    """Return whether an element has very many attributes. The parser needs quadratic time for them."""
    long = (found[0] for found in _LONG_TAG.finditer(page))
    return any(len(_QUOTED.sub(b"", tag).split()) > _MOST_ATTRIBUTES for tag in long)


def _depth(page: bytes) -> int:
    """Return how many elements are open at most, of the kinds that must be closed. The parser needs quadratic time for
    them."""
    depth = deepest = 0
    for slash, tag in _OPENED.findall(page):
        if tag.lower() not in _MAY_STAY_OPEN:
            depth = max(0, depth - 1) if slash else depth + 1
            deepest = max(deepest, depth)
    return deepest


def _text_below(root: Any) -> str:
    """Return the text of a node. The loop needs no recursion, since a hostile page can be very deep."""
    parts: list[str] = []
    in_pre, node = 0, root
    while True:
        tag = node.tag
        if node.is_text_node:
            text = node.text_content or ""
            if in_pre:
                parts.append(text)
            elif not text.isspace():
                parts.append(_BLANKS.sub(" ", text))
            elif parts and not parts[-1].endswith("\n"):
                parts.append(" ")
        else:
            _add_break(parts, _break(tag, ends=False))
        if node.child is not None:
            in_pre += tag == "pre"
            node = node.child
            continue
        while node.next is None or node.mem_id == root.mem_id:
            if node.mem_id == root.mem_id:
                return _MANY_LINES.sub("\n\n", _BLANKS_AT_LINE_END.sub("", "".join(parts))).strip()
            node = node.parent
            in_pre -= node.tag == "pre"
            _add_break(parts, _break(node.tag, ends=True))
        node = node.next


def _add_break(parts: list[str], lines: str) -> None:
    """Add the line ends between two elements. Where one element ends and the next begins, the larger break counts."""
    if lines == "\t" or not (parts and parts[-1] in ("\n", "\n\n")):
        parts.append(lines)
    elif len(lines) > len(parts[-1]):
        parts[-1] = lines


def _break(tag: str, *, ends: bool) -> str:
    """Return the line ends before or after an element."""
    if tag in _CELLS:
        return "\t" if ends else ""
    if tag == "br":
        return "" if ends else "\n"
    return "\n\n" if tag in _PARAGRAPHS else "\n" if tag in _BLOCKS else ""


def epub_chapters(stream: IO[bytes], name: str) -> Iterator[str]:
    """Yield the text of each chapter of an EPUB, in reading order (EPUB 3.3, section 5: the spine).

    Raises `DataError` if the file is damaged, or protected against copying.
    """
    try:
        with zipfile.ZipFile(stream) as book:
            names = {member.filename: member for member in book.infolist()}
            if "META-INF/encryption.xml" in names and "META-INF/rights.xml" in names:
                raise DataError(f"{name}: is protected against copying; leave it out")
            container = ElementTree.fromstring(_member(book, names, "META-INF/container.xml"))
            package = next(
                node.get("full-path", "") for node in container.iter() if node.tag.endswith("}rootfile")
            )
            tree = ElementTree.fromstring(_member(book, names, package))
            items = {
                node.get("id"): node.get("href", "") for node in tree.iter() if node.tag.endswith("}item")
            }
            spine = [node.get("idref") for node in tree.iter() if node.tag.endswith("}itemref")]
            for place in dict.fromkeys(spine):  # a book that repeats a chapter may be a bomb
                path = posixpath.normpath(
                    posixpath.join(posixpath.dirname(package), unquote(items.get(place, "")))
                )
                if path in names and (text := html_text(_member(book, names, path), name)):
                    yield text
    except (
        zipfile.BadZipFile,
        zlib.error,
        ElementTree.ParseError,
        EOFError,
        LookupError,
        RuntimeError,  # an encrypted member, or a compression that `zipfile` does not know
        StopIteration,
        OSError,
        ValueError,
    ) as error:
        raise DataError(f"{name}: is not a complete EPUB ({first_line(error)}); download it again") from None


def _member(book: zipfile.ZipFile, names: dict[str, zipfile.ZipInfo], path: str) -> bytes:
    if path not in names:
        raise ValueError(f"it has no {path:.80}")
    if names[path].file_size > LARGEST_PAGE:
        raise ValueError(f"{path:.80} has more than {LARGEST_PAGE >> 20} MiB")
    return book.read(names[path])


def pdf_text(stream: IO[bytes], name: str) -> str:
    """Return the text of a PDF, with an empty line between two pages.

    Raises `DataError` if the file is damaged, encrypted or consists of pictures.
    """
    import pypdf

    logging.getLogger("pypdf").setLevel(logging.ERROR)
    try:
        document = pypdf.PdfReader(stream)
        if document.is_encrypted and not document.decrypt(""):
            raise DataError(f"{name}: is encrypted; remove its password, for example with qpdf --decrypt")
        text = "\n\n".join(page.extract_text() for page in document.pages)
    except DataError:
        raise
    except Exception as error:  # pypdf raises many kinds of errors for damaged files
        raise DataError(
            f"{name}: is not a PDF that pypdf can read ({first_line(error)}); convert it to text"
        ) from None
    if not text.strip():
        raise DataError(
            f"{name}: holds no text, perhaps only pictures of pages; run OCR on it, for example ocrmypdf"
        )
    return text
