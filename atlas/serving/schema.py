"""The requests and responses of OpenAI's API (https://platform.openai.com/docs/api-reference).

Types are strict and unknown fields are refused, so no setting of a client is ignored silently. `top_k`, `min_p` and
`repetition_penalty` are not OpenAI's; its Python client sends them as `extra_body`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from atlas.inference.sampling import Sampling

MOST_CHOICES, MOST_PROMPTS, MOST_STOPS, MOST_CANDIDATES, MOST_MESSAGES = 16, 64, 16, 20, 1024
"""`MOST_STOPS` also stands in the description of `stop`."""


def _integer(value: Any) -> Any:
    """JSON has one number type: 5.0 is an integer."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _bool(value: Any) -> Any:
    """In Python, and so in a `Literal` of pydantic, `false` equals 0; in JSON it does not."""
    if not isinstance(value, bool):
        raise ValueError("must be false")
    return value


Int = Annotated[int, BeforeValidator(_integer)]
Zero = Annotated[float, Field(ge=0, le=0)]
IsFalse = Annotated[Literal[False], BeforeValidator(_bool)]
TokenIds = Annotated[list[Annotated[Int, Field(ge=0)]], Field(min_length=1)]
SEVERAL = Field(min_length=1, max_length=MOST_PROMPTS)
Stop = Annotated[str, Field(min_length=1, max_length=1000)]


class Body(BaseModel):
    """A JSON object with strict types and no unknown fields. Docstrings of fields are their descriptions."""

    model_config = ConfigDict(strict=True, extra="forbid", use_attribute_docstrings=True)


class StreamOptions(Body):
    """Options of a stream."""

    include_usage: bool | None = None
    """Send the token counts in a last chunk."""


class SamplingSettings(Body):
    """How the next token is chosen."""

    temperature: float | None = Field(None, ge=0, allow_inf_nan=False)
    """0: always the likeliest token. Default: 1."""
    top_p: float | None = Field(None, gt=0, le=1)
    """Keep the likeliest tokens whose probabilities reach this sum."""
    top_k: Int | None = Field(None, ge=0)
    """Keep the k likeliest tokens; 0: all."""
    min_p: float | None = Field(None, ge=0, lt=1)
    """Keep tokens with at least this fraction of the likeliest token's probability."""
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    """Above 1: repeat earlier tokens less."""

    def sampling(self) -> Sampling:
        """The settings; one that the request leaves out changes nothing."""
        named = self.model_dump(include=set(SamplingSettings.model_fields), exclude_none=True)
        return Sampling(**{"temperature": 1.0, "top_k": 0, "top_p": 1.0, **named})


class SamplingParams(SamplingSettings):
    """The fields that both kinds of request have."""

    model: str | None = None
    """A name from /v1/models. Default: the first."""
    n: Int | None = Field(None, ge=1, le=MOST_CHOICES)
    """Generations for each prompt."""
    seed: Int | None = Field(None, ge=-(2**63), lt=2**63)
    """Same seed, same text."""
    stop: Stop | list[Stop] | None = None
    """End before one of these strings, at most 16."""
    stream: bool | None = None
    """Send the text while it is generated."""
    stream_options: StreamOptions | None = None
    user: str | None = None
    """Ignored."""
    # OpenAI's clients may send these with the value that changes nothing.
    frequency_penalty: Zero | None = None
    """0; use repetition_penalty."""
    presence_penalty: Zero | None = None
    """0; use repetition_penalty."""
    logit_bias: dict[str, float] | None = Field(None, max_length=0)
    """Empty."""

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings, none, one or several."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class CompletionRequest(SamplingParams):
    """A text to continue."""

    prompt: str | Annotated[list[str], SEVERAL] | TokenIds | Annotated[list[TokenIds], SEVERAL] = ""
    """One text, several, or token ids. An empty text begins a document."""
    max_tokens: Int | None = Field(None, ge=1)
    """New tokens. Default: 16."""
    logprobs: Int | None = Field(None, ge=0, le=MOST_CANDIDATES)
    """Return each token's log-probability, and this many alternatives."""
    echo: IsFalse | None = None
    """False."""
    suffix: None = None
    """Nothing."""
    best_of: Int | None = Field(None, ge=1, le=1)
    """1."""


class TextPart(Body):
    """A part of a message."""

    type: Literal["text"]
    text: str


class ChatMessage(Body):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None
    """Ignored."""
    # Fields of an answer that a client sends back as part of the conversation.
    refusal: None = None
    """Nothing."""
    tool_calls: None = None
    """Nothing."""
    function_call: None = None
    """Nothing."""
    audio: None = None
    """Nothing."""
    annotations: list[Any] | None = Field(None, max_length=0)
    """Empty."""

    @property
    def text(self) -> str:
        """The content as one text."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ResponseFormat(Body):
    """The format of the answer: text."""

    type: Literal["text"]


class ChatRequest(SamplingParams):
    """A conversation to answer."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=MOST_MESSAGES)
    max_tokens: Int | None = Field(None, ge=1)
    """As max_completion_tokens."""
    max_completion_tokens: Int | None = Field(None, ge=1)
    """New tokens. Default: the free part of the context."""
    logprobs: bool | None = None
    """Return each token's log-probability."""
    top_logprobs: Int | None = Field(None, ge=0, le=MOST_CANDIDATES)
    """With logprobs: this many alternatives."""
    response_format: ResponseFormat | None = None


# Responses


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
    """A list per field, with an entry per token."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """One generation."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"]


class Completion(_Response):
    """A complete answer. Each chunk of a stream has the same shape, with `finish_reason` null except in the last."""

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
    """An entry per token."""

    content: list[ChatTokenLogprob]
    refusal: None


class AssistantMessage(BaseModel):
    """The answer of the model."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(BaseModel):
    """One generation."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"]


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
    """What is wrong, and in which field."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """The body of every error response."""

    error: ErrorInfo
