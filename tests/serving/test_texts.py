"""The routes for tokens, embeddings and properties: against llama.cpp's server, transformers and the tokenizer."""

from __future__ import annotations

import base64
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import openai
import pytest
import torch

from atlas.inference.load import LoadedModel
from atlas.serving.dispatcher import ServerSettings
from atlas.tokenizer.chat import Message, encode_chat
from tests.served import random_model, served, served_model, with_llama_cpp
from tests.serving.test_serving import answered, metric, post

TEXT = "größer — 漢字 🙂 The river"
TALK = [{"role": "user", "content": "Where does the cat live?"}]


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return random_model(chat=True, max_seq_len=128)


@pytest.fixture(scope="module")
def address(loaded: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server of `random`, and of `exported`, the same model in llama.cpp, if llama.cpp is installed."""
    with served(with_llama_cpp(loaded, tmp_path_factory.mktemp("gguf"))) as address:
        yield address


def test_tokens_are_those_of_the_tokenizer_and_come_back_as_the_text(
    address: str, loaded: LoadedModel
) -> None:
    ids = loaded.tokenizer.encode(TEXT)
    for body in ({"content": TEXT}, {"prompt": TEXT}, {"prompt": TEXT, "add_special_tokens": False}):
        status, answer = post(address, body, "/tokenize")
        assert status == 200
        assert answer == {"tokens": ids, "count": len(ids), "max_model_len": 128}
    _, answer = post(address, {"tokens": ids}, "/detokenize")
    assert answer == {"content": TEXT, "prompt": TEXT}
    _, answer = post(address, {"content": TEXT, "with_pieces": True}, "/tokenize")
    pieces = [
        bytes(piece) if isinstance(piece := each["piece"], list) else piece.encode()
        for each in answer["tokens"]
    ]
    assert b"".join(pieces) == TEXT.encode()
    assert any(isinstance(each["piece"], list) for each in answer["tokens"])  # a part of a character
    _, answer = post(address, {"prompt": "The river", "return_token_strs": True}, "/tokenize")
    assert "".join(answer["token_strs"]) == "The river"
    assert post(address, {"content": ""}, "/tokenize")[1]["tokens"] == []
    assert post(address, {"prompt": ""}, "/tokenize")[1]["tokens"] == []


def test_special_tokens_are_read_unless_the_request_says_otherwise(address: str, loaded: LoadedModel) -> None:
    text, (before, after) = (
        "The<|endoftext|> river",
        (loaded.tokenizer.encode(part) for part in ("The", " river")),
    )
    status, info = answered(f"{address}/tokenizer_info")
    assert (status, info["eos_token"], info["model_max_length"]) == (200, "<|endoftext|>", 128)
    for model in [each["id"] for each in answered(f"{address}/v1/models")[1]["data"]]:
        _, special = post(address, {"prompt": text, "model": model}, "/tokenize")
        assert special["tokens"] == [*before, loaded.tokenizer.eos_id, *after]
        _, plain = post(address, {"prompt": text, "model": model, "parse_special": False}, "/tokenize")
        assert plain["tokens"] == loaded.tokenizer.encode(text) != special["tokens"]


def test_a_conversation_has_the_tokens_that_the_model_reads(address: str, loaded: LoadedModel) -> None:
    _, answer = post(address, {"messages": TALK}, "/tokenize")
    assert answer["tokens"] == encode_chat([Message(**TALK[0])], loaded.tokenizer)


def test_llama_cpp_gives_the_same_tokens(address: str) -> None:
    pytest.importorskip("xllamacpp")
    for body in ({"content": TEXT}, {"prompt": TEXT}, {"messages": TALK}):
        ours, theirs = (
            post(address, {**body, "model": name}, "/tokenize")[1] for name in ("random", "exported")
        )
        assert ours["tokens"] == theirs["tokens"]
    ids = post(address, {"content": TEXT}, "/tokenize")[1]["tokens"]
    assert post(address, {"tokens": ids, "model": "exported"}, "/detokenize")[1]["content"] == TEXT


def test_properties_are_those_of_the_model(address: str, loaded: LoadedModel) -> None:
    status, answer = answered(f"{address}/props")
    assert status == 200
    assert answer["default_generation_settings"]["n_ctx"] == 128
    assert answer["total_slots"] == 8
    assert answer["chat_template"] == loaded.tokenizer.chat_template
    assert answered(f"{address}/props?model=none")[0] == 404


def test_embeddings_are_the_mean_of_the_last_hidden_states_in_transformers(
    address: str, loaded: LoadedModel, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    from atlas.export.huggingface import export_hf

    export_hf(loaded.model, loaded.tokenizer, tmp_path / "hf")
    theirs = transformers.AutoModel.from_pretrained(tmp_path / "hf").eval()
    texts = ["The river", "The boat on the river", "x"]
    expected = []
    for text in texts:
        with torch.no_grad():
            hidden = theirs(torch.tensor([loaded.tokenizer.encode(text)])).last_hidden_state[0].mean(0)
        expected.append((hidden / hidden.norm()).tolist())
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none") as client:
        answer = client.embeddings.create(model="random", input=texts)  # the client asks for base64
        alone = client.embeddings.create(model="random", input=texts[1], encoding_format="float")
    assert np.allclose([each.embedding for each in answer.data], expected, atol=1e-5)
    assert np.allclose(alone.data[0].embedding, expected[1], atol=1e-5)
    assert [each.index for each in answer.data] == [0, 1, 2]
    assert answer.usage.prompt_tokens == sum(len(loaded.tokenizer.encode(text)) for text in texts)
    ids = [loaded.tokenizer.encode(text) for text in texts]
    _, raw = post(address, {"model": "random", "input": ids, "encoding_format": "base64"}, "/v1/embeddings")
    bytes_of = base64.b64decode(raw["data"][2]["embedding"])
    assert np.allclose(struct.unpack(f"<{len(bytes_of) // 4}f", bytes_of), expected[2], atol=1e-5)


@pytest.mark.parametrize(
    ("route", "body", "says"),
    [
        ("/tokenize", {}, "one of content, prompt and messages"),
        ("/tokenize", {"content": "a", "prompt": "a"}, "one of content, prompt and messages"),
        ("/tokenize", {"content": "a " * 40_000}, "context"),
        ("/detokenize", {"tokens": [10**9]}, "vocabulary"),
        ("/detokenize", {"tokens": "a"}, "tokens"),
        ("/v1/embeddings", {"input": ""}, "input"),
        ("/v1/embeddings", {"input": []}, "input"),
        ("/v1/embeddings", {"input": [[10**9]]}, "vocabulary"),
        ("/v1/embeddings", {"input": "a " * 500}, "context"),
        ("/v1/embeddings", {"input": "a", "dimensions": 8}, "must be 32"),
        ("/v1/embeddings", {"input": "a", "model": "none"}, "none"),
        ("/v1/embeddings", {"input": ["a"] * 2049}, "at most 2048 items"),
        ("/v1/embeddings", {"input": [-1]}, "input.0: must be greater than or equal to 0"),
        ("/v1/embeddings", {"input": [[]]}, "input.0: must have at least 1 item"),
        ("/v1/embeddings", {"input": ["a", 1]}, "input.1: must be a valid string"),
    ],
)
def test_a_bad_request_is_refused_with_its_reason(address: str, route: str, body: dict, says: str) -> None:
    status, answer = post(address, {"model": "random", **body}, route)
    assert 400 <= status < 500
    assert says in answer["error"]["message"]


def test_a_long_text_is_cut_where_the_request_allows_it(address: str) -> None:
    long, end = "The river and " * 100, "the end of the text"
    whole, cut = (
        post(address, {"model": "random", "input": text, "truncate_prompt_tokens": 4}, "/v1/embeddings")[1]
        for text in (long + end, end)
    )
    assert whole["usage"]["prompt_tokens"] == cut["usage"]["prompt_tokens"] == 4
    assert whole["data"] == cut["data"]


def test_a_gguf_file_has_no_embeddings(address: str) -> None:
    pytest.importorskip("xllamacpp")
    status, answer = post(address, {"model": "exported", "input": "a"}, "/v1/embeddings")
    assert (status, "checkpoint" in answer["error"]["message"]) == (400, True)


def test_no_tokens_kept_means_one_as_in_completions(address: str) -> None:
    body = {"model": "random", "input": "The river and the boat", "truncate_prompt_tokens": 0}
    assert post(address, body, "/v1/embeddings")[1]["usage"]["prompt_tokens"] == 1


def test_embeddings_have_the_servers_time_limit_and_are_counted(loaded: LoadedModel) -> None:
    settings = ServerSettings(seconds=0.05)
    with served_model(loaded, settings=settings) as (address, _):
        status, answer = post(address, {"input": ["The river and the boat " * 10] * 2000}, "/v1/embeddings")
        assert (status, "--timeout" in answer["error"]["message"]) == (504, True)
    with served_model(loaded) as (address, _):
        _, answer = post(address, {"input": ["The river"] * 3}, "/v1/embeddings")
        assert metric(address, "atlas_prompt_tokens_total") == answer["usage"]["prompt_tokens"]


def test_the_tokens_of_a_conversation_include_its_functions(address: str) -> None:
    tool = {
        "type": "function",
        "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}},
    }
    plain, told = (
        post(address, {"messages": TALK, **more}, "/tokenize")[1] for more in ({}, {"tools": [tool]})
    )
    chat = {"model": "random", "messages": TALK, "tools": [tool], "max_tokens": 1}
    read = post(address, {**chat, "truncation": "auto"}, "/v1/chat/completions")[1]
    assert told["count"] > plain["count"] + 50
    assert read["usage"]["prompt_tokens"] == min(told["count"], 127)
