"""The network. Knows nothing of training, devices or files."""

from atlas.model.kv_cache import KVCache
from atlas.model.transformer import AtlasLM, build_model

__all__ = ["AtlasLM", "KVCache", "build_model"]
