"""The network. This package does not depend on training, devices or files."""

from atlas.model.kv_cache import KVCache, long_tensor
from atlas.model.lora import add_lora, has_lora, is_lora, merged
from atlas.model.transformer import AtlasLM, build_model

__all__ = ["AtlasLM", "KVCache", "add_lora", "build_model", "has_lora", "is_lora", "long_tensor", "merged"]
