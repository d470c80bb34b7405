"""The configs that come with Atlas, found by name in a checkout and in an installed wheel."""

from __future__ import annotations

from pathlib import Path

from atlas.config.loader import Layer, overlay, read_yaml
from atlas.errors import ConfigError, did_you_mean
from atlas.files import was_url

_NAMES = ("nano", "modern-nano", "tiny", "modern", "small", "default", "large", "xlarge", "ultra")

# A wheel holds the presets inside the package; a checkout has the presets beside the package.
_FOLDERS = (Path(__file__).parents[1] / "configs", Path(__file__).parents[2] / "configs")


def preset_names() -> tuple[str, ...]:
    """Return the names of the presets, smallest first."""
    return _NAMES


def preset_path(name: str) -> Path:
    """Return the config file of a preset; the case of `name` does not matter. Raises `ConfigError` if there is no such
    preset."""
    name = name.lower() if name.lower() in _NAMES else name
    if name not in _NAMES:
        hint = did_you_mean(name, _NAMES, f"the presets are {', '.join(_NAMES)}")
        raise ConfigError(f"{name}: no such preset; {hint}")
    return next(path for folder in _FOLDERS if (path := folder / f"{name}.yaml").is_file())


def find_config(name_or_path: str | Path) -> Path:
    """Return the file that `--config` names, by its path or as a preset. Raises `ConfigError` if there is no such file
    or preset."""
    path = Path(name_or_path)
    if path.is_file():
        return path
    if path.is_dir() and str(name_or_path) not in _NAMES:
        raise ConfigError(f"{path}: is a folder; name a config file in it")
    if path.suffix not in (".yaml", ".yml") and path.parent == Path():
        return preset_path(path.name)
    if path.stem in _NAMES:
        raise ConfigError(
            f"{path}: no such config file; to use the preset, give its name: --config {path.stem}"
        )
    if was_url(path):
        raise ConfigError(f"{path}: is a URL; download the config file, and give the path of the file")
    if path.is_symlink():
        raise ConfigError(
            f"{path}: is a link to a file that does not exist; correct the link, or give the file"
        )
    there = [str(other) for other in path.parent.glob("*.y*ml")]
    hint = did_you_mean(str(path), there, f"give a file, or a preset ({', '.join(_NAMES)})")
    raise ConfigError(f"{path}: no such config file; {hint}")


def leaves_batch_size_open(config: str | Path | None, written: Layer) -> bool:
    """Return True if the user did not set `training.batch_size`, neither in the layer `written` nor in the file that
    `--config` names. A preset's value does not count."""
    path = None if config is None else find_config(config)
    is_own = path is not None and path.resolve() not in {preset_path(name).resolve() for name in _NAMES}
    own = read_yaml(path) if path and is_own else {}
    return "batch_size" not in overlay(own, written).get("training", {})
