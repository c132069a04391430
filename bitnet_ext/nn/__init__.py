"""Modules: the training form and the packed form of a BitLinear layer, an int8 head, and conversion of whole
models.
"""

from bitnet_ext.nn.attention import BitMultiheadAttention
from bitnet_ext.nn.bit_linear import QUANTIZATIONS, BitLinear, set_backward
from bitnet_ext.nn.convert import convert_linear, pack_model
from bitnet_ext.nn.int8_linear import Int8Linear
from bitnet_ext.nn.packed_bit_linear import PackedBitLinear
from bitnet_ext.nn.rms_norm import RMSNorm
from bitnet_ext.nn.weight_cache import (
    FrozenWeights,
    WeightCache,
    frozen_weights,
    resident_weights,
    weight_caches,
)
from bitnet_ext.nn.weight_readers import guard_registration

guard_registration()

__all__ = [
    "QUANTIZATIONS",
    "BitLinear",
    "BitMultiheadAttention",
    "FrozenWeights",
    "Int8Linear",
    "PackedBitLinear",
    "RMSNorm",
    "WeightCache",
    "convert_linear",
    "frozen_weights",
    "pack_model",
    "resident_weights",
    "set_backward",
    "weight_caches",
]
