"""The training product of a BitLinear layer, with the straight-through gradient.

Forward: quantise the activations to int8 (after an optional RMSNorm), the weights to ternary codes, and
multiply exactly in int32, so training sees the arithmetic of packed inference bit for bit. Backward: the
gradient passes unchanged through both quantisers (Bengio et al., arXiv 1308.3432; BitNet, arXiv 2310.11453,
section 2.2), both scales being constants.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from bitnet_ext.ops import _checks
from bitnet_ext.ops.matmul import int8xint2_mm_ref
from bitnet_ext.ops.packing import pack_ternary_ref
from bitnet_ext.ops.quantize import quantize_act_int8_ref, quantize_weight_ternary_ref
from bitnet_ext.ops.quantize_groups import QuantizedWeight, can_stack, quantize_weights
from bitnet_ext.ops.rms_norm import check_delta, check_gain, rms_norm_ref

_ops = torch.ops.bitnet_ext

Backward = Literal["exact", "int8"]
BACKWARDS = ("exact", "int8")


def bit_linear(
    x: Tensor,
    weight: Tensor | Sequence[Tensor],
    *,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_eps: float | None = None,
    first_norm: tuple[Tensor, float] | None = None,
    out_dtype: torch.dtype | None = None,
    backward: Backward = "exact",
    quantized: QuantizedWeight | None = None,
) -> Tensor:
    """``y = Q_int8(norm(x)) Q_ternary(weight)^T + bias`` with straight-through gradients.

    Several weights that share the input are multiplied at once: x is normalised and quantised once, and one product
    reads all of them. Each keeps the scale of its own, and the result is theirs side by side, bit for bit.

    Args:
        x: [..., K] float32, bfloat16 or float16.
        weight: latent weights [N, K], same dtypes; or a sequence of weights [N_i, K] of one dtype, N = sum N_i.
        bias: float32 [N] or None.
        norm_weight: float32 [K], gain of an RMSNorm before the quantiser; needs `norm_eps`.
        norm_eps: epsilon of that norm; None for no norm. With `norm_eps` alone the norm has no gain.
        first_norm: gain float32 [K] and epsilon of an RMSNorm in front of that one, which then needs a gain too; its
            result is rounded to x's dtype, as :func:`rms_norm` rounds it. Both are one pass, and one in the backward,
            on CUDA for up to 512 rows of K <= 512, a multiple of 8.
        out_dtype: of the result; by default the autocast dtype where autocast is on, else x's.
        backward: "exact" computes both products of the backward pass in the dtype of the result, "int8" from a
            gradient in 8 bits with stochastic rounding: see :func:`bitnet_ext.ops.int8_grads`.
        quantized: the weights as :func:`quantize_weights` returned them, for a caller that keeps them while the
            weights stay what they are; None quantises here.

    Returns:
        [..., N] of `out_dtype`. Gradients reach x, weight, bias, norm_weight and first_norm's gain.
    """
    op = "bit_linear"
    out_dtype = result_dtype(op, out_dtype, x)
    norms = (norm_weight, norm_eps, first_norm)
    return _bit_linear(op, x, None, weight, bias, norms, out_dtype, backward, quantized)[0]


def add_bit_linear(
    x: Tensor,
    delta: Tensor | None,
    weight: Tensor | Sequence[Tensor],
    *,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-5,
    first_norm: tuple[Tensor, float] | None = None,
    out_dtype: torch.dtype | None = None,
    backward: Backward = "exact",
    quantized: QuantizedWeight | None = None,
) -> tuple[Tensor, Tensor]:
    """``sum = x + delta``, and :func:`bit_linear` of it with a norm: sum, norm and quantiser in one pass, in the
    backward norm and sum in one.

    For the residual stream x of a transformer and the output `delta` of the block before. The sum is rounded to x's
    dtype before the norm.

    Args:
        x: [..., K] float32, bfloat16 or float16.
        delta: of x's shape and dtype, or bfloat16 or float16 where x is float32. None: the sum is x, whose gradients
            by both ways are still added in the pass of the norms where `first_norm` is given.
        weight, bias, norm_weight, norm_eps, first_norm, out_dtype, backward, quantized: as for :func:`bit_linear`.

    Returns:
        y [..., N] of `out_dtype`, and sum of x's shape and dtype. Gradients reach x, delta, weight, bias,
        norm_weight and first_norm's gain, from both results.
    """
    op = "add_bit_linear"
    if delta is not None:
        check_delta(op, x, delta)
    out_dtype = result_dtype(op, out_dtype, x)
    norms = (norm_weight, norm_eps, first_norm)
    return _bit_linear(op, x, delta, weight, bias, norms, out_dtype, backward, quantized)


def _bit_linear(
    op: str,
    x: Tensor,
    delta: Tensor | None,
    weight: Tensor | Sequence[Tensor],
    bias: Tensor | None,
    norms: tuple[Tensor | None, float | None, tuple[Tensor, float] | None],
    out_dtype: torch.dtype,
    backward: Backward,
    quantized: QuantizedWeight | None,
) -> tuple[Tensor, Tensor]:
    """y and the sum. `norms`: norm_weight, norm_eps and first_norm."""
    norm_weight, norm_eps, first_norm = norms
    if not isinstance(weight, Tensor):
        _checks.sequence(op, "weight", weight)
    weights = [weight] if isinstance(weight, Tensor) else list(weight)
    _checks.tensor(op, "x", x, dtypes=_checks.FLOATS, min_dim=1)
    N = _check_weights(op, weights, x)
    if x.shape[-1] != weights[0].shape[1]:
        raise ValueError(
            f"{op}: x must have K = {weights[0].shape[1]} as its last dimension (in_features of weight), "
            f"got {x.shape[-1]}"
        )
    check_bias(op, bias, N, x)
    if norm_weight is not None:
        if norm_eps is None:
            raise ValueError(f"{op}: norm_weight needs norm_eps, got norm_eps=None")
        check_gain(op, "norm_weight", norm_weight, x)
        norm_weight = norm_weight.contiguous()
    if norm_eps is not None:
        _checks.number(op, "norm_eps", norm_eps, minimum=0)
    check_backward(op, backward)
    check_quantized(op, quantized)
    first_gain, first_eps = None, 0.0
    if first_norm is not None:
        first_gain, first_eps = _check_first_norm(op, first_norm, norm_weight, x)
        if not fits_norm_pair(x) or (quantized is None and not can_stack(weights)):
            normed, total, _ = _ops.rms_norm(
                x.contiguous(), None if delta is None else delta.contiguous(), first_gain, first_eps
            )
            norms = (norm_weight, norm_eps, None)
            y, _ = _bit_linear(op, normed, None, weight, bias, norms, out_dtype, backward, quantized)
            return y, x if delta is None else total
    if quantized is None and not can_stack(weights):
        sizes = [w.shape[0] for w in weights]
        biases = [None] * len(sizes) if bias is None else bias.split(sizes)
        total = x if delta is None else (x + delta).to(x.dtype)
        parts = [
            _bit_linear(op, total, None, w, b, norms, out_dtype, backward, None)[0]
            for w, b in zip(weights, biases, strict=True)
        ]
        return torch.cat(parts, dim=-1), total
    weights = [w.contiguous() for w in weights]
    packed, weight_scale = quantize_weights(weights) if quantized is None else quantized
    result = _ops.bit_linear(
        x.contiguous(),
        None if delta is None else delta.contiguous(),
        weights,
        packed,
        weight_scale,
        None if bias is None else bias.contiguous(),
        norm_weight,
        0.0 if norm_eps is None else norm_eps,
        norm_eps is not None,
        first_gain,
        first_eps,
        out_dtype,
        backward,
    )
    return result[0], x if delta is None and first_norm is None else result[4]


def fits_norm_pair(x: Tensor) -> bool:
    """Whether two norms of x can be one pass: on CUDA where a warp holds a row, and few rows share a launch that
    sums up the gains' gradients.
    """
    K = x.shape[-1]
    return not x.is_cuda or (K % 8 == 0 and K <= 512 and x.numel() <= 512 * K)


def _check_first_norm(
    op: str, first_norm: tuple[Tensor, float], norm_weight: Tensor | None, x: Tensor
) -> tuple[Tensor, float]:
    if not isinstance(first_norm, (tuple, list)) or len(first_norm) != 2:
        raise TypeError(f"{op}: first_norm must be a gain and an epsilon, got {_checks.describe(first_norm)}")
    gain, eps = first_norm
    if norm_weight is None:
        raise ValueError(f"{op}: first_norm needs norm_weight, got norm_weight=None")
    check_gain(op, "first_norm[0]", gain, x)
    _checks.number(op, "first_norm[1]", eps, minimum=0)
    return gain.contiguous(), eps


def check_backward(op: str, backward: str) -> None:
    _checks.one_of(op, "backward", backward, BACKWARDS)


def result_dtype(op: str, out_dtype: torch.dtype | None, x: Tensor) -> torch.dtype:
    """`out_dtype`, or what it is by default: the autocast dtype where autocast is on, else x's."""
    _checks.tensor(op, "gate_up" if op == "glu_bit_linear" else "x", x, dtypes=_checks.FLOATS, min_dim=1)
    if out_dtype is None:
        device_type = x.device.type
        if device_type != "meta" and torch.is_autocast_enabled(device_type):  # meta has no autocast
            return torch.get_autocast_dtype(device_type)
        return x.dtype
    _checks.float_dtype(op, "out_dtype", out_dtype)
    return out_dtype


def _check_weights(op: str, weights: Sequence[Tensor], x: Tensor) -> int:
    """The rows of all weights together."""
    N = 0
    for index, w in enumerate(weights):
        name = "weight" if len(weights) == 1 else f"weight[{index}]"
        _checks.tensor(op, name, w, dtypes=(weights[0].dtype,) if index else _checks.FLOATS, dim=2)
        _checks.same_device(op, name, w, "x", x)
        _checks.at_least_one(op, name, w.shape[0], "out_features (N)")
        _checks.at_least_one(op, name, w.shape[1], "in_features (K)")
        if w.shape[1] != weights[0].shape[1]:
            raise ValueError(
                f"{op}: {name} must have K = {weights[0].shape[1]} like weight[0], got {w.shape[1]}"
            )
        N += w.shape[0]
    return N


def check_quantized(op: str, quantized: QuantizedWeight | None) -> None:
    """The form only; the operator compares shapes and devices with the weights."""
    if quantized is None:
        return
    if not isinstance(quantized, (tuple, list)) or len(quantized) != 2:
        raise TypeError(f"{op}: quantized must be a QuantizedWeight, got {_checks.describe(quantized)}")
    _checks.tensor(op, "quantized.packed", quantized[0], dtypes=(torch.uint8, torch.int32))
    _checks.tensor(op, "quantized.weight_scale", quantized[1], dtypes=(torch.float32,), dim=1)


def check_bias(op: str, bias: Tensor | None, N: int, x: Tensor) -> None:
    if bias is not None:
        _checks.tensor(op, "bias", bias, dtypes=(torch.float32,), dim=1)
        _checks.shape(op, "bias", bias, (N,), "out_features of weight")
        _checks.same_device(op, "bias", bias, "x", x)


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
    weight: Tensor | Sequence[Tensor],
    *,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_eps: float | None = None,
    first_norm: tuple[Tensor, float] | None = None,
) -> Tensor:
    """:func:`bit_linear` in plain PyTorch, in float32: the exact forward, gradients by autograd."""
    if first_norm is not None:
        x = rms_norm_ref(x, *first_norm)
    if not isinstance(weight, Tensor):
        parts = [w.shape[0] for w in weight]
        biases = [None] * len(parts) if bias is None else bias.split(parts)
        return torch.cat(
            [
                bit_linear_ref(x, w, bias=b, norm_weight=norm_weight, norm_eps=norm_eps)
                for w, b in zip(weight, biases, strict=True)
            ],
            dim=-1,
        )
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


def add_bit_linear_ref(
    x: Tensor,
    delta: Tensor | None,
    weight: Tensor | Sequence[Tensor],
    *,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-5,
    first_norm: tuple[Tensor, float] | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`add_bit_linear` in plain PyTorch, y in float32."""
    total = x if delta is None else (x + delta).to(x.dtype)
    norms = {"norm_weight": norm_weight, "norm_eps": norm_eps, "first_norm": first_norm}
    return bit_linear_ref(total, weight, bias=bias, **norms), total  # type: ignore[arg-type]
