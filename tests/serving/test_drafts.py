"""Drafts from earlier in the text: fewer forward passes, and the same text."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from atlas.inference.load import LoadedModel
from atlas.serving.backends.drafts import Drafts
from atlas.serving.backends.engine import Engine
from tests.served import random_model, served
from tests.serving.test_serving import post

LINE = "The river and the boat run past the old mill. "


class Counted:
    """A server of `drafts` and of `plain`, the same model without drafts, and the positions of each forward pass."""

    def __init__(self, address: str, passes: dict[str, list[int]]) -> None:
        self.address = address
        self.passes = passes

    def texts(self, **body: object) -> tuple[list[dict], list[dict]]:
        """The choices of both models."""
        answers = []
        for name, passes in self.passes.items():
            passes.clear()
            status, answer = post(self.address, {"model": name, "prompt": LINE * 3, **body})
            assert status == 200, answer
            answers.append(answer["choices"])
        return answers[0], answers[1]


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return random_model(max_seq_len=256)


@pytest.fixture(scope="module")
def server(loaded: LoadedModel) -> Iterator[Counted]:
    passes: dict[str, list[int]] = {"drafts": [], "plain": []}
    engines = [
        Engine(random_model(max_seq_len=256), "drafts", parallel=4, queue=8, prefix_tokens=0),
        Engine(loaded, "plain", parallel=4, queue=8, prefix_tokens=0, draft_tokens=0),
    ]
    for engine in engines:
        seen = passes[engine.id]
        hidden_states = engine.loaded.model.hidden_states

        def counted(tokens: torch.Tensor, *rest: object, seen=seen, inner=hidden_states, **more: object):
            seen.append(tokens.shape[1])
            return inner(tokens, *rest, **more)

        engine.loaded.model.hidden_states = counted  # type: ignore[method-assign]
    with served(engines) as address:
        yield Counted(address, passes)


def shown(choices: list[dict]) -> list[tuple[str, str]]:
    return [(each["text"], each["finish_reason"]) for each in choices]


def test_a_repeated_text_needs_fewer_passes(server: Counted, loaded: LoadedModel) -> None:
    """A bias makes the model write only two letters, so that it repeats itself."""
    bias = {str(loaded.tokenizer.encode(letter)[0]): 300 for letter in "ab"}
    ours, theirs = server.texts(temperature=0, max_tokens=100, logit_bias=bias, logprobs=2)
    assert shown(ours) == shown(theirs)
    assert len(server.passes["plain"]) == 100
    assert len(server.passes["drafts"]) < 60
    mine, other = (each[0]["logprobs"] for each in (ours, theirs))
    assert mine["tokens"] == other["tokens"]
    assert mine["token_logprobs"] == pytest.approx(other["token_logprobs"], abs=1e-3)


OPTIONS: dict[str, dict] = {
    "greedy": {"temperature": 0},
    "sampled": {"temperature": 0.9, "top_k": 20, "seed": 3},
    "penalties": {"temperature": 0, "frequency_penalty": 0.5, "repetition_penalty": 1.1},
    "biased": {"temperature": 0.7, "seed": 1, "logit_bias": {str(id): 40 for id in range(97, 101)}},
    "stop": {
        "temperature": 0.7,
        "seed": 1,
        "logit_bias": {str(id): 40 for id in range(97, 101)},
        "stop": "ada",
    },
    "beyond the context": {
        "temperature": 0.7,
        "max_tokens": 500,
        "ignore_eos": True,
        "seed": 5,
        "logit_bias": {str(id): 60 for id in range(97, 101)},
    },
    "JSON": {
        "temperature": 1,
        "seed": 4,
        "json_schema": {"type": "array", "items": {"enum": ["river", "boat"]}},
    },
    "several": {"temperature": 0.7, "n": 3, "seed": 1, "logit_bias": {str(id): 40 for id in range(97, 101)}},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_the_text_is_the_same_with_drafts(server: Counted, name: str) -> None:
    ours, theirs = server.texts(**{"max_tokens": 60, **OPTIONS[name]})
    assert shown(ours) == shown(theirs)
    if name in ("biased", "stop", "beyond the context"):
        assert len(server.passes["drafts"]) < len(server.passes["plain"])


def test_drafts_follow_the_latest_earlier_place() -> None:
    drafts = Drafts(16)
    assert drafts.propose([1, 2, 3], 16) == []
    assert drafts.propose([1, 2, 3, 4, 5, 1, 2, 3], 16) == [4, 5, 1, 2]
    assert drafts.propose([1, 2, 3, 4, 5, 1, 2, 3, 9, 1, 2, 3], 2) == [9, 1]
    assert drafts.propose([1, 2, 3, 4, 5, 1, 2, 3, 9, 1, 2, 3, 7], 4) == []
    assert Drafts(16).propose([7, 1, 2, 1, 2, 1], 16) == [2, 1, 2, 1]  # a repetition continues beyond the end


def test_drafts_become_longer_while_they_are_right_and_pause_while_they_are_wrong() -> None:
    drafts, text = Drafts(8), [1, 2, 3] * 20
    lengths = []
    for num_right in (4, 8, 8, 0, 0, 0, 0):
        lengths.append(len(drafts.propose(text, 16)))
        drafts.judge(min(num_right, lengths[-1]), lengths[-1])
    assert lengths == [4, 8, 8, 8, 4, 2, 1]
    for more in range(1, 8):
        assert drafts.propose([*text, *([1, 2, 3] * 3)[:more]], 16) == []
    assert len(drafts.propose([*text, *([1, 2, 3] * 3)[:8]], 16)) == 1
