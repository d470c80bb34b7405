"""Text that is not UTF-8: decoded if its bytes show the encoding, else refused; never replaced in silence."""

from __future__ import annotations

import bz2
import lzma
from pathlib import Path

import pytest

from atlas.data.text.formats.encodings import guess_encodings
from atlas.data.text.report import SourceReport
from atlas.data.text.sources import Reading, Sources
from atlas.errors import AtlasError
from tests.archive import documents_of, whole

# The first article of the Universal Declaration of Human Rights, or a sentence from a poem.
SENTENCES = {
    "cp1252": "Tous les êtres humains naissent libres et égaux en dignité et en droits. Ça, c’est l’été à la forêt.",
    "cp1250": "Wszyscy ludzie rodzą się wolni i równi pod względem swej godności i swych praw. Są oni obdarzeni "
    "rozumem i sumieniem i powinni postępować wobec innych w duchu braterstwa. Zażółć gęślą jaźń.",
    "cp1251": "Все люди рождаются свободными и равными в своем достоинстве и правах. Они наделены разумом и совестью.",
    "koi8_r": "Все люди рождаются свободными и равными в своем достоинстве и правах. Они наделены разумом и совестью.",
    "cp866": "Все люди рождаются свободными и равными в своем достоинстве и правах. Они наделены разумом и совестью.",
    "gb18030": "人人生而自由，在尊严和权利上一律平等。他们赋有理性和良心，并应以兄弟关系的精神相对待。",
    "big5": "人人生而自由，在尊嚴和權利上一律平等。他們賦有理性和良心，並應以兄弟關係的精神相對待。",
    "cp932": "すべての人間は、生まれながらにして自由であり、かつ、尊厳と権利とについて平等である。",
    "euc_jp": "すべての人間は、生まれながらにして自由であり、かつ、尊厳と権利とについて平等である。",
    "iso2022_jp": "すべての人間は、生まれながらにして自由であり、かつ、尊厳と権利とについて平等である。",
    "cp949": "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다. "
    "인간은 천부적으로 이성과 양심을 부여받았다.",
    "cp1253": "Όλοι οι άνθρωποι γεννιούνται ελεύθεροι και ίσοι στην αξιοπρέπεια και τα δικαιώματα.",
    "cp1254": "Bütün insanlar hür, haysiyet ve haklar bakımından eşit doğarlar. Akıl ve vicdana sahiptirler ve "
    "birbirlerine karşı kardeşlik zihniyeti ile hareket etmelidirler. İğne, çatı, şöyle.",
    "cp1255": "בראשית ברא אלהים את השמים ואת הארץ והארץ היתה תהו ובהו וחשך על פני תהום ורוח אלהים מרחפת על פני המים.",
    "cp1256": "يولد جميع الناس أحرارا متساوين في الكرامة والحقوق. وقد وهبوا عقلا وضميرا.",
    "cp874": "มนุษย์ทั้งหลายเกิดมามีอิสระและเสมอภาคกันในเกียรติศักดิ์และสิทธิ",
}


@pytest.mark.parametrize("encoding", SENTENCES)
def test_a_text_is_decoded_in_the_encoding_that_its_bytes_show(encoding: str, tmp_path: Path) -> None:
    text = f"{SENTENCES[encoding]}\n" * 5
    (tmp_path / "a.txt").write_bytes(text.encode(encoding))
    report = SourceReport()
    sources = Sources([tmp_path])
    assert whole(sources.documents(report)) == [text]
    assert not report.undecodable
    assert any(": not UTF-8; decoded as" in note for note in sources.notes(report))


def test_rows_are_decoded_too(tmp_path: Path) -> None:
    rows = "".join(f'{{"text": "{SENTENCES["cp1251"]} {n}"}}\n' for n in range(5))
    (tmp_path / "a.jsonl").write_bytes(rows.encode("cp1251"))
    assert documents_of(tmp_path) == [f"{SENTENCES['cp1251']} {n}" for n in range(5)]


def test_an_uncertain_encoding_is_refused_with_the_likeliest(tmp_path: Path) -> None:
    hebrew = "כל בני האדם נולדו בני חורין ושווים בערכם ובזכויותיהם. כולם חוננו בתבונה ובמצפון."
    names, is_certain = guess_encodings(hebrew.encode("cp1255"))  # the bytes also give Russian letters
    assert "cp1255" in names
    assert not is_certain
    unclear = b"na\xefve caf\xe9 \x99\xff\xfe\xfd\xfc " * 3
    (tmp_path / "a.txt").write_bytes(unclear)
    with pytest.raises(AtlasError, match=r"a\.txt: is (neither UTF-8|not UTF-8).*--encoding"):
        documents_of(tmp_path)
    assert documents_of(tmp_path, reading=Reading(encoding="latin-1")) == [unclear.decode("latin-1")]


def test_more_than_a_tenth_of_a_percent_of_replaced_bytes_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"a few words " * 1000 + b"\xff")
    assert documents_of(tmp_path) == ["a few words " * 1000 + "\ufffd"]
    (tmp_path / "a.txt").write_bytes(b"a few words " * 200_000 + b"\xff\xfe" * 4000)
    with pytest.raises(
        AtlasError, match=r"8,000 of 2,408,000 bytes are not UTF-8; name its encoding with --encoding"
    ):
        documents_of(tmp_path)


def test_an_unknown_encoding_is_refused() -> None:
    for name in ("utf-99", "base64", "rot13"):
        with pytest.raises(AtlasError, match=f"--encoding {name}: no such encoding"):
            Reading(encoding=name)


def test_utf_32_and_a_named_encoding_with_zero_bytes_are_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("words".encode("utf-32"))
    assert documents_of(tmp_path) == ["words"]
    (tmp_path / "a.txt").write_bytes("words".encode("utf-16-le"))
    with pytest.raises(AtlasError, match="a binary file"):
        documents_of(tmp_path)
    assert documents_of(tmp_path, reading=Reading(encoding="utf-16-le")) == ["words"]


@pytest.mark.parametrize("name", ["a.txt.xz", "a.txt.bz2", "b.txt.gz"])
def test_the_bytes_decide_how_a_file_is_compressed(name: str, tmp_path: Path) -> None:
    """A browser may unpack a download and keep its name."""
    content = b"A river ran past the mill.\n" * 1000
    pack = {"xz": lambda data: lzma.compress(data[:99]) + lzma.compress(data[99:]), "bz2": bz2.compress}
    (tmp_path / name).write_bytes(pack.get(name.rpartition(".")[2], bytes)(content))
    assert documents_of(tmp_path) == [content.decode()]


def test_an_xz_file_that_needs_much_memory_or_is_cut_is_refused(tmp_path: Path) -> None:
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": 1 << 30}]
    packed = lzma.compress(b"words " * 1000, filters=filters)
    (tmp_path / "a.txt.xz").write_bytes(packed)
    with pytest.raises(AtlasError, match="Memory usage limit"):
        documents_of(tmp_path)
    (tmp_path / "a.txt.xz").write_bytes(lzma.compress(b"words " * 1000)[:-10])
    with pytest.raises(AtlasError, match="is damaged"):
        documents_of(tmp_path)
