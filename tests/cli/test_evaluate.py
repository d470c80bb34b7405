"""`atlas evaluate --worst`."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from atlas.cli import main
from atlas.config import ModelConfig
from atlas.export.save_imported import save_imported
from atlas.model import build_model
from atlas.tokenizer import Tokenizer
from atlas.training.loss import compute_lm_loss


def test_the_worst_windows_are_shown_with_their_worst_tokens(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model that memorized one sentence, and a text that differs from it at one place."""
    sentence = "the river runs past the old mill . "
    tokenizer = Tokenizer.train([sentence * 50 + " bridge"], 300)
    model = build_model(
        ModelConfig(
            hidden_size=32, num_layers=1, num_heads=2, max_seq_len=16, vocab_size=tokenizer.vocab_size
        ),
        seed=0,
    )
    ids = torch.tensor(tokenizer.encode(sentence * 50))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(60):
        rows = torch.stack([ids[start : start + 17] for start in range(step % 9, 160, 11)])
        compute_lm_loss(model(rows[:, :-1]), rows[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
    checkpoint = save_imported(model, tokenizer, tmp_path / "run", source="a test")
    text = tmp_path / "text.txt"
    text.write_text(sentence * 20 + "the river runs past the old bridge . " + sentence * 20, encoding="utf-8")
    command = [
        "evaluate",
        "--checkpoint",
        str(checkpoint),
        "--data",
        str(text),
        "--device",
        "cpu",
        "--worst",
        "2",
    ]
    assert main(command) == 0
    said = capsys.readouterr().out.splitlines()
    ranks = [line for line in said if re.match(r"\d\. window", line)]
    assert len(ranks) == 2
    means = [float(re.search(r": ([\d.]+) nats", line)[1]) for line in ranks]
    assert means[0] > means[1]
    shown = said[said.index(ranks[0]) + 1]
    assert re.search(r"old⟦? ?b", shown), shown
    assert "⟦" in shown
    losses = [float(line.split()[1]) for line in said if line.startswith("loss ")]
    assert means[0] > losses[0]
