"""Ternary layers that read the same input, computed as one product."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bitnet_ext import ops
from bitnet_ext.nn.bit_linear import BitLinear
from bitnet_ext.nn.packed_bit_linear import PackedBitLinear
from bitnet_ext.nn.rms_norm import RMSNorm
from bitnet_ext.nn.weight_cache import WeightCache


def shared_input_linear(
    x: Tensor, layers: Sequence[nn.Module], cache: WeightCache, norm: nn.Module | None = None
) -> list[Tensor]:
    """The outputs of `layers`, each on ``norm(x)``: as views of one product where the layers are ternary and in
    training form, whose input is then normalised and quantised once.

    Packed layers quantise their input once too; their outputs are those of the training form, bit for bit.

    Args:
        x: [..., K].
        layers: with in_features K.
        cache: of their stacked codes, for these layers only.
        norm: in front of all of them; an :class:`RMSNorm` is fused with the quantiser.
    """
    fused = norm if isinstance(norm, RMSNorm) else None
    if norm is not None and fused is None:
        x = norm(x)
    gain = None if fused is None else fused.weight.float()
    eps = None if fused is None else fused.eps
    training = [m for m in layers if isinstance(m, BitLinear) and m.is_quantized and m.norm_weight is None]
    if len(training) == len(layers):
        weights = [m.weight for m in training]
        if ops.can_stack(weights):
            y = ops.bit_linear(
                x,
                weights,
                bias=_stacked_bias(training),
                norm_weight=gain,
                norm_eps=eps,
                quantized=cache.get(weights),
            )
            return list(y.split([m.out_features for m in training], dim=-1))
        return [
            ops.bit_linear(
                x,
                m.weight,
                bias=m.float_bias,
                norm_weight=gain,
                norm_eps=eps,
                quantized=m.cache.get([m.weight]),
            )
            for m in training
        ]
    packed = [m for m in layers if isinstance(m, PackedBitLinear) and m.norm_weight is None]
    if len(packed) == len(layers):
        if eps is None:
            x_i8, act_scale = ops.quantize_act_int8(x)
        else:
            x_i8, act_scale, _ = ops.rms_norm_quantize(x, gain, eps)
        return [m.product(x_i8, act_scale, x.dtype) for m in packed]
    if fused is not None:
        x = fused(x)
    return [m(x) for m in layers]


def _stacked_bias(layers: Sequence[BitLinear]) -> Tensor | None:
    biases = [m.float_bias for m in layers]
    if all(b is None for b in biases):
        return None
    return torch.cat(
        [
            b if b is not None else m.weight.new_zeros(m.out_features, dtype=torch.float32)
            for b, m in zip(biases, layers, strict=True)
        ]
    )
