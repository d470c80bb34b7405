"""The fields for the format of an answer: JSON that follows a schema, and calls of functions."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from atlas.serving.api.body import Body

_JSON_OBJECT = {"type": "object"}


class ResponseFormat(Body):
    """What the text must be."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: dict[str, Any] | None = None
    """For the type `json_schema`: an object with the JSON schema in `schema`; with `strict: false`, keywords that
    cannot be enforced are ignored."""

    schema_: dict[str, Any] | None = Field(None, alias="schema")
    """llama.cpp's name for the JSON schema, also with the type `json_object`."""

    @property
    def schema_of_text(self) -> dict[str, Any] | None:
        """The JSON schema that the text must follow; None: any text."""
        if self.type == "text":
            return None
        schema = (self.json_schema or {}).get("schema") or self.schema_
        if self.type == "json_object":
            return self.schema_ or _JSON_OBJECT
        return schema if isinstance(schema, dict) else {}

    @property
    def is_strict(self) -> bool:
        """Whether a keyword that cannot be enforced is an error."""
        return (self.json_schema or {}).get("strict") is not False


class Function(Body):
    """A function that the model may call."""

    name: Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[a-zA-Z0-9_.:/-]+$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """The JSON schema of the arguments."""
    strict: bool | None = None
    """True: a keyword of the schema that cannot be enforced is an error."""


class Tool(Body):
    """A tool, which can only be a function."""

    type: Literal["function"]
    function: Function


class FunctionName(Body):
    """The name of a function."""

    name: str


class ToolChoice(Body):
    """The function that the model must call."""

    type: Literal["function"]
    function: FunctionName


class CalledFunction(Body):
    """A function that an earlier answer called."""

    name: str
    arguments: str
    """The arguments as JSON."""


class ToolCall(Body):
    """A call in an earlier answer."""

    type: Literal["function"] = "function"
    id: str | None = None
    function: CalledFunction
