"""The content of a message in a public chat dataset → text.

The content is a string, or a list of parts as in the interfaces of OpenAI and Anthropic. Calls of tools become text.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from atlas.errors import DataError

_NOT_SAID = (
    "thoughts", "reasoning_recap", "user_editable_context", "model_editable_context", "computer_output", "system_error",
)  # fmt: skip
"""Contents of ChatGPT's export that are no messages of the conversation."""
_LEFT_OUT = (
    "thinking", "redacted_thinking", "token_budget", "audio_asset_pointer", "real_time_user_audio_video_asset_pointer",
)  # fmt: skip
"""Parts of a message that its reader does not see, and sound, whose transcript is a part of its own."""


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
    kind = part.get("type", part.get("content_type")) if isinstance(part, dict) else None
    if part is None:
        return ""
    if kind in _LEFT_OUT and found is not None:
        found[f"{kind} of a message"] += 1
        return ""
    if kind in ("tool_use", "server_tool_use"):
        return _as_call({"name": part.get("name"), "arguments": part.get("input")})
    if isinstance(part, dict) and isinstance(part.get("text"), str):
        return str(part["text"])
    raise DataError(f"{place}: contains {kind or 'a part'!r:.60}; Atlas reads only text")


def with_results_apart(message: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield a message in parts, so that each result of a tool is a message of its own. With Anthropic, the results are
    parts of what the user says, or stand between the parts of an answer."""
    content = message.get("content")
    if not isinstance(content, list) or not any(map(_is_result, content)):
        yield message
        return
    for is_result, parts in itertools.groupby(content, _is_result):
        if is_result:
            yield from ({"role": "tool", "content": part.get("content") or ""} for part in parts)
        else:
            yield message | {"content": [*parts]}


def _is_result(part: Any) -> bool:
    return isinstance(part, dict) and str(part.get("type")).endswith("tool_result")


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


def thread_of(tree: dict[str, Any], last: Any, found: Counter[str]) -> list[dict[str, Any]]:
    """Return the messages from the root of ChatGPT's tree to its node `last`, the end of the shown conversation, or to
    the last node if the tree has no such node. Answers that were replaced by others are on other branches. Messages
    that are not shown are left out and counted in `found`."""
    messages: list[dict[str, Any]] = []
    seen = set()
    if not isinstance(last, str) or last not in tree:
        last = next(reversed(tree), None)
    while isinstance(last, str) and last not in seen:
        seen.add(last)
        node = _object(tree, last)
        if message := _object(node, "message"):
            messages += _shown_message(message, found)
        last = node.get("parent")
    return messages[::-1]


def _shown_message(message: dict[str, Any], found: Counter[str]) -> list[dict[str, Any]]:
    """Return the message in a list, or an empty list."""
    content, role = _object(message, "content"), _object(message, "author").get("role")
    hidden = _object(message, "metadata").get("is_visually_hidden_from_conversation")
    said = next((content[field] for field in ("parts", "text", "result") if content.get(field)), "")
    if hidden or content.get("content_type") in _NOT_SAID:
        found["hidden messages" if hidden else f"{content.get('content_type')} of a message"] += 1
        return []
    if role == "tool" and isinstance(said, list):
        texts = [part for part in said if not (isinstance(part, dict) and "asset_pointer" in part)]
        if len(texts) < len(said):
            found["pictures of a tool"] += len(said) - len(texts)
        said = texts
    return [] if role in ("system", "tool") and said in ([""], [], "") else [{"role": role, "content": said}]


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
