"""Convert and check the numbers, sizes and words that users write in YAML and on the command line."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def _number(value: Any) -> Any:
    """Convert a string to a number. Raises `ValueError` for a bool. YAML 1.1 reads `3e-4` as a string, and `yes` as a
    bool."""
    if isinstance(value, bool):
        raise ValueError("must be a number, not true/false")
    if isinstance(value, str):
        try:
            return float(value.replace("_", ""))
        except ValueError:
            raise ValueError("must be a number") from None
    return value


def whole_number(value: Any) -> Any:
    """Convert a number to an integer: `1e5` becomes 100000. Raises `ValueError` for a fraction."""
    value = _number(value)
    if isinstance(value, float):
        if not value.is_integer():
            raise ValueError("must be a whole number")
        value = int(value)
    if isinstance(value, int) and abs(value) >= 2**63:
        raise ValueError("must be below 2^63")
    return value


def count_or_auto(value: Any) -> Any:
    """Return `auto`, or an integer of at least 1. Raises `ValueError` for any other number."""
    if value == "auto":
        return value
    value = whole_number(value)
    if isinstance(value, int) and value < 1:
        raise ValueError("must be at least 1, or auto")
    return value


def off_on(value: Any) -> Any:
    """Convert booleans back to `off` and `on`, since YAML 1.1 reads these words as booleans."""
    return {False: "off", True: "on"}[value] if isinstance(value, bool) else value


def size(value: Any) -> Any:
    """Return `value`. Raises `ValueError` if it is a string but not a size such as 20GB."""
    if isinstance(value, str) and not re.fullmatch(
        r"\s*\d+(\.\d+)?\s*([kmgt]i?)?b?\s*", value, re.IGNORECASE
    ):
        raise ValueError("must be a size such as 20GB")
    return value


def device_name(value: str) -> str:
    """Return `value`. Raises `ValueError` if the setting `device` does not accept this name."""
    if not re.fullmatch(DEVICE, value):
        raise ValueError("must be 'auto', 'cpu', 'cuda', 'cuda:N' or 'mps'")
    return value


DEVICE = r"auto|cpu|cuda|cuda:\d{1,3}|mps"
Int = Annotated[int, BeforeValidator(whole_number)]
Float = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]


class Section(BaseModel):
    """A section of the config. Its values cannot change, and unknown keys raise an error. The docstring of a field is
    the field's description."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", protected_namespaces=(), use_attribute_docstrings=True
    )
