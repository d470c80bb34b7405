"""Calls of functions: how the model learns of the functions, what a call looks like, and how it is read.

A call is written as in the format of Hermes 2 Pro and Qwen:

    <tool_call>
    {"name": "weather", "arguments": {"city": "Oslo"}}
    </tool_call>

If the model's chat template knows this format, the template describes the functions. Otherwise, the system message
does. A grammar makes every call valid JSON that follows the schema of the function's arguments.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Sequence
from typing import Any, NamedTuple

from atlas.serving.api.formats import Tool, ToolCall
from atlas.serving.backends.grammar import CALL_BEGIN, CALL_END, Grammar
from atlas.tokenizer.chat import Message

_CALL = re.compile(f"{CALL_BEGIN}\\s*(.*?)\\s*(?:{CALL_END}|$)", re.DOTALL)
_EXAMPLE = f'{CALL_BEGIN}\n{{"name": NAME, "arguments": {{…}}}}\n{CALL_END}'


class Call(NamedTuple):
    """A call of a function. `arguments` is JSON."""

    name: str
    arguments: str

    def shown(self, index: int | None = None) -> dict[str, Any]:
        """Return the call in OpenAI's format. `index` is its position among the calls of a stream."""
        call = {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": self._asdict()}
        return call if index is None else {"index": index, **call}


def call_grammar(
    tools: Sequence[Tool], *, must_call: bool, is_one: bool, answer: Grammar | None = None
) -> Grammar:
    """Return the grammar of an answer: the JSON of a call if `must_call` is true, otherwise a text with calls. `answer`
    is the grammar of a text without calls; None: any text."""
    definitions, calls = {}, []
    for number, tool in enumerate(tools):
        place = f"#/$defs/arguments_{number}"
        schema = tool.function.parameters or {"type": "object", "properties": {}}
        definitions[f"arguments_{number}"] = _moved(schema, place)
        properties = {"name": {"const": tool.function.name}, "arguments": {"$ref": place}}
        calls.append(
            {
                "type": "object",
                "properties": properties,
                "required": list(properties),
                "additionalProperties": False,
            }
        )
    schema = {**(calls[0] if len(calls) == 1 else {"anyOf": calls}), "$defs": definitions}
    is_strict = any(tool.function.strict for tool in tools)
    if must_call:
        return Grammar(schema, "tools", is_strict=is_strict)
    return Grammar(schema, "tools", is_strict=is_strict, is_call=True, is_one=is_one, answer=answer)


def _moved(schema: Any, place: str) -> Any:
    """Return a schema whose references to itself point to `place`, where it now is."""
    if isinstance(schema, list):
        return [_moved(each, place) for each in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {name: _moved(value, place) for name, value in schema.items()}
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference.startswith("#"):
        moved["$ref"] = place + reference[1:]
    return moved


def knows_calls(template: str | None) -> bool:
    """Return whether a chat template describes functions, and their calls in the format of this module."""
    return template is not None and "tools" in template and CALL_BEGIN in template


def with_instruction(messages: Sequence[Message], tools: Sequence[Tool]) -> list[Message]:
    """Return a conversation whose system message describes the functions."""
    functions = "\n".join(json.dumps(each, ensure_ascii=False) for each in described(tools))
    how = f"To call a function, write only its name and its arguments as JSON:\n{_EXAMPLE}"
    text = f"You may call these functions:\n{functions}\n{how}"
    if messages and messages[0].role == "system":
        return [Message("system", f"{messages[0].content}\n\n{text}"), *messages[1:]]
    return [Message("system", text), *messages]


def described(tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """Return the tools as JSON values, for a chat template."""
    return [tool.model_dump(exclude_none=True, exclude={"function": {"strict"}}) for tool in tools]


def written(text: str, calls: Sequence[ToolCall]) -> str:
    """Return the text of an earlier answer with its calls, as the model wrote them."""
    parts = [text] if text else []
    for call in calls:
        name, arguments = json.dumps(call.function.name), call.function.arguments or "{}"
        parts.append(f'{CALL_BEGIN}\n{{"name": {name}, "arguments": {arguments}}}\n{CALL_END}')
    return "\n".join(parts)


def read_calls(text: str, *, must_call: bool) -> tuple[str, list[Call]]:
    """Return the text before the first call, and the calls. A call that is not complete stays in the text."""
    if must_call:
        call = _read(text)
        return ("", [call]) if call else (text, [])
    calls = [_read(match[1]) for match in _CALL.finditer(text)]
    if not calls or None in calls:
        return text, []
    return text[: text.index(CALL_BEGIN)].rstrip(), [call for call in calls if call]


def _read(text: str) -> Call | None:
    try:
        call = json.loads(text)
        return Call(str(call["name"]), json.dumps(call["arguments"], ensure_ascii=False))
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


class CallStream:
    """The text of an answer that arrives in pieces. `add` returns the text before the first call, and `calls` are the
    calls after the last piece."""

    def __init__(self, *, must_call: bool) -> None:
        self.calls: list[Call] = []
        self._must_call = must_call
        self._text, self._num_shown = "", 0

    def add(self, text: str, *, is_last: bool) -> str:
        """Return the new text that may be shown now: nothing that is, or could become, a part of a call."""
        self._text += text
        shown = self._text
        if is_last:
            shown, self.calls = read_calls(self._text, must_call=self._must_call)
            shown = shown if self.calls else self._text
        elif self._must_call:
            shown = ""
        elif CALL_BEGIN in shown:
            shown = shown[: shown.index(CALL_BEGIN)].rstrip()
        else:
            ends = (
                length for length in range(len(CALL_BEGIN) - 1, 0, -1) if shown.endswith(CALL_BEGIN[:length])
            )
            shown = shown[: len(shown) - next(ends, 0)].rstrip()
        new = shown[self._num_shown :]
        self._num_shown = max(self._num_shown, len(shown))
        return new
