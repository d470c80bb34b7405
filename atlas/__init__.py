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
    """Load a trained model, for generation (`generate`) and inspection (`logits`).

    The arguments and their defaults are those of `atlas generate`. Raises `AtlasError` where the command would print an
    error.
    """
    from atlas.inference import load_model  # this imports PyTorch, which takes a second

    return load_model(checkpoint, device=device, dtype=dtype, tokenizer=tokenizer)
