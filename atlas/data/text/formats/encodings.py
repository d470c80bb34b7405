"""Text that is not UTF-8 → its encoding.

`charset-normalizer` recognises East Asian, Cyrillic, Greek, Arabic, Hebrew and Thai encodings. The Western and Central
European ones, whose bytes all give Latin letters, differ in a few accented letters: there the language decides in whose
alphabet the accented letters are. If two encodings are about as likely, the answer is that neither is certain.
"""

from __future__ import annotations

import re
import unicodedata
from typing import Any

ENCODINGS = [
    "cp1252",
    "cp1250",
    "cp1254",
    "cp1257",
    "iso8859_2",
    "cp850",
    "mac_roman",
    "iso8859_15",
    "cp1251",
    "koi8_r",
    "koi8_u",
    "cp866",
    "iso8859_5",
    "gb18030",
    "big5",
    "cp932",
    "euc_jp",
    "cp949",
    "cp1253",
    "iso8859_7",
    "cp1255",
    "iso8859_8",
    "cp1256",
    "iso8859_6",
    "cp874",
]
"""The encodings that a text can have, the common ones first. Rare ones are left out: the guess would often be wrong."""
_ALPHABETS = [
    "àâæçéèêëîïôœùûüÿ",
    "äöüß",
    "áéíñóúü",
    "áàâãçéêíóôõú",
    "àèéìíîòóùú",
    "åäöé",
    "åæøéôò",
    "áéëïóöüèê",
    "áðéíóúýþæö",
    "àçèéíïòóúü",
    "ąćęłńóśźż",
    "áčďéěíňóřšťúůýž",
    "áäčďéíĺľňóôŕšťúýž",
    "áéíóöőúüű",
    "čćđšž",
    "ăâîșțşţ",
    "çğıöşüâîûi̇",
    "āčēģīķļņšūž",
    "ąčęėįšųūž",
    "äõöüšž",
    "áâđêôơưàảãạèéẻẽẹ",
]
"""Accented letters of French, German, Spanish, Portuguese, Italian, Swedish, Danish, Dutch, Icelandic, Catalan, Polish,
Czech, Slovak, Hungarian, Croatian, Romanian, Turkish, Latvian, Lithuanian, Estonian and Vietnamese."""
_PUNCTUATION = frozenset("«»‹›„“”‚‘’–—…°§·•¿¡€£©®™´ªº\xa0\xad×")
_FOREIGN = re.compile("[a-z]?[^\x00-\x7f]")
_CONTROL = re.compile("[\x80-\x9f\ufffd]")
_LATIN = ["cp1252", "cp1250", "cp1254", "cp1257", "iso8859_2", "iso8859_15"]
_CLEAR = 0.02
_SAMPLE_BYTES = 1 << 16
_ALIKE = 0.1
_SURE, _JAPANESE = 0.9, 0.2


def guess_encodings(text: bytes) -> tuple[list[str], bool]:
    """Return the encodings that a text may have, the likeliest first, and whether the first one is certain."""
    from charset_normalizer import from_bytes

    at = next((place for place, byte in enumerate(text) if byte >= 0x80), 0)
    sample = text if at < _SAMPLE_BYTES // 2 else text[text.rfind(b"\n", 0, at) + 1 :]
    sample = sample[:_SAMPLE_BYTES]
    sample = sample[: sample.rfind(b"\n") + 1] or sample
    found: list[Any] = [*from_bytes(sample, cp_isolation=ENCODINGS, enable_fallback=False)]
    names = [_commonest(match) for match in found]
    if found and not _is_latin(str(found[0])):
        return names, _is_clear(found)
    most = found[0].chaos + _ALIKE if found else 1.0
    alike = [name for name, match in zip(names, found, strict=True) if match.chaos <= most] or _LATIN
    texts = {name: sample.decode(name, errors="replace") for name in alike}
    shares = {
        name: _share_in_one_alphabet(text)
        for name, text in texts.items()
        if _is_latin(text) and not _CONTROL.search(text)
    }
    ranked = sorted(shares, key=lambda name: (-shares[name], ENCODINGS.index(name)))
    is_certain = [shares[name] >= _SURE and shares[name] > shares[ranked[0]] - _CLEAR for name in ranked]
    return [*ranked, *(name for name in names if name not in ranked)], is_certain.count(True) == 1


def _is_clear(found: list[Any]) -> bool:
    """Return whether the first of the encodings that were found is much likelier than the others."""
    best = found[0]
    has_kana = _share_of_kana(str(best)) > _JAPANESE
    rivals = [
        match
        for match in found[1:]
        if match.chaos <= best.chaos + _CLEAR
        and str(match) != str(best)
        and not (has_kana and _share_of_kana(str(match)) < _JAPANESE / 4)
    ]
    return all(match.coherence <= best.coherence - _ALIKE for match in rivals)


def _share_of_kana(text: str) -> float:
    foreign = [char for char in text if ord(char) > 0x7F]
    return sum("\u3040" <= char <= "\u30ff" for char in foreign) / max(1, len(foreign))


def _commonest(match: Any) -> str:
    """Return the commonest of the encodings that give the same text."""
    names = {match.encoding, *match.could_be_from_charset} & {*ENCODINGS}
    return str(min(names, key=ENCODINGS.index))


def _is_latin(text: str) -> bool:
    letters = [char for char in text if ord(char) > 0x7F and char.isalpha()][:1000]
    latin = sum("LATIN" in unicodedata.name(char, "") for char in letters)
    return latin > len(letters) / 2


def _share_in_one_alphabet(text: str) -> float:
    """Return the share of the characters beyond ASCII that are in the alphabet of one language, or punctuation. A
    capital after a small letter does not count."""
    foreign = [char for char in _FOREIGN.findall(text) if char[-1] not in _PUNCTUATION]
    in_words = [char.lower() for char in foreign if not (len(char) == 2 and char[1].isupper())]
    return max(sum(char[-1] in letters for char in in_words) for letters in _ALPHABETS) / max(1, len(foreign))
