"""What a run is made of, and how it is read from files and flags."""

from atlas.config.config import (
    AtlasConfig,
    CheckpointConfig,
    DataConfig,
    GuardConfig,
    LoraConfig,
    TrainingConfig,
)
from atlas.config.model import ModelConfig

__all__ = [
    "AtlasConfig",
    "CheckpointConfig",
    "DataConfig",
    "GuardConfig",
    "LoraConfig",
    "ModelConfig",
    "TrainingConfig",
]
