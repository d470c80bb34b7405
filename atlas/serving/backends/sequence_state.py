"""A waiting or running generation of the engine: its tokens, its window, and what it has scored."""

from __future__ import annotations

from dataclasses import replace

import torch
from llguidance import LLMatcher
from torch import Tensor

from atlas.inference.generate import window_start
from atlas.inference.load import LoadedModel
from atlas.inference.sampling import BAN, Sampling
from atlas.inference.text import TextStream
from atlas.model import AtlasLM, long_tensor
from atlas.serving.backends.drafts import Drafts
from atlas.serving.backends.generation import Candidate, Generation, Piece, failure

_SCORED_AT_ONCE = 128
"""The number of positions of a prompt whose logits are computed in one chunk, since a position needs 4 bytes per token
of the vocabulary."""


class SequenceState:
    """A waiting or running generation, with its tokens, its window and its random generator."""

    def __init__(self, generation: Generation, loaded: LoadedModel) -> None:
        self.generation = generation
        self.tokens = list(generation.prompt)
        self.slide(loaded.config.model.max_seq_len)
        self.generator = torch.Generator().manual_seed(generation.seed)
        self._stream = TextStream(loaded.tokenizer, generation.stop)
        self._stop_ids = loaded.tokenizer.stop_ids
        self.drafts: Drafts | None = None
        self._prompt: list[list[Candidate]] = []
        self.matcher: LLMatcher | None = generation.constraint.deep_copy() if generation.constraint else None
        bans = tuple((id, BAN) for id in sorted(self._stop_ids))
        self._endless = replace(generation.sampling, logit_bias=generation.sampling.logit_bias + bans)

    def slide(self, context: int) -> None:
        """Set `start`, the index of the first token in the model's window."""
        self.start = window_start(len(self.generation.prompt), len(self.tokens), context)

    @property
    def window(self) -> list[int]:
        """The tokens in the model's window."""
        return self.tokens[self.start :]

    @property
    def cached(self) -> int:
        """The number of tokens in the cache: all tokens of the window except the newest."""
        return len(self.tokens) - self.start - 1

    @property
    def num_new(self) -> int:
        """The number of tokens after the prompt."""
        return len(self.tokens) - len(self.generation.prompt)

    @property
    def sampling(self) -> Sampling:
        """The settings for the next token."""
        must_continue = self.generation.ignore_eos or self.num_new < self.generation.min_tokens
        return self._endless if must_continue else self.generation.sampling

    def score_prompt(self, model: AtlasLM, states: Tensor) -> None:
        """If the client requested it, compute the log-probabilities of the prompt from `states` (T, C), the final
        hidden states."""
        wanted = self.generation.num_candidates
        if self.generation.scores_prompt and wanted is not None and self.num_new == 0:
            ids = self.tokens[1:]
            for start in range(0, len(ids), _SCORED_AT_ONCE):
                tokens = dict(enumerate(ids[start : start + _SCORED_AT_ONCE]))
                logits = model.head(states[start : start + len(tokens)])
                candidates = top_logprobs(logits, tokens, dict.fromkeys(tokens, wanted))
                self._prompt += candidates.values()

    def add(self, token: int, candidates: list[Candidate]) -> Piece:
        """Append a token, and return the piece for this token. If the client requested `candidates`, the first
        candidate is the token."""
        generation, prompt, self._prompt = self.generation, self._prompt, []
        if generation.max_tokens == 0:
            return Piece("", finish="length", num_tokens=0, prompt=prompt)
        if self.matcher is not None and self.matcher.is_error():  # the choice of the token had no mask
            return failure("too complex")
        if token in self._stop_ids:
            shown = candidates if generation.scores_prompt else ()
            return Piece(self._stream.finish(), shown, finish="stop", num_tokens=0, prompt=prompt)
        self.tokens.append(token)
        text, finish = self._stream.add(token), None
        if self._stream.stopped:
            finish = "stop"
        elif self.matcher is not None and not self.matcher.consume_token(token):
            return failure("too complex")
        elif self.matcher is not None and self.matcher.is_stopped():
            text, finish = text + self._stream.finish(), "stop"
        elif self.num_new == generation.max_tokens:
            text, finish = text + self._stream.finish(), "length"
        return Piece(text, candidates, finish, prompt=prompt)


def top_logprobs(
    logits: Tensor, tokens: dict[int, int], wanted: dict[int, int]
) -> dict[int, list[Candidate]]:
    """Return, for each row in `wanted`, the candidates: the row's token in `tokens`, then the `wanted[row]` likeliest
    tokens."""
    logprobs = logits[long_tensor(list(wanted), logits.device)].float().log_softmax(dim=-1)
    own = logprobs.gather(-1, long_tensor([[tokens[row]] for row in wanted], logits.device))
    top = logprobs.topk(min(max(wanted.values()), logprobs.shape[-1]), dim=-1)
    columns = zip(wanted, own.tolist(), top.indices.tolist(), top.values.tolist(), strict=True)
    return {
        row: [Candidate(tokens[row], logprob), *map(Candidate, ids[: wanted[row]], values)]
        for row, [logprob], ids, values in columns
    }
