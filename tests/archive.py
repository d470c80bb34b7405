"""A small archive in the layout of the Kaggle one, and the documents that sources give."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from atlas.data.text.report import SourceReport
from atlas.data.text.sources import Sources


def whole(pieces: Any) -> list[str]:
    """The documents that pieces make up."""
    documents, started = [""], False
    for piece in pieces:
        documents[-1] += piece.text
        started = True
        if piece.ends_document:
            documents.append("")
            started = False
    return documents if started else documents[:-1]


def documents_of(*paths: Path, **options: Any) -> list[str]:
    report = SourceReport()
    sources = Sources(paths, **options)
    documents = whole(sources.documents(report))
    report.check_faults(None, total_bytes=sources.total_bytes)
    return documents


def article(number: int, *, newline: str = "\n") -> str:
    lines = [
        f"Title of {number}",
        "",
        f"Article {number} begins here. It has sentences.",
        "And a second line.",
        "",
        f"Its last paragraph counts to {number}.",
    ]
    return newline.join(lines)


def kaggle_files(
    count: int = 60, gap: str = "\n\n\n", *, combined: bool = True, newline: str = "\n"
) -> dict[str, str]:
    """An archive in the layout of plaintext-wikipedia-simpleenglish; one part ends in mid-article."""
    everything = gap.replace("\n", newline).join(article(n, newline=newline) for n in range(count)) + newline
    third = len(everything) // 3
    parts = {
        "1of2/wiki_00": everything[:third],
        "1of2/wiki_01": everything[third : 2 * third],
        "2of2/wiki_00": everything[2 * third :],
    }
    return {"AllCombined.txt": everything, **parts} if combined else parts


def write_zip(path: Path, files: Mapping[str, str | bytes], order: Sequence[str] | None = None) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in order or files:
            archive.writestr(name, files[name])
    return path


def write_folder(path: Path, files: Mapping[str, str | bytes]) -> Path:
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return path


ARTICLES = [article(n) for n in range(60)]
