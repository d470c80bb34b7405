"""The requests and responses of OpenAI's API (https://platform.openai.com/docs/api-reference).

The server refuses unknown fields and values of a wrong type. So the server never ignores a client's setting silently.
`top_k`, `min_p` and `repetition_penalty` are not fields of OpenAI's API. OpenAI's Python client sends these fields with
`extra_body`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from atlas.inference.sampling import Sampling

MOST_CHOICES, MOST_PROMPTS, MOST_STOPS, MOST_CANDIDATES, MOST_MESSAGES = 16, 64, 16, 20, 1024
"""Limits of one request. The description of `stop` repeats the value of `MOST_STOPS`."""


def _integer(value: Any) -> Any:
    """Convert a float such as 5.0 to an int, since JSON has only one type of number."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _bool(value: Any) -> Any:
    """Refuse every value except a boolean. In Python, and therefore in pydantic's `Literal`, 0 equals `False`; in JSON
    it does not."""
    if not isinstance(value, bool):
        raise ValueError("must be false")
    return value


def _integers(values: Any) -> Any:
    """Convert the floats of a list as `_integer` does. A list without floats takes less time."""
    has_floats = isinstance(values, list) and float in set(map(type, values))
    return [*map(_integer, values)] if has_floats else values


T = TypeVar("T")
# The first wrong item ends the validation of a list. Errors for a million items would take seconds and a gigabyte.
Items = Annotated[list[T], Field(fail_fast=True)]
Int = Annotated[int, BeforeValidator(_integer)]
Zero = Annotated[float, Field(ge=0, le=0)]
IsFalse = Annotated[Literal[False], BeforeValidator(_bool)]
TokenIds = Annotated[Items[Annotated[int, Field(ge=0)]], Field(min_length=1), BeforeValidator(_integers)]
SEVERAL = Field(min_length=1, max_length=MOST_PROMPTS)
Stop = Annotated[str, Field(min_length=1, max_length=1000)]


class Body(BaseModel):
    """A JSON object with strict types and no unknown fields. The docstring of a field is its description in the API."""

    model_config = ConfigDict(strict=True, extra="forbid", use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _drop_unknown(cls, values: Any) -> Any:
        """Drop all unknown fields except the first, since pydantic would make an error for each of them."""
        if not isinstance(values, dict):
            return values
        first = next((name for name in values if name not in cls.model_fields), None)
        return {name: value for name, value in values.items() if name in cls.model_fields or name == first}


class StreamOptions(Body):
    """Options of a stream."""

    include_usage: bool | None = None
    """Send the token counts in an additional last chunk."""


class SamplingSettings(Body):
    """The settings for the choice of the next token."""

    temperature: float | None = Field(None, ge=0, allow_inf_nan=False)
    """The sampling temperature; 0: always choose the likeliest token. Default: 1."""
    top_p: float | None = Field(None, gt=0, le=1)
    """Keep only the smallest set of likeliest tokens whose probabilities sum to at least this value."""
    top_k: Int | None = Field(None, ge=0)
    """Keep only the k likeliest tokens; 0: keep all."""
    min_p: float | None = Field(None, ge=0, lt=1)
    """Keep only tokens with at least this fraction of the likeliest token's probability."""
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    """Above 1: make tokens that occurred earlier less likely."""

    def sampling(self) -> Sampling:
        """Return the sampling settings. A setting that the request leaves out has no effect on sampling."""
        named = self.model_dump(include=set(SamplingSettings.model_fields), exclude_none=True)
        return Sampling(**{"temperature": 1.0, "top_k": 0, "top_p": 1.0, **named})


class SamplingParams(SamplingSettings):
    """The fields that requests for completions and for chat completions share."""

    model: str | None = None
    """The id of a model in /v1/models. Default: the first model."""
    n: Int | None = Field(None, ge=1, le=MOST_CHOICES)
    """The number of generations for each prompt."""
    seed: Int | None = Field(None, ge=-(2**63), lt=2**63)
    """The random seed. The same request with the same seed gives the same text."""
    stop: Stop | Items[Stop] | None = None
    """At most 16 strings. The generation ends before the first occurrence of any of these strings."""
    stream: bool | None = None
    """Send the text in chunks during generation."""
    stream_options: StreamOptions | None = None
    user: str | None = None
    """Accepted and ignored."""
    # OpenAI's clients may send the following fields with their neutral values.
    frequency_penalty: Zero | None = None
    """Must be 0 or null; use `repetition_penalty` instead."""
    presence_penalty: Zero | None = None
    """Must be 0 or null; use `repetition_penalty` instead."""
    logit_bias: dict[str, Any] | None = Field(None, max_length=0)
    """Must be empty or null."""

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings, none, one or several."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class CompletionRequest(SamplingParams):
    """A text to continue."""

    prompt: str | Annotated[Items[str], SEVERAL] | TokenIds | Annotated[Items[TokenIds], SEVERAL] = ""
    """One text or several, each as a string or as a list of token ids. An empty text begins a document."""
    max_tokens: Int | None = Field(None, ge=1)
    """The largest number of new tokens. Default: 16."""
    logprobs: Int | None = Field(None, ge=0, le=MOST_CANDIDATES)
    """The number of alternatives to return for each token. If this field is set, the response has log-probabilities."""
    echo: IsFalse | None = None
    """Must be false or null."""
    suffix: None = None
    """Must be null."""
    best_of: Int | None = Field(None, ge=1, le=1)
    """Must be 1 or null."""


class TextPart(Body):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


class ChatMessage(Body):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Items[TextPart]
    name: str | None = None
    """Accepted and ignored."""
    # A client sends these fields if it adds an earlier answer to the conversation.
    refusal: None = None
    """Must be null."""
    tool_calls: None = None
    """Must be null."""
    function_call: None = None
    """Must be null."""
    audio: None = None
    """Must be null."""
    annotations: Items[Any] | None = Field(None, max_length=0)
    """Must be empty or null."""

    @property
    def text(self) -> str:
        """The content of the message as one string."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ResponseFormat(Body):
    """The format of the answer, which can only be text."""

    type: Literal["text"]


class ChatRequest(SamplingParams):
    """A conversation to answer."""

    messages: Items[ChatMessage] = Field(min_length=1, max_length=MOST_MESSAGES)
    max_tokens: Int | None = Field(None, ge=1)
    """Another name for `max_completion_tokens`."""
    max_completion_tokens: Int | None = Field(None, ge=1)
    """The largest number of new tokens. Default: the number of free positions in the context."""
    logprobs: bool | None = None
    """Return the log-probability of each token."""
    top_logprobs: Int | None = Field(None, ge=0, le=MOST_CANDIDATES)
    """With `logprobs`: the number of alternatives to return for each token."""
    response_format: ResponseFormat | None = None
