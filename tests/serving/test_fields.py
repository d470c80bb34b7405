"""The fields that clients send beside the text: what is taken, what is refused, and what the response names."""

from __future__ import annotations

import json
import re
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from openai.types import chat as chat_types
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params
from pydantic import ValidationError

from atlas.serving.api.fields import UNSUPPORTED, WITHOUT_EFFECT
from atlas.serving.api.items import ResponseRequest
from atlas.serving.api.requests import ChatMessage, ChatRequest, CompletionRequest, StreamOptions
from tests.served import random_model, served_model
from tests.serving.test_serving import post

CHAT, TALK = "/v1/chat/completions", [{"role": "user", "content": "Where does the cat live?"}]
PAGE = (Path(__file__).parents[2] / "docs/SERVING.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with served_model(random_model(chat=True)) as (address, _):
        yield address


def headers_of(address: str, path: str, body: dict) -> dict[str, str]:
    request = urllib.request.Request(address + path, json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=30) as answer:
        answer.read()
        return {name.lower(): value for name, value in answer.headers.items()}


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (chat_create_params.CompletionCreateParamsBase, ChatRequest),
        (completion_create_params.CompletionCreateParamsBase, CompletionRequest),
        (chat_types.ChatCompletionStreamOptionsParam, StreamOptions),
        (chat_types.ChatCompletionAssistantMessageParam, ChatMessage),
        (chat_types.ChatCompletionContentPartTextParam, ChatMessage),
    ],
)
def test_every_field_of_openais_client_is_decided(theirs: type, ours: type) -> None:
    known = {*ours.model_fields, *WITHOUT_EFFECT, *UNSUPPORTED, "text", "type"}  # type: ignore[attr-defined]
    assert set(theirs.__annotations__) - known == set()


def test_the_page_lists_every_field() -> None:
    """`docs/SERVING.md` has one table of all fields."""
    words = set(re.findall(r"`([a-z_]+)`", PAGE))
    own = {*ChatRequest.model_fields, *CompletionRequest.model_fields, *ResponseRequest.model_fields}
    fields = {*own, *WITHOUT_EFFECT, *UNSUPPORTED}
    assert fields - words == set()


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_an_unsupported_field_is_taken_with_its_neutral_value_and_refused_by_name_with_another(
    name: str,
) -> None:
    kind = next(
        (each for each in (ChatRequest, CompletionRequest) if name not in each.model_fields), ChatMessage
    )
    body = {ChatRequest: {"messages": TALK}, CompletionRequest: {"prompt": "x"}, ChatMessage: TALK[0]}[kind]  # type: ignore[index]
    for value in (*UNSUPPORTED[name].neutral, None):
        kind.model_validate({**body, name: value})
    with pytest.raises(ValidationError) as error:
        kind.model_validate({**body, name: {"anything": "else"}})
    assert [each["ctx"]["name"] for each in error.value.errors()] == [name]


def test_fields_without_effect_do_not_change_the_answer(address: str) -> None:
    body = {"messages": TALK, "max_tokens": 8, "temperature": 0}
    status, plain = post(address, body, CHAT)
    fields = {name: {"any": ["value", 1]} for name in WITHOUT_EFFECT - set(ChatRequest.model_fields)}
    _, full = post(address, {**body, **fields, "messages": [{**TALK[0], **fields}]}, CHAT)
    assert status == 200
    assert full["choices"] == plain["choices"]
    assert "x-ignored-fields" not in headers_of(address, CHAT, {**body, **fields})


def test_unknown_fields_are_named_in_a_header_and_once_in_the_log(capsys: pytest.CaptureFixture[str]) -> None:
    body = {
        "messages": [{**TALK[0], "timestamp": 1}, {**TALK[0], "timestamp": 2}],
        "max_tokens": 1,
        "colour": "red",
    }
    with served_model(random_model(chat=True)) as (address, _):
        for stream in (False, True, False):
            told = headers_of(address, CHAT, {**body, "stream": stream})
            assert told["x-ignored-fields"] == "colour, messages.timestamp"
        many = {f"{number} ü\r\nSet-Cookie: a,{'x' * 100}": 1 for number in range(1000)}
        told = headers_of(address, CHAT, {**body, **many})
        names = told["x-ignored-fields"].split(", ")
    assert len(names) == 10
    assert all(re.fullmatch(r"\d\?\?\?\?Set-Cookie:\?a\?x+", name) and len(name) == 64 for name in names[1:])
    assert names[0] == "colour"
    assert "set-cookie" not in told
    logged = [line for line in capsys.readouterr().err.splitlines() if line.startswith("ignored fields")]
    assert logged[0] == "ignored fields that no server knows: colour, messages.timestamp"
    assert len(logged) == 2
    assert "colour" not in logged[1]


def test_a_field_that_is_refused_inside_a_message_is_named(address: str) -> None:
    spoken = {"role": "assistant", "content": None, "audio": {"id": "1"}}
    status, answer = post(address, {"messages": [*TALK, spoken], "max_tokens": 1}, CHAT)
    assert (status, answer["error"]["param"]) == (400, "messages.1.audio")
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}}
    status, answer = post(address, {"messages": [{"role": "user", "content": [image]}]}, CHAT)
    assert (status, answer["error"]["param"]) == (400, "messages.0.content.0.type")
