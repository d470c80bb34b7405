"""The report after training on conversations says what the model says."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from atlas.cli import main
from atlas.inference.recall import Answer, describe_recall
from atlas.tokenizer import Tokenizer
from tests.conftest import corpus

QUESTIONS = [f"What is in box {number}?" for number in range(12)]
SETTINGS = ("model.hidden_size=64", "model.num_layers=2", "model.num_heads=4", "model.max_seq_len=128")


@pytest.mark.parametrize(("steps", "at_least", "at_most"), [(90, 10, 12), (25, 0, 6)])
def test_it_counts_the_answers_that_the_model_gives(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    steps: int,
    at_least: int,
    at_most: int,
) -> None:
    monkeypatch.chdir(tmp_path)
    Tokenizer.train([corpus()], 320).save("bpe.json")
    answers = [" ".join(corpus().split()[5 * n : 5 * n + 5]) for n in range(len(QUESTIONS))]
    pairs = [{"prompt": q, "response": a} for q, a in zip(QUESTIONS, answers, strict=True)]
    Path("chats.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    settings = [word for setting in (*SETTINGS, "tracking.samples=0") for word in ("--set", setting)]
    train = ["train", "--train-data", "chats.jsonl", "--tokenizer", "bpe.json", "--device", "cpu", *settings]
    more = ["--max-steps", str(steps), "--learning-rate", "5e-3", "--set", "training.warmup_steps=5"]
    assert main([*train, *more]) == 0
    said = capfd.readouterr().err
    [(right, asked)] = re.findall(r"greedy decoding gives (\d+) of (\d+) learnt answers word for word", said)
    [(first, last)] = re.findall(r"loss of the answers: ([\d.]+) in the first update, ([\d.]+) in the", said)
    assert float(first) > float(last)

    Path("questions.txt").write_text("\n".join(QUESTIONS), encoding="utf-8")
    ask = ["generate", "--chat", "--temperature", "0", "--max-tokens", "40", "--checkpoint"]
    files = ["--prompts-file", "questions.txt", "--output-file", "said.jsonl"]
    assert main([*ask, f"checkpoints/atlas_step_{steps}.pt", *files]) == 0
    rows = [json.loads(line) for line in Path("said.jsonl").read_text(encoding="utf-8").splitlines()]
    counted = sum(row["text"].strip() == answer for row, answer in zip(rows, answers, strict=True))
    assert (int(right), int(asked)) == (counted, len(QUESTIONS))
    assert at_least <= counted <= at_most
    # The passes take less than a minute, so none of them is saved.
    assert {path.name for path in Path("checkpoints").glob("*.pt")} == {
        "atlas_best.pt",
        f"atlas_step_{steps}.pt",
    }


def test_a_wrong_answer_is_shown_beside_the_learnt_one() -> None:
    right, wrong = Answer("Who?", "Me.", "Me.", True), Answer("W" * 70, "N" * 70, "Now.", False)
    lines = describe_recall([right, right, right, wrong], total=9)
    assert lines == [
        "greedy decoding gives 3 of 4 learnt answers word for word (of 9 conversations, 4 were asked), such as:",
        f"  …{'W' * 59} → Now.  (learnt: {'N' * 59}…)",
        "  Who? → Me.",
        "  Who? → Me.",
    ]
