"""Ternary layers together with what stands in front of them: one operator for what would be several.

Every function takes the layers in any form (:class:`BitLinear` quantised or not, :class:`PackedBitLinear`,
something else) and gives what the modules called one by one give. Packed layers give what the training form gives, bit
for bit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bitnet_ext import ops
from bitnet_ext.nn.bit_linear import BitLinear
from bitnet_ext.nn.packed_bit_linear import PackedBitLinear
from bitnet_ext.nn.rms_norm import RMSNorm
from bitnet_ext.nn.weight_cache import WeightCache
from bitnet_ext.ops.fused_quantize import Activation
from bitnet_ext.ops.packed_linear import needs_gradient


def norm_linear(
    x: Tensor,
    delta: Tensor | None,
    norms: Sequence[RMSNorm],
    layers: Sequence[nn.Module],
    cache: WeightCache,
) -> tuple[list[Tensor], Tensor]:
    """``sum = x + delta``, the norms of it one behind the other, and each of `layers` on the result.

    Ternary layers in training form are one product of their stacked weights, whose input is normalised, also twice, and
    quantised once in one operator; packed ones read an input that is quantised once.

    Args:
        x, delta: [..., K], the residual stream and what the block before adds to it, or None.
        norms: at least one. All but the last are rounded to x's dtype; the last is fused with the quantiser.
        layers: with in_features K.
        cache: of the stacked codes of these layers.

    Returns:
        The outputs of `layers`, as a list of one tensor [..., N] of all, side by side, where they are one product,
        else of one for each (see :func:`side_by_side` and :func:`apart`); and the sum.
    """
    *first, last = norms
    training = [m for m in layers if isinstance(m, BitLinear) and m.is_quantized and m.norm_weight is None]
    total, first_norm = x, None
    if len(first) == 1 and len(training) == len(layers):
        first_norm, first = (first[0].weight.float(), first[0].eps), []
    for norm in first:
        x, total = norm.add(x, delta) if delta is not None else (norm(x), total)
        delta = None
    gain, eps = last.weight.float(), last.eps

    if len(training) == len(layers):
        weights = [m.weight for m in training]
        bias, codes, mode = _stacked_bias(training), None, training[0].backward_mode
        if ops.can_stack(weights):
            codes = cache.get(weights)
        y, summed = ops.add_bit_linear(
            x,
            delta,
            weights,
            bias=bias,
            norm_weight=gain,
            norm_eps=eps,
            first_norm=first_norm,
            backward=mode,
            quantized=codes,
        )
        return [y], total if first else summed

    packed = [m for m in layers if isinstance(m, PackedBitLinear) and m.norm_weight is None]
    if len(packed) == len(layers):
        if torch.is_grad_enabled() and needs_gradient(x, delta, gain, *(m.bias for m in packed)):
            total = total if delta is None else (x + delta).to(x.dtype)
            read = x if delta is None else total
            return [m.trainable(read, gain, eps) for m in packed], total
        if delta is not None and delta.dtype == x.dtype:
            x_i8, act_scale, total = ops.add_rms_norm_quantize(delta, x, gain, eps)
        else:
            if delta is not None:
                x = total = x + delta
            x_i8, act_scale, _ = ops.rms_norm_quantize(x, gain, eps)
        return [m.product(x_i8, act_scale, x.dtype) for m in packed], total

    x, summed = last.add(x, delta)
    return [m(x) for m in layers], total if delta is None else summed


def glu_linear(parts: Sequence[Tensor], activation: Activation, layer: nn.Module) -> Tensor:
    """``layer(act(gate) * up)``: with a ternary layer, one operator.

    Args:
        parts: gate and up, as :func:`norm_linear` gives them.
        activation: "relu2" or "silu".
        layer: of K in_features.
    """
    if isinstance(layer, BitLinear) and layer.is_quantized:
        gain = layer.float_gain
        return ops.glu_bit_linear(
            side_by_side(parts),
            layer.weight,
            activation,
            bias=layer.float_bias,
            norm_weight=gain,
            norm_eps=None if gain is None else layer.norm_eps,
            backward=layer.backward_mode,
            quantized=layer.cache.get([layer.weight]),
        )
    gate, up = parts[0].chunk(2, dim=-1) if len(parts) == 1 else parts
    if isinstance(layer, PackedBitLinear):
        if torch.is_grad_enabled() and needs_gradient(gate, up, layer.bias, layer.norm_weight):
            return layer.trainable_glu(side_by_side(parts), activation)
        gain = layer.norm_weight
        x_i8, act_scale = ops.glu_quantize(gate, up, activation, gain, layer.norm_eps, gain is not None)
        return layer.product(x_i8, act_scale, gate.dtype)
    return layer((F.relu(gate).square() if activation == "relu2" else F.silu(gate)) * up)


def side_by_side(parts: Sequence[Tensor]) -> Tensor:
    """The parts that :func:`norm_linear` gives as one tensor."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=-1)


def apart(parts: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
    """The parts that :func:`norm_linear` gives, one a layer of these out_features."""
    return list(parts[0].split(list(sizes), dim=-1)) if len(parts) == 1 else list(parts)


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
