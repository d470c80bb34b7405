"""A model as lm-eval asks it: how likely a text is after another, how likely a whole text is, and what it writes.

lm-eval is EleutherAI's evaluation harness, https://github.com/EleutherAI/lm-evaluation-harness.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.defaults import DEFAULT_MAX_GEN_TOKS
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from atlas.errors import AtlasError
from atlas.inference.load import LoadedModel
from atlas.inference.sampling import Sampling, row_generators
from atlas.inference.text import stream_ids

Track = Callable[[Sequence[Any]], Iterable[Any]]
"""May draw a progress bar around batches."""


class HarnessModel(TemplateLM):  # type: ignore[misc]
    """`loaded`, asked `batch_size` questions at once.

    Where a text ends and its continuation begins is decided by lm-eval's own class, as for every model it measures.
    """

    def __init__(self, loaded: LoadedModel, *, batch_size: int, track: Track = iter) -> None:
        super().__init__()
        self.loaded = loaded
        self.batch_size = batch_size
        self.track = track
        self.max_length = loaded.model.config.max_seq_len

    @property
    def eot_token_id(self) -> int:
        return self.loaded.tokenizer.eos_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **options: Any) -> list[int]:
        """Ids of the text alone: Atlas's tokenizers add none."""
        return self.loaded.tokenizer.encode(string)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each text, in windows of the model's context: every token is predicted once."""
        windows, owners = [], []
        for owner, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1):
                windows.append((request.args, *make_disjoint_window(window)))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, (log_likelihood, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += log_likelihood
        return totals

    @torch.inference_mode()
    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Of each request (its texts, the ids of its context and of its continuation): the continuation's
        log-likelihood, and whether greedy decoding would write it. What is too long loses its beginning.

        Requests that differ in their last token alone, as the letters of a multiple choice do, share a row.
        """
        rows = defaultdict(list)
        for number, (texts, context, continuation) in enumerate(requests):
            self._check_continuation(texts, continuation)
            rows[tuple([*context, *continuation][:-1][-self.max_length :])].append(number)
        answers = [(0.0, True)] * len(requests)
        device = self.loaded.model.head_weight.device
        for batch in self.track(self._cut(sorted(rows, key=len, reverse=True))):
            padded = pad_sequence([torch.tensor(row) for row in batch], batch_first=True)
            hidden = self.loaded.model.hidden_states(padded.to(device))
            for row, states in zip(batch, hidden, strict=True):
                for number in rows[row]:
                    answers[number] = self._score(states[: len(row)], requests[number][2])
        return answers

    def _check_continuation(self, texts: Any, continuation: list[int]) -> None:
        if not continuation:
            raise AtlasError(
                f"--tasks: {texts[1]!r} after {texts[0][-20:]!r} has no token of its own in this tokenizer; set a "
                "target_delimiter, such as a blank, in the task"
            )
        if len(continuation) > self.max_length:
            raise AtlasError(
                f"--tasks: an answer of {len(continuation)} tokens is longer than the model's context of "
                f"{self.max_length}; take a task with shorter ones"
            )

    def _score(self, hidden: Tensor, continuation: list[int]) -> tuple[float, bool]:
        """`hidden` (T, C) ends where the last token of `continuation` is predicted."""
        targets = torch.tensor(continuation, device=hidden.device)
        logits = self.loaded.model.head(hidden[-len(continuation) :]).float()
        chosen = logits.log_softmax(dim=-1).gather(-1, targets[:, None])
        return float(chosen.sum()), bool((logits.argmax(dim=-1) == targets).all())

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """What the model writes after each text, up to a stop string or the number of tokens that the task sets."""
        tokenizer = self.loaded.tokenizer
        prompts = [tokenizer.encode(request.args[0]) or [tokenizer.eos_id] for request in requests]
        alike = defaultdict(list)
        for number, request in enumerate(requests):
            alike[_Manner.of(request.args[1])].append(number)
        batches = []
        for manner, numbers in alike.items():
            longest_first = sorted(numbers, key=lambda number: -len(prompts[number]))
            batches += [(manner, batch) for batch in self._cut(longest_first)]
        texts = [""] * len(requests)
        for manner, batch in self.track(batches):
            room = self._room_for_prompt(manner.max_tokens)
            steps = stream_ids(
                self.loaded,
                [prompts[number][-room:] for number in batch],
                manner.sampling,
                max_tokens=manner.max_tokens,
                stop=manner.stop,
                # By the request's number, so that its text does not depend on the batch.
                generators=[row_generators(0, 1, first_row=number)[0] for number in batch],
            )
            for pieces in steps:
                for number, piece in zip(batch, pieces, strict=True):
                    texts[number] += piece
        return texts

    def _room_for_prompt(self, max_tokens: int) -> int:
        """What new tokens leave of the context; where that is nothing, half of it, as writing on keeps."""
        room = self.max_length - max_tokens
        return room if room > 0 else max(1, self.max_length // 2)

    def _cut(self, items: Sequence[Any]) -> list[Sequence[Any]]:
        return [items[start : start + self.batch_size] for start in range(0, len(items), self.batch_size)]


@dataclass(frozen=True)
class _Manner:
    """How a task wants its texts written; those of one manner can be written side by side."""

    sampling: Sampling
    stop: tuple[str, ...]
    max_tokens: int

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> _Manner:
        """From a task's `generation_kwargs`: greedy unless it asks for samples, and those from all tokens unless it
        names fewer."""
        options = dict(options)
        until = options.pop("until", None) or []
        max_tokens = (
            options.pop("max_gen_toks", None) or options.pop("max_new_tokens", None) or DEFAULT_MAX_GEN_TOKS
        )
        temperature = options.pop("temperature", None)
        is_sampled = options.pop("do_sample", None)
        if is_sampled is None:
            is_sampled = bool(temperature)
        sampling = Sampling(
            temperature=float(1 if temperature is None else temperature) if is_sampled else 0.0,
            top_k=int(options.pop("top_k", None) or 0),
            top_p=float(options.pop("top_p", None) or 1),
        )
        unknown = [name for name, value in options.items() if (name, value) != ("num_beams", 1)]
        if unknown:
            raise AtlasError(
                f"--tasks: generation_kwargs asks for {', '.join(unknown)}, which Atlas does not have; it has until, "
                "max_gen_toks, do_sample, temperature, top_k and top_p"
            )
        return cls(sampling, (until,) if isinstance(until, str) else tuple(until), int(max_tokens))
