"""A corpus that every machine with Python has: the documentation in Python's standard library.

About 2 MB of English by many authors: the docstrings of the library's source files, and the language reference that
`help()` shows. Atlas parses the source files, and does not import them.
"""

from __future__ import annotations

import ast
import inspect
import json
import sysconfig
import warnings
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from atlas.errors import DataError
from atlas.files import replacing

_SHORTEST = 80
"""A text with fewer characters is not used as a document."""
_ENOUGH_BYTES = 200_000
_NOT_THE_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


def write_demo_corpus(path: str | Path, *, library: str | Path | None = None) -> Path:
    """Write the documentation of `library` to `path`, as JSONL with one document per line.

    By default, `library` is the standard library of this Python. Each document occurs once. The order is the same at
    every call.

    Raises `DataError` if this Python installation contains too little documentation.
    """
    path = Path(path)
    texts = _documents(Path(library or sysconfig.get_paths()["stdlib"]))
    documents = dict.fromkeys(text for text in texts if len(text) >= _SHORTEST)
    text = "".join(json.dumps({"text": document}, ensure_ascii=False) + "\n" for document in documents)
    if len(text.encode()) < _ENOUGH_BYTES:
        raise DataError(
            "this Python installation contains almost no documentation (a stripped build?); give your own text with "
            "--data"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def _documents(library: Path) -> Iterator[str]:
    topics = library / "pydoc_data" / "topics.py"
    for source in sorted(library.rglob("*.py")):
        if source != topics and not _NOT_THE_LIBRARY & set(source.relative_to(library).parts):
            for node in _nodes(source):
                if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                    yield ast.get_docstring(node) or ""
    if topics.exists():
        for node in _nodes(topics):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield inspect.cleandoc(node.value)


def _nodes(source: Path) -> list[ast.AST]:
    """Return the nodes of a file's syntax tree, or an empty list if this Python cannot parse the file."""
    with warnings.catch_warnings(), suppress(SyntaxError, ValueError):
        warnings.simplefilter("ignore")  # invalid escapes in old sources
        return list(ast.walk(ast.parse(source.read_bytes())))
    return []
