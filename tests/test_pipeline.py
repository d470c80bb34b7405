"""The whole road in one command, with a person, without one, and without data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from atlas.cli import main
from atlas.cli import pipeline as command
from atlas.data.demo import write_demo_corpus
from atlas.errors import AtlasError
from tests.conftest import corpus

TINY = [
    "model.hidden_size=16",
    "model.num_layers=1",
    "model.num_heads=2",
    "model.max_seq_len=64",
    "training.max_steps=4",
    "training.warmup_steps=1",
    "training.batch_size=2",
    "device=cpu",
]
SMALLER = [word for setting in TINY for word in ("--set", setting)]


@pytest.fixture(autouse=True)
def _workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_demo_goes_the_whole_road_on_ones_own_text(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    gguf = pytest.importorskip("gguf")
    pytest.importorskip("xllamacpp")
    Path("river.txt").write_text(corpus(), encoding="utf-8")
    assert main(["pipeline", "--demo", "--data", "river.txt", *SMALLER]) == 0
    out, err = capfd.readouterr()
    assert "proved: llama.cpp says what the model says" in err
    assert "the whole road took" in err
    assert out.count("─" * 40) == 3  # three samples
    folder = Path("demo-river")
    assert (folder / "checkpoints" / "atlas_step_4.pt").exists()
    reader = gguf.GGUFReader(folder / "atlas_demo.gguf")
    assert reader.fields["general.architecture"].contents() == "qwen3"

    assert main(["pipeline", "--demo", "--data", "river.txt", *SMALLER]) == 0  # done already: not done again
    assert "the run is complete at step 4" in capfd.readouterr().err


@pytest.mark.slow
def test_the_demo_s_corpus_is_documentation_and_the_same_every_time(tmp_path: Path) -> None:
    first = write_demo_corpus("a/corpus.jsonl").read_bytes()
    assert first == write_demo_corpus("b/corpus.jsonl").read_bytes()
    documents = [json.loads(line)["text"] for line in first.decode("utf-8").splitlines()]
    assert len(first) > 1_500_000
    assert len(set(documents)) == len(documents) > 3000
    assert json.__doc__.strip() in documents


def test_a_python_without_documentation_is_said(tmp_path: Path) -> None:
    (tmp_path / "library").mkdir()
    (tmp_path / "library" / "broken.py").write_text("def (:")
    with pytest.raises(AtlasError, match="--data"):
        write_demo_corpus("corpus.jsonl", library=tmp_path / "library")


def test_without_data_it_says_where_to_get_it(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["pipeline"]) == 2
    error = capfd.readouterr().err
    for word in ("archive.zip", "kaggle.com", "--data", "--demo"):
        assert word in error


def test_without_a_terminal_nothing_is_asked(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    Path("river.txt").write_text(corpus(), encoding="utf-8")
    arguments = [
        "pipeline",
        "--data",
        "river.txt",
        "--config",
        "tiny",
        "--set",
        "model.vocab_size=50257",
        *SMALLER,
    ]
    assert main(arguments) == 0
    assert Path("data/processed/river/dataset.json").exists()
    assert Path("checkpoints/atlas_step_4.pt").exists()
    assert main([*arguments, "--set", "training.max_steps=5"]) == 0  # goes on without a question
    assert "resuming" in capfd.readouterr().err


def test_a_person_is_shown_the_presets_and_asked(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("river.txt").write_text(corpus(), encoding="utf-8")
    asked: list[str] = []
    monkeypatch.setattr(
        "atlas.cli.terminal.ask_or_none", lambda: lambda question: asked.append(question) or True
    )
    monkeypatch.setattr(command.typer, "prompt", lambda *args, **options: asked.append(args[0]) or "tiny")
    arguments = ["pipeline", "--data", "river.txt", *SMALLER]
    assert main(arguments) == 0
    shown = capfd.readouterr().err
    for preset, parameters in (("tiny", "40,789,632"), ("small", "124,439,808"), ("ultra", "498")):
        assert preset in shown
        assert parameters in shown
    assert main([*arguments, "--set", "training.max_steps=5"]) == 0
    assert [question for question in asked if "Resume" in question]
