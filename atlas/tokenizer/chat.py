"""Zephyr's template for conversations. It needs no special token except the end-of-text token.

    <|user|>
    Who are you?<|endoftext|>
    <|assistant|>
    A small model.<|endoftext|>

The names of the roles are plain text. A prompt ends with `<|assistant|>` and a new line. An answer ends with the
end-of-text token.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from atlas.tokenizer.base import Tokenizer
from atlas.tokenizer.chat_template import Message as Message
from atlas.tokenizer.chat_template import encode_prompt_for_answer
from atlas.tokenizer.chat_template import encode_with_special as encode_with_special

ROLES = ("system", "user", "assistant", "tool")

CHAT_FORMAT = "zephyr"
"""The name of the template in checkpoints."""

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{ '<|' + message['role'] + '|>\\n' }}"
    "{%- if message['role'] == 'assistant' -%}"
    "{% generation %}{{ (message['content'] | trim) + eos_token }}{% endgeneration %}"
    "{%- else -%}{{ (message['content'] | trim) + eos_token }}{%- endif -%}"
    "{{ '\\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|assistant|>\\n' }}{%- endif -%}"
)
"""The template in Jinja, for GGUF files and Hugging Face's tokenizers."""


class Turn(NamedTuple):
    """One message as two texts. Each text is encoded by itself. The end-of-text token follows the second text.

    The prompt and the answer are separate texts, so an answer has the same ids in training as in generation.
    """

    prompt: str
    answer: str
    learn: bool = True
    """Whether the model learns the answer."""


def turns_of(messages: Sequence[Message]) -> list[Turn]:
    """Return the turns of a conversation. Only the assistant's messages have an `answer`."""
    turns, line_end = [], "\n"
    for number, (role, content, learn) in enumerate(messages):
        head, content = f"{line_end if number else ''}<|{role}|>\n", content.strip()
        turns.append(Turn(head, content, learn) if role == "assistant" else Turn(head + content, ""))
    return turns


def has_own_template(tokenizer: Tokenizer) -> bool:
    """Return whether a tokenizer has a chat template other than Atlas's."""
    return tokenizer.chat_template not in (None, CHAT_TEMPLATE)


def encode_chat(
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    *,
    continues_last: bool = False,
    variables: Mapping[str, Any] | None = None,
) -> list[int]:
    """Return the ids of a conversation, as a prompt for the assistant's next answer. Without a chat template of its
    own, the tokenizer uses Atlas's.

    If `continues_last` is true, the last message is the beginning of this answer, and the model continues it.
    `variables` are additional variables of the tokenizer's template; Atlas's template uses none. Raises `DataError` if
    the tokenizer's template refuses the conversation.
    """
    beginning = messages[-1].content.lstrip() if continues_last else ""
    if continues_last:
        messages = messages[:-1]
    if has_own_template(tokenizer):
        return encode_prompt_for_answer(messages, tokenizer, beginning, variables)
    ids = []
    for prompt, answer, _ in turns_of(messages):
        ids += [*tokenizer.encode(prompt), *(tokenizer.encode(answer) if answer else []), tokenizer.eos_id]
    ids += tokenizer.encode("\n<|assistant|>\n" if messages else "<|assistant|>\n")
    return ids + (tokenizer.encode(beginning) if beginning else [])


def newest_that_fit(messages: Sequence[Message], fits: Callable[[Sequence[Message]], bool]) -> list[Message]:
    """Return a conversation without its oldest messages, so that `fits` is true of the rest.

    System messages at the beginning and the last message are always kept. An answer is dropped with its question.
    """
    system = next((place for place, each in enumerate(messages) if each.role != "system"), len(messages) - 1)
    starts = [place for place in range(system + 1, len(messages)) if messages[place].role != "assistant"]
    starts = [system, *starts]  # if all messages fit, an answer may come first
    rests = [[*messages[:system], *messages[start:]] for start in starts]
    return rests[min(bisect_left(rests, True, key=fits), len(rests) - 1)]
