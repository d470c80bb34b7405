"""What clients send, in OpenAI's words (https://platform.openai.com/docs/api-reference).

Types are strict and unknown fields are refused, so that nothing a client asks for is passed over in silence. `top_k`,
`min_p` and `repetition_penalty` are not OpenAI's; its Python client sends them as `extra_body`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

MOST_CHOICES, MOST_PROMPTS, MOST_STOPS, MOST_CANDIDATES, MOST_MESSAGES = 16, 64, 16, 20, 1024


def _whole(value: Any) -> Any:
    """JSON has one kind of number: 5.0 is an integer."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _no_bool(value: Any) -> Any:
    """To Python `false` is 0; to JSON it is not."""
    if isinstance(value, bool):
        raise ValueError("must be a number")
    return value


def _only_bool(value: Any) -> Any:
    if not isinstance(value, bool):
        raise ValueError("must be false")
    return value


Int = Annotated[int, BeforeValidator(_whole)]
Zero = Annotated[Literal[0], BeforeValidator(_no_bool)]
TokenId = Annotated[Int, Field(ge=0)]
Stop = Annotated[str, Field(min_length=1, max_length=1000)]


class Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class StreamOptions(Body):
    include_usage: bool | None = Field(None, description="A last chunk says how many tokens there were.")


class SamplingParams(Body):
    """What both kinds of request may say."""

    model: str | None = Field(None, description="As /v1/models names it; left out, the first there.")
    temperature: float | None = Field(
        None, ge=0, allow_inf_nan=False, description="0: always the likeliest token; left out: 1."
    )
    top_p: float | None = Field(
        None, gt=0, le=1, description="Choose among the likeliest tokens that reach this mass."
    )
    top_k: Int | None = Field(None, ge=0, description="Choose among the k likeliest tokens; 0: all.")
    min_p: float | None = Field(
        None, ge=0, lt=1, description="Drop tokens less than this part as likely as the likeliest."
    )
    repetition_penalty: float | None = Field(
        None, ge=0.01, le=100, description="Above 1: less of what was there before."
    )
    n: Int | None = Field(None, ge=1, le=MOST_CHOICES, description="Texts for each prompt.")
    seed: Int | None = Field(None, ge=-(2**63), lt=2**63, description="Same seed, same text.")
    stop: Stop | list[Stop] | None = Field(
        None, description=f"End before one of these, at most {MOST_STOPS}."
    )
    stream: bool | None = Field(None, description="Send the text as it is written.")
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, description="Nothing is done with it.")
    # Known to OpenAI's clients, which may send them at the value that changes nothing.
    frequency_penalty: Zero | None = Field(None, description="0; use repetition_penalty.")
    presence_penalty: Zero | None = Field(None, description="0; use repetition_penalty.")
    logit_bias: dict[str, float] | None = Field(None, max_length=0, description="Empty.")

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class CompletionRequest(SamplingParams):
    """A text to continue."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=MOST_PROMPTS)]
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[
            list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1, max_length=MOST_PROMPTS)
        ]
    ) = Field("", description="A text, several, or token ids; an empty one begins a document.")
    max_tokens: Int | None = Field(None, ge=1, description="New tokens; left out: 16.")
    logprobs: Int | None = Field(
        None,
        ge=0,
        le=MOST_CANDIDATES,
        description="Tell each token's log-probability, and so many alternatives.",
    )
    echo: Annotated[Literal[False], BeforeValidator(_only_bool)] | None = Field(None, description="False.")
    suffix: None = Field(None, description="Nothing.")
    best_of: Int | None = Field(None, ge=1, le=1, description="1.")


class TextPart(Body):
    type: Literal["text"]
    text: str


class ChatMessage(Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = Field(None, description="Nothing is done with it.")
    # What an answer may hold that is sent back as part of the conversation.
    refusal: None = Field(None, description="Nothing.")
    tool_calls: None = Field(None, description="Nothing.")
    function_call: None = Field(None, description="Nothing.")
    audio: None = Field(None, description="Nothing.")
    annotations: list[Any] | None = Field(None, max_length=0, description="Empty.")

    @property
    def text(self) -> str:
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class ResponseFormat(Body):
    type: Literal["text"]


class ChatRequest(SamplingParams):
    """A conversation to answer."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=MOST_MESSAGES)
    max_tokens: Int | None = Field(None, ge=1, description="As max_completion_tokens.")
    max_completion_tokens: Int | None = Field(
        None, ge=1, description="New tokens; left out: what the context has room for."
    )
    logprobs: bool | None = Field(None, description="Tell each token's log-probability.")
    top_logprobs: Int | None = Field(
        None, ge=0, le=MOST_CANDIDATES, description="With logprobs: so many alternatives."
    )
    response_format: ResponseFormat | None = None


# What they get


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"]


class Completion(BaseModel):
    """Whole; in a stream each chunk has its shape, and `finish_reason` null up to the last."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class TokenFacts(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class ToldToken(TokenFacts):
    top_logprobs: list[TokenFacts]


class ChatLogprobs(BaseModel):
    content: list[ToldToken]
    refusal: None


class Said(BaseModel):
    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(BaseModel):
    index: int
    message: Said
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"]


class ChatCompletion(BaseModel):
    """Whole; in a stream chunks have a `delta` in place of the message."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class ModelFacts(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class Models(BaseModel):
    object: Literal["list"]
    data: list[ModelFacts]


class Health(BaseModel):
    status: Literal["ok"] = "ok"
    needs_key: bool


class ErrorFacts(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """Every answer that is none."""

    error: ErrorFacts
