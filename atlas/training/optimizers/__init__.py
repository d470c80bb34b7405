"""The optimizers: AdamW, Muon, Adafactor, and AdamW with 8-bit state."""

from atlas.training.optimizers.build import build_optimizer

__all__ = ["build_optimizer"]
