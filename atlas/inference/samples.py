"""Texts that a model generates while it is trained."""

from __future__ import annotations

from collections.abc import Callable

from atlas.config import TrackingConfig
from atlas.inference.sampling import Sampling, row_generators
from atlas.inference.text import encode_prompt, stream_ids
from atlas.model import AtlasLM
from atlas.tokenizer import Tokenizer


def sample_texts(
    model: AtlasLM,
    tokenizer: Tokenizer,
    tracking: TrackingConfig,
    seed: int,
    should_stop: Callable[[], bool] = lambda: False,
) -> list[str]:
    """`tracking.samples` continuations of its prompt; an empty list if `should_stop` returned true between two tokens.

    The model must be in evaluation mode. The same model and `seed` give the same texts. The global random number
    generators are not used.
    """
    texts = [""] * tracking.samples
    prompts = [encode_prompt(tracking.sample_prompt, tokenizer)] * len(texts)
    generators = row_generators(seed, len(texts))
    for pieces in stream_ids(
        model, tokenizer, prompts, Sampling(), generators, max_tokens=tracking.sample_tokens
    ):
        if should_stop():
            return []
        texts = [text + piece for text, piece in zip(texts, pieces, strict=True)]
    return texts
