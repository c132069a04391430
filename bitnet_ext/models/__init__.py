"""Ternary transformers, driven by a configuration, with presets."""

from bitnet_ext.models.config import PRESETS, BitNetConfig, preset
from bitnet_ext.models.kv_cache import KVCache
from bitnet_ext.models.transformer import BitNetForCausalLM

__all__ = ["PRESETS", "BitNetConfig", "BitNetForCausalLM", "KVCache", "preset"]
