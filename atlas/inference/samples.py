"""The texts that a model writes while it is trained."""

from __future__ import annotations

from collections.abc import Callable

from atlas.config import TrackingConfig
from atlas.inference.generate import generate
from atlas.inference.sampling import Sampling, row_generators
from atlas.inference.text import TextStream
from atlas.model import AtlasLM
from atlas.tokenizer import Tokenizer


def sample_texts(
    model: AtlasLM,
    tokenizer: Tokenizer,
    tracking: TrackingConfig,
    *,
    seed: int,
    should_stop: Callable[[], bool] = lambda: False,
) -> list[str]:
    """`tracking.samples` continuations of its prompt; none if `should_stop` said so between two tokens.

    The model must be in evaluation mode. The same model and `seed` write the same texts; of the global random numbers
    none is taken.
    """
    prompt = tokenizer.encode(tracking.sample_prompt) or [tokenizer.eos_id]
    streams = [TextStream(tokenizer) for _ in range(tracking.samples)]
    texts = [""] * len(streams)
    steps = generate(
        model,
        [prompt] * len(streams),
        Sampling(),
        max_tokens=tracking.sample_tokens,
        eos_id=tokenizer.eos_id,
        generators=row_generators(seed, len(streams)),
    )
    for step in steps:
        if should_stop():
            return []
        for row, token in enumerate(step):
            texts[row] += "" if token is None else streams[row].add(token)
    return [text + stream.finish() for text, stream in zip(texts, streams, strict=True)]
