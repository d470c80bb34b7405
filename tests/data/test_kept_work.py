"""An error in the input keeps the work that was done before it, also for the corrected input."""

from __future__ import annotations

import gzip
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from atlas.cli import main
from atlas.data import prepare
from atlas.data.prepare import batching, checks, pipeline
from atlas.data.prepare.pipeline import prepare_text_cached
from atlas.data.prepare.tokenize import Encoder
from atlas.data.prepare.workspace import Workspace
from atlas.data.text import files
from atlas.data.text.documents import Reading
from atlas.data.text.formats import decode
from atlas.errors import DataError
from atlas.tokenizer import Tokenizer
from tests.data.test_workers import bits, documents
from tests.toy import CharacterTokenizer

TEXTS = documents(300)[:300]
ROWS = [json.dumps({"text": text}) for text in TEXTS]


@pytest.fixture(autouse=True)
def _small_sizes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(batching, "BATCH_CHARS", 3000)
    monkeypatch.setattr(checks, "_PROBE_CHARS", 3000)  # it would find an error before the work begins
    monkeypatch.setattr(files, "_BUFFER", 4096)
    monkeypatch.setattr(decode, "_CHUNK_BYTES", 4096)
    monkeypatch.setenv("ATLAS_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The texts that were tokenized in this process, so far."""
    texts: list[str] = []
    encode = Encoder.__call__

    def call(self: Encoder, parts: list[batching.Part]) -> object:
        texts.extend(part.text for part in parts)
        return encode(self, parts)

    monkeypatch.setattr(Encoder, "__call__", call)
    return texts


def rows_as(name: str, rows: list[str]) -> bytes:
    content = "\n".join(rows).encode()
    return gzip.compress(content, 0) if name.endswith(".gz") else content


BAD: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "a cut row": ("r.jsonl", lambda p: p.write_bytes(p.read_bytes()[:-5]), "line 300: is not JSON"),
    "another field": (
        "r.jsonl",
        lambda p: p.write_bytes(rows_as("r", [*ROWS[:299], '{"body": "x"}'])),
        "line 300: has no field 'text'",
    ),
    "a cut gzip": ("r.jsonl.gz", lambda p: p.write_bytes(p.read_bytes()[:-300]), "the file is damaged"),
    "a damaged column": ("r.parquet", lambda p: damage(p), "is not a complete Parquet file"),
}


def damage(path: Path) -> None:
    """Overwrite the middle of the last row group."""
    metadata = parquet.read_metadata(path)
    column = metadata.row_group(metadata.num_row_groups - 1).column(0)
    content, middle = (
        bytearray(path.read_bytes()),
        column.data_page_offset + column.total_compressed_size // 2,
    )
    content[middle : middle + 40] = b"\xff" * 40
    path.write_bytes(content)


@pytest.mark.parametrize("kind", BAD)
def test_an_error_near_the_end_of_a_file_costs_only_its_end(
    kind: str, tmp_path: Path, encoded: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    name, spoil, reason = BAD[kind]
    path, out = tmp_path / name, tmp_path / "out"
    if name.endswith(".parquet"):
        table = pyarrow.table({"text": TEXTS})
        parquet.write_table(table, path, row_group_size=20, compression="gzip", use_dictionary=False)
    else:
        path.write_bytes(rows_as(name, ROWS))
    good = path.read_bytes()
    prepare([path], tmp_path / "fresh")
    spoil(path)
    command = ["prepare", "--input", str(path), "--output", str(out), "--workers", "1", "--on-error", "stop"]
    for again in (False, True):
        encoded.clear()
        assert main(command) == 2
        output = capsys.readouterr().err
        assert reason in output
        assert "tokens) is kept; the same command resumes it" in output
        assert ("tokens were done before; resuming after them" in output) == again
        assert len(encoded) < 25 if again else len(encoded) > 250
    path.write_bytes(good)
    encoded.clear()
    assert main(command) == 0
    assert "tokens were done before; resuming after them" in capsys.readouterr().err
    assert len(encoded) < 50
    assert bits(out) == bits(tmp_path / "fresh")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("remedy", ["correct", "remove", "replace"])
def test_one_bad_file_of_many_costs_no_other(remedy: str, tmp_path: Path, encoded: list[str]) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(120):
        (folder / f"{number}.txt").write_text(TEXTS[number], encoding="utf-8")
    (folder / "110.txt").write_bytes(gzip.compress(b"cut")[:-3])
    with pytest.raises(DataError, match=r"110\.txt: the file is damaged"):
        prepare([folder], tmp_path / "out", workers=1, reading=Reading(on_error="stop"))
    if remedy == "remove":
        (folder / "110.txt").unlink()
    else:
        (folder / "110.txt").write_text(TEXTS[110] if remedy == "correct" else "new", encoding="utf-8")
    encoded.clear()
    dataset = prepare([folder], tmp_path / "out", workers=1).dataset
    assert len(encoded) == (9 if remedy == "remove" else 10)
    assert dataset.manifest == prepare([folder], tmp_path / "fresh").dataset.manifest
    assert bits(tmp_path / "out") == bits(tmp_path / "fresh")


def edit(folder: Path, draw: random.Random) -> None:
    """Change the files in a folder in one of many ways."""
    files = sorted(folder.iterdir())
    path = draw.choice(files)
    rows = path.read_bytes().splitlines()
    kind = draw.choice(["delete", "append", "change", "swap", "rename", "add", "row", "nothing"])
    if kind == "delete" and len(files) > 3:
        path.unlink()
    elif kind == "append":
        path.write_bytes(b"\n".join([*rows, draw.choice(ROWS).encode()]))
    elif kind == "change":
        rows[draw.randrange(len(rows))] = json.dumps({"text": f"changed {draw.random()}"}).encode()
        path.write_bytes(b"\n".join(rows))
    elif kind == "swap":
        path.write_bytes(b"\n".join(draw.sample(rows, len(rows))))
    elif kind == "rename":
        path.rename(folder / f"{draw.random()}.jsonl")
    elif kind == "add":
        shutil.copy(path, folder / f"{draw.random()}.jsonl")
    elif kind == "row":
        del rows[draw.randrange(len(rows))]
        path.write_bytes(b"\n".join([*rows, ROWS[0].encode()]))


@pytest.mark.parametrize(
    "seed", [*range(6), *(pytest.param(n, marks=pytest.mark.slow) for n in range(6, 60))]
)
def test_whatever_is_edited_after_an_error_the_dataset_is_that_of_the_text(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Errors and edits in turn, then the same bits and manifest as without them."""
    monkeypatch.setattr(pipeline, "COMMIT_SECONDS", 0)
    draw = random.Random(seed)
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(6):
        rows = ROWS[50 * number : 50 * number + draw.choice((3, 20, 50))]
        rows.append(json.dumps({"text": "not UTF-8: \udcff"}, ensure_ascii=False))
        (folder / f"{number}.jsonl").write_bytes("\n".join(rows).encode("utf-8", "surrogateescape"))
    tokenizer = Tokenizer.wrap(CharacterTokenizer())
    options = {"val_fraction": 0.2, "shard_tokens": 5000, "workers": 1}
    for _ in range(3):
        path = draw.choice(sorted(folder.iterdir()))
        good = path.read_bytes()
        rows = good.splitlines()
        rows.insert(draw.randrange(len(rows) + 1), b"{")
        path.write_bytes(b"\n".join(rows))
        with pytest.raises(DataError, match="is not JSON"):
            prepare([folder], tmp_path / "out", tokenizer, reading=Reading(on_error="stop"), **options)  # type: ignore[arg-type]
        path.write_bytes(good)
        for _ in range(draw.randrange(3)):
            edit(folder, draw)
    out = prepare([folder], tmp_path / "out", tokenizer, **options)  # type: ignore[arg-type]
    fresh = prepare([folder], tmp_path / "fresh", tokenizer, **options)  # type: ignore[arg-type]
    assert out.dataset.manifest == fresh.dataset.manifest
    assert bits(tmp_path / "out") == bits(tmp_path / "fresh")


def test_a_text_that_train_prepares_is_not_done_again_either(tmp_path: Path, encoded: list[str]) -> None:
    path = tmp_path / "r.jsonl"
    path.write_bytes(rows_as("r", ROWS)[:-5])
    with pytest.raises(DataError, match="line 300"):
        prepare_text_cached([path], Tokenizer.gpt2(), 0.05, Reading(on_error="stop"))
    path.write_bytes(rows_as("r", ROWS))
    encoded.clear()
    folder = prepare_text_cached([path], Tokenizer.gpt2(), 0.05)
    assert encoded == [TEXTS[-1]]
    assert [entry.name for entry in folder.parent.iterdir()] == [folder.name]


def test_states_that_are_not_usable_are_gone_before_their_work_is(tmp_path: Path) -> None:
    """Otherwise a kill and the older text would give a state whose files are another's."""
    Workspace(tmp_path / "work", "key").commit({"at": 1}, {"at": 2})
    assert Workspace(tmp_path / "work", "key", lambda state: state["at"] == 1).state == {"at": 1}
    assert Workspace(tmp_path / "work", "key").states == [{"at": 1}]


def test_a_file_that_changes_while_it_is_prepared_is_prepared_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "r.jsonl"
    path.write_bytes(rows_as("r", ROWS))
    encode = Encoder.__call__

    def change(self: Encoder, parts: list[batching.Part]) -> object:
        path.write_bytes(rows_as("r", ROWS[:200]))
        return encode(self, parts)

    with monkeypatch.context() as patch:
        patch.setattr(Encoder, "__call__", change)
        prepare([path], tmp_path / "out", workers=1)
    assert not prepare([path], tmp_path / "out", workers=1).unchanged
