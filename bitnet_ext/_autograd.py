"""Autograd formulas of the operators declared in csrc/ops.cpp.

A ternary layer is trained straight through (Bengio et al., arXiv 1308.3432): the gradient passes unchanged through
both quantisers, whose scales are constants, so with ``y = x_q W_q^T`` it is ``dL/dx_q = g W_q`` and
``dL/dW = g^T x_q``. Both products are computed by a function of the signature of :func:`exact_grads`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bitnet_ext._differentiation import first_order
from bitnet_ext.ops.int8_grad import int8_grads
from bitnet_ext.ops.small_grad import exact_grads_small, prefers_small_grad

_ops = torch.ops.bitnet_ext

#: (grad_y [M, N], x_i8 [M, K], act_scale [M], packed, weight_scale [S], segments, need_input, need_weight,
#: weight_dtype) -> (grad_x_q [M, K] or None, grad_weight [N, K] or None)
Grads = Callable[
    [Tensor, Tensor, Tensor, Tensor, Tensor, Sequence[int], bool, bool, torch.dtype],
    tuple[Tensor | None, Tensor | None],
]


def exact_grads(
    grad_y: Tensor,
    x_i8: Tensor,
    act_scale: Tensor,
    packed: Tensor,
    weight_scale: Tensor,
    segments: Sequence[int],
    need_input: bool,
    need_weight: bool,
    weight_dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor | None]:
    """Both products of the backward pass in the precision of grad_y, the operands decoded to its dtype.

    Args:
        grad_y: [M, N] float32, bfloat16 or float16.
        x_i8, act_scale: int8 [M, K] and float32 [M], the quantised input.
        packed, weight_scale: the quantised weights, stacked: see :class:`bitnet_ext.ops.QuantizedWeight`.
        segments: rows of each of the stacked weights, of the sum N.
        need_input, need_weight: which of the two products to compute.
        weight_dtype: of grad_weight.

    Returns:
        grad_x_q [M, K] in grad_y's dtype and grad_weight [N, K] in `weight_dtype`; None where it is not needed.
    """
    (M, N), K = grad_y.shape, x_i8.shape[1]
    grad_x = grad_weight = None
    if grad_y.is_cuda and packed.dtype == torch.int32 and M > 0 and prefers_small_grad(M, N, K, grad_y.dtype):
        grad_x, grad_weight = exact_grads_small(
            grad_y, x_i8, act_scale, packed, weight_scale, segments, need_input, need_weight, weight_dtype
        )
        return grad_x if need_input else None, grad_weight if need_weight else None
    if need_input:
        scale = weight_scale
        if len(segments) > 1:
            scale = torch.cat([weight_scale[i : i + 1].expand(n) for i, n in enumerate(segments)])
        if packed.dtype == torch.int32:
            weight_q = _ops.dequantize_prepacked(packed, scale, N, K, grad_y.dtype)
        else:
            weight_q = _ops.dequantize_ternary(packed, scale, K, grad_y.dtype)
        grad_x = torch.mm(grad_y, weight_q)
        del weight_q  # its memory is free for the other operand
    if need_weight:
        x_q = _ops.dequantize_act(x_i8, act_scale, grad_y.dtype)
        if grad_y.is_cuda and grad_y.dtype != weight_dtype == torch.float32:
            grad_weight = torch.mm(grad_y.t(), x_q, out_dtype=weight_dtype)  # the sums as they are
        else:
            grad_weight = torch.mm(grad_y.t(), x_q).to(weight_dtype)
    return grad_x, grad_weight


#: By the argument `backward` of the operators.
GRADS: dict[str, Grads] = {"exact": exact_grads, "int8": int8_grads}


# --- bit_linear ----------------------------------------------------------------------------------------------


def _save_product(ctx: Any, weights: Sequence[Tensor], bias: Tensor | None, backward: str) -> None:
    # Without this every unused output gets a gradient of zeros: six kernels a layer.
    ctx.set_materialize_grads(False)
    ctx.segments = [weight.shape[0] for weight in weights]
    ctx.weight_dtype = weights[0].dtype
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.grads = backward


def _product_grads(
    ctx: Any,
    grad_y: Tensor,
    x_i8: Tensor,
    act_scale: Tensor,
    packed: Tensor,
    weight_scale: Tensor,
    need_input: bool,
    need_weights: Sequence[bool],
    need_bias: bool,
) -> tuple[Tensor | None, list[Tensor | None], Tensor | None]:
    """Gradients of the quantised input [.., K], of each stacked weight and of the bias."""
    segments = ctx.segments
    grad = grad_y.reshape(-1, grad_y.shape[-1])
    grad_x, grad_weight = GRADS[ctx.grads](
        grad,
        x_i8.reshape(-1, x_i8.shape[-1]),
        act_scale.reshape(-1),
        packed,
        weight_scale,
        segments,
        need_input,
        any(need_weights),
        ctx.weight_dtype,
    )
    grad_weights: list[Tensor | None] = [None] * len(segments)
    if grad_weight is not None:
        parts = grad_weight.split(segments) if len(segments) > 1 else (grad_weight,)
        grad_weights = [part if need else None for part, need in zip(parts, need_weights, strict=True)]
    grad_bias = grad.sum(0, dtype=torch.float32).to(ctx.bias_dtype) if need_bias else None
    return None if grad_x is None else grad_x.reshape(x_i8.shape), grad_weights, grad_bias


def _bit_linear_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, delta, weights, packed, weight_scale, bias, norm_weight, _, normalize, first_gain, _, _, backward = (
        inputs
    )
    _y, x_i8, act_scale, rstd, total, first_rstd = output
    # The first norm's backward needs its input and gives the second's; without a norm the int8 form is all that is
    # kept.
    ctx.has_sum = delta is not None or first_gain is not None
    normed = (total if ctx.has_sum else x) if normalize else None
    norms = (norm_weight, rstd, first_gain, None if first_gain is None else first_rstd)
    ctx.save_for_backward(normed, *norms, x_i8, act_scale, packed, weight_scale)
    _save_product(ctx, weights, bias, backward)
    ctx.normalize = normalize
    ctx.x_dtype = x.dtype
    ctx.delta_dtype = None if delta is None else delta.dtype


def _bit_linear_backward(
    ctx: Any,
    grad_y: Tensor | None,
    _x_i8: None,
    _act_scale: None,
    _rstd: None,
    grad_sum: Tensor | None,
    _first_rstd: None,
) -> tuple[Any, ...]:
    no_weights: list[Tensor | None] = [None] * len(ctx.segments)
    if grad_y is None:
        grad_x, grad_delta = _around_norm(ctx, grad_sum)
        return (grad_x, grad_delta, no_weights, *(None,) * 10)
    x, norm_weight, rstd, first_gain, first_rstd, x_i8, act_scale, packed, weight_scale = ctx.saved_tensors
    need_weights, need_bias = (ctx.needs_input_grad[i] for i in (2, 5))
    need_input = any(ctx.needs_input_grad[i] for i in (0, 1, 6, 9))  # x, delta and the gains
    grad_x, grad_weights, grad_bias = _product_grads(
        ctx, grad_y, x_i8, act_scale, packed, weight_scale, need_input, need_weights, need_bias
    )
    grad_delta = grad_gain = grad_first = None
    if grad_x is not None:
        if first_gain is not None:
            grad_x, grad_delta, grad_first, grad_gain = _ops.norm_pair_backward(
                grad_x.contiguous(),
                *(x, first_gain, first_rstd, norm_weight, rstd),
                *_sum_arguments(ctx, x, grad_sum),
            )
            grad_delta = _delta_of(ctx, grad_x, grad_delta)
        elif ctx.normalize:
            grad_x, grad_delta, grad_gain = _norm_grads(ctx, grad_x, x, norm_weight, rstd, grad_sum)
        else:
            grad_x = grad_x.to(ctx.x_dtype)
    no_more = (None, None, None)
    return (
        grad_x,
        grad_delta,
        grad_weights,
        None,
        None,
        grad_bias,
        grad_gain,
        None,
        None,
        grad_first,
        *no_more,
    )


# --- the norm ------------------------------------------------------------------------------------------------


def _norm_grads(
    ctx: Any, grad_y: Tensor, x: Tensor, gain: Tensor | None, rstd: Tensor, grad_sum: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of x, of what was added to it in front of the norm, and of the gain."""
    grad_x, grad_delta, grad_gain = _ops.rms_norm_backward(
        grad_y.contiguous(), x, gain, rstd, *_sum_arguments(ctx, x, grad_sum)
    )
    return grad_x, _delta_of(ctx, grad_x, grad_delta), None if gain is None else grad_gain


def _sum_arguments(ctx: Any, x: Tensor, grad_sum: Tensor | None) -> tuple[Tensor | None, torch.dtype]:
    """The gradient around the norm, and the type that delta's gradient is wanted in."""
    if grad_sum is None or not ctx.has_sum:  # without a sum an empty tensor is returned for it
        return None, ctx.delta_dtype or x.dtype
    return grad_sum.contiguous(), ctx.delta_dtype or x.dtype


def _delta_of(ctx: Any, grad_x: Tensor, grad_delta: Tensor) -> Tensor | None:
    """The gradient of delta, which the operators leave empty where it is that of x."""
    if ctx.delta_dtype is None:
        return None
    return grad_x if ctx.delta_dtype == grad_x.dtype else grad_delta


def _around_norm(ctx: Any, grad_sum: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x and delta where only their sum was used."""
    if grad_sum is None or not ctx.has_sum:
        return None, None
    return grad_sum, None if ctx.delta_dtype is None else grad_sum.to(ctx.delta_dtype)


def _rms_norm_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, delta, gain, _eps = inputs
    _y, total, rstd = output
    ctx.save_for_backward(x if delta is None else total, gain, rstd)
    ctx.set_materialize_grads(False)
    ctx.has_sum = delta is not None
    ctx.delta_dtype = None if delta is None else delta.dtype


def _rms_norm_backward(
    ctx: Any, grad_y: Tensor | None, grad_sum: Tensor | None, _rstd: None
) -> tuple[Any, ...]:
    if grad_y is None:
        return (*_around_norm(ctx, grad_sum), None, None)
    x, gain, rstd = ctx.saved_tensors
    return (*_norm_grads(ctx, grad_y, x, gain, rstd, grad_sum), None)


# --- glu_bit_linear ------------------------------------------------------------------------------------------


def _glu_bit_linear_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    gate_up, weight, packed, weight_scale, bias, norm_weight, _eps, normalize, activation, _, backward = (
        inputs
    )
    _y, x_i8, act_scale, rstd = output
    ctx.save_for_backward(gate_up, norm_weight, x_i8, act_scale, rstd, packed, weight_scale)
    _save_product(ctx, [weight], bias, backward)
    ctx.normalize = normalize
    ctx.activation = activation


def _glu_bit_linear_backward(ctx: Any, grad_y: Tensor | None, *_unused: None) -> tuple[Any, ...]:
    if grad_y is None:
        return (None,) * 11
    gate_up, norm_weight, x_i8, act_scale, rstd, packed, weight_scale = ctx.saved_tensors
    need_x, need_weight, need_bias, need_gain = (ctx.needs_input_grad[i] for i in (0, 1, 4, 5))
    grad_x, (grad_weight,), grad_bias = _product_grads(
        ctx, grad_y, x_i8, act_scale, packed, weight_scale, need_x or need_gain, [need_weight], need_bias
    )
    grad_gate_up = grad_gain = None
    if grad_x is not None:
        grad_gate_up, grad_gain = _ops.glu_backward(
            grad_x, gate_up, ctx.activation, norm_weight, rstd, ctx.normalize
        )
        if norm_weight is None:
            grad_gain = None
    return grad_gate_up, grad_weight, None, None, grad_bias, grad_gain, None, None, None, None, None


# --- short_attention -----------------------------------------------------------------------------------------


def _short_attention_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, cos, sin, num_heads, num_kv_heads = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(qkv, cos, sin, out, lse)
    ctx.heads = (num_heads, num_kv_heads)


def _short_attention_backward(
    ctx: Any, grad_out: Tensor | None, _lse: Tensor | None
) -> tuple[Tensor | None, ...]:
    if grad_out is None:
        return (None,) * 5
    qkv, cos, sin, out, lse = ctx.saved_tensors
    grad_qkv = _ops.short_attention_backward(grad_out.contiguous(), qkv, cos, sin, out, lse, *ctx.heads)
    return grad_qkv, None, None, None, None


def once(name: str, anchor: int, backward: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    """`backward` without a derivative of its own: under ``create_graph=True`` its results say so.

    Args:
        anchor: place in the saved tensors of a float output of the operator.
    """

    def guarded(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        if not torch.is_grad_enabled():
            return backward(ctx, *grads)
        with torch.no_grad():
            results = backward(ctx, *grads)
        return first_order(name, results, ctx.saved_tensors[anchor])

    return guarded


#: For each operator: what it saves, and its backward.
FORMULAS: dict[str, tuple[Callable[..., None], Callable[..., Any]]] = {
    "bit_linear": (_bit_linear_setup, once("bit_linear", 6, _bit_linear_backward)),
    "glu_bit_linear": (_glu_bit_linear_setup, once("glu_bit_linear", 3, _glu_bit_linear_backward)),
    "rms_norm": (_rms_norm_setup, once("rms_norm", 2, _rms_norm_backward)),
    "short_attention": (_short_attention_setup, once("short_attention", 3, _short_attention_backward)),
}
