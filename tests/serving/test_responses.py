"""OpenAI's Responses API through OpenAI's own client, against the answers of chat completions."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator

import openai
import pytest
import torch
from openai.types.responses import response_create_params
from pydantic import BaseModel

from atlas.inference.load import LoadedModel
from atlas.serving.api.fields import UNSUPPORTED, WITHOUT_EFFECT
from atlas.serving.api.items import ResponseRequest
from atlas.serving.backends.engine import Engine
from atlas.serving.backends.generation import Backend
from tests.served import random_model, served, with_llama_cpp
from tests.serving.test_fields import headers_of
from tests.serving.test_serving import post

ROUTE, CHAT = "/v1/responses", "/v1/chat/completions"
QUESTION = "Where does the cat live?"
WEATHER = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Oslo", "Rome"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
FUNCTION = {"type": "function", "name": "weather", "description": "The weather.", "parameters": WEATHER}


class Place(BaseModel):
    city: bool
    size: bool


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return random_model(chat=True, max_seq_len=1024)


@pytest.fixture(scope="module")
def backends(loaded: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> list[Backend]:
    return with_llama_cpp(loaded, tmp_path_factory.mktemp("gguf"))


@pytest.fixture(scope="module")
def address(backends: list[Backend]) -> Iterator[str]:
    with served(backends) as address:
        yield address


@pytest.fixture(params=["random", "exported"])
def model(request: pytest.FixtureRequest, backends: list[Backend]) -> str:
    if request.param not in [backend.id for backend in backends]:
        pytest.skip("llama.cpp is not installed")
    return request.param


@pytest.fixture
def client(address: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        yield client


def chat_text(address: str, body: dict) -> str:
    status, answer = post(address, {"temperature": 0, **body}, CHAT)
    assert status == 200, answer
    return answer["choices"][0]["message"]["content"]


def test_the_answer_is_that_of_a_chat_completion(client: openai.OpenAI, address: str, model: str) -> None:
    answer = client.responses.create(
        model=model, input=QUESTION, instructions="Be short.", max_output_tokens=20, temperature=0, store=True
    )
    messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": QUESTION}]
    assert answer.output_text == chat_text(address, {"model": model, "messages": messages, "max_tokens": 20})
    assert len(answer.output_text) > 5
    assert (answer.status, answer.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert answer.usage.output_tokens == 20
    assert answer.store is False


def test_a_conversation_continues_with_the_items_of_the_answer(client: openai.OpenAI, address: str) -> None:
    first = client.responses.create(model="random", input=QUESTION, max_output_tokens=8, temperature=0)
    items = [
        {"role": "user", "content": QUESTION},
        *first.output,
        {
            "role": "user",
            "content": [{"type": "input_text", "text": "And"}, {"type": "input_text", "text": " the dog?"}],
        },
    ]
    second = client.responses.create(model="random", input=items, max_output_tokens=8, temperature=0)
    messages = [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": first.output_text},
        {"role": "user", "content": "And the dog?"},
    ]
    assert second.output_text == chat_text(
        address, {"messages": messages, "max_tokens": 8, "model": "random"}
    )
    assert second.output_text != first.output_text


def test_a_stream_adds_up_to_the_complete_answer(client: openai.OpenAI, model: str) -> None:
    body = {"model": model, "input": QUESTION, "max_output_tokens": 20, "temperature": 0}
    whole = client.responses.create(**body)
    events = list(client.responses.create(**body, stream=True))
    last = events[-1].response
    kinds = [each.type for each in events]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    assert [each.sequence_number for each in events] == list(range(len(events)))
    assert (
        "".join(each.delta for each in events if each.type == "response.output_text.delta")
        == whole.output_text
    )
    assert last.output_text == whole.output_text
    assert last.usage.input_tokens == whole.usage.input_tokens
    assert last.usage.total_tokens == whole.usage.total_tokens


def test_log_probabilities_are_those_of_a_chat_completion(client: openai.OpenAI, address: str) -> None:
    answer = client.responses.create(
        model="random",
        input=QUESTION,
        max_output_tokens=5,
        temperature=0,
        top_logprobs=2,
        include=["message.output_text.logprobs"],
    )
    body = {
        "messages": [{"role": "user", "content": QUESTION}],
        "max_tokens": 5,
        "temperature": 0,
        "logprobs": True,
        "top_logprobs": 2,
        "model": "random",
    }
    expected = post(address, body, CHAT)[1]["choices"][0]["logprobs"]["content"]
    told = [each.model_dump() for each in answer.output[0].content[0].logprobs]
    assert [each["logprob"] for each in told] == pytest.approx(
        [each["logprob"] for each in expected], abs=1e-5
    )
    assert [len(each["top_logprobs"]) for each in told] == [2] * 5


def test_openais_client_parses_a_model_of_pydantic(client: openai.OpenAI, model: str) -> None:
    answer = client.responses.parse(model=model, input=QUESTION, text_format=Place, max_output_tokens=60)
    assert isinstance(answer.output_parsed, Place)


def test_a_function_is_called_and_its_result_is_read(client: openai.OpenAI, address: str, model: str) -> None:
    body = {
        "model": model,
        "input": QUESTION,
        "tools": [FUNCTION],
        "tool_choice": "required",
        "temperature": 0,
    }
    answer = client.responses.create(**body)
    (call,) = answer.output
    assert (call.type, call.name, answer.status) == ("function_call", "weather", "completed")
    assert json.loads(call.arguments)["city"] in ("Oslo", "Rome")
    with client.responses.stream(**body) as stream:
        assert "response.function_call_arguments.done" in [each.type for each in stream]
        (streamed,) = stream.get_final_response().output
    assert (streamed.name, streamed.arguments) == (call.name, call.arguments)
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "Rain."}
    items = [{"role": "user", "content": QUESTION}, call, result]
    last = client.responses.create(model=model, input=items, max_output_tokens=12, temperature=0)
    messages = [
        {"role": "user", "content": QUESTION},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {
                    "id": call.call_id,
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
            ],
        },
        {"role": "tool", "content": "Rain.", "tool_call_id": call.call_id},
    ]
    assert last.output_text == chat_text(address, {"model": model, "messages": messages, "max_tokens": 12})


def test_a_named_function_is_called(client: openai.OpenAI) -> None:
    other = {**FUNCTION, "name": "other"}
    choice = {"type": "function", "name": "other"}
    answer = client.responses.create(
        model="random", input=QUESTION, tools=[FUNCTION, other], tool_choice=choice
    )
    assert [each.name for each in answer.output] == ["other"]


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"input": []}, "input"),
        ({"input": 5}, "input"),
        ({}, "input"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input.0"),
        ({"input": [{"type": "reasoning", "summary": []}]}, "no message"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input.0"),
        ({"input": "a", "previous_response_id": "resp_1"}, "input"),
        ({"input": "a", "background": True}, "background"),
        ({"input": "a", "tools": [{"type": "web_search"}]}, "tools.0"),
        ({"input": "a", "tool_choice": "required"}, "no such function"),
        ({"input": "a " * 3000}, "context"),
        ({"input": "a", "top_logprobs": 2}, "include"),
        ({"input": "a", "stop": "x"}, "stop"),
        ({"input": "a", "max_tokens": 5}, "max_output_tokens"),
        ({"input": "a", "text": {"format": {"type": "json_schema"}}}, "text.format.schema"),
        ({"input": "a", "text": {"format": {"type": "json_schema", "schema": {"not": {}}}}}, "text.format"),
    ],
)
def test_a_bad_request_is_refused_by_name(address: str, body: dict, says: str) -> None:
    status, answer = post(address, {"model": "random", **body}, ROUTE)
    assert status == 400
    assert says in answer["error"]["message"]


def test_every_field_of_openais_client_is_decided(address: str) -> None:
    own = {field.alias or name for name, field in ResponseRequest.model_fields.items()}
    theirs = set(response_create_params.ResponseCreateParamsBase.__annotations__)
    assert theirs - own - WITHOUT_EFFECT - set(UNSUPPORTED) == set()
    body = {
        "input": [{"role": "user", "content": "a", "colour": 1}],
        "max_output_tokens": 1,
        "model": "random",
    }
    form = {"format": {"type": "text"}, "verbosity": "low"}
    assert headers_of(address, ROUTE, {**body, "text": form})["x-ignored-fields"] == "input.colour"


def test_what_the_client_sent_comes_back_in_ascii(address: str) -> None:
    half = "\ud800"  # half of a surrogate pair, which UTF-8 cannot hold
    body = {
        "model": "random",
        "input": half,
        "instructions": half,
        "max_output_tokens": 1,
        "metadata": {"k": half},
    }
    body["text"] = {"format": {"type": "text", "name": half}}
    status, answer = post(address, body, ROUTE)
    assert (status, answer["instructions"], answer["metadata"]) == (200, half, {"k": half})
    for number in ("NaN", "Infinity", "-Infinity"):
        text = f'{{"input": "x", "text": {{"format": {{"type": "text", "schema": {{"a": {number}}}}}}}}}'
        status, answer = post(address, text.encode(), ROUTE)
        assert (status, "NaN" in answer["error"]["message"]) == (400, True)


@pytest.mark.parametrize("tools", [[], [FUNCTION]])
def test_a_stream_has_the_log_probability_of_every_token(client: openai.OpenAI, tools: list[dict]) -> None:
    """Also of the tokens that are a part of a character, or that could begin a call."""
    for seed in range(3):
        body = {"model": "random", "input": "hi", "max_output_tokens": 40, "temperature": 1.5, "tools": tools}
        body |= {"include": ["message.output_text.logprobs"], "extra_body": {"seed": seed}}
        events = list(client.responses.create(**body, stream=True))
        sent = [
            each for event in events if event.type == "response.output_text.delta" for each in event.logprobs
        ]
        last = next(each for each in events[-1].response.output if each.type == "message").content[0].logprobs
        assert len(sent) == len(last) == 40
        assert [each.logprob for each in sent] == [each.logprob for each in last]


def test_an_answer_can_be_sent_back_with_all_that_it_had(client: openai.OpenAI) -> None:
    body = {"model": "random", "max_output_tokens": 4, "include": ["message.output_text.logprobs"]}
    answer = client.responses.create(**body, input=QUESTION)
    refusal = {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]}
    items = [
        {"role": "user", "content": QUESTION},
        *answer.output,
        refusal,
        {"role": "user", "content": "So?"},
    ]
    assert client.responses.create(**body, input=items).output_text


def test_an_error_ends_a_stream_as_an_event(loaded: LoadedModel) -> None:
    broken = random_model(chat=True)
    with torch.no_grad():
        broken.model.token_embedding.weight.fill_(float("nan"))
    with served([Engine(broken, "broken", parallel=2, queue=2)]) as address:
        request = urllib.request.Request(address + ROUTE, json.dumps({"input": "x", "stream": True}).encode())
        with urllib.request.urlopen(request, timeout=30) as answer:
            *_, name, data = answer.read().decode().strip().splitlines()
        told = json.loads(data.removeprefix("data: "))
        assert (name, told["type"]) == ("event: error", "error")
        assert told["sequence_number"] == 2
        assert told["message"] == told["error"]["message"] != ""
        status, _ = post(address, {"input": "x"}, "/v1/embeddings")
        assert status == 500
        status, answer = post(address, {"prompt": "The river"}, "/api/read")
        assert (status, "weights" in answer["error"]["message"]) == (500, True)
