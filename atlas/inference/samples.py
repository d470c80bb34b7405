"""Texts that a model generates while it is trained."""

from __future__ import annotations

from collections.abc import Callable

from atlas.config import TrackingConfig
from atlas.inference.sampling import Sampling
from atlas.inference.text import ModelAndTokenizer, stream_text
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
    prompts, loaded = [tracking.sample_prompt] * len(texts), ModelAndTokenizer(model, tokenizer)
    for pieces in stream_text(loaded, prompts, Sampling(), max_tokens=tracking.sample_tokens, seed=seed):
        if should_stop():
            return []
        texts = [text + piece for text, piece in zip(texts, pieces, strict=True)]
    return texts
