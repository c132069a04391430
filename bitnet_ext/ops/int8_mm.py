"""Products of int8 activations with int8 weights (W8A8), exact in int32: the output head at half its bytes.

A ternary model keeps its head in full precision, where it soon makes up most of the bytes a step reads. One
int8 code a weight with a scale a row costs about as much accuracy as the activations' own int8.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from bitnet_ext.ops import _checks
from bitnet_ext.ops._compiler import assume_constant_result
from bitnet_ext.ops.packing import prepacked_shape
from bitnet_ext.ops.quantize import quantize_act_int8_ref

_ops = torch.ops.bitnet_ext

#: Largest K whose sums fit int32 whatever the codes: 128 * 128 * K < 2^31.
MAX_INT8_K = 131_071

#: Most weights that the CPU product widens to float64 at a time (32 MiB).
_SLAB_WEIGHTS = 4 << 20


def quantize_rows_int8(w: Tensor) -> tuple[Tensor, Tensor]:
    """Quantises each row of a matrix to int8 by its largest magnitude: ``w ~ codes * scale[:, None]``.

    ``a = max(max_k |w|, 1e-5)``, ``codes = clamp(round(w * (127 / a)), -128, 127)``, ``scale = a / 127``: the
    arithmetic of :func:`bitnet_ext.ops.quantize_act_int8`.

    Args:
        w: [N, K] float32, bfloat16 or float16, N and K >= 1.

    Returns:
        codes int8 [N, K] and scale float32 [N].

    Raises:
        RuntimeError: on the CPU, when w holds NaN or Inf. On CUDA the scale of such a row is NaN.
    """
    op = "quantize_rows_int8"
    _checks.tensor(op, "w", w, dtypes=_checks.FLOATS, dim=2)
    _checks.at_least_one(op, "w", w.shape[0], "out_features (N)")
    _checks.at_least_one(op, "w", w.shape[1], "in_features (K)")
    return _ops.quantize_act_int8(w.contiguous())


def quantize_rows_int8_ref(w: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`quantize_rows_int8` in plain PyTorch."""
    return quantize_act_int8_ref(w)


def unprepack_int8(prepacked: Tensor, N: int, K: int) -> Tensor:
    """Codes int8 [N, K] from their prepacked form: the inverse of :func:`bitnet_ext.ops.prepack_int8`, anywhere."""
    op = "unprepack_int8"
    _checks.at_least_one(op, "N", N, "out_features")
    _checks.at_least_one(op, "K", K, "in_features")
    _check_prepacked(op, "prepacked", prepacked, N, K)
    return unprepacked_int8(prepacked, N, K)


def unprepacked_int8(prepacked: Tensor, N: int, K: int) -> Tensor:
    """:func:`unprepack_int8` without the checks, which a compiled backward pass cannot trace."""
    rows, cols = prepacked.shape[:2]
    ordered = prepacked.contiguous().view(torch.int8).reshape(rows, cols, 4, 8, 4, 2, 2, 4)
    padded = ordered.permute(0, 6, 3, 1, 2, 5, 4, 7).reshape(rows * 16, cols * 128)
    return padded[:N, :K].contiguous()


def int8_mm(
    x_i8: Tensor,
    x_scale: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    out_features: int | None = None,
    out_dtype: torch.dtype = torch.float32,
    weight_is_constant: bool = False,
) -> Tensor:
    """``y[m, n] = (sum_k x_i8[m, k] weight[n, k]) * x_scale[m] * weight_scale[n] + bias[n]``.

    The sum is exact in int32 (K up to 131,071); the scales and the bias are applied in float32, in this order,
    each step rounded, and the result is cast once.

    Args:
        x_i8: int8 [..., K], as from :func:`bitnet_ext.ops.quantize_act_int8`.
        x_scale: float32 [...], one a token; None only for ``out_dtype=torch.int32``.
        weight: int8 [N, K], as from :func:`quantize_rows_int8`; or, on CUDA, their prepacked form int32
            [ceil(N / 16), ceil(K / 128), 4, 32, 4], which spares the repacking in each call.
        weight_scale: float32, of 1 element (per tensor) or N elements (per row); None only for
            ``out_dtype=torch.int32``.
        bias: float32 [N] or None.
        out_features: N. Needed with a prepacked weight, whose last rows may be padding.
        out_dtype: float32, bfloat16, float16, or int32 for the bare accumulators.
        weight_is_constant: the kernel before this one in the stream does not write the weight, so that this
            one may read it before that one ends (CUDA, prepacked weights).

    Returns:
        [..., N] of `out_dtype`. M = 0 gives an empty result.
    """
    op = "int8_mm"
    _checks.tensor(op, "x_i8", x_i8, dtypes=(torch.int8,), min_dim=1)
    _checks.tensor(op, "weight", weight, dtypes=(torch.int8, torch.int32))
    _checks.same_device(op, "weight", weight, "x_i8", x_i8)
    K = x_i8.shape[-1]
    _checks.at_least_one(op, "x_i8", K, "a last dimension (K)")
    if K > MAX_INT8_K:
        raise ValueError(f"{op}: x_i8 must have K <= {MAX_INT8_K}, so that no sum leaves int32, got {K}")
    N = _check_weight(op, weight, out_features, K)
    if not _checks.product_operands(op, x_i8, x_scale, weight_scale, bias, out_dtype, N):
        if x_i8.is_cuda:
            return _ops.prepacked_mm_int32(x_i8.contiguous(), _prepacked(weight), N)
        return _sums_on_cpu(x_i8, weight)
    assert x_scale is not None and weight_scale is not None
    if weight_scale.numel() not in (1, N):
        raise ValueError(f"{op}: weight_scale must have 1 or N = {N} elements, got {weight_scale.numel()}")
    if not x_i8.is_cuda:
        return _scale(_sums_on_cpu(x_i8, weight), x_scale, weight_scale, bias, out_dtype)
    return _ops.prepacked_mm(
        x_i8.contiguous(),
        x_scale.contiguous(),
        _prepacked(weight),
        N,
        weight_scale.contiguous(),
        None if bias is None else bias.contiguous(),
        [],
        out_dtype,
        # The kernel before a weight that is prepacked here is the one that writes it.
        weight_is_constant and weight.dtype == torch.int32,
    )


def int8_mm_ref(
    x_i8: Tensor,
    x_scale: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    out_features: int | None = None,
    out_dtype: torch.dtype = torch.float32,
    weight_is_constant: bool = False,
) -> Tensor:
    """:func:`int8_mm` in plain PyTorch: the sum in float64, where it is exact."""
    if weight.dtype == torch.int32:
        assert out_features is not None
        weight = unprepack_int8(weight, out_features, x_i8.shape[-1])
    sums = (x_i8.double() @ weight.double().t()).to(torch.int32)
    if out_dtype == torch.int32:
        return sums
    assert x_scale is not None and weight_scale is not None
    return _scale(sums, x_scale, weight_scale, bias, out_dtype)


def _scale(
    sums: Tensor, x_scale: Tensor, weight_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    y = sums.float() * x_scale.unsqueeze(-1) * weight_scale.reshape(-1)
    return (y if bias is None else y + bias).to(out_dtype)


def _prepacked(weight: Tensor) -> Tensor:
    return (weight if weight.dtype == torch.int32 else _ops.prepack_int8(weight.contiguous())).contiguous()


# --- the exact sums on a CPU --------------------------------------------------------------------------------


def _sums_on_cpu(x_i8: Tensor, codes: Tensor) -> Tensor:
    """Exact int32 sums [..., N]."""
    K, N = x_i8.shape[-1], codes.shape[0]
    x = x_i8.reshape(-1, K).contiguous()
    # torch._int_mm mistakes the strides of a weight of one column.
    if K > 1 and x.shape[0] > 0 and _int_mm_is_exact():
        sums = torch._int_mm(x, codes.contiguous().t())
    else:
        wide = x.double()
        slabs = codes.split(max(1, _SLAB_WEIGHTS // K))
        sums = torch.cat([(wide @ slab.double().t()).to(torch.int32) for slab in slabs], dim=1)
    return sums.reshape(*x_i8.shape[:-1], N)


@assume_constant_result
def _int_mm_is_exact() -> bool:
    return _probe_int_mm()


@functools.cache
def _probe_int_mm() -> bool:
    """Whether torch._int_mm sums exactly on this CPU. Without VNNI it adds pairs of products in saturating int16."""
    with _disable_current_modes():  # a FLOP counter does not count the probe
        return _int_mm_sums_exactly()


def _int_mm_sums_exactly() -> bool:
    for M, N, K in ((1, 40, 300), (40, 33, 300), (5, 17, 64)):
        for value in (127, -128):
            x = torch.full((M, K), value, dtype=torch.int8, device="cpu")
            weight = torch.full((N, K), value, dtype=torch.int8, device="cpu")
            try:
                sums = torch._int_mm(x, weight.t())
            except RuntimeError:
                return False
            if bool((sums != value * value * K).any()):
                return False
    return True


# --- argument checks ----------------------------------------------------------------------------------------


def _check_weight(op: str, weight: Tensor, out_features: int | None, K: int) -> int:
    """N, after the checks of the weight in either form."""
    if weight.dtype == torch.int32:
        if not weight.is_cuda:
            raise ValueError(
                f"{op}: weight must be int8 [N, K] on the CPU, got the prepacked int32 form, which is for CUDA"
            )
        if out_features is None:
            raise ValueError(f"{op}: out_features (N) is needed with a prepacked int32 weight")
        _checks.at_least_one(op, "out_features", out_features, "a value")
        _check_prepacked(op, "weight", weight, out_features, K)
        return out_features
    if weight.dim() != 2 or weight.shape[1] != K:
        raise ValueError(
            f"{op}: weight must be int8 [N, K] with K = {K} like x_i8, got shape {tuple(weight.shape)}"
        )
    _checks.at_least_one(op, "weight", weight.shape[0], "rows (N)")
    if out_features not in (None, weight.shape[0]):
        raise ValueError(
            f"{op}: out_features must be None or the {weight.shape[0]} rows of weight, got {out_features}"
        )
    return weight.shape[0]


def _check_prepacked(op: str, name: str, prepacked: Tensor, N: int, K: int) -> None:
    _checks.tensor(op, name, prepacked, dtypes=(torch.int32,))
    expected = (*prepacked_shape(N, K)[:2], 4, 32, 4)
    _checks.shape(op, name, prepacked, expected, f"int8 weights prepacked, for N = {N} and K = {K}")
