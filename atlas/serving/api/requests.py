"""The requests of OpenAI's API (https://platform.openai.com/docs/api-reference), with the fields that Atlas acts on.

A value of a wrong type is an error. `fields.py` decides about all other fields. `top_k`, `min_p`, `repetition_penalty`
and so on are not fields of OpenAI's API, but of llama.cpp's or vLLM's. OpenAI's Python client sends these fields with
`extra_body`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, PlainValidator, Tag, WithJsonSchema

from atlas.inference.sampling import BAN, Sampling
from atlas.serving.api.body import Body, Int, IsFalse, IsTrue, Items, TokenIds
from atlas.serving.api.errors import ApiError
from atlas.serving.api.formats import ResponseFormat, Tool, ToolCall, ToolChoice

MOST_CHOICES, MOST_PROMPTS, MOST_STOPS, MOST_CANDIDATES, MOST_MESSAGES = 16, 64, 256, 20, 1024
"""Limits of one request. The description of `stop` repeats the value of `MOST_STOPS`."""


def _biases(value: Any) -> tuple[tuple[int, float], ...] | None:
    """Read `logit_bias`: OpenAI's object of token id → bias, or llama.cpp's list of [token id, bias]. `false` as a bias
    bans the token."""
    if value is None:
        return None
    if not isinstance(value, (dict, list)):
        raise ValueError("must be an object of token ids and numbers")
    pairs = []
    for item in value.items() if isinstance(value, dict) else value:
        if not isinstance(item, (tuple, list)) or len(item) != 2:
            raise ValueError("must have a token id and a number in each item")
        token, bias = item
        token = int(token) if isinstance(token, str) and token.isdecimal() and len(token) < 10 else token
        if type(token) is not int or token < 0:
            raise ValueError('must have token ids as names, such as "1234"')
        if bias is not False and (type(bias) not in (int, float) or not -1000 <= bias <= 1000):
            raise ValueError("must have biases from -1000 to 1000, or false")
        pairs.append((token, BAN if bias is False else float(bias)))
    return tuple(pairs)


def kind_of_prompt(value: Any) -> str:
    """Return the tag of a prompt's type, so that an error is about this type only."""
    if not isinstance(value, list):
        return "str"
    kind = type(value[0]) if value else str
    return "list[list[int]]" if kind is list else "list[int]" if kind in (int, float) else "list[str]"


def prompts_of(text: Any, most: int) -> Any:
    """Return the type of a field with one text or with at most `most` texts, each as a string or as token ids. `text`
    is the type of a string."""
    several = Field(min_length=1, max_length=most)
    return Annotated[
        Annotated[text, Tag("str")]
        | Annotated[Items[text], several, Tag("list[str]")]
        | Annotated[TokenIds, Tag("list[int]")]
        | Annotated[Items[TokenIds], several, Tag("list[list[int]]")],
        Discriminator(kind_of_prompt),
    ]


Stop = Annotated[str, Field(max_length=1000)]
_BIASES = {
    "type": ["object", "null"],
    "additionalProperties": {"type": "number", "minimum": -1000, "maximum": 1000},
}
Biases = Annotated[Any, PlainValidator(_biases), WithJsonSchema(_BIASES)]
Limit = Annotated[Int, Field(ge=-1)]


class StreamOptions(Body):
    """Options of a stream."""

    include_usage: bool | None = None
    """Send the token counts in an additional last chunk. Without a stream, the answer always has them."""


class SamplingSettings(Body):
    """The settings for the choice of the next token."""

    temperature: float | None = Field(None, ge=0, allow_inf_nan=False)
    """The sampling temperature; 0: always choose the likeliest token. Default: 1."""
    top_p: float | None = Field(None, ge=0, le=1)
    """Keep only the smallest set of likeliest tokens whose probabilities sum to at least this value."""
    top_k: Int | None = Field(None, ge=-1)
    """Keep only the k likeliest tokens; 0 or -1: keep all."""
    min_p: float | None = Field(None, ge=0, le=1)
    """Keep only tokens with at least this fraction of the likeliest token's probability."""
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    """Above 1: make tokens that occurred earlier less likely."""
    repeat_penalty: float | None = Field(None, ge=0.01, le=100)
    """llama.cpp's name for `repetition_penalty`, which comes first if a request has both."""
    repeat_last_n: Int | None = Field(None, ge=-1)
    """The penalties count only this number of the latest tokens; 0: no penalty; -1: all tokens. Default: -1."""
    frequency_penalty: float | None = Field(None, ge=-1000, le=1000)
    """Above 0: lower a token's logit by this value for each time that the token occurred in the prompt or the text."""
    presence_penalty: float | None = Field(None, ge=-1000, le=1000)
    """Above 0: lower a token's logit by this value if the token occurred in the prompt or the text."""
    logit_bias: Biases = None
    """Numbers that are added to the logits of tokens, as token id → number; `false` bans the token."""

    def sampling(self) -> Sampling:
        """Return the sampling settings. A setting that the request leaves out has no effect on sampling."""
        given = {
            name: value
            for name in SamplingSettings.model_fields
            if (value := getattr(self, name)) is not None
        }
        penalty = given.pop("repeat_penalty", 1.0)
        given["top_k"] = max(0, given.get("top_k", 0))
        return Sampling(**{"temperature": 1.0, "top_p": 1.0, "repetition_penalty": penalty, **given})


class SamplingParams(SamplingSettings):
    """The fields that requests for completions and for chat completions share."""

    model: str | None = None
    """The id of a model in /v1/models. Default: the first model. A server with one model takes any name."""
    n: Int | None = Field(None, ge=1, le=MOST_CHOICES)
    """The number of generations for each prompt."""
    max_completion_tokens: Limit | None = None
    """The largest number of new tokens. -1 or null: the number of free positions in the context."""
    max_tokens: Limit | None = None
    """Another name for `max_completion_tokens`, which comes first if a request has both."""
    n_predict: Limit | None = None
    """llama.cpp's name for `max_tokens`, which comes first if a request has both."""
    min_tokens: Int | None = Field(None, ge=0)
    """The generation does not end with an end-of-text token before it has this number of tokens."""
    ignore_eos: bool | None = None
    """Never choose an end-of-text token."""
    seed: Int | None = Field(None, ge=-(2**63), lt=2**63)
    """The random seed; -1: any. The same request with the same seed gives the same text."""
    stop: Stop | Items[Stop] | None = None
    """At most 256 strings. The generation ends before the first occurrence of any of these strings."""
    stream: bool | None = None
    """Send the text in chunks during generation."""
    stream_options: StreamOptions | None = None
    truncation: Literal["auto", "disabled"] | None = None
    """`auto`: if the prompt is longer than the context, leave out its oldest messages or tokens. Default: an error."""
    response_format: ResponseFormat | None = None
    """What the text must be: any text, a JSON object, or JSON that follows a schema."""
    json_schema: dict[str, Any] | None = None
    """llama.cpp's name for a `response_format` with this JSON schema; an empty schema asks for nothing."""
    truncate_prompt_tokens: Int | None = Field(None, ge=-1)
    """Keep only this number of the prompt's last tokens; -1: as many as the context has."""
    cache_prompt: bool | None = None
    """False: read the whole prompt, and keep nothing of the text for later requests."""
    cache_salt: str | None = None
    """vLLM's name for a secret that separates the users of a server: if it is set, as `cache_prompt: false`."""

    @property
    def uses_known(self) -> bool:
        """Whether the server may use what it knows of earlier texts, and may keep this text for later ones."""
        return self.cache_prompt is not False and not self.cache_salt

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings, none, one or several."""
        several = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(dict.fromkeys(stop for stop in several if stop))

    @property
    def limit(self) -> int | None:
        """The largest number of new tokens; None: no limit, or no such field in the request."""
        limits = (self.max_completion_tokens, self.max_tokens, self.n_predict)
        limit = next((limit for limit in limits if limit is not None), None)
        return None if limit == -1 else limit


class CompletionRequest(SamplingParams):
    """A text to continue."""

    prompt: prompts_of(str, MOST_PROMPTS) = ""  # type: ignore[valid-type]
    """One text or several, each as a string or as a list of token ids. An empty text begins a document."""
    max_tokens: Limit | None = None
    """The largest number of new tokens; -1 or null: the number of free positions in the context. Default: 16."""
    logprobs: Annotated[Int, Field(ge=0, le=MOST_CANDIDATES)] | bool | None = None
    """The number of alternatives to return for each token. If this field is set, the response has log-probabilities."""
    echo: bool | None = None
    """Return the prompt in front of the text; with `logprobs`, with the log-probabilities of the prompt's tokens."""
    best_of: Int | None = Field(None, ge=1, le=MOST_CHOICES)
    """Generate this number of texts for each prompt, and return the `n` whose tokens are likeliest on average."""
    add_special_tokens: IsTrue | None = None
    """Must be true or null: the prompt begins with the token that the model expects, if any."""

    @property
    def candidates(self) -> int | None:
        """The number of alternatives to return for each token; None: no log-probabilities."""
        return int(self.logprobs) or None if isinstance(self.logprobs, bool) else self.logprobs


class TextPart(Body):
    """A part of a message's content."""

    type: Literal["text", "input_text", "output_text"]
    text: str
    logprobs: list[Any] | None = None
    """What an earlier answer told about its tokens, which is not read."""


class RefusalPart(Body):
    """A part of an earlier answer in which a model refused to answer."""

    type: Literal["refusal"]
    refusal: str

    @property
    def text(self) -> str:
        """The text of the part."""
        return self.refusal


def _kind_of_part(value: Any) -> str:
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return "[refusal]" if kind == "refusal" else "[text]"


_Part = Annotated[
    Annotated[TextPart, Tag("[text]")] | Annotated[RefusalPart, Tag("[refusal]")],
    Discriminator(_kind_of_part),
]


def _kind_of_content(value: Any) -> str:
    return "list[TextPart]" if isinstance(value, list) else "str"


Content = Annotated[
    Annotated[str, Tag("str")] | Annotated[Items[_Part], Tag("list[TextPart]")],
    Discriminator(_kind_of_content),
]


class ChatMessage(Body):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    """A text, or several parts of a text. An answer may have none."""
    tool_calls: Items[ToolCall] | None = None
    """The functions that an earlier answer called."""
    tool_call_id: str | None = None
    """The call whose result this message has."""

    @property
    def text(self) -> str:
        """The content of the message as one string."""
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""


class ChatRequest(SamplingParams):
    """A conversation to answer."""

    messages: Items[ChatMessage] = Field(min_length=1, max_length=MOST_MESSAGES)
    logprobs: bool | None = None
    """Return the log-probability of each token."""
    top_logprobs: Int | None = Field(None, ge=0, le=MOST_CANDIDATES)
    """With `logprobs`: the number of alternatives to return for each token."""
    continue_final_message: bool | None = None
    """Continue the last message, which must be the assistant's. Default: true if the assistant's message is last."""
    add_generation_prompt: bool | None = None
    """True: begin a new answer, also after a message of the assistant. The opposite of `continue_final_message`."""
    echo: bool | None = None
    """If the last message is continued: return its text in front of the new text."""
    chat_template_kwargs: dict[str, Any] | None = None
    """Variables for the model's chat template."""
    tools: Annotated[Items[Tool], Field(max_length=128)] | None = None
    """Functions that the model may call."""
    tool_choice: Literal["none", "auto", "required", ""] | ToolChoice | None = None
    """Whether the model must call a function, or which one. Default: the model decides."""
    parallel_tool_calls: bool | None = None
    """False: the answer has at most one call."""
    add_special_tokens: IsFalse | None = None
    """Must be false or null: the chat template writes the special tokens."""

    @property
    def offered(self) -> list[Tool]:
        """The functions that the model may call: none, all of them, or the one that `tool_choice` names."""
        tools = [] if self.tool_choice == "none" else list(self.tools or [])
        if isinstance(self.tool_choice, ToolChoice):
            tools = [tool for tool in tools if tool.function.name == self.tool_choice.function.name]
        if not tools and self.tool_choice not in (None, "none", "auto", ""):
            raise ApiError(400, "tool_choice: tools has no such function", param="tool_choice")
        return tools

    @property
    def must_call(self) -> bool:
        """Whether the answer must be a call."""
        return self.tool_choice == "required" or isinstance(self.tool_choice, ToolChoice)

    @property
    def continues(self) -> bool:
        """Whether the model continues the last message. Raises `ApiError` if the fields contradict one another."""
        is_last = self.messages[-1].role == "assistant"
        continues, begins = self.continue_final_message, self.add_generation_prompt
        if continues is None:
            continues = is_last and not begins
        if continues and begins:
            rule = "not together with add_generation_prompt"
            raise ApiError(400, f"continue_final_message: {rule}", param="continue_final_message")
        if (continues or begins is False) and not is_last:
            param = "continue_final_message" if continues else "add_generation_prompt"
            rule = (
                "only the assistant's message can be continued, and the last message is not the assistant's"
            )
            raise ApiError(400, f"{param}: {rule}", param=param)
        return continues

    @property
    def candidates(self) -> int | None:
        """The number of alternatives to return for each token; None: no log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None
