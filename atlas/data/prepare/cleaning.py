"""What is done to a document before it becomes tokens. Each step has a name, is counted, and can be left out.

    nfc          Unicode in its composed form (NFC, UAX #15), so that one word has one spelling
    control      control characters other than tab and line ends go
    whitespace   line ends become \\n; blanks at a line's end go; a run of blanks inside a line becomes one blank
                 (indentation stays); more than two empty lines become two
    duplicates   of documents with the same text the first is kept (`atlas.data.prepare.dedup`)

What no step names is kept to the byte. Then a document of fewer than `min_chars` characters goes, and with
`near_dedup` one that is nearly another.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from atlas.errors import DataError

STEPS = ("nfc", "control", "whitespace", "duplicates")

_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
_CONTROL_BYTES = bytes(byte for byte in [*range(0x20), 0x7F] if byte not in b"\t\n\r")
# Each begins at one place of a run only, so that a run of any length is walked once.
_BLANKS_AT_LINE_END = re.compile(r"(?<![ \t])[ \t]+(?=\n)")
_BLANKS_INSIDE_LINE = re.compile(r"(?<=\S)[ \t]{2,}(?=\S)")
_EMPTY_LINES = re.compile(r"\n{4,}")
_BEFORE = "\ufffc"  # is no white space, and combines with nothing


@dataclass(frozen=True)
class Cleaning:
    """Which steps are taken."""

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
        """The steps of `nfc,control`, in the order in which they are taken; `none` is none of them."""
        wished = [name.strip() for name in names.split(",") if name.strip()]
        if wished == ["none"]:
            return ()
        return Cleaning(tuple(sorted(wished, key=(*STEPS, *wished).index))).steps

    @property
    def drops_duplicates(self) -> bool:
        return "duplicates" in self.steps

    def clean(self, text: str, *, starts_document: bool = True) -> tuple[str, dict[str, int]]:
        """The cleaned text, and by how many characters each step that changed it made it shorter."""
        changes: dict[str, int] = {}
        for name, step in _TEXT_STEPS.items():
            if name in self.steps:
                before = text
                text = step(text) if starts_document else step(_BEFORE + text)[len(_BEFORE) :]
                if text is not before and text != before:
                    changes[name] = len(before) - len(text)
        return text, changes

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"steps": list(self.steps)}


def _compose(text: str) -> str:
    if text.isascii() or unicodedata.is_normalized("NFC", text):
        return text
    return unicodedata.normalize("NFC", text)


def _drop_control(text: str) -> str:
    content = text.encode()  # asked of bytes, the question costs a tenth
    if b"\xc2" not in content and len(content.translate(None, _CONTROL_BYTES)) == len(content):
        return text
    return _CONTROL.sub("", text)


def _tidy_whitespace(text: str) -> str:
    # The questions cost little, the substitutions much.
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
    """16 bytes that name a text; whether it is held out for validation is read from them, too."""
    return hashlib.blake2b(content, digest_size=16, person=b"atlas-text").digest()
