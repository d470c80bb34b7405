"""Numbers, sizes and words as people write them in YAML and on the command line."""

from __future__ import annotations

import math
import re
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def _number(value: Any) -> Any:
    """YAML 1.1 reads `3e-4` as a string and `yes` as a bool: take the first, refuse the second."""
    if isinstance(value, bool):
        raise ValueError("must be a number, not true/false")
    if isinstance(value, str):
        try:
            return float(value.replace("_", ""))
        except ValueError:
            raise ValueError("must be a number") from None
    return value


def whole_number(value: Any) -> Any:
    """As `_number`, and `1e5` is the integer 100000."""
    value = _number(value)
    if isinstance(value, float):
        if not math.isfinite(value) or value != int(value):
            raise ValueError("must be a whole number")
        value = int(value)
    if isinstance(value, int) and abs(value) >= 2**63:
        raise ValueError("must be below 2^63")
    return value


def count_or_auto(value: Any) -> Any:
    if value == "auto":
        return value
    value = whole_number(value)
    if isinstance(value, int) and value < 1:
        raise ValueError("must be at least 1, or auto")
    return value


def off_on(value: Any) -> Any:
    """YAML 1.1 reads `off` and `on` as booleans."""
    return {False: "off", True: "on"}[value] if isinstance(value, bool) else value


def size(value: Any) -> Any:
    if isinstance(value, str) and not re.fullmatch(
        r"\s*\d+(\.\d+)?\s*([kmgt]i?)?b?\s*", value, re.IGNORECASE
    ):
        raise ValueError("must be a size such as 20GB")
    return value


def device_name(value: str) -> str:
    if not re.fullmatch(DEVICE, value):
        raise ValueError("must be 'auto', 'cpu', 'cuda', 'cuda:N' or 'mps'")
    return value


DEVICE = r"auto|cpu|cuda|cuda:\d{1,3}|mps"
Int = Annotated[int, BeforeValidator(whole_number)]
Float = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]


class Section(BaseModel):
    """A part of the config: frozen, unknown keys are refused, and a field's docstring is its description."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", protected_namespaces=(), use_attribute_docstrings=True
    )
