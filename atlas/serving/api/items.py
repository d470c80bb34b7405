"""The requests of OpenAI's Responses API (https://platform.openai.com/docs/api-reference/responses).

A conversation is a list of items: messages, calls of functions, and the results of calls. The server keeps nothing, so
each request has all items. `as_chat` returns the same request as a chat request.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from atlas.serving.api.body import Body, Int, Items
from atlas.serving.api.errors import ApiError
from atlas.serving.api.formats import (
    CalledFunction,
    Function,
    FunctionName,
    ResponseFormat,
    Tool,
    ToolCall,
    ToolChoice,
)
from atlas.serving.api.requests import (
    MOST_CANDIDATES,
    MOST_MESSAGES,
    ChatMessage,
    ChatRequest,
    Content,
    Limit,
    SamplingSettings,
)

LOGPROBS = "message.output_text.logprobs"


class MessageItem(Body):
    """A message."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Content


class CallItem(Body):
    """A function that an earlier answer called."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    """The arguments as JSON."""


class ResultItem(Body):
    """The result of a call."""

    type: Literal["function_call_output"]
    call_id: str
    output: Content


class ReasoningItem(Body):
    """The reasoning of another model, which is left out."""

    type: Literal["reasoning"]
    content: list[Any] | None = None
    """Its text, which is not read."""


def _kind_of_item(value: Any) -> str:
    kind = value.get("type", "message") if isinstance(value, dict) else getattr(value, "type", "message")
    # The brackets mark a name that an error does not show.
    return f"[{kind}]" if kind in ("function_call", "function_call_output", "reasoning") else "[message]"


Item = Annotated[
    Annotated[MessageItem, Tag("[message]")]
    | Annotated[CallItem, Tag("[function_call]")]
    | Annotated[ResultItem, Tag("[function_call_output]")]
    | Annotated[ReasoningItem, Tag("[reasoning]")],
    Discriminator(_kind_of_item),
]


_Several = Annotated[Items[Item], Field(min_length=1, max_length=MOST_MESSAGES - 1)]


def _kind_of_input(value: Any) -> str:
    return "list[Item]" if isinstance(value, list) else "str"


class FunctionTool(Function):
    """A function that the model may call. Unlike in a chat request, its fields are not inside of another object."""

    type: Literal["function"]


class FunctionChoice(Body):
    """The function that the model must call."""

    type: Literal["function"]
    name: str


class TextFormat(Body):
    """What the text must be: any text, a JSON object, or JSON that follows `schema`."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class TextSettings(Body):
    """The settings of the text."""

    format: TextFormat | None = None


class ResponseRequest(SamplingSettings):
    """A conversation to answer."""

    model: str | None = None
    """The id of a model in /v1/models. Default: the first model. A server with one model takes any name."""
    input: Annotated[
        Annotated[str, Tag("str")] | Annotated[_Several, Tag("list[Item]")], Discriminator(_kind_of_input)
    ]
    """A message of the user, or all items of a conversation."""
    instructions: str | None = None
    """The system message."""
    max_output_tokens: Limit | None = None
    """The largest number of new tokens. -1 or null: the number of free positions in the context."""
    seed: Int | None = Field(None, ge=-(2**63), lt=2**63)
    """The random seed; -1: any."""
    stream: bool | None = None
    """Send the answer as events during generation."""
    cache_prompt: bool | None = None
    """False: read the whole prompt, and keep nothing of the text for later requests."""
    cache_salt: str | None = None
    """vLLM's name for a secret that separates the users of a server: if it is set, as `cache_prompt: false`."""
    metadata: dict[str, str] | None = None
    """Names and values that the response repeats."""
    text: TextSettings | None = None
    include: list[str] | None = None
    """`message.output_text.logprobs`: return the log-probability of each token. Other values add nothing."""
    top_logprobs: Int | None = Field(None, ge=0, le=MOST_CANDIDATES)
    """With log-probabilities: the number of alternatives to return for each token."""
    tools: Annotated[Items[FunctionTool], Field(max_length=128)] | None = None
    """Functions that the model may call."""
    tool_choice: Literal["none", "auto", "required"] | FunctionChoice | None = None
    """Whether the model must call a function, or which one. Default: the model decides."""
    parallel_tool_calls: bool | None = None
    """False: the answer has at most one call."""
    truncation: Literal["auto", "disabled"] | None = None
    """`auto`: if the conversation is longer than the context, leave out its oldest messages. Default: an error."""

    @property
    def has_logprobs(self) -> bool:
        """Whether the answer has log-probabilities."""
        return LOGPROBS in (self.include or [])

    def as_chat(self) -> ChatRequest:
        """Return the request as a chat request. Raises `ApiError` if no message is left."""
        if self.top_logprobs and not self.has_logprobs:
            rule = f"only allowed with {LOGPROBS} in include"
            raise ApiError(400, f"top_logprobs: {rule}", param="top_logprobs")
        messages = [ChatMessage(role="system", content=self.instructions)] if self.instructions else []
        if isinstance(self.input, str):
            messages.append(ChatMessage(role="user", content=self.input))
        else:
            messages += _messages(self.input)
        if not messages:
            raise ApiError(400, "input: has no message", param="input")
        choice: Any = self.tool_choice
        if isinstance(choice, FunctionChoice):
            choice = ToolChoice(type="function", function=FunctionName(name=choice.name))
        chat = ChatRequest(
            model=self.model,
            messages=messages,
            add_generation_prompt=True,
            max_tokens=self.max_output_tokens,
            seed=self.seed,
            stream=self.stream,
            logprobs=self.has_logprobs,
            top_logprobs=self.top_logprobs if self.has_logprobs else None,
            tools=[Tool(type="function", function=_function(tool)) for tool in self.tools or []],
            tool_choice=choice,
            parallel_tool_calls=self.parallel_tool_calls,
            truncation=self.truncation,
            cache_prompt=self.cache_prompt,
            cache_salt=self.cache_salt,
            response_format=self._format(),
        )
        for name in SamplingSettings.model_fields:
            setattr(chat, name, getattr(self, name))
        return chat

    def _format(self) -> ResponseFormat | None:
        form = self.text.format if self.text else None
        if form is None:
            return None
        json_schema = {"name": form.name, "schema": form.schema_, "strict": form.strict}
        is_schema = form.type == "json_schema"
        if is_schema and form.schema_ is None:
            raise ApiError(400, "text.format.schema: must be a JSON schema", param="text.format.schema")
        return ResponseFormat(type=form.type, json_schema=json_schema if is_schema else None)


def _function(tool: FunctionTool) -> Function:
    return Function(
        name=tool.name, description=tool.description, parameters=tool.parameters, strict=tool.strict
    )


def _messages(items: list[Any]) -> list[ChatMessage]:
    """Return the items as messages. The calls after a message of the assistant belong to this message."""
    messages: list[ChatMessage] = []
    for item in items:
        if isinstance(item, MessageItem):
            messages.append(ChatMessage(role=item.role, content=item.content))
        elif isinstance(item, ResultItem):
            messages.append(ChatMessage(role="tool", content=item.output, tool_call_id=item.call_id))
        elif isinstance(item, CallItem):
            if not messages or messages[-1].role != "assistant":
                messages.append(ChatMessage(role="assistant"))
            call = ToolCall(
                id=item.call_id, function=CalledFunction(name=item.name, arguments=item.arguments)
            )
            messages[-1].tool_calls = [*(messages[-1].tool_calls or []), call]
    return messages
