"""Products of int8 activations with packed ternary weights, exact in int32."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bitnet_ext.ops import _checks
from bitnet_ext.ops.packing import packed_width, unpack_ternary_ref

_ops = torch.ops.bitnet_ext

#: Most segments of a fused weight (qkv has three, gate + up two).
MAX_SEGMENTS = 16


def int8xint2_mm(
    x_i8: Tensor,
    x_scale: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    segments: Sequence[int] | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """``y[m, n] = (sum_k x_i8[m, k] codes[n, k]) * x_scale[m] * weight_scale[n] + bias[n]``.

    The sum is exact in int32 (K up to 4,194,304); the scales and the bias are applied in float32, in this
    order, and the result is cast once.

    Args:
        x_i8: int8 [..., K], as from :func:`quantize_act_int8`.
        x_scale: float32 [...], one a token; None only for ``out_dtype=torch.int32``.
        weight: uint8 [N, ceil(K / 4)], as from :func:`pack_ternary`.
        weight_scale: float32, of 1 element (per tensor), N elements (per row), or one for each of
            `segments`; None only for ``out_dtype=torch.int32``.
        bias: float32 [N] or None.
        segments: rows of each segment of a fused weight, adding up to N (at most 16 segments).
        out_dtype: float32, bfloat16, float16, or int32 for the bare accumulators.

    Returns:
        [..., N] of `out_dtype`. M = 0 gives an empty result.
    """
    op = "int8xint2_mm"
    _checks.tensor(op, "x_i8", x_i8, dtypes=(torch.int8,), min_dim=1)
    _checks.tensor(op, "weight", weight, dtypes=(torch.uint8,), dim=2)
    _checks.same_device(op, "weight", weight, "x_i8", x_i8)
    K, N = x_i8.shape[-1], weight.shape[0]
    _checks.at_least_one(op, "x_i8", K, "a last dimension (K)")
    _checks.at_least_one(op, "weight", N, "rows (N)")
    if weight.shape[1] != packed_width(K):
        raise ValueError(
            f"{op}: weight must have ceil(K / 4) = {packed_width(K)} columns for x_i8 with K = {K}, "
            f"got {weight.shape[1]}"
        )
    if out_dtype == torch.int32:
        if bias is not None or x_scale is not None or weight_scale is not None:
            raise ValueError(f"{op}: out_dtype=int32 returns the bare sums; scales and bias must be None")
        return _ops.int8xint2_mm_int32(x_i8.contiguous(), weight.contiguous())
    if out_dtype not in _checks.FLOATS:
        raise TypeError(f"{op}: out_dtype must be float32, bfloat16, float16 or int32, got {out_dtype}")
    if x_scale is None or weight_scale is None:
        raise ValueError(f"{op}: x_scale and weight_scale are needed unless out_dtype is int32")
    _checks.tensor(op, "x_scale", x_scale, dtypes=(torch.float32,))
    _checks.shape(op, "x_scale", x_scale, x_i8.shape[:-1], "one scale a token of x_i8")
    _checks.tensor(op, "weight_scale", weight_scale, dtypes=(torch.float32,))
    sizes = _check_segments(op, weight_scale, segments, N)
    _checks.same_device(op, "x_scale", x_scale, "x_i8", x_i8)
    _checks.same_device(op, "weight_scale", weight_scale, "x_i8", x_i8)
    if bias is not None:
        _checks.tensor(op, "bias", bias, dtypes=(torch.float32,), dim=1)
        _checks.shape(op, "bias", bias, (N,), "one a row of weight")
        _checks.same_device(op, "bias", bias, "x_i8", x_i8)
    return _ops.int8xint2_mm(
        x_i8.contiguous(),
        x_scale.contiguous(),
        weight.contiguous(),
        weight_scale.contiguous(),
        None if bias is None else bias.contiguous(),
        sizes,
        out_dtype,
    )


def int8xint2_mm_ref(
    x_i8: Tensor,
    x_scale: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    segments: Sequence[int] | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """:func:`int8xint2_mm` in plain PyTorch: the sum in float64, where it is exact."""
    codes = unpack_ternary_ref(weight, x_i8.shape[-1])
    sums = (x_i8.double() @ codes.double().t()).to(torch.int32)
    if out_dtype == torch.int32:
        return sums
    assert x_scale is not None and weight_scale is not None
    row_scale = weight_scale.reshape(-1)
    if segments:
        counts = torch.tensor(list(segments), device=weight.device)
        row_scale = row_scale.repeat_interleave(counts)
    y = sums.float() * x_scale.unsqueeze(-1) * row_scale
    if bias is not None:
        y = y + bias
    return y.to(out_dtype)


def _check_segments(op: str, weight_scale: Tensor, segments: Sequence[int] | None, N: int) -> list[int]:
    if not segments:
        if weight_scale.numel() not in (1, N):
            raise ValueError(
                f"{op}: weight_scale must have 1 or N = {N} elements without segments, got {weight_scale.numel()}"
            )
        return []
    sizes = [int(size) for size in segments]
    if len(sizes) > MAX_SEGMENTS or min(sizes) < 1 or sum(sizes) != N:
        raise ValueError(
            f"{op}: segments must be 1 to {MAX_SEGMENTS} sizes >= 1 that add up to N = {N}, got {sizes}"
        )
    if weight_scale.numel() != len(sizes):
        raise ValueError(
            f"{op}: weight_scale must have one element for each of the {len(sizes)} segments, "
            f"got {weight_scale.numel()}"
        )
    return sizes
