"""What lies where Atlas writes, and is the user's own: it stays, and links and mount points are honoured or refused."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from atlas.cli import main
from atlas.data.shards import open_dataset
from atlas.data.text.sources import SourceReport, Sources
from atlas.files import unused_name, write_folder
from tests.conftest import corpus
from tests.runs import layer, logged, trained

pytestmark = pytest.mark.skipif(os.name == "nt", reason="makes links and pipes")
PREPARE = ("prepare", "--tokenizer", "tests.toy:tokenizer", "--input")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a run with GPT-2's tokenizer, which can be exported."""
    folder = tmp_path_factory.mktemp("exportable")
    (folder / "river.txt").write_text(corpus(), encoding="utf-8")
    trained(layer(folder / "run", folder / "river.txt", data__tokenizer=None, training__max_steps=2))
    return folder / "run"


def atlas(*words: object) -> int:
    return main([str(word) for word in words])


def error_of(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert atlas(*words) == 2
    [error] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return error


def test_an_export_removes_nothing_beside_its_place(tmp_path: Path, run: Path) -> None:
    beside = ["model.tmp", "model.gguf.tmp", "report.html.tmp", "Modelfile.tmp"]
    for name in beside:
        (tmp_path / "out" / name).mkdir(parents=True)
        (tmp_path / "out" / name / "thesis").write_text("mine", encoding="utf-8")
    out, export = tmp_path / "out", ("export", "--checkpoint", run / "atlas_best.pt")
    assert atlas(*export, "--format", "hf", "--output", out / "model") == 0
    assert atlas(*export, "--output", out / "model.gguf", "--no-verify", "--modelfile") == 0
    assert atlas("report", run, "--output", out / "report.html") == 0
    assert {path.parent.name for path in out.glob("*/thesis")} == {*beside}
    assert sorted(os.listdir(out)) == sorted([*beside, "model", "model.gguf", "report.html", "Modelfile"])


def test_only_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    running, killed = (f".model.new-{pid}-0123abcd" for pid in (os.getpid(), ended.pid))
    for name in (running, killed, ".model.new-1-x", ".other.new-1-0123abcd"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    assert not unused_name(tmp_path / "model").exists()
    assert sorted(os.listdir(tmp_path)) == sorted([running, ".model.new-1-x", ".other.new-1-0123abcd"])


def test_two_exports_into_one_folder_are_not_mixed(tmp_path: Path) -> None:
    begun, may_end = threading.Event(), threading.Event()

    def write(name: str, folder: Path) -> None:
        (folder / "a").write_text(name, encoding="utf-8")
        if name == "first":
            begun.set()
            assert may_end.wait(30)
        (folder / "b").write_text(name, encoding="utf-8")

    first = threading.Thread(
        target=write_folder, args=(tmp_path / "model", ("a", "b"), lambda folder: write("first", folder))
    )
    first.start()
    assert begun.wait(30)
    write_folder(tmp_path / "model", ("a", "b"), lambda folder: write("second", folder))
    may_end.set()
    first.join()
    assert [(tmp_path / "model" / name).read_text(encoding="utf-8") for name in "ab"] == ["first"] * 2
    assert os.listdir(tmp_path) == ["model"]


def test_a_link_stays_and_its_target_is_replaced(
    tmp_path: Path, text_file: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("disk").mkdir()
    for name in ("data", "model"):
        Path(name).symlink_to(f"disk/{name}")
    export = ("export", "--checkpoint", run / "atlas_best.pt", "--format", "hf")
    other = tmp_path / "other.txt"
    other.write_text(corpus(900), encoding="utf-8")
    for text in (text_file, other):
        assert atlas(*PREPARE, text, "--output", "data") == 0
        assert atlas(*export, "--output", "model") == 0
        assert open_dataset("disk/data").manifest.source["paths"] == [str(text)]
    assert [Path(name).readlink() for name in ("data", "model")] == [Path("disk/data"), Path("disk/model")]
    assert sorted(os.listdir("disk")) == ["data", "model"]


def test_the_current_folder_is_not_replaced(
    tmp_path: Path,
    text_file: Path,
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    export = ("export", "--checkpoint", run / "atlas_best.pt", "--format", "hf")
    (tmp_path / "new" / "below").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "new" / "below")
    for place in (".", "..", tmp_path / "new"):
        for words in ((*PREPARE, text_file), export):
            error = error_of(capsys, *words, "--output", place)
            assert f"{place}: is the folder in which this command runs" in error
    assert "is the root of a disk or volume" in error_of(capsys, *PREPARE, text_file, "--output", "/")


def test_a_folder_that_was_removed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert atlas("generate", "--prompt", "x") == 2
    assert "the current folder was removed or replaced" in capsys.readouterr().err


def test_a_file_system_that_cannot_be_written_is_named_first(
    tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / ".data.lock").mkdir()  # as where only the folder itself may be written
    error = error_of(capsys, *PREPARE, text_file, "--output", tmp_path / "data")
    assert f"{tmp_path}: the dataset cannot be made in this folder (" in error
    (tmp_path / "file").touch()
    monkeypatch.setenv("ATLAS_CACHE_DIR", str(tmp_path / "file"))
    error = error_of(capsys, "train", "--train-data", text_file, "--output-dir", tmp_path / "run")
    assert "set ATLAS_CACHE_DIR to a folder that you may write to" in error


def test_a_pipe_among_what_was_left_does_not_stop_the_next_call(tmp_path: Path, text_file: Path) -> None:
    names = [".data.replaced-0123abcd", ".data.preparing-01", f".data.stdin-{2**31 - 1}"]
    for name in names:
        os.mkfifo(tmp_path / name)
    assert atlas(*PREPARE, text_file, "--output", tmp_path / "data") == 0
    assert not {*names} & {*os.listdir(tmp_path)}


@pytest.mark.parametrize("kind", ["link", "file"])
def test_unfinished_work_is_no_link(
    tmp_path: Path, text_file: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    (tmp_path / "keep").mkdir()
    (tmp_path / "keep/journal.json").write_text("mine", encoding="utf-8")
    strange = tmp_path / ".data.preparing"
    strange.symlink_to("keep") if kind == "link" else strange.touch()
    error = error_of(capsys, *PREPARE, text_file, "--output", tmp_path / "data")
    assert f"{strange}: is not a folder that atlas prepare has made; remove it" in error
    assert os.listdir(tmp_path / "keep") == ["journal.json"]


def test_what_cannot_be_written_completely_is_one_line(
    tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """safetensors has an error of its own for a full disk."""
    import safetensors.torch

    def full(*_: object, **__: object) -> None:
        raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    error = error_of(
        capsys, "export", "--checkpoint", run / "atlas_best.pt", "--format", "hf", "--output", tmp_path / "m"
    )
    assert "m: cannot be written (I/O error: No space left on device (os error 28))" in error
    assert not (tmp_path / "m").exists()


def test_no_resume_moves_only_the_runs_own_files(
    tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert atlas(*PREPARE, text_file, "--output", "atlas_data") == 0
    Path("atlas_model").mkdir()
    Path("atlas_notes.txt").write_text("mine", encoding="utf-8")
    Path("atlas_model.gguf").write_bytes(b"GGUF")
    own = {"atlas_data", "atlas_model", "atlas_notes.txt", "atlas_model.gguf", text_file.name}
    for options in ({}, {"no_resume": True}):
        _, result = trained(layer(Path("."), Path("atlas_data"), training__max_steps=2), **options)
        assert result.outcome == "finished"
    assert own <= {*os.listdir()}
    assert not own & {*os.listdir("previous-1")}
    assert "atlas_best.pt" in os.listdir("previous-1")


def test_a_run_in_the_folder_of_its_text_does_not_read_itself(tmp_path: Path, text_file: Path) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    text_file.rename(texts / "river.txt")
    trained(layer(texts / "run", texts, training__max_steps=2))
    _, result = trained(layer(texts / "run", texts, training__max_steps=4), resume="auto")
    assert result.outcome == "finished"
    assert [line["step"] for line in logged(texts / "run")] == [1, 2, 3, 4]
    sources = Sources([texts])
    assert [file.name for file in sources.files] == [str(texts / "river.txt")]
    assert sources.notes(SourceReport()) == [
        f"1 output folders of atlas train are left out ({texts / 'run'} …)"
    ]


def test_an_evaluation_reads_the_bytes_that_were_prepared(
    tmp_path: Path, run: Path, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert atlas("prepare", "--input", text_file, "--output", tmp_path / "data") == 0
    words = ("evaluate", "--checkpoint", run / "atlas_best.pt", "--data", tmp_path / "data")
    assert atlas(*words) == 0
    with open(tmp_path / "data/val-00000.npy", "rb+") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\1\0\2\0")
    capsys.readouterr()
    error = error_of(capsys, *words)
    assert "val-00000.npy: its content changed since it was prepared" in error
    assert capsys.readouterr().out == ""
