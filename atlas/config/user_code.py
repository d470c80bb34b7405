"""Settings that name Python code of the user. Atlas imports this code only if the command line names it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from atlas.errors import ConfigError

_DOTTED_NAME = re.compile(r"[^\W\d][\w.]*:[^\W\d][\w.]*")


def names_code(value: object) -> bool:
    """Whether `value` has the form `package.module:name`."""
    return isinstance(value, str) and _DOTTED_NAME.fullmatch(value) is not None


def names_tokenizer_code(value: object) -> bool:
    """Whether the tokenizer `value` is code. An existing file or folder is not code, whatever its name."""
    return names_code(value) and not Path(str(value)).exists()


_NAMES_CODE = {"data.tokenizer": names_tokenizer_code, "training.loss": names_code}
"""The settings whose value Atlas may import, and the function that decides whether a value is code."""


def refuse_unasked_code(inherited: Mapping[str, Any], asked: Mapping[str, Any], source: object) -> None:
    """Raise `ConfigError` if the layer `inherited` names code in a setting that the layer `asked` does not set.

    `inherited` comes from `source`, a config file or a checkpoint, and may have been written by a stranger. `asked`
    contains what the user's command sets.
    """
    for key, is_code in _NAMES_CODE.items():
        section, _, name = key.partition(".")
        value = inherited.get(section, {}).get(name)
        if is_code(value) and name not in asked.get(section, {}):
            raise ConfigError(
                f"{source}: {key}: {value}: is Python code, and Atlas imports only code that the command names: if you "
                f"trust this code, add --set {key}={value}"
            )
