"""The shapes of the responses of OpenAI's API, for the OpenAPI document."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel


class Usage(BaseModel):
    """Token counts."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class _Response(BaseModel):
    id: str
    created: int
    model: str
    usage: Usage


class CompletionLogprobs(BaseModel):
    """Log-probabilities of a completion: each field is a list with one entry per token. With `echo`, the first token of
    the prompt has none."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """The result of one generation."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"]


class Completion(_Response):
    """A complete answer. Each chunk of a stream has the same shape; `finish_reason` is null except in the last chunk of
    a choice."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]


class TokenLogprob(BaseModel):
    """A token and its log-probability."""

    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(TokenLogprob):
    """A token of the answer, with the likeliest tokens at its position."""

    top_logprobs: list[TokenLogprob]


class ChatLogprobs(BaseModel):
    """Log-probabilities of an answer, with one entry per token."""

    content: list[ChatTokenLogprob]
    refusal: None


class CalledFunction(BaseModel):
    """A function, and its arguments as JSON."""

    name: str
    arguments: str


class Call(BaseModel):
    """A call of a function."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class AssistantMessage(BaseModel):
    """The answer of the model. `content` may be null if the answer calls functions."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[Call] | None = None


class ChatChoice(BaseModel):
    """The result of one generation."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]


class ChatCompletion(_Response):
    """A complete answer. The chunks of a stream have a `delta` in place of the message."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]


class ModelInfo(BaseModel):
    """A served model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class Models(BaseModel):
    """All served models."""

    object: Literal["list"]
    data: list[ModelInfo]


class Health(BaseModel):
    """The state of the server."""

    status: Literal["ok"] = "ok"
    needs_key: bool


class ErrorInfo(BaseModel):
    """The error message, the type of error, the name of the wrong field, and the error code."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """The body of every error response."""

    error: ErrorInfo
