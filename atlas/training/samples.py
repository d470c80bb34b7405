"""What the model writes on the way, so that one sees it learn."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import torch

from atlas.config import TrackingConfig
from atlas.model import AtlasLM
from atlas.tokenizer import Tokenizer
from atlas.training.devices.memory import release_memory

if TYPE_CHECKING:
    from atlas.training.train import Trainer


class Sampler(Protocol):
    """Writes texts with a model in evaluation mode, by random numbers of its own; inference has one, and later rooms
    hand it in."""

    def __call__(
        self,
        model: AtlasLM,
        tokenizer: Tokenizer,
        tracking: TrackingConfig,
        *,
        seed: int,
        should_stop: Callable[[], bool],
    ) -> list[str]: ...


def write_samples(trainer: Trainer) -> None:
    """Log what the model as it is writes."""
    if texts := sample(trainer):
        trainer.log.samples(trainer.state.step, trainer.config.tracking.sample_prompt, texts)


def sample(trainer: Trainer) -> list[str]:
    """`tracking.samples` texts on the first rank, none on the others. The first failure is said, and from then on there
    are none."""
    model, tracking, log = trainer.model, trainer.config.tracking, trainer.log
    if trainer.sampler is None or not tracking.samples:
        return []
    if trainer.runtime.parallel == "fsdp":
        log.say("no samples are written: each process holds a part of the weights (tracking.samples)")
        trainer.sampler = None
        return []
    if not trainer.world.is_first:
        return []
    model.eval()
    try:
        # What is compiled is compiled for the shapes of training.
        with torch.compiler.set_stance("force_eager" if trainer.runtime.compiles else "default"):
            return trainer.sampler(
                model,
                trainer.tokenizer,
                tracking,
                seed=trainer.config.seed,  # the same each time, so that what changes is the model
                should_stop=lambda: trainer.stop.requested,
            )
    except Exception as error:  # texts to look at are no reason to end a run
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        log.say(f"step {trainer.state.step}: no samples from here on (tracking.samples): {reason:.200}")
        trainer.sampler = None
    finally:
        model.train()
    release_memory(trainer.runtime.device)  # here: the exception holds on to the tensors of what failed
    return []
