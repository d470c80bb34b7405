"""Load a checkpoint, generate text with it, and evaluate it."""

from atlas.inference.generate import generate
from atlas.inference.load import LoadedModel, load_model
from atlas.inference.sampling import Sampling

__all__ = ["LoadedModel", "Sampling", "generate", "load_model"]
