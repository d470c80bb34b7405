"""Checkpoints of earlier versions can always be loaded, resumed and exported."""

from __future__ import annotations

import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from atlas.export.gguf import export_gguf
from atlas.inference.load import load_model
from atlas.tokenizer import Tokenizer
from atlas.training.checkpoint.load import load_checkpoint
from atlas.training.launch import start_run
from atlas.training.loss import compute_lm_loss
from atlas.training.resume import Request, choose_start
from atlas.training.train import train
from tests.fixtures.make import write_dataset

FIXTURES = sorted(Path(__file__).parents[2].glob("fixtures/checkpoint_v*/atlas_*.pt"))
# Their loss on a sentence on the day they were made.
LOSS = {"checkpoint_v1": 3.777659, "checkpoint_v2": 3.345558}


def test_there_is_one_for_every_version() -> None:
    from atlas.training.checkpoint.manifest import SHARED_BASE_VERSION

    assert [path.parent.name for path in FIXTURES] == [
        f"checkpoint_v{n + 1}" for n in range(SHARED_BASE_VERSION)
    ]


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.parent.name)
def test_its_loss_is_still_the_same(path: Path) -> None:
    loaded = load_model(path)
    ids = torch.tensor([loaded.tokenizer.encode("The river runs past the old mill and under the bridge.")])
    loss = compute_lm_loss(loaded.model(ids[:, :-1]), ids[:, 1:])
    assert loss.item() == pytest.approx(LOSS[path.parent.name], abs=2e-5)


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.parent.name)
def test_it_resumes(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(path.parent, "checkpoints")
    contents = load_checkpoint(path)
    write_dataset(Path(), tokenizer=Tokenizer.from_state(contents["tokenizer"]))
    end = contents["step"] + 2
    run = start_run(choose_start(Request({"training": {"max_steps": end}}, resume="auto")))
    assert run.optimizer.state_dict()["state"]
    result = train(run)
    assert result.step == end
    assert result.loss < 2 * contents["loss"]


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.parent.name)
def test_it_exports(path: Path, tmp_path: Path) -> None:
    loaded = load_model(path)
    export_gguf(loaded.model, loaded.tokenizer, tmp_path / "model.gguf", quantize="f32")
    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    contents, down = load_checkpoint(path), "blocks.1.mlp.down"
    weight = contents["model_state_dict"][f"{down}.weight"].numpy()
    if rank := contents["config"].get("lora", {}).get("rank"):
        a, b = (contents["model_state_dict"][f"{down}.lora_{name}"].numpy() for name in "ab")
        weight = weight + np.float32(16 / rank) * (b @ a)
    assert np.allclose(tensors["blk.1.ffn_down.weight"], weight, atol=0 if not rank else 1e-7)
