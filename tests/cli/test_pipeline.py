"""All steps in one command, with a user at the terminal, without one, and without data."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from atlas.cli import choose_text as ask
from atlas.cli import main
from atlas.cli.choose_text import choose_text
from atlas.config.loader import overlay, read_yaml, resolve
from atlas.config.presets import preset_names, preset_path
from atlas.data.text.demo import write_demo_corpus
from atlas.errors import AtlasError
from atlas.model import build_model
from atlas.training.checkpoint.load import load_checkpoint
from tests.conftest import corpus

ROOT = Path(__file__).parents[2]

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


def test_the_demo_runs_all_steps_on_a_given_text(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    gguf = pytest.importorskip("gguf")
    pytest.importorskip("xllamacpp")
    Path("river.txt").write_text(corpus(), encoding="utf-8")
    assert main(["pipeline", "--demo", "--data", "river.txt", *SMALLER]) == 0
    out, err = capfd.readouterr()
    assert "proved: llama.cpp's results equal the model's" in err
    assert "the demo took" in err
    assert out.count("─" * 40) == 3  # three samples
    folder = Path("demo-river")
    assert (folder / "checkpoints" / "atlas_step_4.pt").exists()
    reader = gguf.GGUFReader(folder / "atlas_demo.gguf")
    assert reader.fields["general.architecture"].contents() == "qwen3"

    assert main(["pipeline", "--demo", "--data", "river.txt", *SMALLER]) == 0  # done already, so not repeated
    assert "the run is complete at step 4" in capfd.readouterr().err


@pytest.mark.slow
def test_the_demo_s_corpus_is_documentation_and_the_same_every_time(tmp_path: Path) -> None:
    first = write_demo_corpus("a/corpus.jsonl").read_bytes()
    assert first == write_demo_corpus("b/corpus.jsonl").read_bytes()
    documents = [json.loads(line)["text"] for line in first.decode("utf-8").splitlines()]
    assert len(first) > 1_500_000
    assert len(set(documents)) == len(documents) > 3000
    assert json.__doc__.strip() in documents


def test_a_python_without_documentation_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "library").mkdir()
    (tmp_path / "library" / "broken.py").write_text("def (:")
    with pytest.raises(AtlasError, match="--data"):
        write_demo_corpus("corpus.jsonl", library=tmp_path / "library")


def test_without_data_the_message_names_the_sources(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["pipeline"]) == 2
    error = capfd.readouterr().err
    for word in ("archive.zip", "kaggle.com", "--data", "--demo"):
        assert word in error


@pytest.mark.skipif(os.name == "nt", reason="runs the Bash script")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "archive.zip: does not exist"),
        (["--yes"], "--demo"),
        (["--data", "nope"], "--data nope: no such file or folder"),
        (["--demo", "--data=empty"], "--data empty: is an empty folder"),
    ],
)
def test_the_script_looks_for_text_before_it_installs_anything(
    arguments: list[str], said: str, tmp_path: Path
) -> None:
    clone = tmp_path / "clone"
    for name in ("scripts/run_pipeline.sh", "scripts/venv.sh", "atlas/cli/choose_text.py"):
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, clone / name)
    (tmp_path / "empty").mkdir()
    command = [str(clone / "scripts/run_pipeline.sh"), *arguments]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    [line] = done.stderr.strip().splitlines()
    assert said in line
    assert not (clone / ".venv").exists()


@pytest.mark.skipif(os.name == "nt", reason="runs Bash")
@pytest.mark.parametrize(
    ("variables", "used"),
    [
        ({"VIRTUAL_ENV": "{active}"}, "{active}"),
        ({"CONDA_PREFIX": "{active}", "CONDA_DEFAULT_ENV": "mine"}, "{active}"),
        ({"CONDA_PREFIX": "{active}", "CONDA_DEFAULT_ENV": "base"}, "{clone}/.venv"),
        ({}, "{clone}/.venv"),
    ],
)
def test_the_script_uses_the_active_environment(variables: dict[str, str], used: str, tmp_path: Path) -> None:
    places = {"active": str(tmp_path / "active"), "clone": str(tmp_path / "clone")}
    wanted = f"{places['clone']}\npyproject\nrequirements\n"
    for place in (Path(places["active"]), Path(places["clone"], ".venv")):
        (place / "bin").mkdir(parents=True)
        (place / "bin/python").symlink_to(sys.executable)  # this Python has pip, and is new enough
        (place / "atlas-installed-llama,serve.txt").write_text(wanted)
    for name, text in (("pyproject.toml", "pyproject\n"), ("requirements.txt", "requirements\n")):
        Path(places["clone"], name).write_text(text)
    script = f'. "{ROOT}/scripts/venv.sh"; set -eu; prepare_venv llama,serve active; echo "$venv_python"'
    environment = {
        name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "CONDA_PREFIX")
    }
    environment |= {name: value.format(**places) for name, value in variables.items()}
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=places["clone"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == used.format(**places) + "/bin/python", done.stderr


def test_a_user_without_data_is_asked_until_there_is_a_text(tmp_path: Path) -> None:
    Path("river.txt").write_text("The river.", encoding="utf-8")
    answers = iter(["nowhere\n", "'river.txt'\n"])
    asked: list[str] = []
    text = choose_text(None, command="atlas pipeline", ask=lambda q: asked.append(q) or next(answers))
    assert text == "river.txt"
    assert "nowhere: no such file or folder" in asked[1]
    assert choose_text(None, command="atlas pipeline", ask=lambda _: "\n") is None


def test_without_a_terminal_nothing_is_asked(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ask, "ask_person", lambda _: pytest.fail("asked"))
    Path("river.txt").write_text(corpus(), encoding="utf-8")
    arguments = ["pipeline", "--data", "river.txt", "--config", "TINY", *SMALLER]
    assert main(arguments) == 0
    assert Path("data/processed/river/dataset.json").exists()
    assert Path("checkpoints/atlas_step_4.pt").exists()
    assert main([*arguments, "--set", "training.max_steps=5"]) == 0  # resumes without a question
    assert "resuming" in capfd.readouterr().err


def test_the_suggestion_without_a_gpu_is_the_demos_recipe(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The commands that it prints at the end work unchanged."""
    Path("my texts").mkdir()
    Path("my texts/river.txt").write_text(corpus(), encoding="utf-8")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["pipeline", "--data", "my texts", *SMALLER]) == 0
    said = capfd.readouterr().err
    assert "training modern-nano; choose another preset with --config" in said
    config = load_checkpoint("checkpoints/atlas_best.pt")["config"]
    assert config["model"]["position"] == "rope"
    assert config["model"]["vocab_size"] <= 1024
    assert Path("data/processed/my texts-vocab1024/dataset.json").exists()
    [command] = re.findall(r"^generate text: +(.+)$", said, re.M)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, shell=True, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Once upon a time")


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The answers of a user at a terminal, in order. Questions go to standard error."""
    answers: list[str] = []

    def answer(question: str) -> str:
        print(question, file=sys.stderr)
        return answers.pop(0)

    monkeypatch.setattr(ask, "ask_person", answer)
    monkeypatch.setattr("atlas.cli.terminal.ask_or_none", lambda: lambda question: answer(question) == "y")
    return answers


def test_a_user_sees_what_each_preset_needs_and_is_asked_until_the_answer_is_valid(
    typed: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    Path("river.txt").write_text(corpus(), encoding="utf-8")
    typed += ["huge", "12", "TINY"]
    arguments = ["pipeline", "--data", "river.txt", *SMALLER]
    assert main(arguments) == 0
    said = capfd.readouterr().err
    assert "huge: no such preset" in said
    assert "12: the presets are numbered 1 to 9" in said
    rows = {row.split()[1]: row.split() for row in said.splitlines() if re.match(r"[1-9]  \w", row)}
    assert list(rows) == list(preset_names())
    for preset, parameters, vocabulary in (("tiny", 40_789_632, 50_257), ("modern-nano", 689_024, 1024)):
        assert rows[preset][2:4] == [f"{parameters:,}", f"{vocabulary:,}"]
    assert re.search(r"\d (minutes|hours|days|years)", " ".join(rows["small"]))
    assert Path("data/processed/river/dataset.json").exists()

    typed += ["3", "y"]
    assert main([*arguments, "--set", "training.max_steps=5"]) == 0
    assert "holds this run at step 4. Resume it?" in capfd.readouterr().err
    assert Path("checkpoints/atlas_step_5.pt").exists()


def test_the_menu_counts_parameters_with_the_datasets_own_vocabulary(
    typed: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    Path("river.txt").write_text(corpus(), encoding="utf-8")
    assert main(["prepare", "--input", "river.txt", "--train-tokenizer", "300"]) == 0
    typed += ["tiny"]  # whose file states GPT-2's vocabulary
    assert main(["pipeline", "--data", "data/processed/river", *SMALLER]) == 0
    said = capfd.readouterr().err
    vocabulary = load_checkpoint("checkpoints/atlas_best.pt")["config"]["model"]["vocab_size"]
    assert vocabulary <= 300
    config = resolve(overlay(read_yaml(preset_path("tiny")), {"model": {"vocab_size": vocabulary}}))
    built = build_model(config.model, seed=0).num_parameters()
    [row] = re.findall(r"^3  tiny +(.*)$", said, re.M)
    assert row.split()[:2] == [f"{built:,}", f"{vocabulary:,}"]


def test_a_preset_that_differs_from_the_existing_run_is_asked_about(
    typed: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    Path("river.txt").write_text(corpus(), encoding="utf-8")
    arguments = ["pipeline", "--data", "river.txt", *SMALLER]
    typed += ["modern-nano"]
    assert main(arguments) == 0
    typed += ["nano", "n"]
    assert main(arguments) == 2  # the user says no: the run stays, and the message says how to keep both
    assert "--no-resume" in capfd.readouterr().err.splitlines()[-1]
    assert load_checkpoint("checkpoints/atlas_best.pt")["config"]["model"]["position"] == "rope"
    typed += ["nano", "y"]
    assert main(arguments) == 0
    assert "Start a new run?" in capfd.readouterr().err
    assert load_checkpoint("checkpoints/atlas_best.pt")["config"]["model"]["position"] == "learned"
    assert load_checkpoint("checkpoints/previous-1/atlas_best.pt")["config"]["model"]["position"] == "rope"


@pytest.mark.parametrize("script", ["train.py", "infer.py", "prepare_data.py", "export_gguf.py"])
def test_scripts_find_the_package_beside_them(script: str, tmp_path: Path) -> None:
    """In a Python in which Atlas is not installed."""
    command = [sys.executable, "-S", str(ROOT / "scripts" / script), "--help"]  # -S: no installed packages
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert re.match(r"error: this Python \(.+\) has no typer, which Atlas needs: ", done.stderr)
    site = sysconfig.get_paths()["purelib"]
    environment = {**os.environ, "PYTHONPATH": site}  # everything but the .pth file that names this folder
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Usage: atlas" in done.stdout
