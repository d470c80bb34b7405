"""Checkpoints of a later version of Atlas, and strange files beside them, are refused and stay as they are."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from atlas.errors import AtlasError, CheckpointError
from atlas.training.checkpoint.load import load_checkpoint
from tests.runs import layer, run_for, trained

LATER = "has format version 99, which a later version of Atlas wrote: update Atlas"


def of_version(sidecar: Path, version: int) -> None:
    facts = json.loads(sidecar.read_text(encoding="utf-8")) | {"format_version": version}
    sidecar.write_text(json.dumps(facts), encoding="utf-8")


def test_a_sidecar_of_a_later_version_is_not_believed(tmp_path: Path, text_file: Path) -> None:
    explicit = layer(tmp_path / "run", text_file, checkpoint__save_interval=3)
    trained(explicit)
    of_version(tmp_path / "run/atlas_step_6.json", 99)
    before = sorted(path.name for path in (tmp_path / "run").iterdir())
    with pytest.raises(CheckpointError, match=LATER):
        load_checkpoint(tmp_path / "run/atlas_step_6.pt")
    with pytest.raises(AtlasError, match=rf"atlas_step_6\.json: {LATER}, or choose another --output-dir"):
        run_for(explicit, resume="auto")
    with pytest.raises(AtlasError, match=LATER):
        run_for(explicit, no_resume=True)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == before
    of_version(tmp_path / "run/atlas_step_6.json", 1)
    assert load_checkpoint(tmp_path / "run/atlas_step_6.pt")["step"] == 6


def test_shards_of_a_later_version_are_found_and_refused(tmp_path: Path, text_file: Path) -> None:
    explicit = layer(tmp_path / "run", text_file, checkpoint__format="sharded")
    trained(explicit)
    for name in ("atlas_step_6", "atlas_best"):
        of_version(tmp_path / f"run/{name}.json", 99)
        with pytest.raises(CheckpointError, match=LATER):
            load_checkpoint(tmp_path / "run" / name)
    with pytest.raises(AtlasError, match=LATER):
        run_for(explicit)
    assert (tmp_path / "run/atlas_step_6/state.json").exists()


@pytest.mark.skipif(os.name == "nt", reason="makes a pipe")
@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "config.yaml", "atlas.lock", "training.log", "atlas_best.pt"]
)
def test_a_pipe_in_the_place_of_a_runs_file_is_refused(tmp_path: Path, text_file: Path, name: str) -> None:
    (tmp_path / "run").mkdir()
    os.mkfifo(tmp_path / "run" / name)
    with pytest.raises(
        AtlasError, match=rf"{name}: is not a regular file: remove it, or choose another --output-dir"
    ):
        run_for(layer(tmp_path / "run", text_file))
