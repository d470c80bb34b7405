"""The form of a conversation, which is Zephyr's: it needs no token but the end of text.

    <|user|>
    Who are you?<|endoftext|>
    <|assistant|>
    A small model.<|endoftext|>

The names of the roles are plain text. Who writes to a model in this form ends with `<|assistant|>` and a new line, and
the model with the end of text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from atlas.tokenizer.base import Tokenizer

ROLES = ("system", "user", "assistant")

CHAT_FORM = "zephyr"
"""What checkpoints call it."""

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{ '<|' + message['role'] + '|>\\n' + (message['content'] | trim) + eos_token + '\\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|assistant|>\\n' }}{%- endif -%}"
)
"""The same in Jinja, as GGUF files and Hugging Face's tokenizers hold it."""


class Message(NamedTuple):
    """Blanks around `content` do not count."""

    role: str
    content: str


class Turn(NamedTuple):
    """One message as two texts, each encoded by itself, and the end of text behind them.

    What a model is given and what it says meet between the two, so that an answer has the same ids in training as in
    use.
    """

    given: str
    said: str


def turns_of(messages: Sequence[Message]) -> list[Turn]:
    """The texts of a conversation; only what the assistant says is `said`."""
    turns, line_end = [], "\n"
    for number, (role, content) in enumerate(messages):
        head, content = f"{line_end if number else ''}<|{role}|>\n", content.strip()
        turns.append(Turn(head, content) if role == "assistant" else Turn(head + content, ""))
    return turns


def encode_question(messages: Sequence[Message], tokenizer: Tokenizer) -> list[int]:
    """The ids of a conversation up to where the assistant is to go on."""
    ids = []
    for given, said in turns_of(messages):
        ids += [*tokenizer.encode(given), *(tokenizer.encode(said) if said else []), tokenizer.eos_id]
    return ids + tokenizer.encode("\n<|assistant|>\n")


def newest_that_fit(messages: Sequence[Message], tokenizer: Tokenizer, room: int) -> list[Message]:
    """The end of a conversation that takes at most `room` tokens as a question: whole messages, the last at least."""
    kept = list(messages)
    while len(kept) > 1 and len(encode_question(kept, tokenizer)) > room:
        del kept[0]
        while len(kept) > 1 and kept[0].role == "assistant":  # an answer without its question
            del kept[0]
    return kept
