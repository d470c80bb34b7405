"""The requests for tokens and embeddings of texts, with the fields of OpenAI's, llama.cpp's and vLLM's servers."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from atlas.serving.api.body import AnyTokenIds, Body, Int, Items
from atlas.serving.api.errors import ApiError
from atlas.serving.api.formats import Tool
from atlas.serving.api.requests import MOST_MESSAGES, ChatMessage, ChatRequest, prompts_of

MOST_EMBEDDED = 2048
"""The largest number of texts in one request for embeddings, as in OpenAI's API."""
Text = Annotated[str, Field(min_length=1)]


class TokenizeRequest(Body):
    """A text or a conversation to tokenize."""

    model: str | None = None
    content: str | None = None
    """llama.cpp's name for the text. The tokens are those of the text alone, unless `add_special` is true."""
    prompt: str | None = None
    """vLLM's name for the text. The tokens include the one with which the model's texts begin, if there is one, unless
    `add_special_tokens` is false."""
    messages: Annotated[Items[ChatMessage], Field(min_length=1, max_length=MOST_MESSAGES)] | None = None
    """A conversation. The tokens are those that /v1/chat/completions reads, up to the beginning of the answer."""
    tools: Annotated[Items[Tool], Field(max_length=128)] | None = None
    """With `messages`: functions that the model may call."""
    chat_template_kwargs: dict[str, Any] | None = None
    """With `messages`: variables for the model's chat template."""
    add_special: bool | None = None
    """Whether the tokens include the one with which the model's texts begin, if there is one."""
    add_special_tokens: bool | None = None
    """vLLM's name for `add_special`."""
    parse_special: bool | None = None
    """False: special tokens in the text, such as `<|im_end|>`, are read as plain text. Default: as special tokens."""
    add_generation_prompt: bool | None = None
    """False: the last message is the assistant's, and is not complete."""
    with_pieces: bool | None = None
    """llama.cpp's option: return each token as an object with its id and its piece of text."""
    return_token_strs: bool | None = None
    """vLLM's option: also return the text of each token."""

    @property
    def conversation(self) -> ChatRequest | None:
        """The messages as a request for an answer; None if the request has a text. Raises `ApiError` if there is not
        exactly one of `content`, `prompt` and `messages`."""
        if sum(each is not None for each in (self.content, self.prompt, self.messages)) != 1:
            raise ApiError(400, "content: give one of content, prompt and messages", param="content")
        if self.messages is None:
            return None
        return ChatRequest(
            messages=self.messages,
            add_generation_prompt=self.add_generation_prompt,
            tools=self.tools,
            chat_template_kwargs=self.chat_template_kwargs,
        )

    @property
    def adds_special(self) -> bool:
        """Whether the tokens of a text include the one with which the model's texts begin."""
        asked = self.add_special if self.add_special is not None else self.add_special_tokens
        return self.content is None if asked is None else asked


class DetokenizeRequest(Body):
    """Tokens whose text is wanted."""

    model: str | None = None
    tokens: AnyTokenIds


class EmbeddingRequest(Body):
    """Texts whose embeddings are wanted."""

    model: str | None = None
    input: prompts_of(Text, MOST_EMBEDDED)  # type: ignore[valid-type]
    """One text or several, each as a string or as a list of token ids."""
    encoding_format: Literal["float", "base64"] | None = None
    """How the numbers are written: as JSON, or as the base64 of fp32 in little-endian order. Default: `float`."""
    dimensions: Int | None = Field(None, ge=1)
    """Must be the model's hidden size, or null: the embeddings cannot be shortened."""
    truncate_prompt_tokens: Int | None = Field(None, ge=-1)
    """Keep only this number of a text's last tokens; -1: as many as the context has. Default: an error for a text that
    is longer than the context."""
