"""A JSON object in a request: strict types, and a decision about every other field."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    PrivateAttr,
    model_validator,
)

from atlas.serving.api.fields import check_neutral, unknown


def _integer(value: Any) -> Any:
    """Convert a float such as 5.0 to an int, since JSON has only one type of number."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _integers(values: Any) -> Any:
    """Convert the floats of a list as `_integer` does. A list without floats takes less time."""
    has_floats = isinstance(values, list) and float in set(map(type, values))
    return [*map(_integer, values)] if has_floats else values


def _same_bool(expected: bool) -> BeforeValidator:
    """Refuse every value except `expected`. In Python, and therefore in pydantic's `Literal`, 0 equals `False`; in JSON
    it does not."""

    def same(value: Any) -> Any:
        if value is not expected:
            raise ValueError(f"must be {str(expected).lower()}")
        return value

    return BeforeValidator(same)


T = TypeVar("T")
# The first wrong item ends the validation of a list. Errors for a million items would take seconds and a gigabyte.
Items = Annotated[list[T], Field(fail_fast=True)]
Int = Annotated[int, BeforeValidator(_integer)]
IsFalse = Annotated[Literal[False], _same_bool(False)]
IsTrue = Annotated[Literal[True], _same_bool(True)]
AnyTokenIds = Annotated[Items[Annotated[int, Field(ge=0)]], BeforeValidator(_integers)]
TokenIds = Annotated[AnyTokenIds, Field(min_length=1)]


class Body(BaseModel):
    """A JSON object with strict types. The docstring of a field is its description in the API."""

    model_config = ConfigDict(strict=True, extra="ignore", use_attribute_docstrings=True)
    _unknown: tuple[str, ...] = PrivateAttr(())

    @model_validator(mode="wrap")
    @classmethod
    def _check_other_fields(cls, values: Any, handler: ModelWrapValidatorHandler[Any]) -> Any:
        own = {field.alias or name for name, field in cls.model_fields.items()}
        others = [name for name in values if name not in own] if isinstance(values, dict) else []
        for name in others:
            check_neutral(name, values[name])
        body = handler(values)
        body._unknown = unknown(others, own)
        return body

    def ignored(self) -> Iterator[str]:
        """Yield the names of the fields that no server knows, also those inside of messages: `messages.colour`."""
        yield from self._unknown
        for name in type(self).model_fields:
            value = getattr(self, name)
            for each in value if isinstance(value, list) else [value]:
                if isinstance(each, Body):
                    yield from (f"{name}.{field}" for field in each.ignored())
