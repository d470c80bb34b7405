"""The base of a LoRA run is stored once: every checkpoint still loads whole, and the best one needs no other file."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from atlas.cli import main
from atlas.config.loader import nested, overlay
from atlas.errors import AtlasError, CheckpointError
from atlas.inference.load import load_model
from atlas.training.checkpoint import CheckpointManager
from atlas.training.checkpoint.load import load_checkpoint
from tests.runs import layer, trained

TOY = "tests.toy:tokenizer"


@pytest.fixture
def base(tmp_path: Path, text_file: Path) -> Path:
    trained(layer(tmp_path / "base", text_file))
    return tmp_path / "base" / "atlas_best.pt"


def lora(folder: Path, text: Path, **settings: object) -> dict:
    """A run of six updates that saves twice."""
    explicit = layer(folder, text, lora__rank=2, checkpoint__save_interval=3, **settings)
    del explicit["model"]
    return explicit


def resumed_in(folder: Path, **settings: object) -> dict:
    """What a command names that resumes such a run."""
    explicit = {"data": {"tokenizer": TOY}, "checkpoint": {"output_dir": str(folder)}}
    for key, value in settings.items():
        explicit = overlay(explicit, nested(key.replace("__", "."), value))
    return explicit


def names(path: Path) -> set[str]:
    """The tensors that are in a file itself, as PyTorch reads it."""
    return set(torch.load(path, weights_only=True)["model_state_dict"])


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_only_the_base_and_the_best_checkpoint_have_the_frozen_weights(
    tmp_path: Path, text_file: Path, base: Path
) -> None:
    run, result = trained(lora(tmp_path / "tuned", text_file), init_from=str(base))
    folder, frozen = tmp_path / "tuned", names(base)
    assert names(folder / "base.pt") == frozen
    assert same(
        load_checkpoint(folder / "base.pt")["model_state_dict"], load_checkpoint(base)["model_state_dict"]
    )
    for step in ("atlas_step_3.pt", "atlas_step_6.pt"):
        assert names(folder / step)
        assert all(".lora_" in name for name in names(folder / step))
        assert (folder / step).stat().st_size < base.stat().st_size
    assert names(folder / "atlas_best.pt") == frozen | names(folder / "atlas_step_6.pt")
    whole = {name: tensor.detach() for name, tensor in run.model.state_dict().items()}
    assert same(load_checkpoint(folder / "atlas_step_6.pt")["model_state_dict"], whole)
    assert {path.name for path in result.saved} == {"atlas_step_6.pt", "atlas_best.pt"}

    alone = tmp_path / "elsewhere" / "atlas_best.pt"
    alone.parent.mkdir()
    shutil.move(folder / "atlas_best.pt", alone)
    assert load_model(alone, tokenizer=TOY).config.lora.rank == 2
    shutil.move(folder / "atlas_step_6.pt", alone.parent)
    with pytest.raises(
        CheckpointError,
        match=r"has only the low-rank updates .*base\.pt is missing: copy base\.pt from the run",
    ):
        load_checkpoint(alone.parent / "atlas_step_6.pt")


@pytest.mark.parametrize("source", ["atlas_step_3.pt", "atlas_best.pt"])
def test_a_resumed_run_ends_with_the_same_bits_and_keeps_the_base(
    tmp_path: Path, text_file: Path, base: Path, source: str
) -> None:
    whole, _ = trained(lora(tmp_path / "whole", text_file), init_from=str(base))
    trained(lora(tmp_path / "tuned", text_file, training__max_steps=3), init_from=str(base))
    written = (tmp_path / "tuned" / "base.pt").stat().st_ino
    explicit = resumed_in(tmp_path / "tuned", training__max_steps=6)
    # The schedule's end has moved, so only the frozen weights and the file of the base are compared bit for bit.
    run, _ = trained(explicit, resume=str(tmp_path / "tuned" / source))
    assert (tmp_path / "tuned" / "base.pt").stat().st_ino == written
    frozen = load_checkpoint(base)["model_state_dict"]
    assert same({name: run.model.state_dict()[name] for name in frozen}, frozen)

    # `whole` was saved at step 3 too: resumed from there in another folder, it comes to the same weights.
    resumed, _ = trained(resumed_in(tmp_path / "again"), resume=str(tmp_path / "whole" / "atlas_step_3.pt"))
    assert same(resumed.model.state_dict(), whole.model.state_dict())
    assert names(tmp_path / "again" / "base.pt") == names(base)


def test_a_damaged_base_is_found_and_written_anew_from_the_best_checkpoint(
    tmp_path: Path, text_file: Path, base: Path
) -> None:
    trained(lora(tmp_path / "tuned", text_file), init_from=str(base))
    folder = tmp_path / "tuned"
    whole = (folder / "base.pt").read_bytes()
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 1
    (folder / "base.pt").write_bytes(damaged)
    with pytest.raises(CheckpointError, match=r"base\.pt is damaged, or is not .*, such as atlas_best\.pt"):
        load_checkpoint(folder / "atlas_step_3.pt")
    said: list[str] = []
    found = CheckpointManager(folder, say=said.append).load_latest()
    assert found is not None
    assert found[0].name == "atlas_best.pt"
    assert any("base.pt is damaged" in line for line in said)
    trained(resumed_in(folder, training__max_steps=8, model__dropout=0.1), resume="auto")
    assert (folder / "base.pt").read_bytes() == whole
    assert load_checkpoint(folder / "atlas_step_3.pt")["step"] == 3


def test_a_file_of_the_user_with_this_name_stays(
    tmp_path: Path, text_file: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "tuned"
    folder.mkdir()
    shutil.copy(base, folder / "base.pt")
    before = (folder / "base.pt").read_bytes()
    with pytest.raises(
        AtlasError, match=r"base\.pt: is not the base of a LoRA run, or is damaged, and this run would"
    ):
        trained(lora(folder, text_file), init_from=str(folder / "base.pt"))
    trained(layer(folder, text_file), no_resume=True)
    trained(layer(folder, text_file), no_resume=True)
    assert (folder / "base.pt").read_bytes() == before
    assert not (folder / "previous-1" / "base.pt").exists()


def test_checkpoints_that_are_moved_aside_keep_their_base(
    tmp_path: Path, text_file: Path, base: Path
) -> None:
    other = tmp_path / "other"
    trained(layer(other, text_file, seed=3))
    folder = tmp_path / "tuned"
    trained(lora(folder, text_file), init_from=str(base))
    last = load_checkpoint(folder / "atlas_step_6.pt")["model_state_dict"]
    trained(resumed_in(folder), resume=str(folder / "atlas_step_3.pt"))
    trained(lora(folder, text_file), init_from=str(other / "atlas_best.pt"), no_resume=True)
    trained(layer(folder, text_file), no_resume=True)
    for place in ("previous-1", "previous-2"):
        weights = load_checkpoint(folder / place / "atlas_step_6.pt")["model_state_dict"]
        assert same(weights, last), place
    assert load_checkpoint(folder / "previous-3" / "atlas_step_6.pt")["step"] == 6
    assert not (folder / "base.pt").exists()
    for place in (folder, *folder.glob("previous-*")):
        assert main(["info", str(place), "--verify"]) == 0


def test_another_runs_base_moves_aside(tmp_path: Path, text_file: Path, base: Path) -> None:
    trained(layer(tmp_path / "other", text_file, seed=3))
    trained(lora(tmp_path / "first", text_file), init_from=str(tmp_path / "other" / "atlas_best.pt"))
    folder = tmp_path / "tuned"
    folder.mkdir()
    shutil.copy(tmp_path / "first" / "base.pt", folder)
    (folder / "base.json").write_text("{}")  # the user's own
    trained(lora(folder, text_file), init_from=str(base))
    assert (folder / "previous-1" / "base.pt").read_bytes() == (tmp_path / "first" / "base.pt").read_bytes()
    assert (folder / "base.json").exists()
    assert load_checkpoint(folder / "atlas_step_3.pt")["step"] == 3


def test_frozen_weights_are_not_copied_for_a_save_in_the_background(
    tmp_path: Path, text_file: Path, base: Path
) -> None:
    explicit = lora(tmp_path / "tuned", text_file, checkpoint__background=True, training__max_steps=3)
    run, _ = trained(explicit, init_from=str(base))
    copied, weights = run.saver.last_good()["model_state_dict"], run.model.state_dict()
    assert copied.keys() == weights.keys()
    for name, tensor in copied.items():
        is_shared = tensor.data_ptr() == weights[name].data_ptr()
        assert is_shared == (".lora_" not in name), name
    assert same(load_checkpoint(tmp_path / "tuned" / "atlas_best.pt")["model_state_dict"], dict(weights))
