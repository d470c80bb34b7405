"""Save and load checkpoints.

If the process is killed at any moment, the last checkpoint stays intact. Atlas never loads a damaged checkpoint.
"""

from atlas.training.checkpoint.load import load_checkpoint
from atlas.training.checkpoint.locate import find_checkpoint
from atlas.training.checkpoint.manager import CheckpointManager

__all__ = ["CheckpointManager", "find_checkpoint", "load_checkpoint"]
