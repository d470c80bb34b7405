"""Sharded checkpoints in one process: what is saved comes back, names share a folder, and no kill loses one."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from atlas.cli import main
from atlas.errors import AtlasError
from atlas.training.checkpoint import manager as checkpoints
from atlas.training.checkpoint.convert import consolidate
from atlas.training.checkpoint.load import load_checkpoint
from atlas.training.checkpoint.locate import find_checkpoint
from atlas.training.checkpoint.manager import CheckpointManager
from atlas.training.checkpoint.manifest import read_manifest
from atlas.training.checkpoint.shard_format import join, split
from tests.runs import STATE, layer, logged, run_for, same_bits, trained

leaves = (
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False)
    | st.text(max_size=5)
)
tensors = st.sampled_from(
    [torch.tensor(7.0), torch.tensor(3), torch.arange(6.0).reshape(2, 3), torch.zeros(2).bfloat16()]
)
keys = st.integers(0, 99) | st.text("abc.#/{}", min_size=1, max_size=5).filter(
    lambda key: not key.startswith("#")
)
values = st.recursive(
    leaves | tensors,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
    max_leaves=12,
)


@given(values)
def test_what_is_split_is_joined_again(contents: Any) -> None:
    plain, tensors = split(contents)
    assert same_bits(join(json.loads(json.dumps(plain)), tensors), contents)
    assert all(tensor.dim() for tensor in tensors.values())


@pytest.mark.parametrize(
    "strange", [{}, {"tensor": "missing"}, {"number": 1, "dtype": "nn"}, {"value": [1]}, 3]
)
def test_other_json_is_refused(strange: Any) -> None:
    with pytest.raises(ValueError, match="not a part of a checkpoint"):
        join(strange, {})


def sharded(folder: Path, text: Path, **settings: object) -> dict:
    return layer(folder, text, checkpoint__format="sharded", checkpoint__save_interval=3, **settings)


def test_a_run_in_shards_is_the_run_in_files(tmp_path: Path, text_file: Path) -> None:
    trained(layer(tmp_path / "file", text_file, checkpoint__save_interval=3))
    trained(sharded(tmp_path / "shards", text_file))
    whole, parts = (
        load_checkpoint(tmp_path / name) for name in ("file/atlas_step_6.pt", "shards/atlas_step_6")
    )
    for key in STATE:
        assert same_bits(_as_lists(whole[key]), _as_lists(parts[key])), key
    assert whole.keys() == parts.keys()
    assert whole["tokenizer"] == parts["tokenizer"]

    names = os.listdir(tmp_path / "shards/atlas_step_6")
    assert "state.json" in names
    held: dict[str, torch.Tensor] = {}
    for name in set(names) - {"state.json"}:
        with safe_open(tmp_path / "shards/atlas_step_6" / name, "pt") as file:
            held |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    weights = {
        key.removeprefix("model_state_dict/"): t for key, t in held.items() if key.startswith("model_")
    }
    assert same_bits(weights, dict(whole["model_state_dict"]))


def _as_lists(value: Any) -> Any:
    """JSON has no tuples."""
    if isinstance(value, dict):
        return {key: _as_lists(entry) for key, entry in value.items()}
    return list(map(_as_lists, value)) if isinstance(value, (list, tuple)) else value


@pytest.mark.parametrize("background", [False, True])
def test_a_run_resumes_from_shards_with_the_same_bits(
    tmp_path: Path, text_file: Path, background: bool
) -> None:
    folder = tmp_path / "shards"
    explicit = sharded(folder, text_file, checkpoint__background=background, training__max_steps=30)
    explicit["checkpoint"]["save_interval"] = 15
    trained(explicit)
    whole, lines = load_checkpoint(folder / "atlas_step_30"), logged(folder)
    trained(explicit, resume=str(folder / "atlas_step_15"))
    again = load_checkpoint(folder / "atlas_step_30")
    for key in STATE:
        assert same_bits(whole[key], again[key]), key
    assert [line["loss"] for line in logged(folder)] == [line["loss"] for line in lines]


def test_any_name_and_a_moved_folder_are_understood(
    tmp_path: Path, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained(sharded(tmp_path / "run", text_file))
    for name in ("atlas_step_6", "atlas_step_6/", "atlas_step_6.pt", "atlas_step_6.json"):
        assert find_checkpoint(f"{tmp_path}/run/{name}") == tmp_path / "run/atlas_step_6"
    for name in ("atlas_best", "atlas_best.pt", "best_model.pt"):
        assert find_checkpoint(tmp_path / "run" / name) == tmp_path / "run/atlas_best"
    best = read_manifest(tmp_path / "run/atlas_best", check_hash=True)
    assert best is not None
    assert (tmp_path / "run" / str(best.folder)).is_dir(), "the best names a folder of a step"

    moved = tmp_path / "elsewhere"
    shutil.copytree(tmp_path / "run/atlas_step_6", moved)
    said: list[str] = []
    assert load_checkpoint(moved, say=said.append)["step"] == 6
    assert "its bytes were not compared" in said[0]
    assert (
        main(
            [
                "generate",
                "--checkpoint",
                str(moved),
                "--prompt",
                "The",
                "--max-tokens",
                "2",
                "--tokenizer",
                "tests.toy:tokenizer",
            ]
        )
        == 0
    )
    assert main(["info", str(tmp_path / "run/atlas_best"), "--verify"]) == 0
    assert main(["info", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    assert "sha256 as saved" in out
    assert "--resume auto takes atlas_step_6" in out


def test_consolidated_shards_are_the_file_of_one_device(tmp_path: Path, text_file: Path) -> None:
    trained(sharded(tmp_path / "run", text_file))
    target = tmp_path / "one.pt"
    assert main(["info", str(tmp_path / "run/atlas_step_6"), "--consolidate", str(target)]) == 0
    assert same_bits(load_checkpoint(target), load_checkpoint(tmp_path / "run/atlas_step_6"))
    manifest = read_manifest(target, check_hash=True)
    assert manifest is not None
    assert manifest.step == 6
    with pytest.raises(AtlasError, match="exists: name another file"):
        consolidate(tmp_path / "run/atlas_step_6", target, say=print)
    assert main(["info", str(target), "--consolidate", str(tmp_path / "two.pt")]) == 0
    assert main(["info", "small", "--consolidate", str(tmp_path / "three.pt")]) == 2


def test_a_damaged_shard_is_never_used(tmp_path: Path, text_file: Path) -> None:
    trained(sharded(tmp_path / "run", text_file))
    (shard,) = (tmp_path / "run/atlas_step_6").glob("*.safetensors")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(AtlasError, match=r"not the file that was saved.*such as atlas_step_3"):
        load_checkpoint(tmp_path / "run/atlas_step_6")
    said: list[str] = []
    latest = CheckpointManager(tmp_path / "run", say=said.append).load_latest()
    assert latest is not None
    assert latest[0].name == "atlas_step_3"
    assert "atlas_step_6" in said[0]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "damaged"),
        ("[]", "damaged"),
        ('{"dict": {}}', "format_version"),
        ('{"dict": {"x": {"tensor": "y"}}}', "y"),
    ],
)
def test_a_strange_folder_is_refused(tmp_path: Path, content: str, reason: str) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/state.json").write_text(content)
    with pytest.raises(AtlasError, match=reason):
        load_checkpoint(tmp_path / "model")


def test_old_folders_are_removed_and_the_best_stays(tmp_path: Path, text_file: Path) -> None:
    explicit = sharded(
        tmp_path / "run",
        text_file,
        training__max_steps=12,
        training__eval_interval=3,
        checkpoint__keep_checkpoints=2,
    )
    trained({**explicit, "data": {**explicit["data"], "val_data": str(text_file)}})
    folder = tmp_path / "run"
    found = {path.name for _, path in CheckpointManager(folder).found()}
    assert {"atlas_step_12", "atlas_step_9", "atlas_best"} == found
    best = read_manifest(folder / "atlas_best", check_hash=True)
    assert best is not None
    folders = {path.name for path in folder.iterdir() if path.is_dir()}
    assert folders == {"atlas_step_12", "atlas_step_9", str(best.folder)}


class Killed(BaseException):
    pass


def die_at(point: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Die at the operation on files with this number, counted from here."""
    done = []

    def dying(function: Any) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            if len(done) == point:
                raise Killed
            done.append(function)
            return function(*arguments, **named)

        return call

    monkeypatch.setattr(os, "replace", dying(os.replace))
    monkeypatch.setattr(shutil, "rmtree", dying(shutil.rmtree))
    monkeypatch.setattr(checkpoints, "write_manifest", dying(checkpoints.write_manifest))


@pytest.mark.parametrize("point", range(6))
def test_a_kill_while_a_step_is_saved_again_loses_neither_it_nor_the_best(
    tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch, point: int
) -> None:
    folder = tmp_path / "run"
    explicit = sharded(folder, text_file, training__max_steps=3)
    trained(explicit)
    run = run_for(explicit, resume="auto")
    die_at(point, monkeypatch)
    with suppress(Killed):
        run.save(["interrupt"], wait=True)
    monkeypatch.undo()
    for name in ("atlas_step_3", "atlas_best"):
        assert load_checkpoint(folder / name)["step"] == 3
    run.save(["interrupt"], wait=True)
    found = {path.name for _, path in CheckpointManager(folder).found()}
    assert found == {"atlas_step_3", "atlas_best", "atlas_interrupt_step_3"}
    named = {manifest.folder for manifest, _ in CheckpointManager(folder).found()}
    assert named == {path.name for path in folder.iterdir() if path.is_dir()}, "no folder is left over"


@pytest.mark.parametrize("point", range(12))
def test_a_kill_at_any_point_of_a_commit_leaves_the_old_or_the_new(
    tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch, point: int
) -> None:
    folder = tmp_path / "run"
    explicit = sharded(folder, text_file, training__max_steps=3)
    trained(explicit)
    old = load_checkpoint(folder / "atlas_best")
    die_at(point, monkeypatch)
    with suppress(Killed):
        trained(sharded(folder, text_file), resume="auto")
    monkeypatch.undo()
    latest = CheckpointManager(folder).load_latest()
    assert latest is not None
    assert latest[1]["step"] in (3, 6)
    best = load_checkpoint(folder / "atlas_best")
    assert best["step"] in (3, 6)
    if best["step"] == 3:
        assert same_bits(best["model_state_dict"], old["model_state_dict"])
    trained(sharded(folder, text_file), resume="auto")
    assert load_checkpoint(folder / "atlas_step_6")["step"] == 6
    assert not list(folder.glob("*.tmp"))
