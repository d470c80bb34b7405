"""A model's own chat template, in Jinja → the text and the token ids of a conversation, and which of them are answers.

A template is code from another person. It runs in Jinja's sandbox, which cannot reach files, modules or Python's
objects, and cannot change what it is given. The variables and functions are those of `transformers`
(https://huggingface.co/docs/transformers/main/en/chat_templating_writing).
"""

from __future__ import annotations

import functools
import json
import re
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from atlas.errors import DataError, TokenizerError
from atlas.files import read_limited
from atlas.tokenizer.base import Tokenizer

_START, _END, _BREAK = "\ufdd0", "\ufdd1", "\ufdd2"
"""Characters that Unicode keeps for a program's own use: the begin and the end of an answer, and a break within a text
that looks like a special token."""
_OWN, _OWN_MARKS = re.compile(f"[{_START}{_END}{_BREAK}]"), re.compile(f"[{_START}{_END}]")
_MARKS_ANSWERS = re.compile(r"\{%-?\s*generation\b")
_DATE_IN_TRAINING = datetime(2024, 7, 26)  # as Llama 3's template has it where there is no clock
"""Some templates write the date. In training it is always the same one, so that a run resumes with the same data."""
_LARGEST_TEMPLATE, _LARGEST_CONFIG = 1 << 20, 64 << 20


class Message(NamedTuple):
    """A message of a conversation. White space around `content` is ignored."""

    role: str
    content: str
    learn: bool = True
    """Whether the model learns an answer. Other messages are never learnt."""


def read_chat_template(folder: Path) -> str | None:
    """Return the chat template in a folder of Hugging Face's format, or None if there is none. Of several named
    templates, it is the one with the name `default`.

    Raises `TokenizerError` if a file cannot be read.
    """
    try:
        if (folder / "chat_template.jinja").is_file():
            template: Any = read_limited(folder / "chat_template.jinja", limit=_LARGEST_TEMPLATE).decode()
        elif (folder / "tokenizer_config.json").is_file():
            config = json.loads(read_limited(folder / "tokenizer_config.json", limit=_LARGEST_CONFIG))
            template = config.get("chat_template") if isinstance(config, dict) else None
        else:
            return None
    except (OSError, ValueError, RecursionError) as error:
        raise TokenizerError(f"{folder}: its chat template cannot be read: {error!s:.200}") from None
    if isinstance(template, list):
        named = (entry for entry in template if isinstance(entry, dict) and entry.get("name") == "default")
        template = next(named, {}).get("template")
    return template.encode("utf-8", "replace").decode() if isinstance(template, str) else None


class _MarkAnswers(Extension):
    """`{% generation %}` … `{% endgeneration %}`: the text between them is what the model learns to write."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own attribute

    def parse(self, parser: Parser) -> nodes.Node:
        """Parse a block."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Callable[[], str]) -> str:
        return f"{_START}{caller()}{_END}"


@functools.lru_cache(maxsize=16)
def _compiled(template: str) -> jinja2.Template:
    def refuse(reason: str) -> None:
        raise jinja2.TemplateError(reason)

    def as_json(value: Any, indent: int | None = None, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_MarkAnswers, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = as_json
    environment.globals["raise_exception"] = refuse
    return environment.from_string(template)


def template_fault(template: str) -> str | None:
    """Return why a chat template is not Jinja, or None if it is."""
    try:
        _compiled(template)
    except (jinja2.TemplateError, RecursionError) as error:
        return f"{error!s:.200}"
    return None


def _plain(text: str, tokenizer: Tokenizer) -> str:
    """Return a text with `_BREAK` in each part that looks like a special token."""
    text = _OWN.sub("\ufffd", text)
    for token in tokenizer.special_strings:
        text = text.replace(token, f"{token[0]}{_BREAK}{token[1:]}")
    return text


def _render(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    date: datetime,
    *,
    for_answer: bool,
    variables: Mapping[str, Any] | None = None,
) -> str:
    """Return the text of a conversation on a date, with `_BREAK` in each text of a message that looks like a special
    token. `for_answer` adds the beginning of an answer. `variables` are additional variables of the template."""
    names = {f"{name}_token": token for name, token in tokenizer.named_tokens().items()}
    talk = [{"role": message.role, "content": _plain(message.content, tokenizer)} for message in messages]
    try:
        return _compiled(tokenizer.chat_template or "").render(
            {
                "tools": None,
                "documents": None,
                **(variables or {}),
                "messages": talk,
                "add_generation_prompt": for_answer,
                "strftime_now": date.strftime,
                **names,
            }
        )
    except (
        jinja2.TemplateError,
        TypeError,
        ValueError,
        LookupError,
        ArithmeticError,
        RecursionError,
    ) as error:
        raise DataError(f"the model's chat template refuses this conversation: {error!s:.300}") from None


def encode_prompt_for_answer(
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    beginning: str = "",
    variables: Mapping[str, Any] | None = None,
) -> list[int]:
    """Return the ids of a conversation up to the next answer, with the `beginning` of this answer. `variables` are
    additional variables of the template.

    Raises `DataError` if the template refuses the conversation.
    """
    text = _render(tokenizer, messages, datetime.now(), for_answer=True, variables=variables)
    return _encode(_OWN_MARKS.sub("", text) + _plain(beginning, tokenizer), tokenizer)[0]


def encode_with_special(text: str, tokenizer: Tokenizer) -> list[int]:
    """Return the ids of a text in which special tokens, such as `<|endoftext|>`, are read as such."""
    if not any(token in text for token in tokenizer.special_strings):
        return tokenizer.encode(text)
    return _encode(_OWN.sub("\ufffd", text), tokenizer)[0]


def encode_conversation(messages: Sequence[Message], tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    """Return the ids of a conversation that ends with an answer, and which of them the model learns: the answers with
    the token that ends them.

    Raises `DataError` if the template refuses the conversation, or does not show where its answers are.
    """
    text = _render(tokenizer, messages, _DATE_IN_TRAINING, for_answer=False).rstrip()
    learn = [message.learn for message in messages if message.role == "assistant"]
    if _MARKS_ANSWERS.search(tokenizer.chat_template or ""):
        text = _with_marks_of(text, learn)
    else:
        text = _with_marks(text, _answers_in(text, messages, tokenizer))
    ids, is_answer = _encode(text, tokenizer)
    if not any(is_answer):
        raise DataError("the model's chat template does not show where the answers are")
    return ids, is_answer


def _with_marks_of(text: str, learn: Sequence[bool]) -> str:
    """Return a text without the marks of the answers that are not learnt."""
    parts = re.split(f"{_START}(.*?){_END}", text, flags=re.DOTALL)
    if len(parts) // 2 != len(learn):  # one answer can have several marked parts
        if all(learn):
            return text
        raise DataError("the model's chat template marks another number of answers; leave out weight 0")
    for number, is_learnt in enumerate(learn):
        if is_learnt:
            parts[2 * number + 1] = f"{_START}{parts[2 * number + 1]}{_END}"
    return "".join(parts)


def _answers_in(text: str, messages: Sequence[Message], tokenizer: Tokenizer) -> list[tuple[int, int]]:
    """Return where the learnt answers begin and end in the text of a conversation: an answer is what a message adds to
    the text of the messages before it and the beginning of an answer.

    An answer that the template writes in another way later, such as without its reasoning, is not found.
    """
    places = []
    for number, message in enumerate(messages):
        if message.role != "assistant" or not message.learn:
            continue
        before = _render(tokenizer, messages[:number], _DATE_IN_TRAINING, for_answer=True)
        after = _render(tokenizer, messages[: number + 1], _DATE_IN_TRAINING, for_answer=False).rstrip()
        if text.startswith(after) and after.startswith(before):
            places.append((len(before), len(after)))
    return places


def _with_marks(text: str, places: Sequence[tuple[int, int]]) -> str:
    for start, end in reversed(places):
        text = f"{text[:start]}{_START}{text[start:end]}{_END}{text[end:]}"
    return text


def _encode(text: str, tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    """Return the ids of a text in which special tokens are written out, and which tokens begin between marks. What
    contains `_BREAK` is no special token."""
    special = tokenizer.special_strings
    written = "|".join([*map(re.escape, sorted(special, key=len, reverse=True)), _START, _END])
    ids: list[int] = []
    is_answer: list[bool] = []
    plain, is_inside, loses_blanks = "", False, False
    changes = [(0, False)]  # places in `plain` from which on its tokens are, or are not, between marks
    for part in [*re.split(f"({written})", text), None]:
        if part in (_START, _END):
            is_inside = part == _START
            changes.append((len(plain), is_inside))
        elif part is not None and part not in special:
            plain += part.replace(_BREAK, "").lstrip() if loses_blanks else part.replace(_BREAK, "")
            loses_blanks = False
        else:
            starts = [start for start, _ in changes]
            for id, start in tokenizer.encode_with_starts(plain) if plain else ():
                ids.append(id)
                is_answer.append(changes[bisect_right(starts, start) - 1][1])
            plain, changes = "", [(0, is_inside)]
            if part is not None:
                ids.append(special[part])
                is_answer.append(is_inside)
                loses_blanks = part in tokenizer.without_blanks_after
    return ids, is_answer
