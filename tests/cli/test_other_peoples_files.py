"""What lies where Atlas writes, and is the user's own: it stays, and links and mount points are honoured or refused."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from atlas.cli import main
from atlas.data import prepare
from atlas.data.prepare import pipeline
from atlas.data.shards import open_dataset
from atlas.data.text.report import SourceReport
from atlas.data.text.sources import Sources
from atlas.errors import AtlasError
from atlas.export.save_imported import save_imported
from atlas.inference.load import load_model
from atlas.outputs import unused_name, write_folder
from atlas.training.checkpoint.lock import FolderLock
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
    running, another = unused_name(tmp_path / "model").name, os.getppid()
    pattern = running.replace(f"-{os.getpid()}-", "-{}-")
    same_number = pattern.format(os.getpid()).replace(running[-8:], "0123abcd")  # as in a container
    host = running.split("-")[1]
    others = [
        pattern.format(another),
        pattern.format(ended.pid).replace(host, "0123abcd"),  # of another host, which shares the disk
        ".model.new-1-x",
        pattern.format(ended.pid).replace("model", "other"),
    ]
    for name in (running, pattern.format(ended.pid), same_number, *others):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    assert not unused_name(tmp_path / "model").exists()
    assert sorted(os.listdir(tmp_path)) == sorted([running, *others])


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
        f"1 folders that Atlas made, or their files, are left out ({texts / 'run'} …)"
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


@pytest.mark.parametrize("how", ["folder", "pattern"])
def test_a_run_whose_folder_is_that_of_its_text_can_be_resumed(
    tmp_path: Path, text_file: Path, how: str
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    text_file.rename(folder / "river.txt")
    text = folder if how == "folder" else folder / "*"
    trained(layer(folder, text, training__max_steps=2))
    _, result = trained(layer(folder, text, training__max_steps=4), resume="auto")
    assert result.outcome == "finished"
    assert [line["step"] for line in logged(folder)] == [1, 2, 3, 4]


def test_a_sidecar_names_no_folder_but_that_of_a_sharded_checkpoint(tmp_path: Path, text_file: Path) -> None:
    """Atlas removes the folders of old checkpoints."""
    folder = tmp_path / "run"
    trained(layer(folder, text_file, training__max_steps=2))
    sidecar = json.loads((folder / "atlas_step_2.json").read_text(encoding="utf-8"))
    (folder / "thesis").mkdir()
    for place in (folder, folder / "thesis"):
        (place / "chapter").write_text("mine", encoding="utf-8")
    file = {"name": "chapter", "size": 4, "sha256": 64 * "0"}
    for step, name in enumerate((".", "..", "thesis"), start=10):
        forged = sidecar | {"step": step, "folder": name, "files": [file]}
        (folder / f"atlas_step_{step}.json").write_text(json.dumps(forged), encoding="utf-8")
    settings = {"training__max_steps": 20, "checkpoint__save_interval": 2, "checkpoint__keep_checkpoints": 1}
    _, result = trained(layer(folder, text_file, **settings), resume="auto")
    assert result.outcome == "finished"
    assert (folder / "chapter").exists()
    assert (folder / "thesis/chapter").exists()


def test_a_save_removes_only_its_own_temporary_files(tmp_path: Path, text_file: Path) -> None:
    folder = tmp_path / "run"
    mine = ("atlas_keep.tmp/thesis", "atlas_step_2/thesis", "atlas_step_4.tmp/thesis")
    for name in mine:
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text("mine", encoding="utf-8")
    (folder / "atlas_note.tmp").write_text("mine", encoding="utf-8")
    (folder / "atlas_step_6.pt.tmp").write_text("left by a kill", encoding="utf-8")
    settings = {"checkpoint__save_interval": 2, "checkpoint__format": "sharded"}
    _, result = trained(layer(folder, text_file, training__max_steps=2, **settings))
    assert all((folder / name).read_text(encoding="utf-8") == "mine" for name in (*mine, "atlas_note.tmp"))
    assert not (folder / "atlas_step_6.pt.tmp").exists()
    assert (folder / "atlas_step_2-2").is_dir()
    assert "atlas_step_2" in {path.name for path in result.saved}


def test_a_run_does_not_replace_a_config_of_the_user(tmp_path: Path, text_file: Path) -> None:
    (tmp_path / "config.yaml").write_text("# my comment\n", encoding="utf-8")
    with pytest.raises(AtlasError, match="was not written by a run"):
        trained(layer(tmp_path, text_file))
    assert os.listdir(tmp_path).count("atlas.lock") == 0


@pytest.mark.parametrize("kind", ["pipe", "socket", "folder"])
def test_an_export_replaces_only_files(
    tmp_path: Path, run: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    if kind == "pipe":
        os.mkfifo(output)
    elif kind == "socket":
        socket.socket(socket.AF_UNIX).bind(str(output))
    else:
        output.mkdir()
    words = ("export", "--checkpoint", run / "atlas_best.pt", "--output", output, "--no-verify")
    assert "which Atlas does not replace" in error_of(capsys, *words)
    assert not output.is_file()


def test_an_export_writes_to_the_file_that_a_link_leads_to(tmp_path: Path, run: Path) -> None:
    (tmp_path / "disk").mkdir()
    output = tmp_path / "m.gguf"
    output.symlink_to("disk/m.gguf")
    assert atlas("export", "--checkpoint", run / "atlas_best.pt", "--output", output, "--no-verify") == 0
    assert output.is_symlink()
    assert (tmp_path / "disk/m.gguf").read_bytes().startswith(b"GGUF")


def test_a_modelfile_is_not_written_where_only_a_link_leads(
    tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "Modelfile").symlink_to(tmp_path / "elsewhere")
    words = (
        "export",
        "--checkpoint",
        run / "atlas_best.pt",
        "--output",
        tmp_path / "m.gguf",
        "--no-verify",
        "--modelfile",
    )
    assert "Modelfile: exists and is not a Modelfile" in error_of(capsys, *words)
    assert not (tmp_path / "elsewhere").exists()


def test_a_folder_that_changes_while_an_export_writes_is_kept(tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        for name in ("config.json", "b"):
            (folder / name).write_text("new", encoding="utf-8")

    target = tmp_path / "model"
    write_folder(target, ("config.json", "b"), write)

    def write_slowly(folder: Path) -> None:
        write(folder)
        (target / "thesis").write_text("mine", encoding="utf-8")

    with pytest.raises(AtlasError, match="is not an exported model"):
        write_folder(target, ("config.json", "b"), write_slowly)
    assert (target / "thesis").read_text(encoding="utf-8") == "mine"
    for name in ("b", "config.json", "thesis"):
        (target / name).unlink()
    (target / "b").write_text("a file of the user", encoding="utf-8")
    with pytest.raises(AtlasError, match="is not an exported model"):
        write_folder(target, ("config.json", "b"), write)


def test_two_imports_into_one_folder_are_not_mixed(tmp_path: Path, run: Path) -> None:
    loaded = load_model(run / "atlas_best.pt")
    lock = FolderLock(tmp_path / "imported")
    code = (
        "import sys; from pathlib import Path; from atlas.export.save_imported import save_imported; "
        "from atlas.inference.load import load_model; m = load_model(Path(sys.argv[1])); "
        "save_imported(m.model, m.tokenizer, sys.argv[2], source='x')"
    )
    words = [sys.executable, "-c", code, str(run / "atlas_best.pt"), str(tmp_path / "imported")]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert "another run is writing to this folder" in done.stderr
    lock.undo()
    save_imported(loaded.model, loaded.tokenizer, tmp_path / "imported", source="x")
    assert sorted(os.listdir(tmp_path / "imported")) == ["atlas_best.json", "atlas_best.pt"]


def test_a_text_that_changes_while_it_is_prepared_is_never_called_unchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its bytes may be the old ones again when Atlas looks next."""
    text = tmp_path / "t.txt"
    text.write_text(corpus(400), encoding="utf-8")
    real = pipeline.Merger.finish

    def change(self: pipeline.Merger) -> object:
        os.utime(text, ns=(1, 1))
        return real(self)

    monkeypatch.setattr(pipeline.Merger, "finish", change)
    summary = prepare([text], tmp_path / "data")
    assert any("was changed while Atlas read it" in note for note in summary.notes)
    monkeypatch.undo()
    assert not prepare([text], tmp_path / "data").unchanged
    assert prepare([text], tmp_path / "data").unchanged


def test_a_process_that_has_ended_but_was_not_collected_does_not_count_as_running(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    while psutil.Process(ended.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    (tmp_path / "t.txt").write_text(corpus(400), encoding="utf-8")
    prepare([tmp_path / "t.txt"], tmp_path / "data")
    left = tmp_path / f".data.stdin-{ended.pid}"
    left.write_text("a copy of standard input", encoding="utf-8")
    assert prepare([tmp_path / "t.txt"], tmp_path / "data").unchanged
    assert not left.exists()
    ended.wait()
