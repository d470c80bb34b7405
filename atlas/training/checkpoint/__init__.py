"""Checkpoints. A kill at any moment leaves the last one intact, and a damaged one is never loaded."""

from atlas.training.checkpoint.load import load_checkpoint
from atlas.training.checkpoint.locate import find_checkpoint
from atlas.training.checkpoint.manager import CheckpointManager

__all__ = ["CheckpointManager", "find_checkpoint", "load_checkpoint"]
