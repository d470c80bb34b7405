"""The content of a message in a public chat dataset → text.

The content is a string, or a list of parts as in the interfaces of OpenAI and Anthropic. Calls of tools become text.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

from atlas.errors import DataError

_NOT_SAID = ("thoughts", "reasoning_recap", "user_editable_context", "model_editable_context")
"""Contents of ChatGPT's export that are no messages of the conversation."""
_THINKING = ("thinking", "redacted_thinking")
"""Parts of an answer that its reader does not see."""


def text_of(value: Any, place: str, found: Counter[str] | None = None) -> str:
    """Return a text that is a string, a number, or a list of parts. Parts that are left out are counted in `found`.

    Raises `DataError` for anything else, such as a picture.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, (int, float)):
        return json.dumps(value)
    if isinstance(value, Sequence):
        return "".join(_part(part, place, found) for part in value)
    raise DataError(f"{place}: is not text")


def _part(part: Any, place: str, found: Counter[str] | None) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in _THINKING and found is not None:
        found[f"{kind} of a message"] += 1
        return ""
    if kind == "tool_use":
        return _as_call({"name": part.get("name"), "arguments": part.get("input")})
    if isinstance(part, dict) and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = kind or (part.get("content_type") if isinstance(part, dict) else None)
    raise DataError(f"{place}: contains {kind or 'a part'!r:.40}; Atlas reads only text")


def without_results(message: dict[str, Any]) -> tuple[list[Any], dict[str, Any] | None]:
    """Return the results of tools in a message of Anthropic's, where they are parts of what the user says, and the
    message without them, or None if nothing is left."""
    content = message.get("content")
    if not isinstance(content, list):
        return [], message
    results = [part for part in content if isinstance(part, dict) and part.get("type") == "tool_result"]
    rest = [part for part in content if part not in results]
    texts = [part.get("content") or "" for part in results]
    return texts, message | {"content": rest} if rest or not results else None


def calls_of(message: dict[str, Any], place: str) -> list[str]:
    """Return OpenAI's calls of tools in a message as texts."""
    calls = message.get("tool_calls") or ([message["function_call"]] if message.get("function_call") else [])
    if not isinstance(calls, list):
        raise DataError(f"{place}: tool_calls is not a list")
    return [_as_call(_without_frame(call)) for call in calls]


def _as_call(call: Any) -> str:
    return f"<tool_call>{as_json(call)}</tool_call>"


def _without_frame(call: Any) -> Any:
    """Return the function and its arguments of a call, without OpenAI's frame."""
    function = call.get("function", call) if isinstance(call, dict) else call
    if isinstance(function, dict) and isinstance(function.get("arguments"), str):
        try:
            return function | {"arguments": json.loads(function["arguments"])}
        except (ValueError, RecursionError):
            return function
    return function


def thread_of(tree: dict[str, Any], last: Any) -> list[dict[str, Any]]:
    """Return the messages from the root of ChatGPT's tree to its node `last`, the end of the shown conversation.
    Answers that were replaced by others are on other branches. Messages that are not shown are left out."""
    messages: list[dict[str, Any]] = []
    seen = set()
    while isinstance(last, str) and last not in seen:
        seen.add(last)
        node = _object(tree, last)
        if shown := _shown_message(_object(node, "message")):
            messages.append(shown)
        last = node.get("parent")
    return messages[::-1]


def _shown_message(message: dict[str, Any]) -> dict[str, Any] | None:
    content, role = _object(message, "content"), _object(message, "author").get("role")
    hidden = _object(message, "metadata").get("is_visually_hidden_from_conversation")
    said = content.get("parts", content.get("text"))
    if (
        hidden
        or content.get("content_type") in _NOT_SAID
        or (role == "system" and said in ([""], [], "", None))
    ):
        return None
    return {"role": role, "content": said} if message else None


def _object(parent: dict[str, Any], name: str) -> dict[str, Any]:
    """Return the object in a field, or an empty one."""
    value = parent.get(name)
    return value if isinstance(value, dict) else {}


def parsed(text: str, place: str) -> Any:
    """Return the value of a JSON text, such as a list of messages in a cell of a table."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise DataError(f"{place}: is neither a list nor JSON") from None


def as_json(value: Any) -> str:
    """Return a value as JSON, or a string as it is."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
