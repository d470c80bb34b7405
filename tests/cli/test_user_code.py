"""Code that a file names is imported only if the command names it, too."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from atlas.cli import main
from tests.conftest import corpus
from tests.runs import layer, write_config

MARK = Path("imported")
CODE = """\
from pathlib import Path
from atlas.training.loss import compute_lm_loss as loss
from tests.toy import tokenizer
Path("imported").touch()
"""
NAMES = {"loss": "training.loss", "tokenizer": "data.tokenizer"}


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A working folder with a text, a module that leaves a file when it is imported, and a config for each setting."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    Path("text.txt").write_text(corpus(), encoding="utf-8")
    Path("strangers_code.py").write_text(CODE, encoding="utf-8")
    for name, key in NAMES.items():
        explicit = layer(Path("run"), Path("text.txt"), training__max_steps=2, checkpoint__save_interval=1)
        del explicit["data"]["tokenizer"]
        section, _, setting = key.partition(".")
        explicit[section][setting] = f"strangers_code:{name}"
        write_config(Path(f"{name}.yaml"), explicit)
    yield
    sys.modules.pop("strangers_code", None)


def is_imported() -> bool:
    return MARK.exists() or "strangers_code" in sys.modules


def forget() -> None:
    MARK.unlink()
    del sys.modules["strangers_code"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "command",
    [
        "train",
        "train --overfit-batch",
        "train --profile",
        "train --resume auto",
        "pipeline --yes --data text.txt",
    ],
)
def test_code_that_only_a_config_file_names_is_not_imported(
    command: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*shlex.split(command), "--config", f"{name}.yaml"]) == 2
    key = NAMES[name]
    assert capsys.readouterr().err == (
        f"error: {name}.yaml: {key}: strangers_code:{name}: is Python code, and Atlas imports only code that the "
        f"command names: if you trust this code, add --set {key}=strangers_code:{name}\n"
    )
    assert not is_imported()
    assert not Path("run").exists()
    assert not Path("data").exists()


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("loss", "--set training.loss=strangers_code:loss"),
        ("tokenizer", "--set data.tokenizer=strangers_code:tokenizer"),
        ("tokenizer", "--tokenizer strangers_code:tokenizer"),
    ],
)
def test_code_that_the_command_names_too_is_imported(
    name: str, flags: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", "--config", f"{name}.yaml", "--set", "training.max_steps=1"]
    assert main([*command, *shlex.split(flags)]) == 0
    assert is_imported()
    forget()
    assert main([*command[:3], "--resume", "auto"]) == 2  # neither the file nor the checkpoint is enough
    if name == "loss":
        capsys.readouterr()
        assert main(["train", "--train-data", "text.txt", "--output-dir", "run"]) == 2
        assert (
            f"run/atlas_step_1.pt: training.loss: strangers_code:{name}: is Python code"
            in capsys.readouterr().err
        )
    assert not is_imported()


def test_other_code_of_the_command_replaces_that_of_the_file() -> None:
    assert main(["train", "--config", "loss.yaml", "--set", "training.loss=null"]) == 0
    assert main(["train", "--config", "tokenizer.yaml", "--tokenizer", "gpt2", "--no-resume"]) == 0
    assert not is_imported()


@pytest.mark.parametrize("name", NAMES)
def test_commands_that_import_no_code_read_such_a_file(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--config", f"{name}.yaml"]) == 0
    assert main(["info", f"{name}.yaml"]) == 0
    assert f"strangers_code:{name}" in capsys.readouterr().out
    assert not is_imported()


def test_a_tokenizer_file_whose_name_looks_like_code_is_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    Path("strangers_code:tokenizer").write_text("{}", encoding="utf-8")
    assert main(["train", "--config", "tokenizer.yaml"]) == 2
    assert "is Python code" not in capsys.readouterr().err
    assert not is_imported()
