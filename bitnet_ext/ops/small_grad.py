"""Exact gradients of a ternary layer for few tokens: both products in one launch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bitnet_ext.ops import _checks
from bitnet_ext.ops.packing import prepacked_codes_ref

_ops = torch.ops.bitnet_ext


def prefers_small_grad(M: int, N: int, K: int, dtype: torch.dtype = torch.float32) -> bool:
    """Whether :func:`exact_grads_small` is faster than two dequantisations and two products of the library.

    Measured on an H200 with N and K from 256 to 8,192: float32 up to M = 2,048 and beyond 1.2 to 4 times as fast,
    16-bit gradients, whose products the library computes at full speed, while the launches decide.
    """
    for name, size in (("M", M), ("N", N), ("K", K)):
        _checks.integer("prefers_small_grad", name, size)
    _checks.float_dtype("prefers_small_grad", "dtype", dtype)
    return M <= 2048 if dtype == torch.float32 else M * N * K < 1 << 27


def exact_grads_small(
    grad_y: Tensor,
    x_i8: Tensor,
    act_scale: Tensor,
    packed: Tensor,
    weight_scale: Tensor,
    segments: Sequence[int],
    need_input: bool,
    need_weight: bool,
    weight_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Gradients in the quantised input and the quantised weight of ``y = x_q W_q^T``, accurate to fp32.

    grad_x_q[m, k] = sum_n grad_y[m, n] weight_scale(n) code[n, k] and grad_weight[n, k] = sum_m grad_y[m, n]
    act_scale[m] x_i8[m, k], with x_q = x_i8 * act_scale. Equal inputs give equal bits.

    Args:
        grad_y: [..., N] float32, bfloat16 or float16 on CUDA; x_i8: int8 [..., K]; act_scale: float32 [...].
        packed: prepacked ternary codes int32 [ceil(N / 16), ceil(K / 128), 32, 4].
        weight_scale: float32, one for each of `segments`, whose sizes sum to N and are multiples of 16 but for
            the last; an empty list is one segment.
        need_input, need_weight: which of the two to compute; the other result is an empty [0] tensor.
        weight_dtype: of grad_weight: float32, bfloat16 or float16.

    Returns:
        grad_x_q of grad_y's dtype and x_i8's shape, grad_weight [N, K].
    """
    op = "exact_grads_small"
    _checks.tensor(op, "grad_y", grad_y, dtypes=_checks.FLOATS, min_dim=1)
    _checks.tensor(op, "x_i8", x_i8, dtypes=(torch.int8,), min_dim=1)
    _checks.shape(op, "grad_y", grad_y, (*x_i8.shape[:-1], grad_y.shape[-1]), "the leading sizes of x_i8")
    _checks.tensor(op, "act_scale", act_scale, dtypes=(torch.float32,))
    _checks.shape(op, "act_scale", act_scale, x_i8.shape[:-1], "one scale a token of x_i8")
    _checks.tensor(op, "packed", packed, dtypes=(torch.int32,), dim=4)
    _checks.tensor(op, "weight_scale", weight_scale, dtypes=(torch.float32,))
    _checks.sizes(op, "segments", segments)
    _checks.boolean(op, "need_input", need_input)
    _checks.boolean(op, "need_weight", need_weight)
    _checks.float_dtype(op, "weight_dtype", weight_dtype)
    if not grad_y.is_cuda:
        raise ValueError(f"{op}: grad_y must be on a CUDA device, got {grad_y.device}")
    for name, value in (
        ("x_i8", x_i8),
        ("act_scale", act_scale),
        ("packed", packed),
        ("weight_scale", weight_scale),
    ):
        _checks.same_device(op, name, value, "grad_y", grad_y)
    _checks.at_least_one(op, "grad_y", grad_y.shape[-1], "N")
    _checks.at_least_one(op, "x_i8", x_i8.shape[-1], "K")
    grad_x, grad_weight = _ops.bit_linear_grad(
        grad_y.reshape(-1, grad_y.shape[-1]).contiguous(),
        x_i8.reshape(-1, x_i8.shape[-1]).contiguous(),
        act_scale.reshape(-1).contiguous(),
        packed,
        weight_scale.reshape(-1),
        list(segments),
        need_input,
        need_weight,
        weight_dtype,
    )
    return (grad_x.view(x_i8.shape) if need_input else grad_x), grad_weight


def exact_grads_small_ref(
    grad_y: Tensor,
    x_i8: Tensor,
    act_scale: Tensor,
    packed: Tensor,
    weight_scale: Tensor,
    segments: Sequence[int],
    need_input: bool,
    need_weight: bool,
    weight_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """:func:`exact_grads_small` in plain PyTorch, in float64."""
    N, K = grad_y.shape[-1], x_i8.shape[-1]
    grad = grad_y.reshape(-1, N).double()
    grad_x, grad_weight = grad_y.new_empty(0), grad_y.new_empty(0, dtype=weight_dtype)
    if need_input:
        sizes = torch.tensor(list(segments) or [N], device=grad.device)
        scale = weight_scale.reshape(-1).repeat_interleave(sizes)
        weight = prepacked_codes_ref(packed, N, K).double() * scale.double().unsqueeze(1)
        grad_x = (grad @ weight).to(grad_y.dtype).view(x_i8.shape)
    if need_weight:
        x_q = x_i8.reshape(-1, K).double() * act_scale.reshape(-1, 1).double()
        grad_weight = (grad.t() @ x_q).to(weight_dtype)
    return grad_x, grad_weight
