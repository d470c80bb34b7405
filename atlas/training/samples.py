"""Samples of what the model writes during training, so that one sees it learn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from atlas.config import AtlasConfig, TrackingConfig
from atlas.model import AtlasLM
from atlas.tokenizer import Tokenizer
from atlas.training.devices.device import Runtime
from atlas.training.devices.memory import release_memory


class Sampler(Protocol):
    """Generates `tracking.samples` texts with a model in evaluation mode, by random numbers of its own. Inference has
    one; whoever starts a run passes it in."""

    def __call__(
        self,
        model: AtlasLM,
        tokenizer: Tokenizer,
        tracking: TrackingConfig,
        *,
        seed: int,
        should_stop: Callable[[], bool],
    ) -> list[str]:
        """The generated texts."""
        ...


class SamplingFailed(Exception):
    """Why no samples were generated, in one line."""


def sample(
    sampler: Sampler,
    model: AtlasLM,
    tokenizer: Tokenizer,
    config: AtlasConfig,
    runtime: Runtime,
    *,
    should_stop: Callable[[], bool],
) -> list[str]:
    """`tracking.samples` texts on the first rank, none on the others. Raises `SamplingFailed`, whatever went wrong:
    texts to look at are no reason to end a run."""
    if runtime.parallel == "fsdp":
        raise SamplingFailed("each process holds a part of the weights")
    if not runtime.world.is_first:
        return []
    reason = ""
    model.eval()
    try:
        # The compiled blocks are compiled for the shapes of training.
        with torch.compiler.set_stance("force_eager" if runtime.compiles else "default"):
            # The same seed each time, so that only the model differs.
            return sampler(model, tokenizer, config.tracking, seed=config.seed, should_stop=should_stop)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    finally:
        model.train()
    release_memory(runtime.device)  # here: the exception holds on to the tensors of what failed
    raise SamplingFailed(f"{reason:.200}")
