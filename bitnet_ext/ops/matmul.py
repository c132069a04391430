"""Products of int8 activations with packed ternary weights, exact in int32."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bitnet_ext.ops import _checks
from bitnet_ext.ops.packing import packed_width, prepacked_codes_ref, prepacked_shape, unpack_ternary_ref

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
    out_features: int | None = None,
    out_dtype: torch.dtype = torch.float32,
    weight_is_constant: bool = False,
) -> Tensor:
    """``y[m, n] = (sum_k x_i8[m, k] codes[n, k]) * x_scale[m] * weight_scale[n] + bias[n]``.

    The sum is exact in int32 (K up to 4,194,304 on the CPU and 262,143 on CUDA); the scales and the bias are
    applied in float32, in this order, and the result is cast once.

    Args:
        x_i8: int8 [..., K], as from :func:`quantize_act_int8`.
        x_scale: float32 [...], one a token; None only for ``out_dtype=torch.int32``.
        weight: uint8 [N, ceil(K / 4)], as from :func:`pack_ternary`; or, on CUDA, the prepacked int32
            [ceil(N / 16), ceil(K / 128), 32, 4] of :func:`prepack_ternary`, which spares the repacking that
            each call with a packed weight does there.
        weight_scale: float32, of 1 element (per tensor), N elements (per row), or one for each of
            `segments`; None only for ``out_dtype=torch.int32``.
        bias: float32 [N] or None.
        segments: rows of each segment of a fused weight, adding up to N (at most 16 segments).
        out_features: N. Needed with a prepacked weight, whose last rows may be padding.
        out_dtype: float32, bfloat16, float16, or int32 for the bare accumulators.
        weight_is_constant: a promise that the kernel just before this call on the stream does not write the
            weight, so that reading it may start before that kernel ends (CUDA, prepacked weights).

    Returns:
        [..., N] of `out_dtype`. M = 0 gives an empty result.
    """
    op = "int8xint2_mm"
    _checks.tensor(op, "x_i8", x_i8, dtypes=(torch.int8,), min_dim=1)
    _checks.tensor(op, "weight", weight, dtypes=(torch.uint8, torch.int32))
    _checks.same_device(op, "weight", weight, "x_i8", x_i8)
    K = x_i8.shape[-1]
    _checks.at_least_one(op, "x_i8", K, "a last dimension (K)")
    N = _check_weight(op, weight, out_features, K)
    prepacked = weight.dtype == torch.int32
    if not _checks.product_operands(op, x_i8, x_scale, weight_scale, bias, out_dtype, N):
        if prepacked:
            return _ops.prepacked_mm_int32(x_i8.contiguous(), weight.contiguous(), N)
        return _ops.int8xint2_mm_int32(x_i8.contiguous(), weight.contiguous())
    assert x_scale is not None and weight_scale is not None
    sizes = _check_segments(op, weight_scale, segments, N)
    bias = None if bias is None else bias.contiguous()
    x_i8, x_scale = x_i8.contiguous(), x_scale.contiguous()
    weight_scale = weight_scale.contiguous()
    if not prepacked:
        return _ops.int8xint2_mm(x_i8, x_scale, weight.contiguous(), weight_scale, bias, sizes, out_dtype)
    # A copy made here would be written by the kernel just before the product.
    constant = weight_is_constant and weight.is_contiguous()
    return _ops.prepacked_mm(
        x_i8, x_scale, weight.contiguous(), N, weight_scale, bias, sizes, out_dtype, constant
    )


def int8xint2_mm_ref(
    x_i8: Tensor,
    x_scale: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    segments: Sequence[int] | None = None,
    out_features: int | None = None,
    out_dtype: torch.dtype = torch.float32,
    weight_is_constant: bool = False,
) -> Tensor:
    """:func:`int8xint2_mm` in plain PyTorch: the sum in float64, where it is exact. Takes both forms of the weight
    on every device.
    """
    if weight.dtype == torch.int32:
        assert out_features is not None
        codes = prepacked_codes_ref(weight, out_features, x_i8.shape[-1])
    else:
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


def _check_weight(op: str, weight: Tensor, out_features: int | None, K: int) -> int:
    """N, after the checks of the weight in either form."""
    if weight.dtype == torch.int32:
        if weight.device.type == "cpu":
            raise ValueError(
                f"{op}: weight must be packed uint8 [N, ceil(K / 4)] on the CPU, got the prepacked int32 form, "
                "which is for CUDA"
            )
        if out_features is None:
            raise ValueError(
                f"{op}: out_features (N) is needed with a prepacked int32 weight, whose rows are padded to a "
                "multiple of 16, got None"
            )
        _checks.at_least_one(op, "out_features", out_features, "a value")
        expected = prepacked_shape(out_features, K)
        _checks.shape(op, "weight", weight, expected, f"prepacked, for N = {out_features} and K = {K}")
        return out_features
    _checks.tensor(op, "weight", weight, dtypes=(torch.uint8,), dim=2)
    _checks.at_least_one(op, "weight", weight.shape[0], "rows (N)")
    if weight.shape[1] != packed_width(K):
        raise ValueError(
            f"{op}: weight must have ceil(K / 4) = {packed_width(K)} columns for x_i8 with K = {K}, "
            f"got {weight.shape[1]}"
        )
    if out_features not in (None, weight.shape[0]):
        raise ValueError(
            f"{op}: out_features must be None or the {weight.shape[0]} rows of weight, got {out_features}"
        )
    return weight.shape[0]


def _check_segments(op: str, weight_scale: Tensor, segments: Sequence[int] | None, N: int) -> list[int]:
    sizes = [] if segments is None else _checks.sizes(op, "segments", segments)
    if not sizes:
        if weight_scale.numel() not in (1, N):
            raise ValueError(
                f"{op}: weight_scale must have 1 or N = {N} elements without segments, got {weight_scale.numel()}"
            )
        return []
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
