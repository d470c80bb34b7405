"""Atlas trains GPT models from raw text, and exports them to files that llama.cpp runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from atlas.version import __version__

if TYPE_CHECKING:
    from atlas.inference import LoadedModel

__all__ = ["__version__", "load"]


def load(
    checkpoint: str = "checkpoints/atlas_best.pt",
    *,
    device: str = "auto",
    dtype: str = "auto",
    tokenizer: str | None = None,
) -> LoadedModel:
    """Load and return a trained model. Its method `generate` returns a text, and its method `logits` returns logits.

    The arguments have the meaning and the defaults of the options of `atlas generate`. Raises `AtlasError` for an error
    that `atlas generate` would print.
    """
    from atlas.inference import load_model  # importing PyTorch takes about a second

    return load_model(checkpoint, device=device, dtype=dtype, tokenizer=tokenizer)
