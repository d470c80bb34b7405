"""What writes samples during training, so that one sees the model learn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from atlas.config import TrackingConfig
from atlas.model import AtlasLM
from atlas.tokenizer import Tokenizer


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
