"""Checkpoints: written so that no kill loses one, read so that a damaged one is never used."""

from atlas.training.checkpoint.load import load_checkpoint
from atlas.training.checkpoint.locate import find_checkpoint
from atlas.training.checkpoint.manager import CheckpointManager

__all__ = ["CheckpointManager", "find_checkpoint", "load_checkpoint"]
