"""Products with weights that are quantised for good, with the straight-through gradient of the training product.

For what trains in front of or inside a packed model: adapters, prompts, norms. The forward is that of packed inference
and that of training, bit for bit. Gradients reach the input, the bias and the norm's gain.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bitnet_ext.ops.fused_quantize import Activation
from bitnet_ext.ops.int8_mm import int8_mm, unprepacked_int8
from bitnet_ext.ops.quantize import quantize_act_int8

_ops = torch.ops.bitnet_ext

#: Rows of a tile of the CUDA kernels of the backward pass.
_TILE_ROWS = 16
#: Most int8 weights that the backward of :func:`int8_linear` widens at a time (256 MiB of float32).
_SLAB_WEIGHTS = 64 << 20


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd, where it is on, records what is computed from any of these tensors."""
    return any(t is not None and t.requires_grad for t in tensors)


def served_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """The dtype of a layer's result: `dtype`, or the autocast dtype where autocast is on."""
    # torch knows no autocast of the meta device.
    if device.type != "meta" and torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return dtype


def packed_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    *,
    out_features: int,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_eps: float | None = None,
    segments: Sequence[int] = (),
    out_dtype: torch.dtype,
) -> Tensor:
    """``y = Q_int8(norm(x)) (codes * weight_scale)^T + bias`` for codes that are packed already.

    Args:
        x: [..., K] float32, bfloat16 or float16.
        weight: uint8 [N, ceil(K / 4)]; or, on CUDA, its prepacked form int32.
        weight_scale: float32, of 1 element, N elements, or one for each of `segments`.
        out_features: N.
        bias: float32 [N] or None.
        norm_weight, norm_eps: of an RMSNorm before the quantiser, as for :func:`bitnet_ext.ops.bit_linear`.
        segments: rows of each segment of a fused weight.
        out_dtype: of the result, and of the products of the backward pass.

    Returns:
        [..., N] of `out_dtype`. Gradients reach x, bias and norm_weight.
    """
    sizes = list(segments) or [out_features]
    if x.is_cuda and any(size % _TILE_ROWS for size in sizes[:-1]):
        # The backward kernels take a scale per tile of rows. A scale per row rounds alike.
        ends = torch.tensor(sizes, device=x.device)
        weight_scale, sizes = weight_scale.reshape(-1).repeat_interleave(ends), [out_features]
    scale, row_scale = _scales(weight_scale, sizes)
    gain = None if norm_weight is None else norm_weight.contiguous()
    y = _ops.bit_linear(
        x.contiguous(),
        None,
        [_shape_of_weight(x, size, x.shape[-1]) for size in sizes],
        weight.contiguous(),
        scale,
        None if bias is None or row_scale is not None else bias.contiguous(),
        gain,
        0.0 if norm_eps is None else norm_eps,
        norm_eps is not None,
        None,
        0.0,
        out_dtype if row_scale is None else torch.float32,
        "exact",
    )[0]
    return y if row_scale is None else _scale_rows(y, row_scale, bias, out_dtype)


def packed_glu_linear(
    gate_up: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    activation: Activation,
    *,
    out_features: int,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_eps: float | None = None,
    out_dtype: torch.dtype,
) -> Tensor:
    """:func:`packed_linear` of ``h = act(gate) * up``, gate and up side by side in `gate_up` [..., 2 K], without
    segments. Gradients reach gate_up, bias and norm_weight.
    """
    scale, row_scale = _scales(weight_scale, [out_features])
    gain = None if norm_weight is None else norm_weight.contiguous()
    y = _ops.glu_bit_linear(
        gate_up.contiguous(),
        _shape_of_weight(gate_up, out_features, gate_up.shape[-1] // 2),
        weight.contiguous(),
        scale,
        None if bias is None or row_scale is not None else bias.contiguous(),
        gain,
        0.0 if norm_eps is None else norm_eps,
        norm_eps is not None,
        activation,
        out_dtype if row_scale is None else torch.float32,
        "exact",
    )[0]
    return y if row_scale is None else _scale_rows(y, row_scale, bias, out_dtype)


def int8_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    *,
    out_features: int,
    bias: Tensor | None = None,
    out_dtype: torch.dtype,
) -> Tensor:
    """``y = Q_int8(x) (codes * weight_scale)^T + bias`` for int8 codes with a scale a row.

    Args:
        x: [..., K] float32, bfloat16 or float16.
        weight: int8 [N, K]; or, on CUDA, its prepacked form int32.
        weight_scale: float32 [N].
        out_features: N.
        bias: float32 [N] or None.
        out_dtype: of the result, and of the product of the backward pass.

    Returns:
        [..., N] of `out_dtype`. Gradients reach x and bias.
    """
    return _Int8Linear.apply(x, weight, weight_scale, bias, out_features, out_dtype)


class _Int8Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None,
        out_features: int,
        out_dtype: torch.dtype,
    ) -> Tensor:
        x_i8, act_scale = quantize_act_int8(x)
        return int8_mm(
            x_i8,
            act_scale,
            weight,
            weight_scale,
            bias=bias,
            out_features=out_features,
            out_dtype=out_dtype,
            weight_is_constant=True,  # the kernel before it is the quantiser
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, weight_scale, _bias, ctx.out_features, _ = inputs
        ctx.save_for_backward(weight, weight_scale)
        ctx.x_shape, ctx.x_dtype = x.shape, x.dtype

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        weight, weight_scale = ctx.saved_tensors
        grad = grad_y.reshape(-1, ctx.out_features)
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = _int8_input_grad(grad, weight, weight_scale, ctx.x_shape[-1])
            grad_x = grad_x.to(ctx.x_dtype).reshape(ctx.x_shape)
        if ctx.needs_input_grad[3]:
            grad_bias = grad.sum(0, dtype=torch.float32)
        return grad_x, None, None, grad_bias, None, None


def _int8_input_grad(grad: Tensor, weight: Tensor, weight_scale: Tensor, K: int) -> Tensor:
    """``grad (codes * weight_scale)``: [M, K] of grad [M, N], the weights decoded to grad's dtype."""
    N = grad.shape[1]
    codes = unprepacked_int8(weight, N, K) if weight.dtype == torch.int32 else weight
    rows = max(1, _SLAB_WEIGHTS // K)
    scale = weight_scale.reshape(-1, 1)
    slabs = [
        grad[:, i : i + rows] @ (codes[i : i + rows].float() * scale[i : i + rows]).to(grad.dtype)
        for i in range(0, N, rows)
    ]
    if len(slabs) == 1:
        return slabs[0]
    total = slabs[0].float()
    for slab in slabs[1:]:
        total = total + slab.float()
    return total


def _shape_of_weight(x: Tensor, N: int, K: int) -> Tensor:
    """Stands for the latent weight, of which the operators read only the shape. Takes the memory of one element."""
    return x.new_empty((1, 1)).expand(N, K)


def _scales(weight_scale: Tensor, sizes: list[int]) -> tuple[Tensor, Tensor | None]:
    """The scales as the training operators take them, one a segment; and those of the rows, if there are any, which
    are multiplied after the product: in the same order, and so with the same rounding, as packed inference.
    """
    if weight_scale.numel() == len(sizes):
        return weight_scale.reshape(-1).contiguous(), None
    return weight_scale.new_ones(len(sizes)), weight_scale.reshape(-1)


def _scale_rows(y: Tensor, row_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    y = y * row_scale
    return (y if bias is None else y + bias).to(out_dtype)
