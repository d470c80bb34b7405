"""What a run is made of, and how it is read from files and flags."""

from atlas.config.config import (
    AtlasConfig,
    CheckpointConfig,
    DataConfig,
    GuardConfig,
    LoraConfig,
    TrackingConfig,
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
    "TrackingConfig",
    "TrainingConfig",
]
