"""The shapes of the responses of OpenAI's API, for the OpenAPI document."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel


class PromptDetails(BaseModel):
    """The number of tokens of the prompt that were known from earlier requests."""

    cached_tokens: int


class Usage(BaseModel):
    """Token counts."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


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


class OutputText(BaseModel):
    """The text of a message in a response."""

    type: Literal["output_text"]
    text: str
    annotations: list[None]
    logprobs: list[ChatTokenLogprob]


class OutputMessage(BaseModel):
    """A message of the model in a response."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    status: Literal["completed", "incomplete"]
    content: list[OutputText]


class OutputCall(BaseModel):
    """A call of a function in a response. `arguments` is JSON."""

    id: str
    type: Literal["function_call"]
    status: Literal["completed"]
    call_id: str
    name: str
    arguments: str


class OutputDetails(BaseModel):
    """The number of tokens of reasoning, which is 0."""

    reasoning_tokens: int


class ResponseUsage(BaseModel):
    """Token counts of a response."""

    input_tokens: int
    input_tokens_details: PromptDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class IncompleteDetails(BaseModel):
    """Why a response ended early."""

    reason: Literal["max_output_tokens"]


class ResponseObject(BaseModel):
    """The answer of the Responses API: items, and the settings of the request. In a stream, the last event has it."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["completed", "incomplete"]
    error: None
    incomplete_details: IncompleteDetails | None
    model: str
    output: list[OutputMessage | OutputCall]
    usage: ResponseUsage
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    parallel_tool_calls: bool
    previous_response_id: None
    store: Literal[False]
    temperature: float
    top_p: float
    truncation: Literal["auto", "disabled"]
    text: dict[str, Any]
    tools: list[dict[str, Any]]
    tool_choice: str | dict[str, Any]


class Piece(BaseModel):
    """A token and its text, or its bytes if it is a part of a character."""

    id: int
    piece: str | list[int]


class Tokenized(BaseModel):
    """The tokens of a text, their number, and the largest number of tokens that the model reads."""

    tokens: list[int] | list[Piece]
    count: int
    max_model_len: int
    token_strs: list[str] | None = None


class TokenizerInfo(BaseModel):
    """The special tokens of a tokenizer, the largest number of tokens that the model reads, and the chat template."""

    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    model_max_length: int
    chat_template: str | None


class Detokenized(BaseModel):
    """The text of tokens, under llama.cpp's name and under vLLM's."""

    content: str
    prompt: str


class GenerationSettings(BaseModel):
    """The largest number of tokens that the model reads."""

    n_ctx: int


class Modalities(BaseModel):
    """What the model reads besides text."""

    vision: Literal[False]
    audio: Literal[False]


class Properties(BaseModel):
    """What llama.cpp's clients ask about a model."""

    default_generation_settings: GenerationSettings
    total_slots: int
    model_alias: str
    chat_template: str
    modalities: Modalities
    build_info: str


class Embedding(BaseModel):
    """The embedding of a text: numbers, or their fp32 bytes in base64."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(BaseModel):
    """Token counts."""

    prompt_tokens: int
    total_tokens: int


class Embeddings(BaseModel):
    """The embeddings of the texts, in their order."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


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
