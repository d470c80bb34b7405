"""The beginning of a file → its format.

The content decides, because endings mislead: a `.json` file can have one row per line, `wiki_00` can be JSON, and a
download can be saved with the ending of a compressed file although it is not compressed. The ending of the name decides
only where the content leaves a choice.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import mimetypes
import posixpath
import re
from contextlib import suppress
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple

from atlas.data.text.formats import compression
from atlas.data.text.formats.chats import LISTS, PAIRS, PARTS_OF_A_ROW
from atlas.data.text.formats.rows import without_comma

SAMPLE_BYTES = 1 << 16
Format = Literal[
    "text", "jsonl", "json", "csv", "parquet", "arrow", "html", "pdf", "epub", "mediawiki", "wikiextractor"
]
ROWS: tuple[Format, ...] = ("jsonl", "json", "csv", "parquet", "arrow")
"""The formats with rows that have fields."""
ROW_ENDINGS = re.compile(r"\.(jsonl|ndjson|json|csv|tsv|parquet|arrow)(\.(gz|zst|bz2|xz))?$")
NAMES: dict[Format, str] = {
    "text": "text",
    "jsonl": "JSON lines",
    "json": "JSON",
    "csv": "table (CSV or TSV)",
    "parquet": "Parquet",
    "arrow": "Arrow",
    "html": "HTML",
    "pdf": "PDF",
    "epub": "EPUB",
    "mediawiki": "MediaWiki dump",
    "wikiextractor": "WikiExtractor's output",
}
_CHAT_FIELDS = (*LISTS, "chosen", *dict.fromkeys(asked for asked, _ in PAIRS))
_INSTALL = "pip install"
_PACKAGES: dict[Format, tuple[str, str]] = {
    "parquet": ("pyarrow", "parquet"),
    "arrow": ("pyarrow", "parquet"),
    "html": ("selectolax", "html"),
    "epub": ("selectolax", "html"),
    "pdf": ("pypdf", "pdf"),
    "mediawiki": ("mwparserfromhell", "wiki"),
}
"""The package that reads a format, and the extra of Atlas that installs it."""
_ROW_LISTS = re.compile(r'"((?:[^"\\]|\\.)*)"\s*:\s*\[\s*\{')


class Unread(NamedTuple):
    """What a file is that Atlas does not read, and the command that converts it, or an empty string."""

    what: str
    command: str = ""
    is_text: bool = False
    """Whether the file can be read as plain text, as in a folder of source code."""

    def explain(self, name: str) -> str:
        """Return what a file is and how to convert it, for messages. `name` is the file's name in the command."""
        command = self.command.replace("NAME", name)
        if not command or command.startswith(_INSTALL):
            return "; ".join(filter(None, (self.what, command)))
        return f"{self.what}; convert it with {command}"


ZIP, TAR = Unread("a zip archive", "unzip NAME"), Unread("a tar archive", "tar -xf NAME")
ARCHIVES = (ZIP, TAR)
_PANDOC, _OFFICE = (
    "pandoc -t plain --wrap=none NAME > NAME.txt",
    "soffice --headless --convert-to txt:Text NAME",
)
_BINARY = (
    (b"7z\xbc\xaf\x27\x1c", Unread("a 7z archive", "7z x NAME")),
    (b"Rar!\x1a\x07", Unread("a RAR archive", "unrar x NAME")),
    (b"MSCF", Unread("a cabinet archive", "cabextract NAME")),
    (b"!<arch>\n", Unread("an ar archive", "ar x NAME")),
    (b"\xed\xab\xee\xdb", Unread("an RPM package", "rpm2cpio NAME | cpio -id")),
    (b"\x04\x22\x4d\x18", Unread("lz4", "lz4 -d NAME")),
    (b"\x1f\x9d", Unread("compressed by compress", "gzip -d NAME")),
    (b"\x5d\x00\x00", Unread("compressed by lzma", "xz -d NAME")),
    (b"LZIP", Unread("compressed by lzip", "lzip -d NAME")),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", Unread("an old Office document", _OFFICE)),
    (b"{\\rtf", Unread("an RTF document", _PANDOC)),
    (b"AT&TFORM", Unread("a DjVu document", "djvutxt NAME NAME.txt")),
    (b"%!PS", Unread("PostScript", "ps2ascii NAME > NAME.txt")),
    (b"ITSF", Unread("a compiled help file (CHM)", "extract_chmLib NAME FOLDER")),
    (b"SQLite format 3\0", Unread("an SQLite database", "sqlite3 -json NAME 'SELECT * FROM table' > NAME.json")),
    (b"Obj\x01", Unread("Avro", "fastavro NAME > NAME.jsonl")),
    (b"ORC", Unread("ORC", "python -c 'import pyarrow.orc as o, pyarrow.parquet as p; p.write_table("
                           "o.read_table(\"NAME\"), \"NAME.parquet\")'")),
    (b"\x89HDF\r\n", Unread("HDF5")),
    (b"\x93NUMPY", Unread("a NumPy array")),
    (b"GGUF", Unread("a GGUF model")),
    (b"\x7fELF", Unread("a program")),
    (b"MZ", Unread("a program for Windows")),
    (b"\xca\xfe\xba\xbe", Unread("a program")),
    (b"\x00asm", Unread("a program")),
    (b"\x89PNG", Unread("a picture")),
    (b"\xff\xd8\xff", Unread("a picture")),
    (b"GIF8", Unread("a picture")),
    (b"II*\0", Unread("a picture")),
    (b"MM\0*", Unread("a picture")),
    (b"\0\0\1\0", Unread("a picture")),
    (b"OggS", Unread("sound")),
    (b"ID3", Unread("sound")),
    (b"fLaC", Unread("sound")),
    (b"\x1aE\xdf\xa3", Unread("a video")),
    (b"\0\1\0\0\0", Unread("a font")),
    (b"wOF", Unread("a font")),
    (b"OTTO", Unread("a font")),
)  # fmt: skip
_TEXT = (
    (
        re.compile(r"version https://git-lfs\.github\.com/spec/"),
        Unread("a Git LFS pointer, not the file itself", "git lfs pull"),
    ),
    (
        re.compile(r"From \S+ +(?:Mon|Tue|Wed|Thu|Fri|Sat|Sun) [^\n]*\n>?[\w-]+:"),
        Unread(
            "a mailbox (mbox)",
            "python -c 'import mailbox; [print(p.get_payload(decode=True).decode(errors=\"replace\")) for m in "
            "mailbox.mbox(\"NAME\") for p in m.walk() if p.get_content_type() == \"text/plain\"]' > NAME.txt",
        ),
    ),
    (
        re.compile(r"WEBVTT|\d+\s*\n\d\d:\d\d:\d\d[,.]\d\d\d --> "),
        Unread(
            "subtitles", "sed -E '/^[0-9]+\\r?$|-->|^.?.?.?WEBVTT|^(Kind|Language):/d; s/<[^>]*>//g' NAME > NAME.txt"
        ),
    ),
    (
        re.compile(r'\{\s*"cells"\s*:\s*\['),
        Unread("a Jupyter notebook", "jupyter nbconvert --to markdown NAME", is_text=True),
    ),
    (
        re.compile(r"(?:<\?xml[^>]*>\s*)?<(?:posts|comments)>\s*<row "),
        Unread("a dump of Stack Exchange", "xmlstarlet sel -T -t -m //row -v @Body -v @Text -n NAME > NAME.html"),
    ),
)  # fmt: skip
_OFFICE_PARTS = (b"[Content_Types].xml", b"word/", b"xl/", b"ppt/", b"mimetypeapplication/vnd.oasis")
_MARKUP = re.compile(r"<!doctype\s+html|<html[\s>]", re.I)
_PDF_OBJECT = re.compile(rb"\d obj\b")
_PDF = re.compile(rb"(?:\A|[\r\n])%PDF-\d")
_MEDIAWIKI = re.compile(r"<mediawiki[\s>]")
_WIKIEXTRACTOR = re.compile(r'<doc id="')
_NO_BLANK = re.compile(r"\S|\Z")
_XML_MISC = (("<?", "?>"), ("<!--", "-->"))
_TAG = re.compile(r"<(?:p|div|body|head|title|h[1-6]|table|ul|ol|br|span)\b[^<>]*>", re.I)
_TEXT_MARKS = (
    codecs.BOM_UTF8,
    codecs.BOM_UTF16_LE,
    codecs.BOM_UTF16_BE,
    codecs.BOM_UTF32_LE,
    codecs.BOM_UTF32_BE,
)
_FEWEST_TAGS = 3
_LINES = (".jsonl", ".ndjson")
_COLUMNAR: dict[str, Format] = {".parquet": "parquet", ".arrow": "arrow"}


def identify(beginning: bytes, name: str, text_field: str = "text") -> Format | Unread:
    """Return the format of a file from its first `SAMPLE_BYTES` bytes, after decompression, and its name. A file in a
    format whose package is not installed is not read."""
    found = _identify(beginning, name, text_field)
    if isinstance(found, str) and found in _PACKAGES:
        package, extra = _PACKAGES[found]
        if find_spec(package) is None:
            return Unread(
                f"{NAMES[found]}, which Atlas reads with the package {package}",
                f'{_INSTALL} "atlas-llm[{extra}]"',
            )
    return found


def _identify(beginning: bytes, name: str, text_field: str) -> Format | Unread:
    if found := _binary_format(beginning):
        return found
    if (ending := ending_of(name)) in _COLUMNAR:  # damaged, or cut within the first bytes
        return _COLUMNAR[ending]
    if b"\0" in beginning[:8000] and not beginning.startswith(_TEXT_MARKS):
        kind = (mimetypes.guess_type(name)[0] or "").partition("/")[0]
        known = {"image": "a picture", "audio": "sound", "video": "a video", "font": "a font"}
        if kind not in known and (codec := _utf16_without_mark(beginning)):
            return Unread(f"perhaps text in UTF-16 without a mark; if so, give --encoding {codec}")
        return Unread(known.get(kind, "a binary file"))
    text = as_text(beginning)
    for mark, what in _TEXT:
        if mark.match(text.lstrip()):
            return what
    if found := _markup_format(text, ending):
        return found
    may_be_json = ending in (*_LINES, ".json") or text.lstrip().startswith(("{", "["))
    if may_be_json and (found := _json_format(text, ending, text_field)):
        return found
    if ending in (".csv", ".tsv", ".tab") or _is_table(text, text_field):
        return "csv"
    return "text"


def _utf16_without_mark(beginning: bytes) -> str | None:
    """Return the codec of a text that has a zero byte in nearly every character, always at the same place, or None."""
    shares = [half.count(0) / max(1, len(half)) for half in (beginning[:400:2], beginning[1:400:2])]
    if len(beginning) < 20 or min(shares) > 0.1 or max(shares) < 0.9:
        return None
    return "utf-16-be" if shares[0] > shares[1] else "utf-16-le"


def ending_of(name: str) -> str:
    """Return the ending of a name in small letters, without that of a compression: `A.JSON.gz` → `.json`."""
    stem, ending = posixpath.splitext(name.lower())
    return posixpath.splitext(stem)[1] if ending in compression.ENDINGS else ending


def as_text(beginning: bytes) -> str:
    """Decode the beginning of a file, to look at its ASCII characters. Any other bytes may come out wrong."""
    for mark, codec in (
        (codecs.BOM_UTF32_LE, "utf-32"),
        (codecs.BOM_UTF32_BE, "utf-32"),
        (codecs.BOM_UTF16_LE, "utf-16"),
        (codecs.BOM_UTF16_BE, "utf-16"),
    ):
        if beginning.startswith(mark):
            return beginning.decode(codec, errors="ignore")
    return beginning.removeprefix(codecs.BOM_UTF8).decode("utf-8", errors="replace")


def _binary_format(beginning: bytes) -> Format | Unread | None:
    has_zeros = b"\0" in beginning
    if beginning.startswith((b"PAR1", b"PARE")) and has_zeros:
        return "parquet"
    if beginning.startswith((b"ARROW1\0\0", b"\xff\xff\xff\xff")):
        return "arrow"
    if _PDF.search(beginning[:1024]) and (has_zeros or _PDF_OBJECT.search(beginning)):
        return "pdf"
    if beginning.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        if b"mimetypeapplication/epub+zip" in beginning[:100]:
            return "epub"
        if any(part in beginning[:4096] for part in _OFFICE_PARTS):
            return Unread("an Office document", _PANDOC)
        return ZIP
    if beginning[257:262] == b"ustar":
        return TAR
    if compressed := compression.compression_of(beginning):
        return Unread(f"compressed twice ({compressed})", "unpack it once")
    if beginning[60:68] == b"BOOKMOBI":
        return Unread("a Kindle book", "ebook-convert NAME NAME.epub")
    if beginning[4:8] == b"ftyp" and has_zeros:
        return Unread("a video")
    if beginning[:4] == b"RIFF" and has_zeros:
        return Unread({b"WEBP": "a picture", b"WAVE": "sound"}.get(beginning[8:12], "a video"))
    found = next(((mark, what) for mark, what in _BINARY if beginning.startswith(mark)), None)
    if found is None or (found[0].isalnum() and not has_zeros):  # a text can begin with these letters
        return None
    return found[1]


def _markup_format(text: str, ending: str) -> Format | None:
    start = _after_misc(text)
    if _MEDIAWIKI.match(text, start):
        return "mediawiki"
    if _WIKIEXTRACTOR.match(text, start):
        return "wikiextractor"
    if ending in (".html", ".htm", ".xhtml"):
        return "html" if len(_TAG.findall(text)) >= _FEWEST_TAGS or _MARKUP.match(text, start) else None
    return "html" if _MARKUP.match(text, start) and ending in ("", ".txt", ".aspx", ".shtml") else None


def _after_misc(text: str) -> int:
    """Return where an XML text begins, after blanks, its declaration and comments."""
    start = 0
    while True:
        start = _NO_BLANK.search(text, start).start()  # type: ignore[union-attr]
        closing = next((end for mark, end in _XML_MISC if text.startswith(mark, start)), None)
        end = text.find(closing, start) if closing else -1
        if closing is None or end < 0:
            return start
        start = end + len(closing)


def _json_format(text: str, ending: str, text_field: str) -> Format | Unread | None:
    """Return the JSON format of a text, or None if the text is something else, such as a log with `[` in it."""
    lines = [line for line in text.split("\n") if line.strip()]
    is_cut = len(lines) > 1 and len(text) > SAMPLE_BYTES // 8  # the last line may be incomplete
    begins = text.lstrip()
    is_array = re.match(r"\[\s*\{", begins) is not None  # its lines can look like rows with commas
    rows = [value_of(line, is_array=is_array) for line in lines[: min(2, len(lines) - is_cut)]]
    first, second = [*rows, None, None][:2]
    if ending in _LINES and (isinstance(first, (dict, list)) or len(lines) == 1 or isinstance(second, dict)):
        return "jsonl"
    if isinstance(first, dict) and len(lines) > 1:
        if isinstance(second, dict) or lines[1].lstrip().startswith("{"):
            return "jsonl"
    elif isinstance(first, list) and isinstance(second, list):
        return "jsonl"
    elif is_array or (ending == ".json" and re.match(r'\[\s*(?:[\["]|\Z)', begins)):
        return "json"
    elif re.match(r'\{\s*(?:"[^"\n]*"\s*:|\Z)', begins):
        return _object_format(text, text_field, is_one_line=len(lines) == 1)
    if ending in _LINES:
        return "jsonl"
    return Unread("no JSON with rows", is_text=True) if ending == ".json" else None


def _object_format(text: str, text_field: str, *, is_one_line: bool) -> Format | Unread:
    """Return the format of a text that begins with a JSON object, which may be a row, or settings, or contain rows."""
    if any(key not in PARTS_OF_A_ROW for key in _ROW_LISTS.findall(text)):
        return "json"
    if any(f'"{key}"' in text for key in (text_field, *_CHAT_FIELDS)):
        return "jsonl" if is_one_line else "json"
    rows = ".KEY[]" if re.search(r":\s*\[", text) else f"{{{text_field}: .[]}}"
    return Unread("a JSON object without rows", f"jq -c '{rows}' NAME > NAME.jsonl", is_text=True)


def value_of(line: str, *, is_array: bool = False) -> Any:
    """Return the JSON value of a line, or None. A comma may follow it, unless the line is a part of an array."""
    with suppress(ValueError, RecursionError):
        return json.loads(line if is_array else without_comma(line))
    return None


def _is_table(text: str, text_field: str) -> bool:
    """Return whether a text is a table: its first line names a field of text, and the next lines have as many cells."""
    header, _, _ = text.partition("\n")
    delimiter = next((mark for mark in "\t,;" if mark in header), None)
    if delimiter is None or len(header) > 1000:
        return False
    with suppress(csv.Error):
        names, *rows = csv.reader(io.StringIO(text), delimiter=delimiter)
        cells = [len(row) for row in rows[:-1] if row]
        return text_field in names and bool(cells) and all(count == len(names) for count in cells)
    return False
