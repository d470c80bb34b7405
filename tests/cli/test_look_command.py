"""`atlas look` prints what atlas/inference/look.py computes, one line per token."""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from atlas.cli import main
from atlas.cli.terminal import printable
from atlas.config import ModelConfig
from atlas.export.save_imported import save_imported
from atlas.inference import Sampling, load_model
from atlas.inference.look import attention, encode, expectations, lens, loss_of, next_token
from atlas.model import build_model
from atlas.tokenizer import Tokenizer
from tests.conftest import corpus

PROMPT = "The river runs\n[red] 漢"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Large random weights, and a vocabulary trained on the tests' corpus."""
    tokenizer = Tokenizer.train([corpus()], 400)
    shape = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "max_seq_len": 64}
    model = build_model(ModelConfig(**shape, vocab_size=tokenizer.vocab_size), seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5)
    return save_imported(model, tokenizer, tmp_path_factory.mktemp("run"), source="a test")


def printed(capsys: pytest.CaptureFixture[str], checkpoint: Path, *options: str) -> str:
    assert main(["look", "--checkpoint", str(checkpoint), "--device", "cpu", *options]) == 0
    answer = capsys.readouterr()
    assert answer.err == ""
    return answer.out


def test_json_contains_the_computed_values(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["--temperature", "0.5", "--top-k", "9", "--top-p", "0.8", "--min-p", "0.01"]
    settings += ["--repetition-penalty", "1.2"]
    options = ["--prompt", PROMPT, *settings, "--lens", "--position", "3", "--attention", "1.0", "--json"]
    facts = json.loads(printed(capsys, checkpoint, *options))
    loaded, sampling = load_model(checkpoint), Sampling(0.5, 9, 0.8, 0.01, 1.2)
    ids = encode(loaded, PROMPT)
    expected = {
        "tokens": [asdict(place) for place in expectations(loaded, ids)],
        "loss": asdict(loss_of(loaded, expectations(loaded, ids))),
        "sampling": asdict(sampling),
        "next_token": asdict(next_token(loaded, ids, sampling)),
        "lens": {"position": 3, "depths": [asdict(depth) for depth in lens(loaded, ids, position=3)]},
        "attention": {
            "layer": 1,
            "head": 0,
            "weights": attention(loaded, ids, layers=[1])[0, 0].tolist(),
        },
    }
    assert facts == json.loads(json.dumps(expected))
    assert "lens" not in json.loads(printed(capsys, checkpoint, "--prompt", PROMPT, "--json"))


def test_each_token_has_its_line(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(capsys, checkpoint, "--prompt", PROMPT).splitlines()
    loaded = load_model(checkpoint)
    places = expectations(loaded, encode(loaded, PROMPT))
    rows = lines[1 : 1 + len(places)]
    assert rows[0].split()[:2] == ["0", "The"]
    for row, place in zip(rows[1:], places[1:], strict=True):
        percent = f"{100 * place.probability:.1f}%" if place.probability >= 0.0005 else "<0.1%"
        cells = [cell for cell in row.split() if not re.fullmatch("[█▏▎▍▌▋▊▉]+", cell)]
        assert cells[2:5] == [percent, str(place.rank), f"{place.entropy:.1f}"]
        assert len(cells) == 10  # with five alternatives
    assert [row.split()[1] for row in rows[-3:]] == [r"\xe6", r"\xbc", r"\xa2"]
    assert {r"\n", "[", "·"} <= {row.split()[1] for row in rows}
    loss = -sum(place.log_probability for place in places[1:]) / (len(places) - 1)
    summary = f"loss of this text {loss:.4f} nats per token, perplexity {math.exp(loss):,.2f}, "
    num_bytes = len(b"".join(loaded.tokenizer.token_bytes(place.id) for place in places[1:]))
    summary += f"{loss * (len(places) - 1) / math.log(2) / num_bytes:.4f} bits per byte"
    assert lines[1 + len(places)].startswith(summary)


def test_each_active_setting_has_a_column(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def columns(*options: str) -> list[str]:
        lines = printed(capsys, checkpoint, "--prompt", "The", *options).splitlines()
        return next(line for line in lines if line.startswith("token  ")).split()

    off = ["--temperature", "1", "--top-k", "0", "--top-p", "1"]
    assert columns() == ["token", "model", "temperature", "top-k", "top-p", "probability"]
    assert columns(*off) == ["token", "model", "probability"]
    on = ["--min-p", "0.1", "--repetition-penalty", "1.1"]
    assert columns(*off, *on) == ["token", "model", "penalty", "min-p", "probability"]


def test_removed_tokens_are_marked(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--temperature", "1", "--top-k", "3", "--top-p", "1"]
    lines = printed(capsys, checkpoint, "--prompt", "The", *options).splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("token  "))
    rows = [line.split() for line in lines[start + 1 : start + 11]]
    assert ["–" in row for row in rows] == [False] * 3 + [True] * 7
    assert lines[start + 11].split()[-2:] == ["400", "3"]


def test_the_lens_and_a_head_are_printed(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(
        capsys, checkpoint, "--prompt", "The river runs", "--lens", "--attention", "0.1"
    ).splitlines()
    start = lines.index("the prediction after each layer, at position 2, ·runs")
    assert [re.split(r"\s{2,}", line)[0] for line in lines[start + 2 : start + 5]] == [
        "embedding",
        "layer 0",
        "layer 1",
    ]
    assert "actual" not in lines[start + 1]
    start = lines.index("layer 0, head 1: which tokens each token attends to")
    assert lines[start + 2].split() == ["0", "The", "█", "0", "The:100.0%"]
    assert len(lines) == start + 5
    lines = printed(
        capsys, checkpoint, "--prompt", "The river runs", "--lens", "--position", "0"
    ).splitlines()
    assert any(line.endswith("actual: ·river  rank") for line in lines)


def test_layers_have_the_same_numbers_in_every_part(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exactly the layer numbers of the lens are valid in --attention."""
    options = ["--prompt", "The river runs", "--lens"]
    named = re.findall(r"^layer (\d+) ", printed(capsys, checkpoint, *options), re.M)
    depths = json.loads(printed(capsys, checkpoint, *options, "--json"))["lens"]["depths"]
    assert [depth["layer"] for depth in depths] == [None, *map(int, named)] == [None, 0, 1]
    for number in named:
        assert f"\nlayer {number}, head 0: " in printed(
            capsys, checkpoint, *options, "--attention", f"{number}.0"
        )
    assert main(["look", "--checkpoint", str(checkpoint), *options, "--attention", f"{len(named)}.0"]) == 2
    assert f"has layers {named[0]} to {named[-1]}" in capsys.readouterr().err


def test_the_attention_of_a_long_text_is_listed_but_not_drawn(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = printed(capsys, checkpoint, "--prompt", "x" * 60, "--attention", "0.0").splitlines()
    assert lines[-60].split()[:3] == ["0", "x", "0"]


def test_an_empty_prompt_begins_a_document(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(capsys, checkpoint, "--prompt", "").splitlines()
    assert lines[1].split()[:2] == ["0", "<|endoftext|>"]
    assert not any("loss" in line for line in lines)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--prompt", "x" * 65], "65 tokens: the model's context is 64"),
        (["--prompt", "x", "--position", "0"], "--position 0: is the token for --lens; give both"),
        (["--prompt", "xx", "--lens", "--position", "2"], "position 2: the text has tokens 0 to 1"),
        (["--prompt", "x", "--attention", "one"], "--attention one: must be a layer's and a head's number"),
        (["--prompt", "x", "--attention", "2.0"], "--attention 2.0: the model has layers 0 to 1"),
        (
            ["--prompt", "x", "--attention", "0.2"],
            "--attention 0.2: the model has layers 0 to 1, each with heads 0 to 1",
        ),
        (["--prompt", "x", "--top-p", "2"], "--top-p 2.0: must be from 0 to 1"),
        ([], "missing option '--prompt'"),
    ],
)
def test_a_user_error_is_one_line(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], options: list[str], reason: str
) -> None:
    assert main(["look", "--checkpoint", str(checkpoint), *options]) == 2
    answer = capsys.readouterr()
    assert reason in answer.err
    assert answer.err.count("\n") == 1
    assert answer.out == ""


def test_a_narrow_terminal_breaks_no_alternative(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"FORCE_COLOR": "1", "TERM": "xterm", "COLUMNS": "80"}.items():
        monkeypatch.setenv(name, value)
    shown = re.sub(r"\x1b\[[0-9;]*m", "", printed(capsys, checkpoint, "--prompt", "The river runs past"))
    assert max(map(len, shown.splitlines())) <= 80
    places = expectations(load_model(checkpoint), encode(load_model(checkpoint), "The river runs past"))
    for place in places[1:]:
        for choice in place.alternatives:
            assert re.search(re.escape(printable(choice.text).replace(" ", "·")) + r":<?[\d.]+%", shown)
    assert not re.search(r"^\s*[\d.<]+%", shown, re.M)
