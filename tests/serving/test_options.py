"""The options that change what is generated: against the model's own logits, and against llama.cpp's server."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest
import torch

from atlas.inference.load import LoadedModel
from atlas.serving.backends.engine import Engine
from atlas.tokenizer.chat import Message, encode_chat
from tests.served import random_model, served, with_llama_cpp
from tests.serving.test_serving import post

CHAT = "/v1/chat/completions"
QUESTION = {"role": "user", "content": "Where does the cat live?"}
PROMPT = "The river and the boat and the river"


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return random_model(chat=True, max_seq_len=128)


@pytest.fixture(scope="module")
def address(loaded: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server of `random`, and of `exported`, the same model in llama.cpp, if llama.cpp is installed."""
    with served(with_llama_cpp(loaded, tmp_path_factory.mktemp("gguf"))) as address:
        yield address


def text_of(address: str, body: dict, model: str = "random") -> str:
    status, answer = post(
        address, {"prompt": PROMPT, "max_tokens": 24, "temperature": 0, "model": model, **body}
    )
    assert status == 200, answer
    return answer["choices"][0]["text"]


OPTIONS: dict[str, dict] = {
    "frequency": {"frequency_penalty": 3.0},
    "negative frequency": {"frequency_penalty": -2.0},
    "presence": {"presence_penalty": 6.0},
    "repetition": {"repetition_penalty": 1.6},
    "llama.cpp's name": {"repeat_penalty": 1.6},
    "all penalties": {"frequency_penalty": 1.0, "presence_penalty": 2.0, "repeat_penalty": 1.3},
    "the latest only": {"presence_penalty": 20.0, "repeat_last_n": 2},
    "none of the latest": {"presence_penalty": 20.0, "repeat_last_n": 0},
    "bias": {"logit_bias": {"300": 9.5, "301": -9.5}},
    "ban": {"logit_bias": [[number, False] for number in range(1, 200)]},
    "bias and penalty": {"logit_bias": {"300": 30}, "frequency_penalty": 4.0},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_give_the_text_of_llama_cpp(address: str, name: str) -> None:
    pytest.importorskip("xllamacpp")
    ours, theirs = (text_of(address, OPTIONS[name], model) for model in ("random", "exported"))
    assert ours.rstrip("\ufffd") == theirs.rstrip(
        "\ufffd"
    )  # llama.cpp leaves out an incomplete character at the end
    assert (ours != text_of(address, {})) == (name != "none of the latest")


def test_no_end_before_min_tokens_and_none_with_ignore_eos(address: str, loaded: LoadedModel) -> None:
    ends = {"logit_bias": {str(loaded.tokenizer.eos_id): 1000}, "logprobs": 0}
    for options, num_tokens, finish in (
        ({}, 0, "stop"),
        ({"min_tokens": 5}, 5, "stop"),
        ({"min_tokens": 100}, 24, "length"),
        ({"ignore_eos": True}, 24, "length"),
    ):
        _, answer = post(address, {"prompt": PROMPT, "max_tokens": 24, "model": "random", **ends, **options})
        [choice] = answer["choices"]
        assert len(choice["logprobs"]["tokens"]) == answer["usage"]["completion_tokens"] == num_tokens
        assert choice["finish_reason"] == finish
    if "exported" in str(post(address, {"prompt": "x", "max_tokens": 1, "model": "none"})):
        _, answer = post(
            address, {"prompt": PROMPT, "max_tokens": 24, "model": "exported", "ignore_eos": True, **ends}
        )
        assert answer["usage"]["completion_tokens"] == 24
        status, answer = post(address, {"prompt": PROMPT, "model": "exported", "min_tokens": 5})
        assert (status, answer["error"]["param"]) == (400, "min_tokens")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("max_tokens", [0, 1, 7])
def test_echo_scores_the_prompt_as_the_model_does(
    address: str, loaded: LoadedModel, max_tokens: int, stream: bool
) -> None:
    """What lm-eval's `local-completions` reads. A prompt of one token has nothing to score."""
    prompts = [
        loaded.tokenizer.encode(text) for text in (PROMPT, "größer", "In winter the river is a road")
    ] + [[5]]
    params: dict = {"model": "random", "prompt": prompts, "max_tokens": max_tokens, "temperature": 0}
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none") as client:
        answer = client.completions.create(**params, echo=True, logprobs=1, stream=stream)
        plain = client.completions.create(**params)
        choices = list(answer.choices) if not stream else [each for chunk in answer for each in chunk.choices]
    for index, ids in enumerate(prompts):
        parts = [choice for choice in choices if choice.index == index]
        text = "".join(part.text for part in parts)
        assert text == loaded.tokenizer.decode(ids) + plain.choices[index].text
        told = [part.logprobs for part in parts]
        tokens, scores, tops, offsets = (
            [each for part in told for each in getattr(part, name)]
            for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")
        )
        with torch.inference_mode():
            expected = loaded.model(torch.tensor([ids]))[0, :-1].log_softmax(dim=-1)
        own = expected.gather(1, torch.tensor(ids[1:], dtype=torch.long)[:, None])[:, 0]
        assert scores[0] is None
        assert tops[0] is None
        assert scores[1 : len(ids)] == pytest.approx(own.tolist(), abs=1e-4)
        assert [max(top.values()) for top in tops[1 : len(ids)]] == pytest.approx(
            expected.amax(1).tolist(), abs=1e-4
        )
        # The end-of-text token is scored too, so that there is always a token after the prompt.
        assert len(tokens) >= len(ids) + (max_tokens > 0)
        assert offsets[0] == 0
        assert offsets == sorted(offsets)


def test_best_of_returns_the_likeliest(address: str) -> None:
    body = {
        "model": "random",
        "prompt": [PROMPT, "A small boat"],
        "max_tokens": 6,
        "seed": 3,
        "temperature": 1.5,
    }
    _, all_five = post(address, {**body, "n": 5, "logprobs": 0})
    _, best = post(address, {**body, "n": 2, "best_of": 5})
    expected = []
    for start in (0, 5):
        group = all_five["choices"][start : start + 5]
        group.sort(
            key=lambda choice: -sum(choice["logprobs"]["token_logprobs"]) / len(choice["logprobs"]["tokens"])
        )
        expected += [choice["text"] for choice in group[:2]]
    assert [choice["text"] for choice in best["choices"]] == expected
    assert [choice["index"] for choice in best["choices"]] == [0, 1, 2, 3]
    assert best["choices"][0]["logprobs"] is None
    assert best["usage"]["completion_tokens"] == all_five["usage"]["completion_tokens"]


@pytest.mark.parametrize("model", ["random", "exported"])
def test_a_last_message_of_the_assistant_is_continued(address: str, loaded: LoadedModel, model: str) -> None:
    if model == "exported":
        pytest.importorskip("xllamacpp")
    started = [QUESTION, {"role": "assistant", "content": " The cat"}]
    body = {"model": model, "messages": started, "max_tokens": 9, "temperature": 0}
    question = [Message("user", QUESTION["content"])]
    continued = encode_chat(question, loaded.tokenizer) + loaded.tokenizer.encode("The cat")
    begun = encode_chat([*question, Message("assistant", "The cat")], loaded.tokenizer)
    for options, ids in (
        ({}, continued),
        ({"continue_final_message": True, "add_generation_prompt": False}, continued),
        ({"add_generation_prompt": True}, begun),
        ({"continue_final_message": False}, begun),
    ):
        _, answer = post(address, {**body, **options}, CHAT)
        assert answer["usage"]["prompt_tokens"] == len(ids), options
        text = text_of(address, {"prompt": ids, "max_tokens": 9, "model": model})
        assert answer["choices"][0]["message"]["content"] == text
    new = text_of(address, {"prompt": continued, "max_tokens": 9, "model": model})
    _, answer = post(address, {**body, "echo": True}, CHAT)
    assert answer["choices"][0]["message"]["content"] == " The cat" + new
    for options, messages in (
        ({"continue_final_message": True}, [QUESTION]),
        ({"add_generation_prompt": False}, [QUESTION]),
        ({"continue_final_message": True, "add_generation_prompt": True}, started),
    ):
        assert post(address, {**body, **options, "messages": messages}, CHAT)[0] == 400


def test_truncation_drops_the_oldest_messages_but_not_the_systems(address: str, loaded: LoadedModel) -> None:
    system = {"role": "system", "content": "Be brief."}
    turns = [
        {"role": role, "content": f"{role} {number} the river"}
        for number in range(9)
        for role in ("user", "assistant")
    ]
    body = {"model": "random", "messages": [system, *turns, QUESTION], "max_tokens": 20, "temperature": 0}
    status, answer = post(address, body, CHAT)
    assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")
    assert post(address, {**body, "truncation": "disabled"}, CHAT)[0] == 400
    status, answer = post(address, {**body, "truncation": "auto"}, CHAT)
    assert status == 200
    sizes = {}
    for start in range(0, 18, 2):
        kept = [Message(each["role"], each["content"]) for each in (system, *turns[start:], QUESTION)]
        sizes[len(encode_chat(kept, loaded.tokenizer))] = start
    assert answer["usage"]["prompt_tokens"] == max(size for size in sizes if size <= 128 - 20)
    # The question alone is too long: its last tokens stay.
    long = [system, {"role": "user", "content": "the river " * 100}]
    _, answer = post(address, {**body, "messages": long, "truncation": "auto"}, CHAT)
    assert answer["usage"]["prompt_tokens"] == 128 - 20


def test_truncation_keeps_the_last_tokens_of_a_text(address: str) -> None:
    ids = list(range(1, 200))
    for options, kept in (
        ({"truncation": "auto"}, ids[-(128 - 24) :]),
        ({"truncate_prompt_tokens": -1}, ids[-(128 - 24) :]),
        ({"truncate_prompt_tokens": 30}, ids[-30:]),
        ({"truncate_prompt_tokens": 0}, ids[-1:]),
    ):
        assert text_of(address, {"prompt": ids, **options}) == text_of(address, {"prompt": kept})
    assert post(address, {"model": "random", "prompt": ids, "truncate_prompt_tokens": 150})[0] == 400


def test_no_limit_means_the_free_positions_of_the_context(address: str, loaded: LoadedModel) -> None:
    ids = loaded.tokenizer.encode(PROMPT)
    for limit in ({"max_tokens": None}, {"max_tokens": -1}, {"n_predict": -1}):
        _, answer = post(address, {"model": "random", "prompt": PROMPT, "ignore_eos": True, **limit})
        assert answer["usage"]["completion_tokens"] == 128 - len(ids)
    _, answer = post(address, {"model": "random", "prompt": PROMPT, "ignore_eos": True})
    assert answer["usage"]["completion_tokens"] == 16  # OpenAI's default
    _, answer = post(address, {"model": "random", "prompt": PROMPT, "ignore_eos": True, "max_tokens": 10**9})
    assert answer["usage"]["completion_tokens"] == 4096  # the server's --max-tokens


def test_an_imported_models_template_gets_variables(loaded: LoadedModel) -> None:
    own = random_model(chat=True)
    own.tokenizer.chat_template = (
        "{{ greeting }}{% for m in messages %}{{ m.content }}{% endfor %}{{ messages|length }}"
    )
    with served([Engine(own, "random", parallel=1, queue=1)]) as address:
        variables = {"greeting": "Hello", "messages": "not these"}
        body = {"messages": [QUESTION], "max_tokens": 1, "chat_template_kwargs": variables}
        _, answer = post(address, body, CHAT)
        text = f"Hello{QUESTION['content']}1"
        assert answer["usage"]["prompt_tokens"] == len(own.tokenizer.encode(text))


def test_special_tokens_over_a_gguf_file_are_read_as_llama_cpp_reads_them(
    address: str, loaded: LoadedModel
) -> None:
    pytest.importorskip("xllamacpp")
    text = "The river<|endoftext|>The boat"
    ids = [
        *loaded.tokenizer.encode("The river"),
        loaded.tokenizer.eos_id,
        *loaded.tokenizer.encode("The boat"),
    ]
    special, plain = (
        post(address, {"model": model, "prompt": text, "max_tokens": 1})[1]["usage"]["prompt_tokens"]
        for model in ("exported", "random")
    )
    assert special == len(ids)
    assert plain == len(loaded.tokenizer.encode(text)) > len(ids)
