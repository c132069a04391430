"""The training product of a BitLinear layer, with the straight-through gradient.

Forward: quantise the activations to int8 (after an optional RMSNorm), the weights to ternary codes, and
multiply exactly in int32, so training sees the arithmetic of packed inference bit for bit. Backward: the
gradient passes unchanged through both quantisers (Bengio et al., arXiv 1308.3432; BitNet, arXiv 2310.11453,
section 2.2), both scales being constants.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitnet_ext.ops import _checks
from bitnet_ext.ops.matmul import int8xint2_mm_ref
from bitnet_ext.ops.packing import pack_ternary_ref
from bitnet_ext.ops.quantize import quantize_act_int8_ref, quantize_weight_ternary_ref
from bitnet_ext.ops.rms_norm import check_gain

_ops = torch.ops.bitnet_ext


def bit_linear(
    x: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_eps: float | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """``y = Q_int8(norm(x)) Q_ternary(weight)^T + bias`` with straight-through gradients.

    Args:
        x: [..., K] float32, bfloat16 or float16.
        weight: latent weights [N, K], same dtypes.
        bias: float32 [N] or None.
        norm_weight: float32 [K], gain of an RMSNorm before the quantiser; needs `norm_eps`.
        norm_eps: epsilon of that norm; None for no norm. With `norm_eps` alone the norm has no gain.
        out_dtype: of the result; by default the autocast dtype where autocast is on, else x's.

    Returns:
        [..., N] of `out_dtype`. Gradients reach x, weight, bias and norm_weight.
    """
    op = "bit_linear"
    _checks.tensor(op, "x", x, dtypes=_checks.FLOATS, min_dim=1)
    _checks.tensor(op, "weight", weight, dtypes=_checks.FLOATS, dim=2)
    _checks.same_device(op, "weight", weight, "x", x)
    N, K = weight.shape
    _checks.at_least_one(op, "weight", N, "out_features (N)")
    _checks.at_least_one(op, "weight", K, "in_features (K)")
    if x.shape[-1] != K:
        raise ValueError(
            f"{op}: x must have K = {K} as its last dimension (in_features of weight), got {x.shape[-1]}"
        )
    if bias is not None:
        _checks.tensor(op, "bias", bias, dtypes=(torch.float32,), dim=1)
        _checks.shape(op, "bias", bias, (N,), "out_features of weight")
        _checks.same_device(op, "bias", bias, "x", x)
    if norm_weight is not None:
        if norm_eps is None:
            raise ValueError(f"{op}: norm_weight needs norm_eps, got norm_eps=None")
        check_gain(op, "norm_weight", norm_weight, x)
    if out_dtype is None:
        device_type = x.device.type
        autocast = torch.is_autocast_enabled(device_type)
        out_dtype = torch.get_autocast_dtype(device_type) if autocast else x.dtype
    if out_dtype not in _checks.FLOATS:
        raise TypeError(f"{op}: out_dtype must be float32, bfloat16 or float16, got {out_dtype}")
    return _ops.bit_linear(
        x.contiguous(),
        weight.contiguous(),
        None if bias is None else bias.contiguous(),
        None if norm_weight is None else norm_weight.contiguous(),
        0.0 if norm_eps is None else norm_eps,
        norm_eps is not None,
        out_dtype,
    )[0]


class _StraightThrough(torch.autograd.Function):
    """Returns `quantized`; hands the gradient to `x`."""

    @staticmethod
    def forward(ctx: object, x: Tensor, quantized: Tensor) -> Tensor:
        return quantized.clone()

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def bit_linear_ref(
    x: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_eps: float | None = None,
) -> Tensor:
    """:func:`bit_linear` in plain PyTorch, in float32: the exact forward, gradients by autograd."""
    x = x.float()
    if norm_eps is not None:
        rstd = (x.double().square().mean(-1, keepdim=True) + norm_eps).rsqrt().float()
        x = x * rstd
        if norm_weight is not None:
            x = x * norm_weight
    with torch.no_grad():
        x_i8, act_scale = quantize_act_int8_ref(x)
        codes, weight_scale = quantize_weight_ternary_ref(weight)
        exact = int8xint2_mm_ref(x_i8, act_scale, pack_ternary_ref(codes), weight_scale, bias=bias)
    x_q = _StraightThrough.apply(x, x_i8.float() * act_scale.unsqueeze(-1))
    w_q = _StraightThrough.apply(weight.float(), codes.float() * weight_scale)
    # The float product carries the gradient, the integer one the value.
    return _StraightThrough.apply(torch.nn.functional.linear(x_q, w_q, bias), exact)
