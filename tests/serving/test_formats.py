"""JSON that follows a schema and calls of functions, checked by `jsonschema` and read by OpenAI's own client."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from enum import Enum

import jsonschema
import openai
import pytest
from pydantic import BaseModel

from atlas.inference.load import LoadedModel
from atlas.serving.api.formats import Tool
from atlas.serving.backends.engine import Engine
from atlas.serving.backends.grammar import CALL_BEGIN, Grammar, Vocabulary
from atlas.serving.tools import CallStream, call_grammar
from atlas.tokenizer import Tokenizer
from atlas.tokenizer.chat import Message, encode_chat
from tests.served import random_model, served, with_llama_cpp
from tests.serving.test_serving import post

CHAT = "/v1/chat/completions"
ASK = [{"role": "user", "content": "Hello"}]
UNIT = {"$defs": {"unit": {"enum": ["C", "F"]}}}
ARGUMENTS = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 8}, "unit": {"$ref": "#/$defs/unit"}},
    "required": ["city", "unit"],
    "additionalProperties": False,
    **UNIT,
}
TOOLS: list[dict] = [
    {
        "type": "function",
        "function": {"name": "weather", "description": "The weather.", "parameters": ARGUMENTS},
    },
    {"type": "function", "function": {"name": "stop_now"}},
]
MODELS = ["random", "exported"]


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return random_model(chat=True, max_seq_len=1024)


@pytest.fixture(scope="module")
def address(loaded: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with served(with_llama_cpp(loaded, tmp_path_factory.mktemp("gguf"))) as address:
        yield address


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> str:
    if request.param == "exported":
        pytest.importorskip("xllamacpp")
    return request.param


def random_schema(draw: random.Random, depth: int = 2) -> dict:
    """A schema with the keywords of the official test suite that a grammar can follow."""

    def scalar() -> dict:
        low = draw.randint(-50, 50)
        return draw.choice(
            [
                {"type": "string", "minLength": draw.randint(0, 2), "maxLength": draw.randint(3, 9)},
                {"type": "string", "pattern": draw.choice(["^[a-z]{2,5}$", "^\\d{4}-\\d{2}$", "^(yes|no)$"])},
                {"type": "string", "format": draw.choice(["ipv4", "uuid", "email"])},
                {"type": "integer", "minimum": low, "maximum": low + draw.randint(0, 40)},
                {"type": "number", "exclusiveMinimum": low, "maximum": low + 1},
                {"enum": [1, "two", None, {"three": [3]}][: draw.randint(1, 4)]},
                {"const": draw.choice([7, 'x\n"y"', None, True, [1, {"a": 2}]])},
                {"type": draw.sample(["boolean", "null", "integer"], 2), "maximum": 9, "minimum": 0},
            ]
        )

    if depth == 0:
        return scalar()
    kind = draw.choice(["object", "array", "tuple", "anyOf", "ref", "scalar"])
    if kind == "object":
        names = draw.sample(["a", "b c", "größe", "$d", 'e"f'], draw.randint(1, 4))
        properties = {name: random_schema(draw, depth - 1) for name in names}
        required = draw.sample(names, draw.randint(0, len(names)))
        return {
            "type": "object",
            "properties": properties,
            "required": required,
            "additionalProperties": False,
        }
    if kind == "array":
        low = draw.randint(0, 2)
        return {
            "type": "array",
            "items": random_schema(draw, depth - 1),
            "minItems": low,
            "maxItems": low + 1,
        }
    if kind == "tuple":
        items = [random_schema(draw, depth - 1) for _ in range(2)]
        return {"type": "array", "prefixItems": items, "items": False, "minItems": 2}
    if kind == "anyOf":
        return {"anyOf": [random_schema(draw, depth - 1) for _ in range(2)]}
    if kind == "ref":
        node = {"properties": {"next": {"$ref": "#/$defs/node"}, "value": scalar()}, "required": ["value"]}
        node |= {"type": "object", "additionalProperties": False}
        return {"$ref": "#/$defs/node", "$defs": {"node": node}} if depth == 2 else scalar()
    return scalar()


@pytest.mark.parametrize("count", [30, pytest.param(200, marks=pytest.mark.slow)])
def test_every_finished_answer_follows_its_schema(address: str, model: str, count: int) -> None:
    draw, finished = random.Random(count), 0
    for number in range(count):
        schema = random_schema(draw)
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
        body = {"model": model, "messages": ASK, "response_format": form, "max_tokens": 300, "seed": number}
        status, answer = post(address, body, CHAT)
        assert status == 200, (schema, answer)
        [choice] = answer["choices"]
        if choice["finish_reason"] == "stop":
            finished += 1
            value = json.loads(choice["message"]["content"])
            jsonschema.validate(
                value, schema, jsonschema.Draft202012Validator, format_checker=jsonschema.FormatChecker()
            )
    assert finished >= 0.8 * count


def test_a_json_object_parses(address: str, model: str) -> None:
    finished = 0
    for seed in range(12):
        body = {"model": model, "messages": ASK, "max_tokens": 200, "seed": seed, "temperature": 1.5}
        _, answer = post(address, {**body, "response_format": {"type": "json_object"}}, CHAT)
        [choice] = answer["choices"]
        if choice["finish_reason"] == "stop":
            finished += 1
            assert isinstance(json.loads(choice["message"]["content"]), dict)
    assert finished > 0


class Colour(Enum):
    red = "red"
    blue = "blue"


class Cat(BaseModel):
    age: int
    colour: Colour
    lives: bool | None


def test_openais_client_parses_a_model_of_pydantic(address: str, model: str) -> None:
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none") as client:
        params: dict = {"model": model, "messages": ASK, "response_format": Cat, "max_tokens": 200}
        answers = [client.chat.completions.parse(**params, seed=seed) for seed in range(4)]
        finished = [answer.choices[0] for answer in answers if answer.choices[0].finish_reason == "stop"]
        assert finished
        assert all(isinstance(choice.message.parsed, Cat) for choice in finished)


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ({"type": "nonsense"}, "nonsense"),
        ({"not": {"type": "string"}}, "not"),
        ({"$ref": "#/$defs/none"}, ""),
        ({"type": "string", "pattern": "("}, ""),
        ({"type": "object", "properties": 7}, ""),
        ({"allOf": [{"type": "string"}, {"type": "integer"}]}, "nsatisfiable"),
    ],
)
def test_a_schema_that_cannot_be_followed_is_an_error(
    address: str, model: str, schema: dict, says: str
) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    for body in ({"response_format": form}, {"json_schema": schema}):
        status, answer = post(address, {"model": model, "messages": ASK, "max_tokens": 4, **body}, CHAT)
        assert (status, answer["error"]["param"]) == (400, next(iter(body)))
        assert says in answer["error"]["message"]
        assert len(answer["error"]["message"]) < 400
    lenient = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": False}}
    body = {"model": model, "messages": ASK, "max_tokens": 4, "response_format": lenient}
    assert post(address, body, CHAT)[0] == (200 if "not" in schema else 400)


def test_a_schema_that_is_too_large_is_an_error_and_not_a_crash(address: str) -> None:
    deep: dict = {"type": "integer"}
    for _ in range(300):
        deep = {"type": "object", "properties": {"a": deep}}
    wide = {"type": "object", "properties": {f"p{number}": {"type": "string"} for number in range(3000)}}
    elsewhere = {"$ref": "file:///etc/hostname"}
    tools = [{"type": "function", "function": {"name": "f", "parameters": deep}}]
    for body in ({"json_schema": deep}, {"json_schema": wide}, {"json_schema": elsewhere}, {"tools": tools}):
        status, answer = post(address, {"model": "random", "messages": ASK, "max_tokens": 4, **body}, CHAT)
        assert status == 400, answer
        assert len(answer["error"]["message"]) < 400
    assert post(address, {"model": "random", "messages": ASK, "max_tokens": 4}, CHAT)[0] == 200


def test_no_end_of_text_can_be_forbidden_in_json(address: str) -> None:
    body = {"model": "random", "prompt": "x", "json_schema": {"type": "integer"}}
    for option in ({"ignore_eos": True}, {"min_tokens": 3}):
        status, answer = post(address, {**body, **option})
        assert (status, answer["error"]["param"]) == (400, next(iter(option)))
    # A ban of every token cannot stop the grammar.
    _, answer = post(
        address, {**body, "logit_bias": dict.fromkeys(map(str, range(400)), False), "max_tokens": 64}
    )
    assert (
        isinstance(json.loads(answer["choices"][0]["text"]), int)
        or answer["choices"][0]["finish_reason"] == "length"
    )


def test_an_object_has_only_the_properties_that_its_schema_names() -> None:
    """Small models invent properties. A schema may say that others are welcome."""
    vocabulary, tokenizer = Vocabulary(Tokenizer.gpt2()), Tokenizer.gpt2()

    def accepts(schema: dict, text: str) -> bool:
        matcher, ids = vocabulary.matcher(Grammar(schema, "x")), tokenizer.encode(text)
        return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()

    inner = {"type": "object", "properties": {"properties": {"type": "integer"}}, "required": ["properties"]}
    outer = {"type": "object", "properties": {"a": {"type": "array", "items": inner}}, "required": ["a"]}
    assert accepts(outer, '{"a":[{"properties":1}]}')
    assert not accepts(outer, '{"a":[{"properties":1}],"b":2}')
    assert not accepts(outer, '{"a":[{"properties":1,"b":2}]}')
    assert accepts({**inner, "additionalProperties": True}, '{"properties":1,"b":2}')
    joined = {
        "allOf": [inner, {"type": "object", "properties": {"b": {"type": "integer"}}, "required": ["b"]}]
    }
    assert accepts(joined, '{"properties":1,"b":2}')


# Functions


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_call_that_is_required_follows_the_functions_schema(
    address: str, model: str, choice: object
) -> None:
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none") as client:
        finished = 0
        for seed in range(6):
            params: dict = {
                "model": model,
                "messages": ASK,
                "tools": TOOLS,
                "tool_choice": choice,
                "seed": seed,
            }
            answer = client.chat.completions.create(**params, max_tokens=300).choices[0]
            chunks = [
                chunk.choices[0]
                for chunk in client.chat.completions.create(**params, max_tokens=300, stream=True)
            ]
            streamed = [call for chunk in chunks for call in chunk.delta.tool_calls or []]
            assert chunks[-1].finish_reason == answer.finish_reason
            if answer.finish_reason != "tool_calls":
                assert answer.finish_reason == "length"
                continue
            finished += 1
            assert answer.message.content is None
            [call], [again] = answer.message.tool_calls or [], streamed
            assert again.function is not None
            assert call.function.model_dump() == again.function.model_dump()
            assert not any(chunk.delta.content for chunk in chunks)
            if choice != "required":
                assert call.function.name == "weather"
            if call.function.name == "weather":
                jsonschema.validate(json.loads(call.function.arguments), ARGUMENTS)
        assert finished >= 3


def test_a_text_may_have_calls_but_only_valid_ones() -> None:
    """`tool_choice: auto`: the mark begins a call wherever it occurs; after it, only the call's JSON may come."""
    tokenizer = Tokenizer.gpt2()
    tools = [Tool.model_validate(tool) for tool in TOOLS]
    vocabulary = Vocabulary(tokenizer)

    def accepts(text: str, *, is_one: bool = False) -> bool:
        matcher = vocabulary.matcher(call_grammar(tools, must_call=False, is_one=is_one))
        ids = tokenizer.encode(text)
        return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()

    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo", "unit": "C"}}\n</tool_call>'
    assert accepts("Just a text.\n<b>größer</b>")
    assert accepts(call)
    assert accepts(f"I look.\n{call}")
    assert accepts(f"{call}\n{call}")
    assert not accepts(f"{call}\n{call}", is_one=True)
    assert not accepts(call.replace("Oslo", "Oslo and more"))
    assert not accepts(call.replace("weather", "climate"))
    assert not accepts(call.replace('"C"', '"K"'))
    assert not accepts("<tool_call>\nnothing")


def test_an_answer_in_a_format_may_be_a_call_instead() -> None:
    """OpenAI's clients may send both `tools` and `response_format`."""
    tokenizer, tools = Tokenizer.gpt2(), [Tool.model_validate(tool) for tool in TOOLS]
    form = Grammar(
        {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}, "response_format"
    )
    vocabulary = Vocabulary(tokenizer)

    def accepts(text: str, *, is_one: bool = False) -> bool:
        matcher = vocabulary.matcher(call_grammar(tools, must_call=False, is_one=is_one, answer=form))
        ids = tokenizer.encode(text)
        return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()

    call = '<tool_call>\n{"name": "stop_now", "arguments": {}}\n</tool_call>'
    assert accepts('{"a": 1}')
    assert accepts(call)
    assert accepts(f"{call}\n{call}")
    assert not accepts(f"{call}\n{call}", is_one=True)
    for wrong in ("Just a text.", '{"b": 1}', f"I look.\n{call}", f'{call}{{"a": 1}}'):
        assert not accepts(wrong)


def test_both_formats_together_are_sent_as_one(address: str, model: str) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": [1, 2]}}}
    body = {"model": model, "messages": ASK, "response_format": form, "max_tokens": 100, "temperature": 0}
    status, answer = post(address, {**body, "json_schema": {"type": "integer"}}, CHAT)
    assert (status, answer["error"]["param"]) == (400, "json_schema")
    _, answer = post(address, {**body, "tools": TOOLS}, CHAT)
    [choice] = answer["choices"]
    assert (
        choice["message"].get("tool_calls")
        or choice["finish_reason"] == "length"
        or (json.loads(choice["message"]["content"]) in (1, 2))
    )


def test_a_stream_shows_the_text_before_a_call_and_no_part_of_a_call() -> None:
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
    for text, shown, num_calls in (
        (f"I look.\n{call}\n{call}", "I look.", 2),
        ("1 < 2 and <tool_calling is not", "1 < 2 and <tool_calling is not", 0),
        ("<tool_call>\n{broken", "<tool_call>\n{broken", 0),
        ("the end <tool", "the end <tool", 0),
        (call, "", 1),
    ):
        for size in (1, 2, 7, 1000):
            stream = CallStream(must_call=False)
            pieces = [text[start : start + size] for start in range(0, len(text), size)]
            told = [
                stream.add(piece, is_last=number == len(pieces) - 1) for number, piece in enumerate(pieces)
            ]
            assert "".join(told) == shown
            assert len(stream.calls) == num_calls
            if num_calls:
                assert CALL_BEGIN not in "".join(told)


def test_the_model_reads_the_functions_earlier_calls_and_results(
    address: str, loaded: LoadedModel, model: str
) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    talk = [*ASK, {"role": "assistant", "content": None, "tool_calls": [call]}]
    talk.append({"role": "tool", "tool_call_id": "1", "content": "rain"})
    read = [Message("user", "Hello")]
    read.append(
        Message("assistant", '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>')
    )
    read.append(Message("tool", "rain"))
    body = {"model": model, "messages": talk, "max_tokens": 1}
    _, answer = post(address, body, CHAT)
    assert answer["usage"]["prompt_tokens"] == len(encode_chat(read, loaded.tokenizer))
    _, told = post(address, {**body, "tools": TOOLS}, CHAT)
    _, none = post(address, {**body, "tools": TOOLS, "tool_choice": "none"}, CHAT)
    assert told["usage"]["prompt_tokens"] > answer["usage"]["prompt_tokens"] + 100
    assert none["usage"]["prompt_tokens"] == answer["usage"]["prompt_tokens"]


def test_a_template_that_knows_functions_describes_them() -> None:
    own = random_model(chat=True, max_seq_len=512)
    own.tokenizer.chat_template = (
        "{% if tools %}{{ tools | tojson }} as <tool_call>{% endif %}"
        "{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    with served([Engine(own, "random", parallel=1, queue=1)]) as address:
        _, answer = post(address, {"messages": ASK, "tools": TOOLS[1:], "max_tokens": 1}, CHAT)
        described = '[{"type": "function", "function": {"name": "stop_now"}}] as <tool_call>Hello'
        assert answer["usage"]["prompt_tokens"] == len(own.tokenizer.encode(described))


def test_a_function_that_is_not_offered_cannot_be_chosen(address: str) -> None:
    for choice, tools in (
        ("required", []),
        ("required", None),
        ({"type": "function", "function": {"name": "none"}}, TOOLS),
    ):
        status, answer = post(
            address, {"model": "random", "messages": ASK, "tools": tools, "tool_choice": choice}, CHAT
        )
        assert (status, answer["error"]["param"]) == (400, "tool_choice")


def test_a_grammar_is_built_once_for_several_generations(address: str) -> None:
    body = {"model": "random", "messages": ASK, "json_schema": {"enum": ["a", "b", "c"]}, "n": 8, "seed": 1}
    _, answer = post(address, {**body, "max_tokens": 30}, CHAT)
    assert {json.loads(choice["message"]["content"]) for choice in answer["choices"]} <= {"a", "b", "c"}
    assert len(answer["choices"]) == 8
    assert Grammar({}, "x").is_strict
