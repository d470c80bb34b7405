"""Check the file names that the user gives for reports and charts, before any work, and write PNG files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from atlas.errors import AtlasError
from atlas.files import explain_failed_write

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def check_target(option: str, path: Path, kind: str, *endings: str) -> None:
    """Raise `AtlasError` if `path` has none of the `endings`, or if the folder of `path` does not exist. `option` and
    `kind` are for the message."""
    if path.suffix.lower() not in endings:
        raise AtlasError(f"{option} {path}: must be {kind}: name a file that ends in {endings[0]}")
    if not path.absolute().parent.is_dir():
        raise AtlasError(f"{option} {path}: there is no folder {path.parent}: make it first")


def check_png(option: str, path: Path) -> None:
    """Raise `AtlasError` if `save_png` cannot write to `path`."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise AtlasError(f'{option}: needs matplotlib: pip install "atlas-llm[plot]"') from None
    check_target(option, path, "a PNG image", ".png")


def save_png(option: str, path: Path, figure: Figure) -> None:
    """Write `figure` as a PNG to `path`, the value of `option`. Raises `AtlasError` if the file cannot be written."""
    with explain_failed_write(f"{option} {path}", "name another file"):
        figure.savefig(path, format="png")
