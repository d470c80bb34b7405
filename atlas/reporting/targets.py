"""Files that the user names for a report or a chart: checks before any work, and writing a PNG."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from atlas.errors import AtlasError
from atlas.files import explain_failed_write

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def check_target(option: str, path: Path, kind: str, *endings: str) -> None:
    """Raise `AtlasError` if the file that `option` names cannot become `kind`, whose names end in `endings`."""
    if path.suffix.lower() not in endings:
        raise AtlasError(f"{option} {path}: is {kind}: name a file that ends in {endings[0]}")
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
    """Write `figure` to the file that `option` names."""
    with explain_failed_write(f"{option} {path}", "name another file"):
        figure.savefig(path, format="png")
