"""Find the packages that are missing on this machine, and install them from a folder of wheels, without a network.

The missing packages go into a separate folder, which Python searches first. Packages that are already installed, such
as PyTorch, do not change.
"""

from __future__ import annotations

import email
import importlib.metadata
import shlex
import subprocess
import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

try:
    from packaging import requirements, tags, utils
except ImportError:  # pip contains a copy
    from pip._vendor.packaging import requirements, tags, utils  # type: ignore[no-redef]

ROOT = Path(__file__).parents[2]
ALSO = ["pytest>=8.2"]
"""Packages beyond Atlas's own requirements."""
PLATFORMS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_17", "manylinux2014", "manylinux1")


class Missing(Exception):
    """Requirements that no package satisfies, as pip reads them."""

    def __init__(self, names: list[str]) -> None:
        super().__init__(", ".join(names))
        self.names = names


def needed() -> list[str]:
    """The requirements in `pyproject.toml`, and pytest."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return [*project["dependencies"], *ALSO]


def missing(wanted: Iterable[str], packages: Path) -> list[str]:
    """The requirements of `wanted` that no distribution satisfies, neither installed nor in the folder `packages`."""
    found: dict[str, str] = {}
    for distribution in importlib.metadata.distributions(path=[str(packages), *sys.path]):
        found.setdefault(utils.canonicalize_name(distribution.metadata["Name"]), distribution.version)
    return [text for text in wanted if not _is_satisfied(requirements.Requirement(text), found)]


def _is_satisfied(requirement: Any, found: dict[str, str]) -> bool:
    if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
        return True
    version = found.get(utils.canonicalize_name(requirement.name))
    return version is not None and requirement.specifier.contains(version, prereleases=True)


def choose(wanted: list[str], wheels: Path, packages: Path) -> list[Path]:
    """The wheels for the missing packages of `wanted`, and for their own requirements. Raises `Missing`."""
    chosen: dict[str, Path] = {}
    absent = []
    queue = missing(wanted, packages)
    while queue:
        text = queue.pop()
        requirement = requirements.Requirement(text)
        name = utils.canonicalize_name(requirement.name)
        if name in chosen:
            continue
        wheel = _best_wheel(requirement, wheels)
        if wheel is None or name == "torch":
            absent.append(text)
            continue
        chosen[name] = wheel
        queue += missing(_requirements_of(wheel), packages)
    if absent:
        raise Missing(sorted(set(absent)))
    return list(chosen.values())


def _best_wheel(requirement: Any, wheels: Path) -> Path | None:
    """The newest wheel that fits this Python."""
    ours = set(tags.sys_tags())
    found = []
    for path in wheels.glob("*.whl"):
        name, version, _, its_tags = utils.parse_wheel_filename(path.name)
        fits = name == utils.canonicalize_name(requirement.name) and not ours.isdisjoint(its_tags)
        if fits and requirement.specifier.contains(version, prereleases=True):
            found.append((version, path))
    return max(found)[1] if found else None


def _requirements_of(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        [metadata] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return email.message_from_bytes(archive.read(metadata)).get_all("Requires-Dist") or []


def install(chosen: list[Path], packages: Path) -> None:
    options = [
        "--quiet",
        "--disable-pip-version-check",
        "--no-index",
        "--no-deps",
        "--no-compile",
        "--upgrade",
    ]
    command = [sys.executable, "-m", "pip", "install", *options, "--target", str(packages)]
    subprocess.run([*command, *map(str, chosen)], check=True)


def advice(names: list[str], wheels: Path) -> str:
    """The missing packages, and the commands that download them."""
    if any(requirements.Requirement(name).name == "torch" for name in names):
        return (
            "error: PyTorch 2.10 or newer with CUDA must be installed: no wheel of it is taken from a folder"
        )
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    command = ["python3", "-m", "pip", "download", "--only-binary=:all:", "--python-version", python]
    command += ["--implementation", "cp"]
    command += [word for name in PLATFORMS for word in ("--platform", f"{name}_x86_64")]
    bare = [name.partition(";")[0].strip() for name in names]
    return (
        f"error: these packages are missing: {', '.join(bare)}\n"
        f"With a network, for Python {python} on Linux x86_64:\n"
        f"    {shlex.join([*command, '--dest', str(wheels), *bare])}\n"
        f"Then here: benchmarks/gpu.sh --wheels {shlex.quote(str(wheels))}"
    )
