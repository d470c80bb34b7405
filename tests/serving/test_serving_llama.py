"""An exported file behind the same API: llama.cpp generates the same text as the checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from atlas.errors import AtlasError
from atlas.export.gguf import export_gguf
from atlas.inference.load import LoadedModel
from atlas.serving.backends.engine import Engine
from atlas.serving.backends.llama import Llama
from tests.served import random_model, served, until

pytest.importorskip("xllamacpp")


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return random_model(chat=True)


@pytest.fixture(scope="module")
def file(loaded: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "exported.gguf"
    export_gguf(loaded.model, loaded.tokenizer, path, quantize="f32", chat_template=loaded.chat_template)
    return path


def test_a_shorter_context_is_used(file: Path) -> None:
    backend = Llama(str(file), parallel=2, queue=8, threads=1, context=32)
    with served([backend]) as address, openai.OpenAI(base_url=f"{address}/v1", api_key="none") as client:
        said = client.completions.create(model="exported", prompt=list(range(20)), max_tokens=4)
        assert said.usage.prompt_tokens == 20
        with pytest.raises(openai.BadRequestError, match="maximum context length is 31"):
            client.completions.create(model="exported", prompt=list(range(40)), max_tokens=4)
    with pytest.raises(AtlasError, match=r"--context 65: .* has a context of 64 tokens"):
        Llama(str(file), parallel=2, queue=8, threads=1, context=65)


@pytest.fixture(scope="module")
def client(loaded: LoadedModel, file: Path) -> Iterator[openai.OpenAI]:
    """A client of `exported`, the file, and `random`, its checkpoint."""
    backends = [
        Llama(str(file), parallel=2, queue=8, threads=1),
        Engine(loaded, "random", parallel=2, queue=8),
    ]
    with (
        served(backends) as address,
        openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client


def test_file_and_checkpoint_generate_the_same(client: openai.OpenAI) -> None:
    for prompt in ("The river", "größer", "", ["A small boat", "In winter"]):
        params: dict = {"prompt": prompt, "max_tokens": 20, "temperature": 0, "logprobs": 2}
        theirs, ours = (client.completions.create(model=name, **params) for name in ("exported", "random"))
        assert [choice.text for choice in theirs.choices] == [choice.text for choice in ours.choices]
        assert theirs.usage == ours.usage
        for one, other in zip(theirs.choices, ours.choices, strict=True):
            assert one.logprobs is not None
            assert other.logprobs is not None
            # llama.cpp does not report tokens that end inside a character.
            told = list(zip(one.logprobs.tokens or [], one.logprobs.token_logprobs or [], strict=True))
            whole = list(zip(other.logprobs.tokens or [], other.logprobs.token_logprobs or [], strict=True))
            told, whole = (
                [entry for entry in each if not entry[0].startswith("bytes:")] for each in (told, whole)
            )
            assert [token for token, _ in told] == [token for token, _ in whole]
            assert [logprob for _, logprob in told] == pytest.approx(
                [logprob for _, logprob in whole], abs=2e-2
            )


def test_a_conversation_uses_the_files_own_template(client: openai.OpenAI) -> None:
    params: dict = {
        "messages": [{"role": "user", "content": "Who are you?"}],
        "max_tokens": 12,
        "temperature": 0,
    }
    theirs, ours = (client.chat.completions.create(model=name, **params) for name in ("exported", "random"))
    assert theirs.choices[0].message == ours.choices[0].message
    assert theirs.usage == ours.usage


def test_stream_stop_and_seed(client: openai.OpenAI) -> None:
    params: dict = {"model": "exported", "prompt": "The", "max_tokens": 30}
    text = client.completions.create(**params, temperature=0).choices[0].text
    chunks = list(client.completions.create(**params, temperature=0, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == text
    assert len(chunks) > 10
    stopped = client.completions.create(**params, temperature=0, stop=text[8:11]).choices[0]
    assert (stopped.text, stopped.finish_reason) == (text[: text.index(text[8:11])], "stop")
    one, same, other = (client.completions.create(**params, seed=seed).choices[0].text for seed in (3, 3, 4))
    assert one == same != other


def test_tokens_are_counted_where_the_end_comes_inside_a_character(client: openai.OpenAI) -> None:
    """llama.cpp reports the end-of-text token separately there; some of 40 seeds meet that case."""
    for seed in range(40):
        answer = client.completions.create(
            model="exported", prompt="The", max_tokens=40, seed=seed, temperature=1, logprobs=0
        )
        assert answer.usage is not None
        told = answer.choices[0].logprobs
        assert told is not None
        assert "<|endoftext|>" not in (told.tokens or [])
        assert len(told.tokens or []) <= answer.usage.completion_tokens <= 40
        assert (answer.usage.completion_tokens == 40) == (answer.choices[0].finish_reason == "length")


def test_a_client_that_disconnects_frees_llama_cpp(file: Path) -> None:
    backend = Llama(str(file), parallel=1, queue=1, threads=1)
    with served([backend]) as address, openai.OpenAI(base_url=f"{address}/v1", api_key="none") as client:
        for _ in range(3):
            stream = client.completions.create(model="exported", prompt="The", max_tokens=60, stream=True)
            next(iter(stream))
            stream.close()
        until(lambda: backend.num_running == backend.num_waiting == 0)


def test_a_broken_file_is_a_user_error(file: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(AtlasError, match="is not a complete GGUF file"):
        Llama(str(cut), parallel=1, queue=1, threads=1)
    with pytest.raises(AtlasError, match="no such file"):
        Llama(str(tmp_path / "none.gguf"), parallel=1, queue=1, threads=1)
