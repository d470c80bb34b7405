"""The settings of a run, and how Atlas reads them from files and flags."""

from atlas.config.config import AtlasConfig as AtlasConfig
from atlas.config.config import CheckpointConfig as CheckpointConfig
from atlas.config.config import DataConfig as DataConfig
from atlas.config.config import GuardConfig as GuardConfig
from atlas.config.config import LoraConfig as LoraConfig
from atlas.config.config import TrackingConfig as TrackingConfig
from atlas.config.config import TrainingConfig as TrainingConfig
from atlas.config.model import ModelConfig as ModelConfig
