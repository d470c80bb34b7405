"""The loop of every command that generates text: prefill the prompts, then generate one token at a time.

The model reads a window of each row's tokens, so a text may have any length. When the window is full, only the newest
half of its tokens stays in the window, and this half is prefilled again. The windows are the same with and without a
cache, so the text is also the same.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

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
    eos_id: int | Collection[int] | None = None,
    generators: list[torch.Generator] | None = None,
    use_cache: bool = True,
) -> Iterator[list[int | None]]:
    """Continue every prompt in `prompts`. A prompt is a list of at least one token id. At each step, yield one new
    token id per row.

    For a row that generates `eos_id`, or one of several ids, yield None at this step and at all later steps. There are
    at most `max_tokens` steps.

    Each row draws its tokens with its own generator. `use_cache` changes the speed, never the text.
    """
    if any(not prompt for prompt in prompts):
        raise ValueError("every prompt needs at least one token")
    stop_ids = eos_id if isinstance(eos_id, Collection) else (eos_id,)
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
            done[row] = done[row] or token in stop_ids
            rows[row].append(token)
        yield [None if ended else token for ended, token in zip(done, tokens, strict=True)]
        if all(done):
            return


def empty_cache(model: AtlasLM, rows: int, *, max_len: int | None = None) -> KVCache:
    """Return a KV cache for `rows` sequences, on the model's device and in the dtype of the model's weights."""
    weights = next(model.parameters())
    return KVCache(model.config, rows, max_len=max_len, device=weights.device, dtype=weights.dtype)


def window_start(num_prompt_tokens: int, num_tokens: int, context: int) -> int:
    """The index of the first token in the model's window, for a row of `num_tokens` tokens. The first
    `num_prompt_tokens` of the row's tokens are the prompt, and the model generated the others."""
    start = max(0, num_prompt_tokens - context)
    while num_tokens - start > context:
        start += context + 1 - max(1, context // 2)
    return start


def prefill(model: AtlasLM, windows: Sequence[Sequence[int]], cache: KVCache | None) -> Tensor:
    """Run one forward pass over `windows`, the token ids of each row, and fill `cache`, which must be empty. Return (B,
    V), the logits of each row's next token."""
    return last_logits(model, prefill_states(model, windows, cache), windows)


def prefill_states(model: AtlasLM, windows: Sequence[Sequence[int]], cache: KVCache | None) -> Tensor:
    """Run one forward pass as `prefill` does, and return (B, T, C), the final hidden states. If `cache` is not empty,
    the windows continue its rows.

    Rows are padded on the right. The tokens of a window do not attend to the padding.
    """
    longest = max(map(len, windows))
    lengths = (
        [start + len(window) for start, window in zip(cache.row_lengths, windows, strict=True)]
        if cache
        else []
    )
    padded = [[*window, *[0] * (longest - len(window))] for window in windows]
    states = model.hidden_states(long_tensor(padded, next(model.parameters()).device), cache)
    if cache is not None:
        cache.truncate(lengths)
    return states


def last_logits(model: AtlasLM, states: Tensor, windows: Sequence[Sequence[int]]) -> Tensor:
    """Return (B, V), the logits of each row's next token, from the final hidden states (B, T, C) of `windows`."""
    last = long_tensor([len(window) - 1 for window in windows], states.device)
    return model.head(states[torch.arange(len(windows), device=states.device), last])
