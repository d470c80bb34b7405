"""`atlas info --verify`: intact, or what is wrong and which file to use instead."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from atlas.cli import main
from atlas.training.checkpoint.manager import CheckpointManager
from tests.conftest import corpus
from tests.runs import layer, trained


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("info")
    (folder / "text.txt").write_text(corpus()[:3000], encoding="utf-8")
    trained(layer(folder / "run", folder / "text.txt", checkpoint__save_interval=2))
    return folder / "run"


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    """A run with checkpoints at steps 2, 4, 6 and the best of them."""
    return shutil.copytree(finished, tmp_path / "run")


def info(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main(["info", *map(str, arguments)])
    return code, *capsys.readouterr()


def count_tensors(value: object) -> int:
    if isinstance(value, dict):
        return sum(map(count_tensors, value.values()))
    return int(isinstance(value, torch.Tensor))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def poison(path: Path) -> None:
    """Infinities in one tensor, saved in good order with a sidecar that fits."""
    contents = torch.load(path, weights_only=True)
    contents["model_state_dict"]["final_norm.weight"][3:5] = torch.inf
    torch.save(contents, path)
    sidecar = path.with_suffix(".json")
    manifest = json.loads(sidecar.read_text(encoding="utf-8"))
    content = path.read_bytes()
    manifest["files"][0] |= {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    sidecar.write_text(json.dumps(manifest), encoding="utf-8")


def swap(path: Path) -> None:
    """Another step's file, with a sidecar that knows its bytes."""
    other = path.with_name("atlas_step_2.pt")
    shutil.copy(other, path)
    theirs, ours = (
        json.loads(file.with_suffix(".json").read_text(encoding="utf-8")) for file in (other, path)
    )
    entry = theirs["files"][0] | {"name": path.name}
    path.with_suffix(".json").write_text(json.dumps(ours | {"files": [entry]}), encoding="utf-8")


def reshape(path: Path) -> None:
    contents = torch.load(path, weights_only=True)
    weights = contents["model_state_dict"]
    weights["final_norm.weights"] = weights.pop("final_norm.weight")
    torch.save(contents, path)
    path.with_suffix(".json").unlink()


def test_an_intact_checkpoint_is_reported_as_such(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder / "atlas_step_6.pt"
    tensors = count_tensors(torch.load(path, weights_only=True))
    code, output, _ = info(capsys, path, "--verify")
    assert code == 0
    assert (
        f"intact: {path.stat().st_size:,} bytes, sha256 as saved; {tensors} tensors, all finite\n" in output
    )
    renamed = path.rename(folder / "mine.pt")
    code, output, _ = info(capsys, renamed, "--verify")
    assert code == 0
    assert "the checksums inside the file match (no mine.json beside it)" in output
    assert "size as saved; --verify compares every byte" in info(capsys, folder / "atlas_best.pt")[1]


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "flipped": (
        flip,
        "is not the file that was saved (damaged: sha256 differs from atlas_step_6.json)",
    ),
    "cut off": (
        lambda path: path.write_bytes(path.read_bytes()[:-9]),
        "is not the file that was saved (atlas_step_6.json does not describe a file of ",
    ),
    "empty sidecar": (
        lambda path: path.with_suffix(".json").write_text(""),
        "is not the file that was saved (atlas_step_6.json does not describe a file of ",
    ),
    "flipped, no sidecar": (
        lambda path: (flip(path), path.with_suffix(".json").unlink()),
        "is damaged (checksum of",
    ),
    "not finite": (
        poison,
        "its bytes are as saved, but 2 numbers of model_state_dict.final_norm.weight are not finite",
    ),
    "another's": (swap, "holds step 2, its sidecar says 6"),
    "other names": (reshape, "its weights do not fit its config"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_one_is_refused_with_the_one_to_take(
    name: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, (damage, reason) = folder / "atlas_step_6.pt", BROKEN[name]
    damage(path)
    (folder / "atlas_best.pt").unlink()  # of step 6, too
    flip(folder / "atlas_step_4.pt")  # what is recommended was itself looked at
    code, output, errors = info(capsys, path, "--verify")
    assert (code, output) == (2, "")
    assert errors.startswith(f"error: {path}: ")
    assert reason in errors
    assert errors.endswith(f"use {folder / 'atlas_step_2.pt'} instead, which is intact\n")
    assert errors.count("\n") == 1
    flip(folder / "atlas_step_2.pt")
    assert info(capsys, path, "--verify")[2].endswith("no other checkpoint in the folder is intact\n")


@pytest.mark.parametrize("name", BROKEN)
def test_a_folder_is_a_table_and_names_what_resume_auto_takes(
    name: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, reason = BROKEN[name]
    damage(folder / "atlas_step_6.pt")
    code, output, errors = info(capsys, folder, "--verify")
    assert code == 2  # so that a script notices
    assert "1 of 4 checkpoints are unsound (atlas_step_6.pt)" in errors
    header, *rows, last = output.splitlines()
    assert header.split() == ["name", "step", "kind", "loss", "validation", "size", "state"]
    states = {row.split()[0]: row[header.index("state") :] for row in rows}
    assert states.keys() == {path.name for path in folder.glob("*.pt")}
    assert reason in states.pop("atlas_step_6.pt")
    assert all(state.startswith("intact: ") for state in states.values())
    manager = CheckpointManager(folder)
    latest = manager.load_latest()
    assert latest
    assert last == f"--resume auto takes {latest[0].name}"
    row = next(row for row in rows if row.startswith("atlas_step_4.pt"))
    facts = json.loads((folder / "atlas_step_4.json").read_text(encoding="utf-8"))
    assert re.search(rf" 4  step +{facts['loss']:.4f} .* 0\.\d MB  intact", row)


def test_a_folder_is_listed_at_once_without_verify(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(folder / "atlas_step_2.pt", folder / "mine.pt")
    (folder / "atlas_step_4.pt").write_bytes(b"short")
    code, output, _ = info(capsys, folder)
    assert code == 0
    assert [line.split()[0] for line in output.splitlines()[1:-1]] == [
        "atlas_step_6.pt",
        "atlas_best.pt",
        "atlas_step_2.pt",
        "atlas_step_4.pt",
        "mine.pt",
    ]
    assert "not the file that atlas_step_4.json describes" in output
    assert output.splitlines()[-2].endswith("no sidecar")
    assert output.endswith("--resume auto takes atlas_step_6.pt; --verify compares every byte\n")


def test_a_folder_without_an_intact_checkpoint_is_refused(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in folder.glob("*.pt"):
        flip(path)
    code, output, errors = info(capsys, folder, "--verify")
    assert code == 2
    assert output.count("damaged: ") == 4
    assert re.fullmatch(r"error: .*: none of its checkpoints is intact: .*\n", errors)


def test_a_dataset_is_compared_with_verify(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text(corpus(), encoding="utf-8")
    prepare = ["prepare", "--input", str(tmp_path / "text.txt"), "--output", str(tmp_path / "set")]
    assert main(prepare) == 0
    total = sum(file.stat().st_size for file in (tmp_path / "set").glob("*.npy"))
    assert "sizes as saved; --verify compares every byte" in info(capsys, tmp_path / "set")[1]
    assert f"intact: {total:,} bytes, sha256 as saved" in info(capsys, tmp_path / "set", "--verify")[1]
    shard = tmp_path / "set" / "train-00000.npy"
    content = bytearray(shard.read_bytes())
    content[-2] ^= 1
    shard.write_bytes(content)
    assert info(capsys, tmp_path / "set")[0] == 0
    code, _, errors = info(capsys, tmp_path / "set", "--verify")
    assert (code, "train-00000.npy: its content changed" in errors) == (2, True)


def test_verify_is_for_checkpoints_and_datasets(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, errors = info(capsys, "small", "--verify")
    assert (code, errors) == (
        2,
        "error: --verify: reads checkpoints and datasets; small is neither: omit --verify\n",
    )
