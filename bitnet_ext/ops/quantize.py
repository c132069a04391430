"""Absmean ternary quantisation of weights and per-token absmax int8 quantisation of activations.

Source: "The Era of 1-bit LLMs: All Large Language Models are in 1.58 Bits" (arXiv 2402.17764), equations
1-3, and the authors' "Training Tips, Code and FAQ" for the clamps. Rounding is half to even.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitnet_ext.ops import _checks
from bitnet_ext.ops.packing import pack_ternary_ref

_ops = torch.ops.bitnet_ext

#: Lower bound of absmean and absmax, so that an all-zero tensor has a finite inverse (b1.58 FAQ).
SCALE_FLOOR = 1e-5


def quantize_act_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantises each token to int8 by its largest magnitude: ``x ~ x_i8 * act_scale``.

    ``a = max(max_k |x|, 1e-5)``, ``x_i8 = clamp(round(x * (127 / a)), -128, 127)``, ``act_scale = a / 127``.

    Args:
        x: [..., K] float32, bfloat16 or float16; any leading dimensions, K >= 1.

    Returns:
        x_i8 int8 [..., K] and act_scale float32 [...].

    Raises:
        RuntimeError: on the CPU, when x holds NaN or Inf. On CUDA, where a check would stall the stream,
            act_scale of such a token is NaN, and so is all that is computed with it.
    """
    _checks.tensor("quantize_act_int8", "x", x, dtypes=_checks.FLOATS, min_dim=1)
    _checks.at_least_one("quantize_act_int8", "x", x.shape[-1], "a last dimension (K)")
    return _ops.quantize_act_int8(x.contiguous())


def quantize_act_int8_ref(x: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`quantize_act_int8` in plain PyTorch."""
    x = x.float()
    absmax = x.abs().amax(-1).clamp(min=SCALE_FLOOR)
    # Tensor by tensor: PyTorch may turn a division with a number into a product with a reciprocal, rounding twice.
    steps = torch.full_like(absmax, 127.0)
    inverse = steps / absmax
    x_i8 = (x * inverse.unsqueeze(-1)).round().clamp(-128, 127).to(torch.int8)
    return x_i8, absmax / steps


def quantize_weight_ternary(w: Tensor) -> tuple[Tensor, Tensor]:
    """Quantises a matrix to {-1, 0, 1} by its mean magnitude: ``w ~ codes * weight_scale``.

    ``weight_scale = max(mean |w|, 1e-5)``, the mean taken in float64 and rounded once;
    ``codes = clamp(round(w / weight_scale), -1, 1)``.

    Args:
        w: [N, K] float32, bfloat16 or float16, N and K >= 1.

    Returns:
        codes int8 [N, K] and weight_scale float32 [].

    Raises:
        RuntimeError: on the CPU, when w holds NaN or Inf. On CUDA weight_scale is NaN then.
    """
    _check_weight("quantize_weight_ternary", w)
    return _ops.quantize_weight_ternary(w.contiguous())


def quantize_weight_ternary_ref(w: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`quantize_weight_ternary` in plain PyTorch."""
    scale = w.double().abs().mean().float().clamp(min=SCALE_FLOOR)
    return (w.float() / scale).round().clamp(-1, 1).to(torch.int8), scale


def quantize_pack_weight(w: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`quantize_weight_ternary` and ``pack_ternary`` in one pass over w.

    Returns:
        packed uint8 [N, ceil(K / 4)] and weight_scale float32 [].
    """
    _check_weight("quantize_pack_weight", w)
    return _ops.quantize_pack_weight(w.contiguous())


def quantize_pack_weight_ref(w: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`quantize_pack_weight` in plain PyTorch."""
    codes, scale = quantize_weight_ternary_ref(w)
    return pack_ternary_ref(codes), scale


def dequantize_act(x_i8: Tensor, act_scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """``x_i8 * act_scale`` in float32, then cast to `dtype`: [..., K] from int8 [..., K] and float32 [...]."""
    op = "dequantize_act"
    _checks.tensor(op, "x_i8", x_i8, dtypes=(torch.int8,), min_dim=1)
    _checks.tensor(op, "act_scale", act_scale, dtypes=(torch.float32,))
    _checks.shape(op, "act_scale", act_scale, x_i8.shape[:-1], "the leading dimensions of x_i8")
    _checks.same_device(op, "act_scale", act_scale, "x_i8", x_i8)
    _checks.float_dtype(op, "dtype", dtype)
    return _ops.dequantize_act(x_i8.contiguous(), act_scale.contiguous(), dtype)


def dequantize_act_ref(x_i8: Tensor, act_scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """:func:`dequantize_act` in plain PyTorch."""
    return (x_i8.float() * act_scale.unsqueeze(-1)).to(dtype)


def _check_weight(op: str, w: Tensor) -> None:
    _checks.tensor(op, "w", w, dtypes=_checks.FLOATS, dim=2)
    _checks.at_least_one(op, "w", w.shape[0], "out_features (N)")
    _checks.at_least_one(op, "w", w.shape[1], "in_features (K)")
