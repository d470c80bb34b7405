"""From a checkpoint to text."""

from atlas.inference.generate import generate
from atlas.inference.load import LoadedModel, load_model
from atlas.inference.sampling import Sampling

__all__ = ["LoadedModel", "Sampling", "generate", "load_model"]
