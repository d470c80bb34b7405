"""Who runs Atlas, and where: paths that are not UTF-8, users without a home folder, outputs that are full."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from atlas.cli import main
from atlas.errors import AtlasError
from atlas.files import cache_folder
from tests.conftest import corpus
from tests.runs import layer, trained

pytestmark = pytest.mark.skipif(os.name == "nt", reason="asks POSIX for users and paths")


def test_a_path_that_is_not_utf8_is_a_path_like_any_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    name = os.fsdecode(b"caf\xe9")
    try:
        Path(f"{name}.txt").write_text(corpus(), encoding="utf-8")
    except OSError:
        pytest.skip("this file system takes only UTF-8")
    trained(layer(Path(name), Path(f"{name}.txt")))
    trained(layer(Path("tuned"), Path(f"{name}.txt")), init_from=f"{name}/atlas_best.pt")
    assert main(["info", name]) == 0
    assert main(["info", "tuned"]) == 0
    assert "no such" not in capsys.readouterr().err
    start = json.loads(Path(name, "metrics.jsonl").read_bytes().split(b"\n")[0])
    assert start["data"] == f"{name}.txt"  # the escape in the log is JSON's own
    assert (
        json.loads(Path("tuned/atlas_best.json").read_bytes())["initialized_from"]
        == "caf\\udce9/atlas_best.pt"
    )


def test_a_user_without_a_home_folder_has_a_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ATLAS_CACHE_DIR", raising=False)
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))

    def no_home(*_: object, **__: object) -> str:
        raise RuntimeError("could not determine the home directory")

    monkeypatch.setattr("platformdirs.user_cache_dir", no_home)
    folder = cache_folder()
    assert folder.parent == tmp_path
    assert folder.stat().st_mode & 0o777 == 0o700
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda *_, **__: "/proc/nowhere/atlas")  # as HOME=/
    assert cache_folder() == folder
    folder.rmdir()
    folder.symlink_to(tmp_path)  # made by another user
    with pytest.raises(AtlasError, match=r"belongs to another user.*ATLAS_CACHE_DIR"):
        cache_folder()
