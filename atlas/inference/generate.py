"""Prefill, then one token at a time: the loop under every command that writes text.

The context is a window on each row's tokens. When it is full, the newest half is kept and prefilled
again, with and without cache alike, so that both write the same text, of any length.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from atlas.errors import AtlasError
from atlas.inference.decoder import Decoder
from atlas.inference.sampling import Sampling, row_generators, sample
from atlas.model import AtlasLM, KVCache, long_tensor


@torch.inference_mode()
def generate(
    model: AtlasLM,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    max_tokens: int,
    eos_id: int | None = None,
    generators: list[torch.Generator] | None = None,
    use_cache: bool = True,
) -> Iterator[list[int | None]]:
    """Continue every prompt (ids, at least one each); yield one new token per row and step, None for a
    row that is done: after `eos_id` (which is not yielded) or `max_tokens`.

    `generators`, one per row, decide the draws; `use_cache` changes the speed, never the text.
    """
    if any(not prompt for prompt in prompts):
        raise ValueError("every prompt needs at least one token")
    device = next(model.parameters()).device
    rows = [list(prompt) for prompt in prompts]
    context = _Context(model, rows, use_cache=use_cache)
    generators = generators or row_generators(0, len(rows))
    done = [False] * len(rows)
    for _ in range(max_tokens):
        tokens = sample(context.next_logits(device), sampling, rows, generators).tolist()
        if min(tokens) < 0:
            raise AtlasError(
                "the model's logits are not finite: its weights are damaged, or too large for half precision: try "
                "--dtype f32"
            )
        step: list[int | None] = []
        for row, token in enumerate(tokens):
            done[row] = done[row] or token == eos_id
            rows[row].append(token)
            step.append(None if done[row] else token)
        yield step
        if all(done):
            return


def window_start(num_given: int, num_tokens: int, context: int) -> int:
    """Where the window begins that the token after `num_tokens` is predicted from, in a text of which the model was
    given the first `num_given` and wrote the others."""
    start = max(0, num_given - context)
    while num_tokens - start > context:
        start += context + 1 - max(1, context // 2)
    return start


class _Context:
    """What the model sees of each row, and the cache that remembers it."""

    def __init__(self, model: AtlasLM, rows: list[list[int]], *, use_cache: bool) -> None:
        self.model = model
        self.rows = rows
        self.limit = model.config.max_seq_len
        self.num_given = [len(row) for row in rows]
        self.starts = [window_start(given, given, self.limit) for given in self.num_given]
        self.use_cache = use_cache
        self.cache: KVCache | None = None
        self.decoder: Decoder | None = None

    def next_logits(self, device: torch.device) -> Tensor:
        """(B, V): the logits of each row's next token."""
        before = self.starts
        self.starts = [
            window_start(given, len(tokens), self.limit)
            for given, tokens in zip(self.num_given, self.rows, strict=True)
        ]
        if self.cache is not None and self.starts == before:
            assert self.decoder is not None
            return self.decoder.next_logits([tokens[-1] for tokens in self.rows])
        return self._prefill(device)

    def _prefill(self, device: torch.device) -> Tensor:
        """Run every row's window at once, padded on the right; what padding writes is never seen."""
        windows = [tokens[start:] for tokens, start in zip(self.rows, self.starts, strict=True)]
        lengths = [len(window) for window in windows]
        longest = max(lengths)
        padded = long_tensor([window + [0] * (longest - len(window)) for window in windows], device)
        if self.use_cache:
            dtype = next(self.model.parameters()).dtype
            if self.cache is None:
                self.cache = KVCache(self.model.config, len(windows), device=device, dtype=dtype)
                self.decoder = Decoder(self.model, self.cache)
            self.cache.truncate([0] * len(windows))
        hidden = self.model.hidden_states(padded, self.cache)
        if self.cache is not None:
            self.cache.truncate(lengths)
        last = long_tensor(lengths, device) - 1
        return self.model.head(hidden[torch.arange(len(windows), device=device), last])
