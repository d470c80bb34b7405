"""Rows in the layouts of public chat datasets → conversations.

| layout | fields of a row | used by |
|---|---|---|
| messages | `messages`: a list of `role` and `content` | OpenAI, TRL, axolotl, unsloth |
| ShareGPT | `conversations`: a list of `from` and `value` | FastChat, axolotl, LLaMA-Factory, unsloth |
| Alpaca | `instruction`, `input`, `output` | Stanford Alpaca, litgpt, LLaMA-Factory, axolotl |
| Dolly | `instruction`, `context`, `response` | Databricks |
| pairs | `prompt` and `response` or `completion`, `question` and `answer`, and so on | TRL, OpenOrca, FLAN |
| preference | `prompt`, `chosen` and `rejected` | TRL, LLaMA-Factory |
| bare list | the row itself is a list of messages | |
| exports | `mapping`: a tree of messages; `chat_messages` | ChatGPT's and Claude's export of one's own chats |

Any layout can have `system`, `history` and `tools` beside these fields. A message with `weight` 0 is read, but not
learnt.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, Field

from atlas.data.text.formats.content import as_json, calls_of, parsed, text_of, thread_of, with_results_apart
from atlas.errors import DataError
from atlas.tokenizer.chat import Message

LISTS = ("messages", "conversations", "conversation", "dialog", "dialogue", "turns", "chat", "chat_messages")
"""Fields with a list of messages."""
PAIRS = (
    ("prompt", "response"),
    ("prompt", "completion"),
    ("prompt", "chosen"),
    ("prompt", "output"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("question", "answer"),
    ("question", "response"),
    ("query", "response"),
    ("query", "answer"),
    ("problem", "solution"),
    ("inputs", "targets"),
    ("input", "output"),
    ("human", "assistant"),
    ("user", "assistant"),
)
"""Fields with a question and its answer. An earlier pair is preferred."""
_EXPORTS = {"mapping": "mapping (ChatGPT's export)", "chat_messages": "chat_messages (Claude's export)"}
_COMMON_NAMES = {
    "openai": "messages", "sharegpt": "conversations", "alpaca": "instruction/output", "dolly": "instruction/response",
}  # fmt: skip
PARTS_OF_A_ROW = {*LISTS, "prompt", "completion", "chosen", "rejected", "history", "tools", "functions"}
"""Fields whose list of objects is a part of a row, not a list of rows."""
_MORE_OF_QUESTION = {
    "instruction": ("input", "context"),
    "prompt": ("input", "context"),
    "question": ("context",),
}
_SYSTEM = ("system", "system_prompt", "system_message")
_TOOLS = ("tools", "functions")
_ROLES = {
    "system": "system developer",
    "user": "user human prompter questioner",
    "assistant": "assistant gpt chatgpt model bot ai bing bard claude",
    "tool": "tool function observation function_response tool_response ipython environment",
}
_ROLE_OF = {name: role for role, names in _ROLES.items() for name in names.split()}
_CALLS = ("function_call", "tool_call")
"""Roles of ShareGPT whose text is a call of a tool by the assistant."""
_WEIGHTS = ("weight", "train", "training", "loss")
"""Fields of a message that are 0 or false if the message is not to be learnt."""
_KNOWN_IN_MESSAGE = {
    "role", "from", "sender", "content", "value", "text", "tool_calls", "function_call", "tool_call_id", *_WEIGHTS,
}  # fmt: skip
SINGLE_MESSAGE = (
    "is a single message; if the file is one conversation, write it as one row: jq -cs flatten FILE > CHAT.jsonl, then "
    "atlas train --train-data CHAT.jsonl"
)
_FIELDS_SHOWN, _ITEMS_LOOKED_AT = 8, 20


class ChatReport(BaseModel):
    """How Atlas understood rows of conversations."""

    layouts: Counter[str] = Field(default_factory=Counter)
    """Number of conversations in each layout."""
    roles: Counter[str] = Field(default_factory=Counter)
    """Number of messages of each role."""
    unlearnt: int = 0
    """Number of answers that are read but not learnt, since the row marks them so."""
    empty: int = 0
    """Number of conversations without a message, as apps keep them of chats that were not begun."""
    unanswered: int = 0
    """Number of messages after the last answer. They are left out."""
    passed_over: Counter[str] = Field(default_factory=Counter)
    """Number of times that a field occurred which Atlas does not use, by name."""

    def notes(self) -> Iterator[str]:
        """Yield what was understood, one line each."""
        if self.layouts:
            names = {layout: _EXPORTS.get(layout, layout) for layout in self.layouts}
            layouts = ", ".join(f"{count:,} as {names[form]}" for form, count in self.layouts.most_common())
            roles = ", ".join(f"{count:,} {role}" for role, count in self.roles.most_common())
            yield f"conversations: {layouts}; messages: {roles}"
        if self.unlearnt:
            yield f"{self.unlearnt:,} answers are read but not learnt, since they are marked with weight 0"
        if self.empty:
            yield f"{self.empty:,} conversations without a message are left out"
        if self.unanswered:
            yield f"{self.unanswered:,} messages after the last answer are left out"
        if self.passed_over:
            fields = ", ".join(field for field, _ in self.passed_over.most_common(_FIELDS_SHOWN))
            yield f"fields that are not used: {fields}"


def parse_layout(name: str) -> str:
    """Return the layout with this name: a common name such as `alpaca`, or its fields as `layout_of` returns them.

    Raises `DataError` for any other name.
    """
    layout = _COMMON_NAMES.get(name.lower(), name)
    known = [*LISTS, *("/".join(pair) for pair in PAIRS), "chosen", "mapping", "bare list"]
    if layout not in known:
        raise DataError(
            f"--chat-format {name}: no such layout; give {', '.join(_COMMON_NAMES)}, or {', '.join(known)}"
        )
    return layout


def layout_of(value: object, forced: str | None = None) -> str | None:
    """Return the layout of a row: the field with the list of messages, a pair of fields such as `prompt/response`, or
    `bare list`. Returns None for a row that is no conversation. `forced` is the layout that the user named."""
    if isinstance(value, list):
        return "bare list" if _is_list_of_messages(value) else None
    if not isinstance(value, dict):
        return None
    value = _in_small_letters(value)
    is_list = _may_be_messages if forced is None else bool
    layouts = [
        field for field in LISTS if isinstance(value.get(field), (list, str)) and is_list(value[field])
    ]
    layouts += ["/".join(pair) for pair in PAIRS if all(value.get(field) is not None for field in pair)]
    if isinstance(value.get("chosen"), list) and "prompt" not in value:
        layouts.append("chosen")
    if isinstance(value.get("mapping"), dict) and any("message" in node for node in _nodes(value["mapping"])):
        layouts.append("mapping")
    if forced is not None:
        return forced if forced in layouts else None
    return layouts[0] if layouts else None


def _nodes(tree: dict[str, Any]) -> list[dict[str, Any]]:
    return [node for node in itertools.islice(tree.values(), _ITEMS_LOOKED_AT) if isinstance(node, dict)]


def _in_small_letters(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row with its names in small letters: `Question` is `question`, unless the row has both."""
    small = {name.lower(): value for name, value in row.items()}
    return small if len(small) == len(row) else row


def is_empty(row: object) -> bool:
    """Return whether a row is a conversation without a message."""
    return isinstance(row, dict) and any(row.get(field) == [] for field in LISTS) and layout_of(row) is None


def has_messages(row: object) -> bool:
    """Return whether a row has a list of messages, not only a field of such a name."""
    return isinstance(row, dict) and any(_is_list_of_messages(row.get(field)) for field in LISTS)


def is_message(row: object) -> bool:
    """Return whether a row is a single message, as in a file that is one conversation."""
    return isinstance(row, dict) and {"role", "content"} <= row.keys() and _role_name(row) in _ROLE_OF


def _may_be_messages(value: Any) -> bool:
    """Return whether one of the first items is a message of a known role, a pair, or a list. Exports of messengers have
    messages, too, but from people."""
    if isinstance(value, str):
        return bool(value)
    return any(
        not isinstance(item, dict)
        or _role_name(item) in {*_ROLE_OF, *_CALLS}
        or (_role_of(item) is None and layout_of(item) is not None)
        for item in value[:_ITEMS_LOOKED_AT]
    )


def _unknown_role(message: dict[str, Any]) -> str:
    known = ", ".join(sorted({*_ROLE_OF, *_CALLS}))
    return f"the role {_role_of(message)!r:.60}; Atlas knows {known}"


def _role_of(message: dict[str, Any]) -> Any:
    return next((message[field] for field in ("role", "from", "sender") if field in message), None)


def _role_name(message: dict[str, Any]) -> str:
    return str(_role_of(message)).strip().lower()


def _is_list_of_messages(value: object) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(item, dict) and _role_of(item) is not None for item in value)
    )


def read_conversation(value: Any, place: str, report: ChatReport, forced: str | None = None) -> list[Message]:
    """Return the messages of a row up to its last answer, and add to `report`.

    Raises `DataError` if the row is no conversation, or has no answer to learn from.
    """
    try:
        return _read(value, place, report, forced)
    except RecursionError:
        raise DataError(f"{place}: its history is nested too deeply") from None


def _read(value: Any, place: str, report: ChatReport, forced: str | None) -> list[Message]:
    layout = layout_of(value, forced)
    if layout is None:
        raise DataError(f"{place}: {_no_conversation(value, forced)}")
    found = Counter[str]()
    if layout == "bare list":
        messages = [*_messages(value, place, found)]
    else:
        value = _in_small_letters(value)
        used = {layout} if "/" not in layout else {*layout.split("/")}
        messages = [*_in_fields(value, layout, place, used, found)]
        found.update(field for field in value if field not in used)
    dropped = 0
    while messages and not (messages[-1].role == "assistant" and messages[-1].content.strip()):
        dropped += 1
        messages.pop()
    if not messages:
        raise DataError(f"{place}: has no answer")
    if not any(message.role == "assistant" and message.learn for message in messages):
        raise DataError(f"{place}: has no answer to learn: each is marked with weight 0")
    report.layouts[layout] += 1
    report.unanswered += dropped
    report.passed_over.update(found)
    for message in messages:
        report.roles[message.role] += 1
        report.unlearnt += message.role == "assistant" and not message.learn
    return messages


def _no_conversation(value: object, forced: str | None) -> str:
    if forced is not None:
        return f"does not have the layout {forced}"
    if not isinstance(value, (dict, list)):
        return "is no conversation: a row is an object, or a list of messages"
    lists = (value.get(field) for field in LISTS) if isinstance(value, dict) else ()
    if strange := next((items for items in lists if _is_list_of_messages(items)), None):
        return f"has {_unknown_role(strange[0])}"
    if is_message(value):
        return SINGLE_MESSAGE
    fields = ", ".join(str(field)[:40] for field in value) if isinstance(value, dict) else "a list"
    return (
        f"is no conversation (fields: {fields:.200}); a row has messages, conversations, or a pair such as prompt and "
        "response, instruction and output, question and answer"
    )


def _in_fields(
    row: dict[str, Any], layout: str, place: str, used: set[str], found: Counter[str]
) -> Iterator[Message]:
    system = next((field for field in _SYSTEM if row.get(field)), None)
    tools = next((field for field in _TOOLS if row.get(field)), None)
    used.update(
        field for field in (*_SYSTEM, *_TOOLS, "history") if not row.get(field) or field in (system, tools)
    )
    first = "\n\n".join(
        [
            *([text_of(row[system], f"{place}, {system}")] if system else []),
            *([f"Tools: {as_json(row[tools])}"] if tools else []),
        ]
    )
    messages = [*_after_system(row, layout, place, used, found)]
    if first and messages and messages[0].role == "system":
        messages[0] = Message("system", f"{messages[0].content}\n\n{first}")
    elif first:
        yield Message("system", first)
    yield from messages


def _after_system(
    row: dict[str, Any], layout: str, place: str, used: set[str], found: Counter[str]
) -> Iterator[Message]:
    if history := row.get("history"):
        used.add("history")
        yield from _history(history, place, found)
    if "/" not in layout:
        value = row[layout]
        if isinstance(value, str):  # a CSV file, or a table with JSON in a column
            value = parsed(value, f"{place}, {layout}")
        if layout == "mapping":
            used.add("current_node")
            value = thread_of(value, row.get("current_node"), found)
        yield from _messages(value, place, found)
        return
    asked, answer = layout.split("/")
    if isinstance(row[asked], list) or isinstance(row[answer], list):
        if not _repeats(row[answer], row[asked]):
            yield from _side(row[asked], "user", f"{place}, {asked}", found)
        yield from _side(row[answer], "assistant", f"{place}, {answer}", found)
        return
    question = [text_of(row[asked], f"{place}, {asked}")]
    for field in _MORE_OF_QUESTION.get(asked, ()):
        if field not in (asked, answer) and row.get(field):
            used.add(field)
            question.append(text_of(row[field], f"{place}, {field}"))
        elif field in row and not row[field]:
            used.add(field)
    yield Message("user", "\n\n".join(question))
    yield Message("assistant", text_of(row[answer], f"{place}, {answer}"))


def _repeats(answer: Any, asked: Any) -> bool:
    """Return whether the messages of an answer begin with what was asked, as those of a preference can."""
    if not isinstance(answer, list) or not answer or not isinstance(answer[0], dict):
        return False
    if isinstance(asked, list):
        return answer[: len(asked)] == asked
    return _ROLE_OF.get(_role_name(answer[0])) == "user" and answer[0].get("content") == asked


def _side(value: Any, role: str, place: str, found: Counter[str]) -> Iterator[Message]:
    """Yield the messages of a prompt or a completion. Answers in a prompt are not learnt, as in TRL."""
    if not isinstance(value, list):
        yield Message(role, text_of(value, place))
        return
    for message in _messages(value, place, found):
        learn = message.learn and not (role == "user" and message.role == "assistant")
        yield message._replace(learn=learn)


def _history(value: Any, place: str, found: Counter[str]) -> Iterator[Message]:
    """Yield earlier turns: pairs of question and answer, or messages."""
    if isinstance(value, str):
        value = parsed(value, f"{place}, history")
    if not isinstance(value, list):
        raise DataError(f"{place}, history: is not a list of pairs or messages")
    for number, turn in enumerate(value, start=1):
        if isinstance(turn, dict):
            yield from _messages([turn], f"{place}, history", found)
        elif isinstance(turn, (list, tuple)) and len(turn) == 2:
            yield Message("user", text_of(turn[0], f"{place}, history {number}"))
            yield Message("assistant", text_of(turn[1], f"{place}, history {number}"))
        else:
            raise DataError(
                f"{place}, history {number}: is neither a pair of question and answer nor a message"
            )


def _messages(value: Any, place: str, found: Counter[str]) -> Iterator[Message]:
    if not isinstance(value, list):
        raise DataError(f"{place}: is not a list of messages")
    for number, message in enumerate(value, start=1):
        where = f"{place}, message {number}"
        if not isinstance(message, dict):
            raise DataError(f'{where}: is not an object like {{"role": "user", "content": …}}')
        if _role_of(message) is None and (layout := layout_of(message)) and layout not in LISTS:
            yield from _in_fields(
                message, layout, where, {*message}, found
            )  # a turn with question and answer
            continue
        for part in with_results_apart(message):
            yield _message(part, where, found)
        found.update(f"{field} of a message" for field in message if field not in _KNOWN_IN_MESSAGE)


def _message(message: dict[str, Any], place: str, found: Counter[str]) -> Message:
    name = _role_name(message)
    role = "assistant" if name in _CALLS else _ROLE_OF.get(name)
    if role is None:
        raise DataError(f"{place}: has {_unknown_role(message)}")
    fields = [field for field in ("content", "value", "text") if message.get(field) is not None]
    field = next((field for field in fields if message[field] not in ("", [])), fields[0] if fields else None)
    texts = [text_of(message[field], place, found)] if field else []
    texts += calls_of(message, place)
    if name in _CALLS:
        texts = [f"<tool_call>{text}</tool_call>" for text in texts]
    if not texts and role != "assistant":
        raise DataError(f"{place}: has no text in content")
    learn = all(
        str(message[weight]).lower() not in ("0", "0.0", "false") for weight in _WEIGHTS if weight in message
    )
    return Message(role, "\n".join(text for text in texts if text), learn)
