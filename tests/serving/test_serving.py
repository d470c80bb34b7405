"""The OpenAI-compatible API, used by OpenAI's own client and by hostile clients."""

from __future__ import annotations

import json
import math
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import torch

from atlas.errors import AtlasError
from atlas.inference.load import LoadedModel
from atlas.inference.sampling import Sampling
from atlas.inference.text import stream_text
from atlas.serving import server as server_module
from atlas.serving.backends.engine import Engine
from atlas.serving.dispatcher import ServerSettings
from atlas.tokenizer.chat import Message, encode_chat
from tests.served import random_model, served, served_model, until

PROMPTS = [
    "The river",
    "A small boat",
    "In winter the",
    "größer",
    "",
    "When spring returns, the children throw",
]


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return random_model(chat=True)


@pytest.fixture(scope="module")
def address(loaded: LoadedModel) -> Iterator[str]:
    with served_model(loaded) as (address, _):
        yield address


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        yield client


def generated(
    loaded: LoadedModel, prompt: object, *, max_tokens: int, seed: int = 0, **sampling: float
) -> str:
    """The text of `atlas generate`: the same functions, one text at a time."""
    steps = stream_text(loaded, [prompt], Sampling(**sampling), max_tokens=max_tokens, seed=seed)  # type: ignore[arg-type,list-item]
    return "".join(step[0] for step in steps)


def post(address: str, body: bytes | dict, path: str = "/v1/completions", **headers: str) -> tuple[int, dict]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    names = {
        "Content-Type": "application/json",
        **{key.replace("_", "-"): value for key, value in headers.items()},
    }
    return answered(urllib.request.Request(address + path, data, names))


def answered(request: urllib.request.Request) -> tuple[int, dict]:
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def metric(address: str, name: str) -> float:
    with urllib.request.urlopen(address + "/metrics") as answer:
        lines = answer.read().decode().splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith((name + "{", name + " ")))


# The same text


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_text_equals_that_of_generate(client: openai.OpenAI, loaded: LoadedModel, prompt: str) -> None:
    # Longer than the context, so that the window slides.
    answer = client.completions.create(model="random", prompt=prompt, max_tokens=150, temperature=0)
    assert answer.choices[0].text == generated(loaded, prompt, max_tokens=150, temperature=0.0, top_k=0)


def test_a_text_does_not_depend_on_the_other_texts_of_the_batch(
    client: openai.OpenAI, loaded: LoadedModel
) -> None:
    """More texts than slots, of different lengths and settings, which join and leave the batch."""

    def ask(number: int) -> tuple[int, str]:
        answer = client.completions.create(
            model="random",
            prompt=PROMPTS[number % len(PROMPTS)],
            max_tokens=5 + 11 * number % 90,
            temperature=number % 3 / 2,
            seed=number,
            extra_body={"top_k": 20},
        )
        return number, answer.choices[0].text

    with ThreadPoolExecutor(24) as pool:
        texts = dict(pool.map(ask, range(48)))
    for number, text in texts.items():
        expected = generated(
            loaded,
            PROMPTS[number % len(PROMPTS)],
            max_tokens=5 + 11 * number % 90,
            seed=number,
            temperature=number % 3 / 2,
            top_k=20,
            top_p=1.0,
        )
        assert text == expected, number


def test_seed_decides_and_choices_differ(client: openai.OpenAI) -> None:
    def ask(seed: int | None) -> list[str]:
        answer = client.completions.create(model="random", prompt="The", max_tokens=20, seed=seed, n=3)
        return [choice.text for choice in sorted(answer.choices, key=lambda choice: choice.index)]

    assert ask(5) == ask(5)
    assert len({*ask(5), *ask(6)}) == 6
    assert ask(None) != ask(None)


def test_a_stream_adds_up_to_the_complete_text(client: openai.OpenAI) -> None:
    def params() -> dict:
        return {"model": "random", "prompt": PROMPTS[:3], "max_tokens": 30, "seed": 3}

    whole = client.completions.create(**params())
    texts, finishes = ["", "", ""], [None, None, None]
    chunks = list(client.completions.create(**params(), stream=True, stream_options={"include_usage": True}))
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            finishes[choice.index] = finishes[choice.index] or choice.finish_reason
    assert texts == [choice.text for choice in whole.choices]
    assert finishes == [choice.finish_reason for choice in whole.choices]
    assert len(chunks) > 20
    assert chunks[-1].usage == whole.usage
    assert chunks[-1].choices == []


def test_stop_strings_end_the_text_before_them(client: openai.OpenAI) -> None:
    text = (
        client.completions.create(model="random", prompt="The", max_tokens=40, temperature=0).choices[0].text
    )
    stop = text[10:13]
    answer = client.completions.create(
        model="random", prompt="The", max_tokens=40, temperature=0, stop=[stop]
    )
    assert answer.choices[0].text == text[: text.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


def test_logprobs_are_those_of_the_model(client: openai.OpenAI, loaded: LoadedModel) -> None:
    """Computed here from the logits of the full text."""
    answer = client.completions.create(model="random", prompt="The river", max_tokens=12, logprobs=3, seed=1)
    told = answer.choices[0].logprobs
    assert told is not None
    ids_of = {shown(loaded.tokenizer.token_bytes(id)): id for id in range(loaded.tokenizer.vocab_size)}
    prompt, said = loaded.tokenizer.encode("The river"), [ids_of[token] for token in told.tokens or []]
    assert loaded.tokenizer.decode(said) == answer.choices[0].text
    with torch.inference_mode():
        logprobs = loaded.model(torch.tensor([prompt + said]))[0].log_softmax(dim=-1)
    rows = logprobs[len(prompt) - 1 :]
    for row, id, logprob, top in zip(rows, said, told.token_logprobs, told.top_logprobs, strict=False):
        assert logprob == pytest.approx(float(row[id]), abs=1e-4)
        likeliest = row.topk(3).indices.tolist()
        likeliest += [] if id in likeliest else [id]
        assert [ids_of[token] for token in top] == likeliest
        assert list(top.values()) == pytest.approx(row[likeliest].tolist(), abs=1e-4)
    for token, offset in zip(told.tokens, told.text_offset, strict=True):
        if not token.startswith("bytes:"):  # U+FFFD, for bytes of no character, may precede it
            assert token in answer.choices[0].text[offset : offset + len(token) + 1]


def shown(token: bytes) -> str:
    try:
        return token.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)


# Chat


def test_chat_uses_the_chat_format_of_the_model(client: openai.OpenAI, loaded: LoadedModel) -> None:
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Who are you?"}]},
    ]
    answer = client.chat.completions.create(
        model="random",
        messages=messages,
        max_completion_tokens=20,
        temperature=0,  # type: ignore[arg-type]
    )
    asked = [Message("system", "Be brief."), Message("user", "Who are you?")]
    assert answer.choices[0].message.content == generated(loaded, asked, max_tokens=20, temperature=0.0)
    assert answer.choices[0].message.role == "assistant"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(encode_chat(asked, loaded.tokenizer))


def test_chat_accepts_its_own_answer_as_a_message() -> None:
    with served_model(random_model(chat=True, max_seq_len=512)) as (address, _):
        with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
            messages: list = [{"role": "user", "content": "Who are you?"}]
            for _ in range(2):
                answer = client.chat.completions.create(
                    model="random", messages=messages, max_completion_tokens=20, seed=1
                )
                messages += [answer.choices[0].message, {"role": "user", "content": "And now?"}]


def test_chat_streams_with_logprobs(client: openai.OpenAI) -> None:
    params: dict = {
        "model": "random",
        "messages": [{"role": "user", "content": "Hello"}],
        "max_tokens": 12,
        "seed": 4,
        "logprobs": True,
        "top_logprobs": 2,
    }
    whole = client.chat.completions.create(**params).choices[0]
    chunks = [chunk.choices[0] for chunk in client.chat.completions.create(**params, stream=True)]
    assert chunks[0].delta.role == "assistant"
    assert "".join(chunk.delta.content or "" for chunk in chunks) == whole.message.content
    told = [entry for chunk in chunks if chunk.logprobs for entry in chunk.logprobs.content or []]
    assert whole.logprobs is not None
    assert [entry.token for entry in told] == [entry.token for entry in whole.logprobs.content or []]
    for entry in told:
        assert len(entry.top_logprobs) == 2
        assert entry.bytes is not None
        assert math.exp(entry.logprob) <= 1


def test_a_model_without_chat_training_refuses_to_chat() -> None:
    with served_model(random_model()) as (address, _):
        status, answer = post(
            address, {"messages": [{"role": "user", "content": "Hello"}]}, "/v1/chat/completions"
        )
    assert status == 400
    assert "was not trained on conversations" in answer["error"]["message"]


# Errors


def test_errors_have_openais_types_and_codes(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.models.retrieve("gpt-4")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model="random", prompt="The river " * 100)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match=r"mirostat: must be 0 or null .*not 2"):
        client.completions.create(model="random", prompt="x", extra_body={"mirostat": 2})
    assert [model.id for model in client.models.list()] == ["random"]
    assert client.models.retrieve("random").id == "random"


BAD = {
    "no JSON": (b"{", 400, "JSON"),
    "not UTF-8": (b'{"prompt": "\xff"}', 400, ""),
    "not an object": (b"[]", 400, ""),
    "a number": (b"7", 400, ""),
    "nothing": (b"", 400, ""),
    "nested": (b"[" * 100_000, 400, ""),
    "wrong type": ({"prompt": 5}, 400, "prompt"),
    "wrong type of tokens": ({"prompt": "x", "max_tokens": "5"}, 400, "max_tokens"),
    "a bool": ({"prompt": "x", "max_tokens": True}, 400, "max_tokens"),
    "negative tokens": ({"prompt": "x", "max_tokens": -5}, 400, "max_tokens"),
    "negative temperature": ({"prompt": "x", "temperature": -1}, 400, "temperature"),
    "infinite temperature": (b'{"prompt": "x", "temperature": 1e999}', 400, "temperature"),
    "no number": (b'{"prompt": "x", "temperature": NaN}', 400, "NaN"),
    "top_p": ({"prompt": "x", "top_p": 1.5}, 400, "top_p"),
    "negative n": ({"prompt": "x", "n": -1}, 400, "n"),
    "huge n": ({"prompt": "x", "n": 10**6}, 400, "n"),
    "huge seed": ({"prompt": "x", "seed": 10**30}, 400, "seed"),
    "negative logprobs": ({"prompt": "x", "logprobs": -1}, 400, "logprobs"),
    "token beyond the vocabulary": ({"prompt": [10**6]}, 400, "prompt"),
    "negative token": ({"prompt": [-1]}, 400, "prompt"),
    "no prompts": ({"prompt": []}, 400, "prompt"),
    "empty ids": ({"prompt": [[]]}, 400, "prompt"),
    "many stops": ({"prompt": "x", "stop": list(map(str, range(300)))}, 400, "at most 256 strings, not 300"),
    "a word as a bias": ({"prompt": "x", "logit_bias": {"the": 1.0}}, 400, "token ids as names"),
    "a large bias": ({"prompt": "x", "logit_bias": {"5": 1e6}}, 400, "from -1000 to 1000"),
    "a bias beyond the vocabulary": (
        {"prompt": "x", "logit_bias": {"99999": 1}},
        400,
        "logit_bias: token 99999",
    ),
    "a bias that is true": ({"prompt": "x", "logit_bias": {"5": True}}, 400, "logit_bias"),
    "a bias for nothing": ({"prompt": "x", "logit_bias": [[5]]}, 400, "logit_bias"),
    "an endless penalty": (b'{"prompt": "x", "presence_penalty": 1e999}', 400, "presence_penalty"),
    "fewer than n of best_of": (
        {"prompt": "x", "n": 3, "best_of": 2},
        400,
        "best_of: at least n, which is 3",
    ),
    "a stream of best_of": (
        {"prompt": "x", "best_of": 2, "stream": True},
        400,
        "best_of: only without stream",
    ),
    "a conversation": ({"messages": [{"role": "user", "content": "x"}]}, 400, "/v1/chat/completions"),
    "tools": ({"prompt": "x", "tools": [{"type": "function"}]}, 400, "tools: must be [] or null"),
    "many parts": (b'{"prompt": "x", "stop": [' + b"{}," * 40_000 + b"{}]}", 400, "32,768 strings"),
    "many numbers": ({"prompt": [7] * 100_000}, 400, "32,768 numbers"),
    "many texts": ({"prompt": "x", "stop": ["[" * 20] * 40_000}, 400, "32,768 strings"),
    "a nested input": (b'{"prompt": ' + b"[" * 900 + b"]" * 900 + b"}", 400, "prompt"),
    "UTF-16": ('{"prompt": "x"}'.encode("utf-16"), 400, "UTF-8"),
    "a text longer than the context": ({"prompt": "The river " * 50_000}, 400, "at least"),
    "10 MB": ({"prompt": "x" * 10_000_000}, 413, "larger"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_body_gets_its_4xx(address: str, name: str) -> None:
    body, status, says = BAD[name]
    got, answer = post(address, body)
    assert got == status, answer
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert says in answer["error"]["message"]
    assert len(answer["error"]["message"]) < 400
    assert post(address, {"prompt": "x", "max_tokens": 1})[0] == 200


@pytest.mark.parametrize(
    ("path", "status"),
    [("/v2/completions", 404), ("/v1/models/none", 404), ("/v1/completions", 405), ("/health", 200)],
)
def test_a_wrong_path_is_answered_in_openais_shape(address: str, path: str, status: int) -> None:
    got, answer = answered(urllib.request.Request(address + path))
    assert got == status
    assert answer.get("status") == "ok" or answer["error"]["message"]


def test_a_slow_sender_times_out(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("atlas.serving.app.BODY_SECONDS", 0.3)
    monkeypatch.setattr(server_module, "HEAD_SECONDS", 0.3)
    with served_model(loaded) as (address, _):
        host, port = address.removeprefix("http://").split(":")
        halves = (
            b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            b'Content-Length: 500\r\n\r\n{"prompt"',
            b"POST /v1/completions HTTP/1.1\r\nHo",
            b"",
        )
        for half in halves:
            with socket.create_connection((host, int(port)), timeout=10) as connection:
                connection.sendall(half)
                answer = b""
                while part := connection.recv(4096):
                    answer += part
                assert answer.startswith(b"HTTP/1.1 408"), half
        assert post(address, {"prompt": "x", "max_tokens": 1})[0] == 200


def test_the_key_is_required() -> None:
    loaded = random_model()
    with served_model(loaded, settings=ServerSettings(api_key="geheim-ß")) as (address, _):
        body = {"prompt": "x", "max_tokens": 1}
        assert post(address, body)[0] == 401
        assert post(address, body, Authorization="Bearer wrong")[0] == 401
        assert post(address, body, Authorization="geheim")[0] == 401
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{address}/v1", api_key="wrong").models.list()
        with urllib.request.urlopen(address + "/health") as answer:
            assert answer.status == 200
    with served_model(loaded, settings=ServerSettings(api_key="secret")) as (address, _):
        assert post(address, body, Authorization="Bearer secret")[0] == 200
        assert post(address, body, Authorization="Bearer secret", Host="example.org")[0] == 200
        assert post(address, body, api_key="secret")[0] == 200  # Azure's clients
        assert post(address, body, x_api_key="secret")[0] == 200  # Anthropic's clients
        assert post(address, body, api_key="wrong", x_api_key="")[0] == 401


def test_pages_of_other_hosts_cannot_use_a_loopback_server(address: str) -> None:
    """DNS rebinding: the browser sends the host name of the page."""
    assert post(address, {"prompt": "x"}, Host="evil.example")[0] == 403
    assert post(address, {"prompt": "x"}, Host="127.0.0.1.evil.example:80")[0] == 403
    # The origin of the page.
    assert post(address, {"prompt": "x"}, Origin="https://evil.example")[0] == 403
    assert post(address, {"prompt": "x"}, Origin="null")[0] == 403
    assert post(address, {"prompt": "x", "max_tokens": 1}, Origin=address)[0] == 200
    # A form can send a body without a preflight request; the browser adds the origin of its page.
    form = {"Content_Type": "text/plain", "Origin": "https://evil.example"}
    assert post(address, {"prompt": "x", "max_tokens": 1}, **form)[0] == 403


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "application/json; charset=utf-8"]
)
def test_the_declared_type_of_a_body_does_not_matter(address: str, kind: str) -> None:
    """`curl -d` declares a form."""
    assert post(address, {"prompt": "x", "max_tokens": 1}, Content_Type=kind)[0] == 200
    status, answer = post(address, b"prompt=x&max_tokens=1", Content_Type=kind)
    assert (status, "JSON" in answer["error"]["message"]) == (400, True)


# Load


def test_a_full_queue_refuses_requests(loaded: LoadedModel) -> None:
    with served_model(loaded, parallel=1, queue=2) as (address, engine):
        slow = {"prompt": "The", "max_tokens": 4000, "temperature": 0}
        with ThreadPoolExecutor(8) as pool:
            answers = [pool.submit(post, address, {**slow, "max_tokens": 300}) for _ in range(8)]
            statuses = [answer.result() for answer in answers]
        refused = [answer for status, answer in statuses if status == 429]
        assert refused
        assert all(answer["error"]["type"] == "rate_limit_error" for answer in refused)
        assert sum(status == 200 for status, _ in statuses) >= 3
        assert engine.num_running == engine.num_waiting == 0


def test_requests_have_a_time_limit(loaded: LoadedModel) -> None:
    with served_model(loaded, settings=ServerSettings(max_tokens=10**6, seconds=0.3)) as (address, engine):
        status, answer = post(address, {"prompt": "The", "max_tokens": 10**6, "temperature": 0})
        assert status == 504
        assert "--timeout" in answer["error"]["message"]
        until(lambda: engine.num_running == 0)


def test_a_client_that_disconnects_frees_its_slot_within_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of eight streams disconnect: after the server knows, at most one more step includes them."""
    with served_model(random_model(), settings=ServerSettings(max_tokens=10**6)) as (address, engine):
        host, port = address.removeprefix("http://").split(":")
        body = json.dumps({"prompt": "The", "max_tokens": 10**6, "temperature": 0, "stream": True}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        request = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
        clients = [socket.create_connection((host, int(port))) for _ in range(8)]
        for client in clients:
            client.sendall(request)
        until(lambda: engine.num_running == 8)
        steps: list[int] = []
        step = Engine._step

        def counted(self: Engine) -> None:
            cancelled = [each for each in self._running if each.generation.cancelled]
            step(self)
            steps.append(sum(each in self._running for each in cancelled))

        monkeypatch.setattr(Engine, "_step", counted)
        for client in clients[:4]:
            client.close()
        until(lambda: engine.num_running == 4 and len(steps) > 0)
        assert metric(address, "atlas_running") == 4
        assert not any(steps), "a generation that was cancelled before a step has no row after it"
        for client in clients[4:]:
            assert client.recv(100)
            client.close()
        until(lambda: engine.num_running == 0)


def test_a_disconnect_ends_a_generation_that_is_not_streamed() -> None:
    with served_model(random_model(), settings=ServerSettings(max_tokens=10**6)) as (address, engine):
        host, port = address.removeprefix("http://").split(":")
        body = json.dumps({"prompt": "The", "max_tokens": 10**6, "temperature": 0}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        with socket.create_connection((host, int(port))) as client:
            client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            until(lambda: engine.num_running == 1)
        until(lambda: engine.num_running == 0)


def test_a_failed_step_fails_only_its_own_generations(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with served_model(loaded) as (address, _):

        def broken(*_: object) -> None:
            raise RuntimeError("no memory for this one")

        with monkeypatch.context() as patched:
            patched.setattr(Engine, "_sample", broken)
            status, answer = post(address, {"prompt": "The", "max_tokens": 3})
        assert status == 500
        assert answer["error"]["type"] == "server_error"
        assert post(address, {"prompt": "The", "max_tokens": 3})[0] == 200
    assert "no memory for this one" in capsys.readouterr().err


def test_metrics_count_the_generated_tokens(loaded: LoadedModel) -> None:
    with served_model(loaded) as (address, _):
        _, answer = post(address, {"prompt": ["The river", "A"], "max_tokens": 9, "n": 2})
        assert metric(address, "atlas_completion_tokens_total") == answer["usage"]["completion_tokens"]
        assert metric(address, "atlas_prompt_tokens_total") == answer["usage"]["prompt_tokens"]
        assert metric(address, "atlas_time_to_first_token_seconds_count") == 1
        post(address, {"prompt": 5})
        with urllib.request.urlopen(address + "/metrics") as told:
            assert 'atlas_requests_total{route="/v1/completions",status="400"} 1.0' in told.read().decode()


def test_a_shutdown_lets_generations_finish(loaded: LoadedModel) -> None:
    answers: list[tuple[int, dict]] = []
    with served_model(loaded) as (address, engine):
        body = {"prompt": "The", "max_tokens": 400, "temperature": 0}
        thread = threading.Thread(target=lambda: answers.append(post(address, body)))
        thread.start()
        until(lambda: engine.num_running == 1)
    thread.join()
    [(status, answer)] = answers
    assert status == 200
    assert answer["usage"]["completion_tokens"] == 400
    with pytest.raises(OSError, match="refused"):
        post(address, body)


def test_a_taken_port_is_a_user_error(address: str) -> None:
    port = int(address.rpartition(":")[2])
    with pytest.raises(AtlasError, match=f"--port {port}: cannot listen"):
        server_module.listen("127.0.0.1", port)


def test_two_models_are_served_by_name() -> None:
    one, other = random_model(), random_model(seed=1)
    engines = [Engine(one, "one", parallel=2, queue=2), Engine(other, "other", parallel=2, queue=2)]
    body = {"prompt": "The", "max_tokens": 20, "temperature": 0}
    with served(engines) as address:
        texts = [post(address, {**body, "model": name})[1]["choices"][0]["text"] for name in ("one", "other")]
        assert post(address, body)[1]["model"] == "one"
        status, answer = post(address, {**body, "model": "gpt-4"})
        assert (status, answer["error"]["code"]) == (404, "model_not_found")
    assert texts == [generated(model, "The", max_tokens=20, temperature=0.0) for model in (one, other)]
