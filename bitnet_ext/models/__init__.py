"""Ternary transformers, driven by a configuration, with presets."""

from typing import TYPE_CHECKING

from bitnet_ext._lazy import lazy_names
from bitnet_ext.models.config import PRESETS, BitNetConfig, preset

if TYPE_CHECKING:
    from bitnet_ext.models.kv_cache import KVCache
    from bitnet_ext.models.transformer import BitNetForCausalLM

# Presets are read without torch, by the command line; what follows imports it.
__getattr__ = lazy_names(__name__, {"kv_cache": ("KVCache",), "transformer": ("BitNetForCausalLM",)})

__all__ = ["PRESETS", "BitNetConfig", "BitNetForCausalLM", "KVCache", "preset"]
