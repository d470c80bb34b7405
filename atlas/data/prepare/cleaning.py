"""The cleaning of documents before tokenization. Each step has a name and can be left out. Atlas counts the changes of
each step.

    nfc          Unicode in its composed form (NFC, UAX #15), so that one word has one spelling; beyond 30 marks on
                 one letter, marks keep their order (the limit of UAX #15's Stream-Safe Text Format)
    control      control characters other than tab and line ends are removed, with the complete escape sequences of
                 terminals (ECMA-48); form feeds and other separators of lines become line ends
    whitespace   line ends become \\n; blanks at a line's end are removed; consecutive blanks inside a line become
                 one blank (indentation stays); more than two empty lines become two
    duplicates   only the first of documents with the same text is kept (`atlas.data.prepare.dedup`)

All other bytes of a document are kept. Atlas leaves out documents that have fewer than `min_chars` characters after
cleaning. With `near_dedup`, Atlas also leaves out near-duplicates of earlier documents.
"""

from __future__ import annotations

import functools
import hashlib
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass

from atlas.errors import DataError

STEPS = ("nfc", "control", "whitespace", "duplicates")

_CONTROL = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x9f]")
_ESCAPE = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b\n]*(?:\x07|\x1b\\)|[()][0-9A-Z]|[@-Z\\^_=>])")
_OVERSTRUCK = re.compile("[^\ufffc\n]\x08")  # as `man` prints bold letters: each twice
_LINE_SEPARATORS = re.compile("[\x0b\x0c\x1c-\x1e\x85]")
_CONTROL_BYTES = bytes(byte for byte in [*range(0x20), 0x7F] if byte not in b"\t\n\r")
# Each pattern can match at only one position in a sequence of blanks or newlines. So a search takes linear time.
_BLANKS_AT_LINE_END = re.compile(r"(?<![ \t])[ \t]+(?=\n)")
_BLANKS_INSIDE_LINE = re.compile(r"(?<=\S)[ \t]{2,}(?=\S)")
_EMPTY_LINES = re.compile(r"\n{4,}")
_MOST_MARKS, _PLACES_OF_MARKS, _ASTRAL = 30, range(0x300, 0x1F000), "\U00010000"
_BEFORE = "\ufffc"  # a character that is not white space and combines with no other character


@dataclass(frozen=True)
class Cleaning:
    """The cleaning steps, and the criteria for leaving out documents."""

    steps: tuple[str, ...] = STEPS
    min_chars: int = 1
    near_dedup: bool = False

    def __post_init__(self) -> None:
        unknown = [step for step in self.steps if step not in STEPS]
        if unknown:
            raise DataError(f"--clean {unknown[0]}: no such step; the steps are {', '.join(STEPS)}, or none")
        if self.min_chars < 0:
            raise DataError(f"--min-chars {self.min_chars}: must be at least 0")

    @staticmethod
    def parse(names: str) -> tuple[str, ...]:
        """Return the steps of a list such as `nfc,control`, in the order in which Atlas applies them. The list `none`
        gives no steps."""
        wanted = [name.strip() for name in names.split(",") if name.strip()]
        if wanted == ["none"]:
            return ()
        return Cleaning(tuple(sorted(wanted, key=(*STEPS, *wanted).index))).steps

    def clean(self, text: str, *, starts_document: bool = True) -> tuple[str, dict[str, int]]:
        """Return the cleaned text and a dict. For each step that changed the text, the dict has the number of
        characters by which the step shortened the text."""
        changes: dict[str, int] = {}
        for name, step in _TEXT_STEPS.items():
            if name in self.steps:
                before = text
                text = step(text) if starts_document else step(_BEFORE + text)[len(_BEFORE) :]
                if text is not before and text != before:
                    changes[name] = len(before) - len(text)
        return text, changes


def _compose(text: str) -> str:
    """Return the text in NFC. The library orders the marks on a letter in quadratic time, so that
    160,000 of them took half a minute."""
    if text.isascii():
        return text
    many, beyond = _marks()
    parts = beyond.split(text) if any(pattern.search(text) for pattern in many) else [text]
    return "".join(unicodedata.normalize("NFC", part) for part in parts)


@functools.cache
def _marks() -> tuple[list[re.Pattern[str]], re.Pattern[str]]:
    """Return patterns of what may be a letter with too many combining marks, and one for the places after each mark
    beyond the limit. A set of characters is searched fast only within the first 65,536."""
    marks = [*filter(unicodedata.combining, map(chr, _PLACES_OF_MARKS))]
    first, all_marks = f"[{''.join(mark for mark in marks if mark < _ASTRAL)}]", f"[{''.join(marks)}]"
    astral = f"[{_ASTRAL}-{marks[-1]}]"
    many = [re.compile(f"{kind}{kind}{{{_MOST_MARKS}}}") for kind in (first, astral)]
    return many, re.compile(f"(?={all_marks})(?<={all_marks}{{{_MOST_MARKS}}})")


def _drop_control(text: str) -> str:
    content = text.encode()  # testing the bytes takes a tenth of the time of `sub`
    if b"\xc2" not in content and len(content.translate(None, _CONTROL_BYTES)) == len(content):
        return text
    text = _OVERSTRUCK.sub("", _ESCAPE.sub("", text))
    return _CONTROL.sub("", _LINE_SEPARATORS.sub("\n", text))


def _tidy_whitespace(text: str) -> str:
    # The tests are cheap, but the substitutions are expensive.
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    has_tabs = "\t" in text
    if has_tabs or " \n" in text:
        text = _BLANKS_AT_LINE_END.sub("", text)
    if has_tabs or "  " in text:
        text = _BLANKS_INSIDE_LINE.sub(" ", text)
    if "\n\n\n\n" in text:
        text = _EMPTY_LINES.sub("\n\n\n", text)
    return text


_TEXT_STEPS: dict[str, Callable[[str], str]] = {
    "nfc": _compose,
    "control": _drop_control,
    "whitespace": _tidy_whitespace,
}


def digest_of(content: bytes) -> bytes:
    """Return 16 bytes that identify a text. The bytes also decide whether the text is held out for validation."""
    return hashlib.blake2b(content, digest_size=16, person=b"atlas-text").digest()
