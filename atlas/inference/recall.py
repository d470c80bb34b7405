"""Whether a model answers the conversations that it was trained on in their own words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from atlas.inference.generate import generate
from atlas.inference.sampling import Sampling
from atlas.model import AtlasLM
from atlas.progress import item_progress
from atlas.tokenizer import Tokenizer

_COMPARED, _ROWS = 64, 10  # tokens of an answer; conversations at once
_SHOWN, _WIDTH = 3, 60  # answers; characters of a text


@dataclass(frozen=True)
class Answer:
    """A conversation up to its first answer, that answer, and the answer of the model, as texts of one line. Only the
    first tokens of an answer count."""

    prompt: str
    learnt: str
    said: str
    is_same: bool


def recall_answers(
    model: AtlasLM,
    tokenizer: Tokenizer,
    conversations: Sequence[tuple[list[int], list[int]]],
) -> list[Answer]:
    """Return the model's answers, by greedy decoding, to `conversations`: the token ids up to an answer, and those of
    the answer.

    The model must be in evaluation mode. A conversation that leaves no room for an answer in the model's context is
    left out.
    """
    context = model.config.max_seq_len
    pairs = [(prompt, learnt[:_COMPARED]) for prompt, learnt in conversations if len(prompt) < context]
    answers: list[Answer] = []
    for start in item_progress(range(0, len(pairs), _ROWS), "asking for learnt answers"):
        some = pairs[start : start + _ROWS]
        answers += [
            Answer(
                " ".join(tokenizer.decode(prompt).split()),
                _answer_text(tokenizer, learnt),
                _answer_text(tokenizer, said),
                said == learnt,
            )
            for (prompt, learnt), said in zip(some, _greedy(model, some), strict=True)
        ]
    return answers


def _greedy(model: AtlasLM, pairs: Sequence[tuple[list[int], list[int]]]) -> list[list[int]]:
    """Return, for each prompt, as many tokens as its answer has."""
    said: list[list[int]] = [[] for _ in pairs]
    longest = max(len(learnt) for _, learnt in pairs)
    for step in generate(model, [prompt for prompt, _ in pairs], Sampling(0.0), max_tokens=longest):
        for tokens, token in zip(said, step, strict=True):
            assert token is not None  # no token ends a row here
            tokens.append(token)
    return [tokens[: len(learnt)] for tokens, (_, learnt) in zip(said, pairs, strict=True)]


def describe_recall(answers: Sequence[Answer], *, total: int) -> list[str]:
    """Return lines for the user: how many answers are the learnt ones, and some of the answers. `total` is the number
    of conversations that the model was trained on."""
    wrong = [answer for answer in answers if not answer.is_same]
    right = [answer for answer in answers if answer.is_same]
    some = "" if len(answers) == total else f" (of {total:,} conversations, {len(answers)} were asked)"
    lines = [
        f"greedy decoding gives {len(right)} of {len(answers)} learnt answers word for word{some}, such as:"
    ]
    for answer in [*wrong[:1], *right, *wrong[1:]][:_SHOWN]:
        end = "" if answer.is_same else f"  (learnt: {_shortened(answer.learnt)})"
        lines.append(f"  {_last(answer.prompt)} → {_shortened(answer.said)}{end}")
    return lines


def _answer_text(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """Return the text of `ids`, without the token that ends an answer and what follows it."""
    end = next((place for place, token in enumerate(ids) if token in tokenizer.stop_ids), len(ids))
    return " ".join(tokenizer.decode(list(ids[:end])).split())


def _shortened(text: str) -> str:
    return text if len(text) <= _WIDTH else text[: _WIDTH - 1] + "…"


def _last(text: str) -> str:
    return text if len(text) <= _WIDTH else "…" + text[1 - _WIDTH :]
