"""The backward pass of a ternary product in 8 bits, both of its products on int8 tensor cores.

With y = x_q W_q^T, the gradients of the straight-through estimator are ``dL/dx_q = g W_q`` and
``dL/dW = g^T x_q``. Here g [M, N] is put into 8 bits twice, rounded up or down at random so that the mean is g
(stochastic rounding, as in Gupta et al., arXiv 1502.02551):

* by row, with weight_scale applied, for dL/dx_q: the product is then that of the forward, int8 x ternary;
* by column, with act_scale applied, for dL/dW. Tokens are sorted by their largest gradient, in powers of two,
  and the unit of a column falls from 128 tokens to the next with the tokens, so a few tokens with large
  gradients do not cost the others their precision.

The random bits are a hash of (seed, m, n): equal seeds give equal bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bitnet_ext.ops import _checks
from bitnet_ext.ops._compiler import assume_constant_result
from bitnet_ext.ops.packing import packed_width, prepacked_shape

_ops = torch.ops.bitnet_ext

#: Tokens that share a unit, and the classes of magnitude they are sorted into.
STAGE_TOKENS = 128
CLASSES = 16
#: A little below 127: what is rounded up from below it needs no clamp.
LARGEST_CODE = 126.999
_INVERSE_LARGEST_CODE = float((1 / torch.tensor(LARGEST_CODE, dtype=torch.float32)).item())
_LARGEST_PRODUCT = 128 * 127
#: Tokens whose int8 products fit int32 sums; more are done in parts.
MAX_TOKENS = 131071
_U32 = 0xFFFFFFFF


def int8_grads(
    grad_y: Tensor,
    x_i8: Tensor,
    act_scale: Tensor,
    packed: Tensor,
    weight_scale: Tensor,
    segments: Sequence[int],
    need_input: bool,
    need_weight: bool,
    weight_dtype: torch.dtype,
    *,
    seed: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Both products of the backward pass from a gradient in 8 bits.

    Args:
        grad_y: [M, N] float32, bfloat16 or float16.
        x_i8, act_scale: int8 [M, K] and float32 [M], the quantised input.
        packed, weight_scale: the stacked ternary weights [N, K]: prepacked int32 on CUDA, packed uint8 on the
            CPU; float32 scales, one for each segment.
        segments: rows of each of the stacked weights, of the sum N.
        need_input, need_weight: which of the two products to compute.
        weight_dtype: of grad_weight.
        seed: int64 of 1 element on the device of grad_y; by default drawn from torch's generator of that
            device, which ``torch.manual_seed`` sets.

    Returns:
        grad_x_q [M, K] in grad_y's dtype and grad_weight [N, K] in `weight_dtype`; None where it is not needed.
        A row of grad_y with a value that is not finite makes that row of grad_x_q NaN, and all of
        grad_weight.

    On a GPU that is not of compute capability 9.0, grad_weight is computed in grad_y's dtype instead, as
    ``backward="exact"`` does.
    """
    _check(grad_y, x_i8, act_scale, packed, weight_scale, segments)
    _checks.boolean("int8_grads", "need_input", need_input)
    _checks.boolean("int8_grads", "need_weight", need_weight)
    _checks.float_dtype("int8_grads", "weight_dtype", weight_dtype)
    if not (need_input or need_weight):
        return None, None
    if seed is None:
        seed = torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=grad_y.device)
    _checks.tensor("int8_grads", "seed", seed, dtypes=(torch.int64,))
    _checks.same_device("int8_grads", "seed", seed, "grad_y", grad_y)
    if seed.numel() != 1:
        raise ValueError(f"int8_grads: seed must have 1 element, got {seed.numel()}")
    M, N = grad_y.shape
    K = x_i8.shape[1]
    if grad_y.device.type == "meta":
        return (
            grad_y.new_empty((M, K)) if need_input else None,
            grad_y.new_empty((N, K), dtype=weight_dtype) if need_weight else None,
        )
    arguments = (packed, weight_scale, segments, need_input, need_weight, weight_dtype)
    if M == 0:
        return (
            grad_y.new_zeros((0, K)) if need_input else None,
            grad_y.new_zeros((N, K), dtype=weight_dtype) if need_weight else None,
        )
    if M > MAX_TOKENS and need_weight:
        return _in_parts(grad_y, x_i8, act_scale, *arguments, seed=seed)
    if not grad_y.is_cuda:
        return int8_grads_ref(grad_y, x_i8, act_scale, *arguments, seed=seed)
    grad_y, x_i8, act_scale = grad_y.contiguous(), x_i8.contiguous(), act_scale.contiguous()
    weight_in_8_bits = need_weight and _has_weight_grad(grad_y.device.index)
    grad_x = grad_weight = None
    if need_input or weight_in_8_bits:
        g_row, row_scale, g_column, order, stage_bound, column_max = _ops.quantize_grad(
            grad_y, act_scale, weight_scale, list(segments), seed, need_input, weight_in_8_bits
        )
        if need_input:
            transposed = _ops.transpose_prepacked(packed, N, K)
            one = torch.ones((), dtype=torch.float32, device=grad_y.device)
            grad_x = _ops.prepacked_mm(g_row, row_scale, transposed, K, one, None, [], grad_y.dtype, False)
            del transposed
        del g_row  # as large as g_column; its memory is free for the other product
        if weight_in_8_bits:
            x_column = _ops.transpose_int8(x_i8, order)
            grad_weight = _ops.int8_weight_grad(g_column, x_column, column_max, stage_bound, weight_dtype)
    if need_weight and grad_weight is None:
        x_q = _ops.dequantize_act(x_i8, act_scale, grad_y.dtype)
        grad_weight = torch.mm(grad_y.t(), x_q).to(weight_dtype)
    return grad_x, grad_weight


def int8_grads_ref(
    grad_y: Tensor,
    x_i8: Tensor,
    act_scale: Tensor,
    packed: Tensor,
    weight_scale: Tensor,
    segments: Sequence[int],
    need_input: bool,
    need_weight: bool,
    weight_dtype: torch.dtype,
    *,
    seed: Tensor,
) -> tuple[Tensor | None, Tensor | None]:
    """:func:`int8_grads` in plain PyTorch, with the same random bits; `packed` in either form."""
    N, K = grad_y.shape[1], x_i8.shape[1]
    if packed.dtype == torch.int32:
        packed = _ops.unprepack_ternary(packed, N, K)
    scales = _column_scales(weight_scale, segments)
    grad_x = grad_weight = None
    if need_input:
        codes, row_scale = quantize_grad_rows_ref(grad_y, scales, seed)
        weight = _ops.unpack_ternary(packed, K).float()
        # Sums of up to 127 N: exact in float32 below 2^24, and rounded like them above.
        grad_x = ((codes.float() @ weight) * row_scale.unsqueeze(1)).to(grad_y.dtype)
    if need_weight:
        grad_weight = _weight_grad_ref(grad_y, x_i8, act_scale, seed).to(weight_dtype)
    return grad_x, grad_weight


def quantize_grad_rows_ref(grad_y: Tensor, scales: Tensor, seed: Tensor) -> tuple[Tensor, Tensor]:
    """(int8 [M, N], float32 [M]) of grad_y times `scales` [N], rounded at random."""
    scaled = grad_y.float() * scales
    row_scale = scaled.abs().amax(1) * _INVERSE_LARGEST_CODE
    row_scale = torch.where(row_scale.isfinite(), row_scale, torch.nan)
    uniform = (random_words(seed, *grad_y.shape) >> 16).double() / 65536
    return _round_at_random(scaled, _inverse(row_scale).unsqueeze(1), uniform), row_scale


def order_tokens_ref(token_max: Tensor) -> tuple[Tensor, Tensor]:
    """From each token's largest magnitude [M]: the tokens in order of falling class, -1 up to a multiple of 128,
    and the bound of every 128 of them."""
    M = token_max.numel()
    exponents = token_max.float().view(torch.int32) >> 23
    largest = int(exponents.max())
    classes = (largest - exponents).clamp(max=CLASSES - 1)
    order = torch.argsort(classes, stable=True)
    stages = -(-M // STAGE_TOKENS)
    top = 2.0 ** (largest - 126) if largest < 255 else float("nan")
    bounds = []
    shift, total = 0, 0.0
    for stage in range(stages):
        first = stage * STAGE_TOKENS
        left = _LARGEST_PRODUCT * float(stages * STAGE_TOKENS - first)
        while shift < int(classes[order[first]]) and 2 * total + left < 2147000000.0:
            shift += 1
            total *= 2
        bounds.append(top * 2.0**-shift)
        total += _LARGEST_PRODUCT * STAGE_TOKENS
    order = torch.nn.functional.pad(order, (0, stages * STAGE_TOKENS - M), value=-1)
    return order, torch.tensor(bounds, dtype=torch.float32, device=token_max.device)


def quantize_grad_columns_ref(
    grad_y: Tensor, act_scale: Tensor, seed: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(int8 [M, N] in the order of tokens, order, stage_bound, column_max) of grad_y times act_scale."""
    scaled = grad_y.float() * act_scale.unsqueeze(1)
    order, stage_bound = order_tokens_ref(scaled.abs().amax(1))
    column_max = scaled.abs().amax(0)
    units = column_units(stage_bound, column_max)
    places = order[order >= 0]
    uniform = (random_words(seed, *grad_y.shape) & 0xFFFF).double() / 65536
    per_token = units.repeat_interleave(STAGE_TOKENS, 0)[: places.numel()]
    codes = _round_at_random(scaled[places], _inverse(per_token), uniform[places])
    return codes, order, stage_bound, column_max


def column_units(stage_bound: Tensor, column_max: Tensor) -> Tensor:
    """[stages, N]: what a code of 1 stands for."""
    bound = stage_bound.unsqueeze(1)
    return torch.where(column_max <= bound, column_max, bound) * _INVERSE_LARGEST_CODE


def random_words(seed: Tensor, M: int, N: int) -> Tensor:
    """int64 [M, N] of 32 random bits: a hash of the seed, the row and the column."""
    x = seed.reshape(()) + (torch.arange(M, device=seed.device) + 1) * _signed(0x9E3779B97F4A7C15)
    x = (x ^ _shifted(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted(x, 27)) * _signed(0x94D049BB133111EB)
    key = (x ^ _shifted(x, 31)).unsqueeze(1)
    n = torch.arange(N, device=seed.device)
    word = (n * 0x9E3779B1 + (key & _U32)) & _U32
    word = word ^ word >> 15
    word = (word * 0x85EBCA6B + (_shifted(key, 32))) & _U32
    word = word ^ word >> 13
    word = (word * 0xC2B2AE35) & _U32
    return word ^ word >> 16


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Shifted to the right as an unsigned number."""
    return x >> bits & ((1 << (64 - bits)) - 1)


def _inverse(scale: Tensor) -> Tensor:
    return torch.where(scale > 1e-36, 1 / scale, torch.zeros_like(scale))


def _round_at_random(values: Tensor, factor: Tensor, uniform: Tensor) -> Tensor:
    moved = (values.double() * factor.double() + (1 + uniform)).float()
    return (moved.nan_to_num(0.0, 0.0, 0.0).floor() - 1).to(torch.int8)


def _column_scales(weight_scale: Tensor, segments: Sequence[int]) -> Tensor:
    sizes = torch.tensor(list(segments), device=weight_scale.device)
    return weight_scale.reshape(-1).repeat_interleave(sizes)


def _weight_grad_ref(grad_y: Tensor, x_i8: Tensor, act_scale: Tensor, seed: Tensor) -> Tensor:
    codes, order, stage_bound, column_max = quantize_grad_columns_ref(grad_y, act_scale, seed)
    units = column_units(stage_bound, column_max)
    x = x_i8[order[order >= 0]].float()
    out = torch.zeros(codes.shape[1], x.shape[1], dtype=torch.float32, device=x.device)
    starts = [0, *(s for s in range(1, len(units)) if float(stage_bound[s]) != float(stage_bound[s - 1]))]
    for first, last in zip(starts, [*starts[1:], len(units)], strict=True):
        part = slice(first * STAGE_TOKENS, last * STAGE_TOKENS)
        out += units[first].unsqueeze(1) * (codes[part].float().t() @ x[part])
    return out


def _in_parts(
    grad_y: Tensor,
    x_i8: Tensor,
    act_scale: Tensor,
    packed: Tensor,
    weight_scale: Tensor,
    segments: Sequence[int],
    need_input: bool,
    need_weight: bool,
    weight_dtype: torch.dtype,
    *,
    seed: Tensor,
) -> tuple[Tensor | None, Tensor | None]:
    """For more tokens than int32 sums hold: parts with seeds of their own, grad_weight summed in float32."""
    inputs, total = [], None
    for i, first in enumerate(range(0, grad_y.shape[0], MAX_TOKENS)):
        part = slice(first, first + MAX_TOKENS)
        grad_x, grad_weight = int8_grads(
            grad_y[part], x_i8[part], act_scale[part], packed, weight_scale, segments,
            need_input, need_weight, torch.float32, seed=seed + i * _signed(0xD1B54A32D192ED03),
        )  # fmt: skip
        inputs.append(grad_x)
        total = grad_weight if total is None or grad_weight is None else total + grad_weight
    joined = torch.cat([grad_x for grad_x in inputs if grad_x is not None]) if need_input else None
    return joined, None if total is None else total.to(weight_dtype)


@assume_constant_result
def _has_weight_grad(device: int) -> bool:
    """Whether the device and this build have the product over tokens."""
    from bitnet_ext import build_info

    archs = str(build_info().get("cuda_archs", ""))
    return torch.cuda.get_device_capability(device) == (9, 0) and "90a" in archs


def _check(
    grad_y: Tensor,
    x_i8: Tensor,
    act_scale: Tensor,
    packed: Tensor,
    weight_scale: Tensor,
    segments: Sequence[int],
) -> None:
    op = "int8_grads"
    _checks.tensor(op, "grad_y", grad_y, dtypes=_checks.FLOATS, dim=2)
    _checks.tensor(op, "x_i8", x_i8, dtypes=(torch.int8,), dim=2)
    _checks.tensor(op, "act_scale", act_scale, dtypes=(torch.float32,), dim=1)
    _checks.shape(op, "act_scale", act_scale, (grad_y.shape[0],), "one a row of grad_y")
    if x_i8.shape[0] != grad_y.shape[0]:
        raise ValueError(f"{op}: x_i8 must have the {grad_y.shape[0]} rows of grad_y, got {x_i8.shape[0]}")
    N, K = grad_y.shape[1], x_i8.shape[1]
    _checks.tensor(op, "packed", packed, dtypes=(torch.uint8, torch.int32))
    is_packed = packed.dtype == torch.uint8
    shape = (N, packed_width(K)) if is_packed else prepacked_shape(N, K)
    _checks.shape(op, "packed", packed, shape, f"N = {N}, K = {K}")
    _checks.tensor(op, "weight_scale", weight_scale, dtypes=(torch.float32,))
    count = max(1, len(_checks.sizes(op, "segments", segments)))
    if weight_scale.numel() != count:
        raise ValueError(f"{op}: weight_scale must have {count} elements, got {weight_scale.numel()}")
    for name, value in (
        ("x_i8", x_i8),
        ("act_scale", act_scale),
        ("packed", packed),
        ("weight_scale", weight_scale),
    ):
        _checks.same_device(op, name, value, "grad_y", grad_y)
    if sum(segments) != grad_y.shape[1]:
        raise ValueError(
            f"{op}: segments must sum to the {grad_y.shape[1]} columns of grad_y, got {list(segments)}"
        )
