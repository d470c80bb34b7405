"""Give an Atlas model the interface of lm-eval: log-likelihoods of continuations and of full texts, and generation.

lm-eval is EleutherAI's evaluation harness, https://github.com/EleutherAI/lm-evaluation-harness.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
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
from atlas.inference.text import encode_prompt, stream_ids

Track = Callable[[Sequence[Any]], Iterable[Any]]
"""A function that iterates over batches and may draw a progress bar."""


class HarnessModel(TemplateLM):  # type: ignore[misc]
    """A model for lm-eval, which answers requests with the model `loaded`, in batches of `batch_size`.

    The base class of lm-eval splits each text into context and continuation.
    """

    def __init__(self, loaded: LoadedModel, *, batch_size: int, track: Track = iter) -> None:
        super().__init__()
        self.loaded = loaded
        self.batch_size = batch_size
        self.track = track
        self.max_length = loaded.model.config.max_seq_len

    @property
    def eot_token_id(self) -> int:
        """The id of the end-of-text token."""
        return self.loaded.tokenizer.eos_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **options: Any) -> list[int]:
        """The token ids of a text. Atlas's tokenizers add no special tokens, so the other arguments have no effect."""
        return self.loaded.tokenizer.encode(string)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each text, in nats. The model predicts each token once, in windows as long as its
        context."""
        windows = [
            (number, (request.args, *make_disjoint_window(window)))
            for number, request in enumerate(requests)
            for window in get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, 1
            )
        ]
        totals = [0.0] * len(requests)
        scores = self._loglikelihood_tokens([window for _, window in windows])
        for (number, _), (log_likelihood, _) in zip(windows, scores, strict=True):
            totals[number] += log_likelihood
        return totals

    @torch.inference_mode()
    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Return, for each request, the log-likelihood of the continuation, and whether greedy decoding would generate
        the continuation. A request consists of texts, context ids and continuation ids. If a request is longer than the
        model's context, its first ids are dropped.

        Requests that differ only in their last token, such as the letters of a multiple-choice question, share a row of
        the batch.
        """
        rows = defaultdict(list)
        for number, (texts, context, continuation) in enumerate(requests):
            self._check_continuation(texts, continuation)
            rows[tuple([*context, *continuation][:-1][-self.max_length :])].append(number)
        answers = [(0.0, True)] * len(requests)
        device = self.loaded.model.head_weight.device
        for batch in self.track(self._batches(sorted(rows, key=len, reverse=True))):
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
                "target_delimiter, such as a space, in the task"
            )
        if len(continuation) > self.max_length:
            raise AtlasError(
                f"--tasks: an answer of {len(continuation)} tokens is longer than the model's context of "
                f"{self.max_length}; choose a task with shorter answers"
            )

    def _score(self, hidden: Tensor, continuation: list[int]) -> tuple[float, bool]:
        """The log-likelihood of `continuation`, and whether greedy decoding would generate it.

        `hidden` (T, C) ends at the position that predicts the last token of `continuation`.
        """
        targets = torch.tensor(continuation, device=hidden.device)
        logits = self.loaded.model.head(hidden[-len(continuation) :]).float()
        chosen = logits.log_softmax(dim=-1).gather(-1, targets[:, None])
        return float(chosen.sum()), bool((logits.argmax(dim=-1) == targets).all())

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Generate a continuation of each text, up to a stop string or the task's maximum number of tokens."""
        tokenizer = self.loaded.tokenizer
        prompts = [encode_prompt(request.args[0], tokenizer) for request in requests]
        groups = defaultdict(list)  # requests with the same options, longest prompt first
        for number in sorted(range(len(requests)), key=lambda number: -len(prompts[number])):
            groups[_generation_options(requests[number].args[1])].append(number)
        batches = [(*options, batch) for options, group in groups.items() for batch in self._batches(group)]
        texts = [""] * len(requests)
        for sampling, stop, max_tokens, batch in self.track(batches):
            # The prompt may use the positions of the context that the new tokens do not need. If the new tokens need
            # all positions, the prompt may use half of the context, as much as a full window keeps.
            room = self.max_length - max_tokens
            room = room if room > 0 else max(1, self.max_length // 2)
            steps = stream_ids(
                self.loaded,
                [prompts[number][-room:] for number in batch],
                sampling,
                # The request's number gives the seed, so that the generated text does not depend on the batch.
                [row_generators(0, 1, first_row=number)[0] for number in batch],
                max_tokens=max_tokens,
                stop=stop,
            )
            for pieces in steps:
                for number, piece in zip(batch, pieces, strict=True):
                    texts[number] += piece
        return texts

    def _batches(self, items: Sequence[Any]) -> list[Sequence[Any]]:
        return [items[start : start + self.batch_size] for start in range(0, len(items), self.batch_size)]


def _generation_options(kwargs: Mapping[str, Any]) -> tuple[Sampling, tuple[str, ...], int]:
    """The sampling settings, stop strings and maximum number of tokens in a task's `generation_kwargs`.

    Decoding is greedy unless the task requests sampling. Sampling draws from all tokens unless the task sets top_k or
    top_p.
    """
    known = ("until", "max_gen_toks", "max_new_tokens", "temperature", "do_sample", "top_k", "top_p")
    until, max_gen_toks, max_new_tokens, temperature, do_sample, top_k, top_p = map(kwargs.get, known)
    if unknown := [key for key in kwargs if key not in known and (key, kwargs[key]) != ("num_beams", 1)]:
        supported = "until, max_gen_toks, do_sample, temperature, top_k and top_p"
        reason = f"asks for {', '.join(unknown)}, which Atlas does not support"
        raise AtlasError(f"--tasks: generation_kwargs {reason}; supported are {supported}")
    if not (bool(temperature) if do_sample is None else do_sample):
        temperature = 0
    sampling = Sampling(float(1 if temperature is None else temperature), int(top_k or 0), float(top_p or 1))
    stop = (until,) if isinstance(until, str) else tuple(until or ())
    return sampling, stop, int(max_gen_toks or max_new_tokens or DEFAULT_MAX_GEN_TOKS)
