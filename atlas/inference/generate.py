"""Prefill, then one token at a time: the loop under every command that generates text.

The context is a window on each row's tokens. When it is full, the newest half is kept and prefilled again. This is so
with and without a cache, so both generate the same text, of any length.
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
    rows = [list(prompt) for prompt in prompts]
    generators = generators or row_generators(0, len(rows))
    done = [False] * len(rows)
    decoder = Decoder(model, empty_cache(model, len(rows))) if use_cache else None
    starts: list[int] = []
    for _ in range(max_tokens):
        before = starts
        starts = [
            window_start(len(prompt), len(tokens), model.config.max_seq_len)
            for prompt, tokens in zip(prompts, rows, strict=True)
        ]
        if decoder and starts == before:
            logits = decoder.next_logits([tokens[-1] for tokens in rows])
        else:
            windows = [tokens[start:] for tokens, start in zip(rows, starts, strict=True)]
            if decoder:
                decoder.cache.truncate([0] * len(rows))
            logits = prefill(model, windows, decoder.cache if decoder else None)
        tokens = sample(logits, sampling, rows, generators).tolist()
        if min(tokens) < 0:
            raise AtlasError(
                "the model's logits are not finite: its weights are damaged, or too large for half precision: try "
                "--dtype f32"
            )
        for row, token in enumerate(tokens):
            done[row] = done[row] or token == eos_id
            rows[row].append(token)
        yield [None if ended else token for ended, token in zip(done, tokens, strict=True)]
        if all(done):
            return


def empty_cache(model: AtlasLM, rows: int, *, max_len: int | None = None) -> KVCache:
    """A KV cache on the model's device, in the dtype of its weights."""
    weights = next(model.parameters())
    return KVCache(model.config, rows, max_len=max_len, device=weights.device, dtype=weights.dtype)


def window_start(num_prompt_tokens: int, num_tokens: int, context: int) -> int:
    """The start of the model's window when it predicts the token after `num_tokens`, of which the first
    `num_prompt_tokens` were the prompt and the others were generated."""
    start = max(0, num_prompt_tokens - context)
    while num_tokens - start > context:
        start += context + 1 - max(1, context // 2)
    return start


def prefill(model: AtlasLM, windows: Sequence[Sequence[int]], cache: KVCache | None) -> Tensor:
    """Run the windows (ids) in one forward pass, into an empty `cache`: (B, V), the logits of each row's next token.

    Rows are padded on the right. No query attends to the padding.
    """
    device = next(model.parameters()).device
    lengths = [len(window) for window in windows]
    longest = max(lengths)
    padded = long_tensor([[*window, *[0] * (longest - len(window))] for window in windows], device)
    hidden = model.hidden_states(padded, cache)
    if cache is not None:
        cache.truncate(lengths)
    last = long_tensor(lengths, device) - 1
    return model.head(hidden[torch.arange(len(windows), device=device), last])
