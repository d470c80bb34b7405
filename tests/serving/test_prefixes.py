"""What is kept of finished texts: the next turn of a conversation reads only what is new, and says the same."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from atlas.inference.generate import empty_cache
from atlas.inference.load import LoadedModel
from atlas.serving.backends.engine import Engine
from atlas.serving.backends.prefixes import LEAST_REUSED, PrefixCache
from tests.served import random_model, served, with_llama_cpp
from tests.serving.test_serving import metric, post

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return random_model(chat=True, max_seq_len=512)


@pytest.fixture(scope="module")
def address(loaded: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`random` keeps what it read, `forgetful` is the same model and keeps nothing, `exported` runs in llama.cpp."""
    backends = with_llama_cpp(loaded, tmp_path_factory.mktemp("gguf"))
    with served([*backends, Engine(loaded, "forgetful", parallel=8, queue=64, prefix_tokens=0)]) as address:
        yield address


def asked(address: str, model: str, route: str = CHAT, **body: object) -> dict:
    status, answer = post(address, {"model": model, "temperature": 0, **body}, route)
    assert status == 200, answer
    return answer


def reused(answer: dict) -> int:
    return answer["usage"]["prompt_tokens_details"]["cached_tokens"]


def test_the_next_turn_reads_only_what_is_new_and_says_the_same(address: str) -> None:
    messages: list[dict] = [{"role": "system", "content": "You know the river and the old mill very well."}]
    before = 0
    for turn in range(6):
        messages.append({"role": "user", "content": f"Question {turn}: where does the cat live?"})
        options = {"messages": messages, "max_tokens": 8, "logprobs": True, "top_logprobs": 3}
        ours, theirs = (asked(address, model, **options) for model in ("random", "forgetful"))
        assert ours["choices"][0]["message"] == theirs["choices"][0]["message"]
        mine, other = (each["choices"][0]["logprobs"]["content"] for each in (ours, theirs))
        assert [each["logprob"] for each in mine] == pytest.approx(
            [each["logprob"] for each in other], abs=1e-3
        )
        assert reused(theirs) == 0
        # All but the end of the last answer, whose tokens may be other ones than those that were sampled.
        assert reused(ours) >= (before if before >= LEAST_REUSED else 0)
        assert reused(ours) < ours["usage"]["prompt_tokens"]
        before = ours["usage"]["prompt_tokens"]
        messages.append({"role": "assistant", "content": ours["choices"][0]["message"]["content"]})
    assert metric(address, 'atlas_reused_tokens_total{model="random"}') > 2 * before
    assert metric(address, 'atlas_reused_tokens_total{model="forgetful"}') == 0


def test_llama_cpp_reports_what_it_knew(address: str) -> None:
    pytest.importorskip("xllamacpp")
    text = "The river and the boat run past the old mill, " * 6
    asked(address, "exported", "/v1/completions", prompt=text, max_tokens=2)
    answer = asked(address, "exported", "/v1/completions", prompt=text + "and on to the sea", max_tokens=2)
    assert answer["usage"]["prompt_tokens"] > reused(answer) > 30


def test_a_known_prompt_is_scored_and_continued_in_parallel_as_before(address: str) -> None:
    text = "The river and the boat run past the old mill, " * 6
    for _ in range(2):
        texts = [text + end for end in ("and on to the sea", "and back", "and on to the mill")] + ["A cat"]
        options = {"prompt": texts, "max_tokens": 12, "n": 2}
        ours, theirs = (
            asked(address, model, "/v1/completions", **options) for model in ("random", "forgetful")
        )
        assert [each["text"] for each in ours["choices"]] == [each["text"] for each in theirs["choices"]]
    assert reused(ours) > 3 * LEAST_REUSED
    options = {"prompt": text, "max_tokens": 0, "echo": True, "logprobs": 1}
    ours, theirs = (
        asked(address, model, "/v1/completions", **options)["choices"][0]["logprobs"]["token_logprobs"]
        for model in ("random", "forgetful")
    )
    assert len(ours) == len(theirs) > 50
    assert ours[1:] == pytest.approx(theirs[1:], abs=1e-3)


def test_a_text_that_outgrew_the_context_is_not_kept(address: str) -> None:
    text = "A window of the text slides when it is full, and its beginning is gone. " * 4
    long = {"prompt": text, "max_tokens": 600, "ignore_eos": True}
    ours, theirs = (asked(address, model, "/v1/completions", **long) for model in ("random", "forgetful"))
    assert ours["choices"][0]["text"] == theirs["choices"][0]["text"]
    assert reused(asked(address, "random", "/v1/completions", prompt=text + "x", max_tokens=1)) == 0


def test_the_oldest_texts_make_room_for_new_ones(loaded: LoadedModel) -> None:
    def read(ids: list[int]) -> object:
        cache = empty_cache(loaded.model, 1)
        with torch.inference_mode():
            loaded.model(torch.tensor([ids]), cache)
        return cache

    first, second, third = ([number, *range(10, 49)] for number in (1, 2, 3))
    prefixes = PrefixCache(100)
    with torch.inference_mode():
        for ids in (first, second):
            prefixes.keep(ids, read(ids), 0)
        assert prefixes.find([*first, 5, 6]).num_tokens == 40  # now the second is the oldest
        prefixes.keep(third, read(third), 0)
        assert [prefixes.find([*ids, 5]) is not None for ids in (first, second, third)] == [True, False, True]
        # A longer text replaces its own beginning, and a beginning of it is not kept twice.
        prefixes.keep([*third, *range(50, 70)], read([*third, *range(50, 70)]), 0)
        assert prefixes.find([*third, *range(50, 70)]).num_tokens == 59  # the last token is always read
        prefixes.keep(third, read(third), 0)
        assert prefixes.find([*first, 5]) is not None
        # Too short, or too long for the whole cache.
        prefixes.keep(
            list(range(100, 100 + LEAST_REUSED - 1)), read(list(range(100, 100 + LEAST_REUSED - 1))), 0
        )
        prefixes.keep(list(range(101)), read(list(range(101))), 0)
        assert prefixes.find(list(range(101))) is None
        found = prefixes.find([*first, 7, 8])
        fresh = read(first)
    torch.testing.assert_close(found.keys, fresh.keys[:, 0, :, :40])
    torch.testing.assert_close(found.values, fresh.values[:, 0, :, :40])


def test_several_answers_to_a_new_prompt_count_as_read(loaded: LoadedModel) -> None:
    """The later answers know the first one's prompt, but the request had to read it."""
    with served([Engine(loaded, "random", parallel=1, queue=8)]) as address:
        text = "The river and the boat run past the old mill, and back to the harbour in the winter. " * 2
        answer = asked(address, "random", "/v1/completions", prompt=text, max_tokens=3, n=3)
        assert reused(answer) == 0
        assert (
            reused(asked(address, "random", "/v1/completions", prompt=text, max_tokens=3, n=3)) > LEAST_REUSED
        )


@pytest.mark.parametrize("options", [{"cache_prompt": False}, {"cache_salt": "mine"}])
def test_a_request_may_neither_use_nor_leave_anything(loaded: LoadedModel, options: dict) -> None:
    text = "The river and the boat run past the old mill, and back to the harbour in the winter. " * 2
    body = {"prompt": text, "max_tokens": 3}
    with served([Engine(loaded, "random", parallel=2, queue=8)]) as address:
        for more in (options, options, {}, options):
            assert reused(asked(address, "random", "/v1/completions", **body, **more)) == 0
        assert reused(asked(address, "random", "/v1/completions", **body)) > LEAST_REUSED


def test_too_little_memory_to_keep_a_text_ends_no_generation(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise MemoryError("no memory")

    monkeypatch.setattr(PrefixCache, "keep", fail)
    with served([Engine(loaded, "random", parallel=4, queue=8)]) as address, ThreadPoolExecutor() as pool:
        lengths = [3, 60, 60]
        bodies = [{"prompt": "The river", "max_tokens": length, "ignore_eos": True} for length in lengths]
        answers = list(pool.map(lambda body: asked(address, "random", "/v1/completions", **body), bodies))
    assert [each["usage"]["completion_tokens"] for each in answers] == lengths
    assert "no memory to keep a text" in capsys.readouterr().err
