"""Functional operators, each with a ``*_ref`` twin in plain PyTorch that defines it.

Shapes: M tokens, N out_features, K in_features. Activations keep their leading dimensions.
"""

from bitnet_ext.ops.attention import rotary_attention, rotary_attention_ref
from bitnet_ext.ops.bit_linear import bit_linear, bit_linear_ref
from bitnet_ext.ops.fused_quantize import (
    add_rms_norm_quantize,
    add_rms_norm_quantize_ref,
    glu_quantize,
    glu_quantize_ref,
)
from bitnet_ext.ops.int8_mm import int8_mm, int8_mm_ref, quantize_rows_int8, quantize_rows_int8_ref
from bitnet_ext.ops.loss import (
    LinearCrossEntropyOutput,
    SoftmaxStats,
    linear_cross_entropy,
    linear_cross_entropy_ref,
    softmax_stats,
    softmax_stats_ref,
)
from bitnet_ext.ops.matmul import int8xint2_mm, int8xint2_mm_ref
from bitnet_ext.ops.optimizer import (
    adam_step_,
    adam_step_ref,
    clip_gradients_,
    clip_gradients_ref,
    sum_of_squares,
    sum_of_squares_ref,
)
from bitnet_ext.ops.packing import (
    dequantize_prepacked,
    dequantize_prepacked_ref,
    dequantize_ternary,
    dequantize_ternary_ref,
    pack_ternary,
    pack_ternary_ref,
    prepack_int8,
    prepack_int8_ref,
    prepack_ternary,
    prepack_ternary_ref,
    unpack_ternary,
    unpack_ternary_ref,
    unprepack_ternary,
    unprepack_ternary_ref,
)
from bitnet_ext.ops.quantize import (
    dequantize_act,
    dequantize_act_ref,
    quantize_act_int8,
    quantize_act_int8_ref,
    quantize_pack_weight,
    quantize_pack_weight_ref,
    quantize_weight_ternary,
    quantize_weight_ternary_ref,
)
from bitnet_ext.ops.quantize_groups import (
    QuantizedWeight,
    abs_sums_like,
    can_stack,
    quantize_weight_groups_,
    quantize_weights,
    quantize_weights_ref,
)
from bitnet_ext.ops.rms_norm import (
    rms_norm_backward,
    rms_norm_backward_ref,
    rms_norm_quantize,
    rms_norm_quantize_ref,
)

__all__ = [
    "LinearCrossEntropyOutput",
    "QuantizedWeight",
    "SoftmaxStats",
    "abs_sums_like",
    "adam_step_",
    "adam_step_ref",
    "add_rms_norm_quantize",
    "add_rms_norm_quantize_ref",
    "bit_linear",
    "bit_linear_ref",
    "can_stack",
    "clip_gradients_",
    "clip_gradients_ref",
    "dequantize_act",
    "dequantize_act_ref",
    "dequantize_prepacked",
    "dequantize_prepacked_ref",
    "dequantize_ternary",
    "dequantize_ternary_ref",
    "glu_quantize",
    "glu_quantize_ref",
    "int8_mm",
    "int8_mm_ref",
    "int8xint2_mm",
    "int8xint2_mm_ref",
    "linear_cross_entropy",
    "linear_cross_entropy_ref",
    "pack_ternary",
    "pack_ternary_ref",
    "prepack_int8",
    "prepack_int8_ref",
    "prepack_ternary",
    "prepack_ternary_ref",
    "quantize_act_int8",
    "quantize_act_int8_ref",
    "quantize_pack_weight",
    "quantize_pack_weight_ref",
    "quantize_rows_int8",
    "quantize_rows_int8_ref",
    "quantize_weight_groups_",
    "quantize_weight_ternary",
    "quantize_weight_ternary_ref",
    "quantize_weights",
    "quantize_weights_ref",
    "rms_norm_backward",
    "rms_norm_backward_ref",
    "rms_norm_quantize",
    "rms_norm_quantize_ref",
    "rotary_attention",
    "rotary_attention_ref",
    "softmax_stats",
    "softmax_stats_ref",
    "sum_of_squares",
    "sum_of_squares_ref",
    "unpack_ternary",
    "unpack_ternary_ref",
    "unprepack_ternary",
    "unprepack_ternary_ref",
]
