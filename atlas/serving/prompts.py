"""The prompts of a request as token ids: texts, or a conversation up to the beginning of the answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from atlas.serving.api.errors import ApiError
from atlas.serving.api.requests import ChatRequest, CompletionRequest, SamplingParams
from atlas.serving.backends.generation import Backend, TooLong
from atlas.serving.backends.grammar import CALL_BEGIN
from atlas.serving.tools import described, knows_calls, with_instruction, written
from atlas.tokenizer.chat import Message, newest_that_fit

_ROLES = {"developer": "system"}
"""OpenAI's newer names of roles."""


def each_prompt(prompt: Any) -> list[str | list[int]]:
    """Return the prompts in the field `prompt`, each as a text or as token ids."""
    return [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt


def text_of(prompt: str | list[int], backend: Backend) -> str:
    """Return the text of a prompt, which a client gave as a text or as token ids."""
    if isinstance(prompt, str):
        return prompt
    return b"".join(map(backend.token_bytes, prompt)).decode("utf-8", "replace")


def check_known(ids: Sequence[int], backend: Backend, param: str) -> None:
    """Raise `ApiError` if an id in the field `param` is not in the vocabulary."""
    if (largest := max(ids, default=0)) >= backend.vocab_size:
        rule = f"token {largest}: the vocabulary has {backend.vocab_size} tokens"
        raise ApiError(400, f"{param}: {rule}", param=param)


def encode_prompts(body: CompletionRequest, backend: Backend) -> list[list[int]]:
    """Return the token ids of each prompt in the request."""
    encoded = [backend.encode(each) if isinstance(each, str) else each for each in each_prompt(body.prompt)]
    return [_latest(ids, body, backend) for ids in encoded]


def encode_conversation(body: ChatRequest, backend: Backend) -> list[int]:
    """Return the token ids of a conversation, up to the beginning of the answer."""
    tools, continues = body.offered, body.continues
    messages = [
        Message(_ROLES.get(each.role, each.role), written(each.text, each.tool_calls or []))
        for each in body.messages
    ]
    variables = dict(body.chat_template_kwargs or {})
    if tools and knows_calls(backend.chat_template):
        variables["tools"] = described(tools)
    elif tools:
        messages = with_instruction(messages, tools)
    if tools and body.must_call:  # the answer begins inside of a call
        start = messages.pop().content + "\n" if continues else ""
        messages.append(Message("assistant", f"{start}{CALL_BEGIN}\n"))
        continues = True

    def encode(messages: Sequence[Message]) -> list[int]:
        return backend.encode_chat(messages, continues_last=continues, variables=variables)

    if body.truncation == "auto":
        most = _most_of_prompt(body, backend)

        def fits(messages: Sequence[Message]) -> bool:
            try:
                return len(encode(messages)) <= most
            except TooLong:
                return False

        messages = newest_that_fit(messages, fits)
    return _latest(encode(messages), body, backend)


def _latest(ids: list[int], body: SamplingParams, backend: Backend) -> list[int]:
    """Return the latest ids of a prompt, if the request allows to leave out the others."""
    most = body.truncate_prompt_tokens
    if most == -1 or (most is None and body.truncation == "auto"):
        most = _most_of_prompt(body, backend)
    return ids if most is None else ids[max(0, len(ids) - most) :] or ids[-1:]


def _most_of_prompt(body: SamplingParams, backend: Backend) -> int:
    """The number of tokens that a prompt may have so that there is room for the answer: all that it may need, but at
    most half of the context."""
    return backend.context - min(body.limit or backend.context // 4, backend.context // 2)
