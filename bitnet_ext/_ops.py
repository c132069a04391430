"""Fake kernels (shapes for tracing) of the operators declared in csrc/ops.cpp; their registration."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bitnet_ext import _autograd, _differentiation, _flops
from bitnet_ext.ops import loss


def _packed_width(K: int) -> int:
    return (K + 3) // 4


# --- fake kernels: the shape, dtype and (contiguous) strides of every result --------------------------------


def _quantize_act_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[:-1], dtype=torch.float32)


def _rms_norm_quantize(x: Tensor, gain: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    x_i8, act_scale = _quantize_act_int8(x)
    return x_i8, act_scale, torch.empty_like(act_scale)


def _add_rms_norm_quantize(
    x: Tensor, residual: Tensor, gain: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    x_i8, act_scale = _quantize_act_int8(x)
    return x_i8, act_scale, x.new_empty(x.shape)


def _glu_quantize(
    gate: Tensor, up: Tensor, activation: str, gain: Tensor | None, eps: float, normalize: bool
) -> tuple[Tensor, Tensor]:
    return _quantize_act_int8(gate)


def _quantize_weight_ternary(weight: Tensor) -> tuple[Tensor, Tensor]:
    return weight.new_empty(weight.shape, dtype=torch.int8), weight.new_empty((), dtype=torch.float32)


def _quantize_pack_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    N, K = weight.shape
    packed = weight.new_empty((N, _packed_width(K)), dtype=torch.uint8)
    return packed, weight.new_empty((), dtype=torch.float32)


def _quantize_weights(weights: list[Tensor]) -> tuple[Tensor, Tensor]:
    N, K = sum(w.shape[0] for w in weights), weights[0].shape[1]
    if weights[0].device.type == "cuda":
        packed = _prepacked(weights[0], N, K)
    else:
        packed = weights[0].new_empty((N, _packed_width(K)), dtype=torch.uint8)
    return packed, weights[0].new_empty((len(weights),), dtype=torch.float32)


def _quantize_weight_groups_(
    weights: list[Tensor],
    group_sizes: list[int],
    packed: list[Tensor],
    weight_scale: list[Tensor],
    abs_sums: Tensor | None,
) -> None:
    return None


def _pack_ternary(codes: Tensor) -> Tensor:
    N, K = codes.shape
    return codes.new_empty((N, _packed_width(K)), dtype=torch.uint8)


def _unpack_ternary(packed: Tensor, K: int) -> Tensor:
    return packed.new_empty((packed.shape[0], K), dtype=torch.int8)


def _prepacked(like: Tensor, N: int, K: int) -> Tensor:
    return like.new_empty(((N + 15) // 16, (K + 127) // 128, 32, 4), dtype=torch.int32)


def _prepack_ternary(packed: Tensor, K: int) -> Tensor:
    return _prepacked(packed, packed.shape[0], K)


def _unprepack_ternary(prepacked: Tensor, N: int, K: int) -> Tensor:
    return prepacked.new_empty((N, _packed_width(K)), dtype=torch.uint8)


def _prepack_int8(codes: Tensor) -> Tensor:
    N, K = codes.shape
    return codes.new_empty(((N + 15) // 16, (K + 127) // 128, 4, 32, 4), dtype=torch.int32)


def _dequantize_prepacked(
    prepacked: Tensor, weight_scale: Tensor, N: int, K: int, dtype: torch.dtype
) -> Tensor:
    return prepacked.new_empty((N, K), dtype=dtype)


def _dequantize_ternary(packed: Tensor, weight_scale: Tensor, K: int, dtype: torch.dtype) -> Tensor:
    return packed.new_empty((packed.shape[0], K), dtype=dtype)


def _dequantize_act(x_i8: Tensor, act_scale: Tensor, dtype: torch.dtype) -> Tensor:
    return x_i8.new_empty(x_i8.shape, dtype=dtype)


def _int8xint2_mm_int32(x_i8: Tensor, packed: Tensor) -> Tensor:
    return x_i8.new_empty((*x_i8.shape[:-1], packed.shape[0]), dtype=torch.int32)


def _int8xint2_mm(
    x_i8: Tensor,
    act_scale: Tensor,
    packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    segments: list[int],
    out_dtype: torch.dtype,
) -> Tensor:
    return x_i8.new_empty((*x_i8.shape[:-1], packed.shape[0]), dtype=out_dtype)


def _prepacked_mm_int32(x_i8: Tensor, prepacked: Tensor, N: int) -> Tensor:
    return x_i8.new_empty((*x_i8.shape[:-1], N), dtype=torch.int32)


def _prepacked_mm(
    x_i8: Tensor,
    act_scale: Tensor,
    prepacked: Tensor,
    N: int,
    weight_scale: Tensor,
    bias: Tensor | None,
    segments: list[int],
    out_dtype: torch.dtype,
    weight_is_constant: bool,
) -> Tensor:
    return x_i8.new_empty((*x_i8.shape[:-1], N), dtype=out_dtype)


def _product(x: Tensor, K: int, N: int, normalize: bool, out_dtype: torch.dtype) -> tuple[Tensor, ...]:
    """(y, x_i8, act_scale, rstd) of the ternary layers."""
    leading = x.shape[:-1]
    return (
        x.new_empty((*leading, N), dtype=out_dtype),
        x.new_empty((*leading, K), dtype=torch.int8),
        x.new_empty(leading, dtype=torch.float32),
        x.new_empty(leading if normalize else (0,), dtype=torch.float32),
    )


def _bit_linear(
    x: Tensor,
    delta: Tensor | None,
    weights: list[Tensor],
    packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_eps: float,
    normalize: bool,
    first_norm_weight: Tensor | None,
    first_norm_eps: float,
    out_dtype: torch.dtype,
    backward: str,
) -> tuple[Tensor, ...]:
    N = sum(w.shape[0] for w in weights)
    total = x.new_empty((0,) if delta is None and first_norm_weight is None else x.shape)
    first_rstd = x.new_empty((0,) if first_norm_weight is None else x.shape[:-1], dtype=torch.float32)
    return (*_product(x, x.shape[-1], N, normalize, out_dtype), total, first_rstd)


def _glu_bit_linear(
    gate_up: Tensor,
    weight: Tensor,
    packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_eps: float,
    normalize: bool,
    activation: str,
    out_dtype: torch.dtype,
    backward: str,
) -> tuple[Tensor, ...]:
    N, K = weight.shape
    return _product(gate_up, K, N, normalize, out_dtype)


def _glu_backward(
    grad_y: Tensor, gate_up: Tensor, activation: str, gain: Tensor | None, rstd: Tensor, normalize: bool
) -> tuple[Tensor, Tensor]:
    grad_gain = gate_up.new_empty((0,) if gain is None else gain.shape, dtype=torch.float32)
    return gate_up.new_empty(gate_up.shape), grad_gain


def _rms_norm(
    x: Tensor, delta: Tensor | None, gain: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    total = x.new_empty((0,) if delta is None else x.shape)
    return x.new_empty(x.shape), total, x.new_empty(x.shape[:-1], dtype=torch.float32)


def _rms_norm_backward(
    grad_y: Tensor,
    x: Tensor,
    gain: Tensor | None,
    rstd: Tensor,
    grad_residual: Tensor | None,
    delta_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_gain = x.new_empty((0,) if gain is None else (x.shape[-1],), dtype=torch.float32)
    grad_delta = x.new_empty((0,) if delta_dtype == x.dtype else x.shape, dtype=delta_dtype)
    return x.new_empty(x.shape), grad_delta, grad_gain


def _norm_pair_backward(
    grad_z: Tensor,
    x: Tensor,
    first_gain: Tensor,
    first_rstd: Tensor,
    gain: Tensor,
    rstd: Tensor,
    grad_residual: Tensor | None,
    delta_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_delta = x.new_empty((0,) if delta_dtype == x.dtype else x.shape, dtype=delta_dtype)
    return x.new_empty(x.shape), grad_delta, first_gain.new_empty(gain.shape), gain.new_empty(gain.shape)


def _bit_linear_grad(
    grad_y: Tensor,
    x_i8: Tensor,
    act_scale: Tensor,
    prepacked: Tensor,
    weight_scale: Tensor,
    segments: list[int],
    need_input: bool,
    need_weight: bool,
    weight_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    N, K = grad_y.shape[1], x_i8.shape[1]
    return (
        grad_y.new_empty(x_i8.shape if need_input else (0,)),
        grad_y.new_empty((N, K) if need_weight else (0,), dtype=weight_dtype),
    )


def _sum_of_squares(tensors: list[Tensor]) -> Tensor:
    return tensors[0].new_empty((), dtype=torch.float64)


def _clip_gradients_(
    grads: list[Tensor],
    step: Tensor,
    max_norm: float,
    latch: Tensor,
    known: Tensor | None,
    known_index: int,
) -> tuple[Tensor, Tensor]:
    norm = grads[0].new_empty((), dtype=torch.float32)
    return norm, torch.empty_like(norm)


def _square_partials(tensor: Tensor) -> Tensor:
    count = 1
    if tensor.device.type == "cuda":  # csrc/cuda/grad_norm.h
        share = -(-tensor.numel() // 1024)
        run = 4096 if share <= 4096 else -(-share // 8) * 8
        count = -(-tensor.numel() // run)
    return tensor.new_empty((count,), dtype=torch.float64)


def _row_slots(ids: Tensor, V: int) -> Tensor:
    return ids.new_empty((*ids.shape[:-1], V), dtype=torch.int32)


def _sum_rows(ids: Tensor, rows: Tensor, slots: Tensor) -> Tensor:
    return rows.new_empty(rows.shape)


def _adam_step_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avg: list[Tensor],
    exp_avg_sq: list[Tensor],
    hyper: Tensor,
    grad_scale: Tensor,
    decay: list[int],
    ternary: list[int],
    abs_sums: Tensor | None,
    slots: Tensor | None,
    row_param: int,
    beta1: float,
    beta2: float,
    eps: float,
    decoupled: bool,
    num_blocks: int,
) -> None:
    return None


def _adam_rows_(
    param: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grads: list[Tensor],
    slots: Tensor,
    hyper: Tensor,
    grad_scales: list[Tensor],
    ids: Tensor | None,
    decay: bool,
    beta1: float,
    beta2: float,
    eps: float,
    decoupled: bool,
    num_blocks: int,
) -> None:
    return None


def _softmax_stats(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    T = logits.shape[0]
    target_logit, mean_logit, expected_logit = (logits.new_empty((T,), dtype=torch.float32) for _ in range(3))
    return (
        logits.new_empty((T,), dtype=torch.float64),
        target_logit,
        mean_logit,
        expected_logit,
        logits.new_empty((T,), dtype=torch.int64),
    )


def _count_targets(target: Tensor) -> Tensor:
    return target.new_empty((), dtype=torch.float32)


def _cross_entropy_rows_(
    logits: Tensor,
    V: int,
    target: Tensor,
    count: Tensor | None,
    log_marginal: Tensor | None,
    label_smoothing: float,
    z_loss: float,
    entropy_weight: float,
    diversity_weight: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    T = logits.shape[0]
    lse, cross_entropy, entropy, smoothing = (logits.new_empty((T,), dtype=torch.float32) for _ in range(4))
    return lse, cross_entropy, entropy, smoothing, logits.new_empty((T,), dtype=torch.int64)


def _cross_entropy_mean(
    lse: Tensor,
    cross_entropy: Tensor,
    entropy: Tensor,
    smoothing: Tensor,
    target: Tensor,
    marginal_entropy: Tensor | None,
    square_sum: Tensor | None,
    label_smoothing: float,
    z_loss: float,
    entropy_weight: float,
    diversity_weight: float,
    output_l2: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    loss, mean_cross_entropy, mean_entropy, mean_square = (lse.new_empty(()) for _ in range(4))
    return loss, mean_cross_entropy, mean_entropy, mean_square


def _probability_sums(logits: Tensor, V: int, target: Tensor, lse: Tensor, softcap: float) -> Tensor:
    return lse.new_empty(((logits.shape[0] + 31) // 32, V))


def _predicted_rows_(logits: Tensor, V: int, target: Tensor) -> tuple[Tensor, ...]:
    T = logits.shape[0]
    cross_entropy, entropy, top = (logits.new_empty((T,), dtype=torch.float64) for _ in range(3))
    std, argmax = logits.new_empty((T,), dtype=torch.float32), target.new_empty((T,))
    return cross_entropy, entropy, top, std, argmax, logits.new_empty((V,), dtype=torch.float64)


def _scale_(tensors: list[Tensor], scale: Tensor) -> None:
    return None


def _skinny_mm(out: Tensor, left: Tensor, right: Tensor) -> None:
    return None


def _skinny_mm_tn_(out: Tensor, grad: Tensor, hidden: Tensor, accumulate: bool, max_blocks: int) -> None:
    return None


def _short_attention(
    qkv: Tensor, cos: Tensor, sin: Tensor, num_heads: int, num_kv_heads: int
) -> tuple[Tensor, Tensor]:
    B, T, width = qkv.shape
    out = qkv.new_empty((B, T, width // (num_heads + 2 * num_kv_heads) * num_heads))
    return out, qkv.new_empty((B, num_heads, T), dtype=torch.float32)


def _short_attention_backward(
    grad_out: Tensor,
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    out: Tensor,
    lse: Tensor,
    num_heads: int,
    num_kv_heads: int,
) -> Tensor:
    return qkv.new_empty(qkv.shape)


def _rotary_query_key(
    qkv: Tensor, cos: Tensor, sin: Tensor, num_heads: int, num_kv_heads: int
) -> tuple[Tensor, Tensor]:
    B, T, width = qkv.shape
    head_dim = width // (num_heads + 2 * num_kv_heads)
    return qkv.new_empty((B, T, num_heads, head_dim)), qkv.new_empty((B, T, num_kv_heads, head_dim))


def _rotate_query_key_(qkv: Tensor, cos: Tensor, sin: Tensor, num_heads: int, num_kv_heads: int) -> None:
    pass


def _rotary_query_key_backward(
    grad_query: Tensor, grad_key: Tensor, grad_value: Tensor, cos: Tensor, sin: Tensor
) -> Tensor:
    B, T, num_heads, head_dim = grad_query.shape
    return grad_query.new_empty((B, T, (num_heads + 2 * grad_key.shape[2]) * head_dim))


def _quantize_grad(
    grad_y: Tensor,
    act_scale: Tensor,
    weight_scale: Tensor,
    segments: list[int],
    seed: Tensor,
    by_row: bool,
    by_column: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    M, N = grad_y.shape
    stages = (M + 127) // 128 if by_column else 0
    width = 128 * stages
    return (
        grad_y.new_empty((M, N) if by_row else (0,), dtype=torch.int8),
        grad_y.new_empty((M if by_row else 0,), dtype=torch.float32),
        grad_y.new_empty((N, width) if by_column else (0,), dtype=torch.int8),
        grad_y.new_empty((width,), dtype=torch.int32),
        grad_y.new_empty((stages,), dtype=torch.float32),
        grad_y.new_empty((N if by_column else 0,), dtype=torch.float32),
    )


def _transpose_prepacked(prepacked: Tensor, N: int, K: int) -> Tensor:
    return _prepacked(prepacked, K, N)


def _transpose_int8(x_i8: Tensor, order: Tensor | None) -> Tensor:
    M, K = x_i8.shape
    return x_i8.new_empty((K, M if order is None else order.numel()))


def _int8_weight_grad(
    g_column: Tensor, x_column: Tensor, column_max: Tensor, stage_bound: Tensor, out_dtype: torch.dtype
) -> Tensor:
    return g_column.new_empty((g_column.shape[0], x_column.shape[0]), dtype=out_dtype)


_FAKES: dict[str, Callable[..., Any]] = {
    "quantize_act_int8": _quantize_act_int8,
    "rms_norm_quantize": _rms_norm_quantize,
    "add_rms_norm_quantize": _add_rms_norm_quantize,
    "glu_quantize": _glu_quantize,
    "quantize_weight_ternary": _quantize_weight_ternary,
    "quantize_pack_weight": _quantize_pack_weight,
    "quantize_weights": _quantize_weights,
    "quantize_weight_groups_": _quantize_weight_groups_,
    "pack_ternary": _pack_ternary,
    "unpack_ternary": _unpack_ternary,
    "dequantize_ternary": _dequantize_ternary,
    "prepack_ternary": _prepack_ternary,
    "unprepack_ternary": _unprepack_ternary,
    "prepack_int8": _prepack_int8,
    "dequantize_prepacked": _dequantize_prepacked,
    "dequantize_act": _dequantize_act,
    "int8xint2_mm_int32": _int8xint2_mm_int32,
    "int8xint2_mm": _int8xint2_mm,
    "prepacked_mm_int32": _prepacked_mm_int32,
    "prepacked_mm": _prepacked_mm,
    "bit_linear": _bit_linear,
    "glu_bit_linear": _glu_bit_linear,
    "glu_backward": _glu_backward,
    "rms_norm": _rms_norm,
    "rms_norm_backward": _rms_norm_backward,
    "norm_pair_backward": _norm_pair_backward,
    "bit_linear_grad": _bit_linear_grad,
    "sum_of_squares": _sum_of_squares,
    "clip_gradients_": _clip_gradients_,
    "square_partials": _square_partials,
    "row_slots": _row_slots,
    "sum_rows": _sum_rows,
    "adam_step_": _adam_step_,
    "adam_rows_": _adam_rows_,
    "softmax_stats": _softmax_stats,
    "count_targets": _count_targets,
    "cross_entropy_rows_": _cross_entropy_rows_,
    "cross_entropy_mean": _cross_entropy_mean,
    "probability_sums": _probability_sums,
    "predicted_rows_": _predicted_rows_,
    "scale_": _scale_,
    "linear_cross_entropy": loss.fake,
    "skinny_mm_nt_": _skinny_mm,
    "skinny_mm_nn_": _skinny_mm,
    "skinny_mm_tn_": _skinny_mm_tn_,
    "short_attention": _short_attention,
    "short_attention_backward": _short_attention_backward,
    "rotary_query_key": _rotary_query_key,
    "rotate_query_key_": _rotate_query_key_,
    "rotary_query_key_backward": _rotary_query_key_backward,
    "quantize_grad": _quantize_grad,
    "transpose_prepacked": _transpose_prepacked,
    "transpose_int8": _transpose_int8,
    "int8_weight_grad": _int8_weight_grad,
}


_library: torch.library.Library | None = None


def register() -> None:
    """Registers the fakes, the derivatives and the batching rules, once per process."""
    global _library
    if _library is not None:
        return
    _library = torch.library.Library("bitnet_ext", "FRAGMENT")
    for name, fake in _FAKES.items():
        torch.library.register_fake(f"bitnet_ext::{name}", fake)
    torch.library.impl("bitnet_ext::linear_cross_entropy", ("cpu", "cuda"), loss.forward)
    _differentiation.define_first_order(_library)
    formulas = {**_autograd.FORMULAS, "linear_cross_entropy": (loss.setup, loss.backward)}
    prepares = {"linear_cross_entropy": loss.prepare}
    for name in _FAKES:
        if not name.endswith("_"):  # those that change an argument
            setup, backward = formulas.get(name, (None, None))
            _differentiation.register(_library, name, setup, backward, prepares.get(name))
    _flops.register_when_imported()
