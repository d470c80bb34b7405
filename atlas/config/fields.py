"""Numbers, sizes and words as users write them in YAML and on the command line."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def _number(value: Any) -> Any:
    """Return a number. YAML 1.1 reads `3e-4` as a string, which is accepted, and `yes` as a bool, which is not."""
    if isinstance(value, bool):
        raise ValueError("must be a number, not true/false")
    if isinstance(value, str):
        try:
            return float(value.replace("_", ""))
        except ValueError:
            raise ValueError("must be a number") from None
    return value


def whole_number(value: Any) -> Any:
    """An integer; `1e5` is 100000."""
    value = _number(value)
    if isinstance(value, float):
        if not value.is_integer():
            raise ValueError("must be a whole number")
        value = int(value)
    if isinstance(value, int) and abs(value) >= 2**63:
        raise ValueError("must be below 2^63")
    return value


def count_or_auto(value: Any) -> Any:
    """`auto`, or an integer from 1."""
    if value == "auto":
        return value
    value = whole_number(value)
    if isinstance(value, int) and value < 1:
        raise ValueError("must be at least 1, or auto")
    return value


def off_on(value: Any) -> Any:
    """Turn booleans into `off` and `on`: YAML 1.1 reads these words as booleans."""
    return {False: "off", True: "on"}[value] if isinstance(value, bool) else value


def size(value: Any) -> Any:
    """Refuse a string that is not a number of bytes such as 20GB."""
    if isinstance(value, str) and not re.fullmatch(
        r"\s*\d+(\.\d+)?\s*([kmgt]i?)?b?\s*", value, re.IGNORECASE
    ):
        raise ValueError("must be a size such as 20GB")
    return value


def device_name(value: str) -> str:
    """Refuse a name that the setting `device` does not accept."""
    if not re.fullmatch(DEVICE, value):
        raise ValueError("must be 'auto', 'cpu', 'cuda', 'cuda:N' or 'mps'")
    return value


DEVICE = r"auto|cpu|cuda|cuda:\d{1,3}|mps"
Int = Annotated[int, BeforeValidator(whole_number)]
Float = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]


class Section(BaseModel):
    """A section of the config, which is frozen and refuses unknown keys. The docstring of a field is its
    description."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", protected_namespaces=(), use_attribute_docstrings=True
    )
