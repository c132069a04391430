"""The inference form of a ternary linear layer: a quarter of a byte a weight."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from bitnet_ext import ops
from bitnet_ext.nn.bit_linear import BitLinear
from bitnet_ext.ops.packing import packed_width


class PackedBitLinear(nn.Module):
    """Packed 2-bit weights x int8 activations; the forward of the :class:`BitLinear` it was made from.

    Buffers: ``packed`` uint8 [N, ceil(K / 4)], ``weight_scale`` float32 (1, N or one a segment),
    ``bias`` float32 [N] or None, ``norm_weight`` float32 [K] or None.

    Args:
        in_features, out_features: K and N.
        packed, weight_scale, bias, norm_weight: the buffers.
        norm_eps: epsilon of the norm.
        segments: rows of each segment of a fused weight, when weight_scale has one element a segment.

    Shapes: input [..., K], output [..., N] in the input's dtype (the autocast dtype under autocast).
    """

    packed: Tensor
    weight_scale: Tensor
    bias: Tensor | None
    norm_weight: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        packed: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None = None,
        norm_weight: Tensor | None = None,
        norm_eps: float = 1e-5,
        segments: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        if packed.dtype != torch.uint8 or tuple(packed.shape) != (out_features, packed_width(in_features)):
            raise ValueError(
                f"PackedBitLinear: packed must be uint8 of shape {(out_features, packed_width(in_features))}, "
                f"got {packed.dtype} of shape {tuple(packed.shape)}"
            )
        self.in_features = in_features
        self.out_features = out_features
        self.norm_eps = norm_eps
        self.segments = segments
        self.register_buffer("packed", packed)
        self.register_buffer("weight_scale", weight_scale)
        self.register_buffer("bias", bias)
        self.register_buffer("norm_weight", norm_weight)

    @classmethod
    @torch.no_grad()
    def from_bit_linear(cls, layer: BitLinear) -> PackedBitLinear:
        """Quantises and packs a trained layer.

        Raises:
            ValueError: when the weights hold NaN or Inf.
        """
        if not layer.is_quantized:
            raise ValueError("PackedBitLinear: the layer must have quantization 'b1.58', got 'none'")
        if not bool(torch.isfinite(layer.weight).all()):
            raise ValueError("PackedBitLinear: the layer's weight holds NaN or Inf; finite values are needed")
        packed, weight_scale = ops.quantize_pack_weight(layer.weight)
        return cls(
            layer.in_features,
            layer.out_features,
            packed,
            weight_scale,
            None if layer.bias is None else layer.bias.detach().clone(),
            None if layer.norm_weight is None else layer.norm_weight.detach().clone(),
            layer.norm_eps,
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedBitLinear:
        """Moves as any module does, but a cast (``model.bfloat16()``) leaves the float32 buffers as they are:
        a rounded scale would be another weight.
        """
        exact = {name: getattr(self, name) for name in ("weight_scale", "bias", "norm_weight")}
        super()._apply(fn, recurse)
        for name, value in exact.items():
            moved = getattr(self, name)
            if moved is not None and moved.dtype != value.dtype:
                setattr(self, name, value.to(moved.device))
        return self

    def forward(self, x: Tensor) -> Tensor:
        if self.norm_weight is not None:
            x_i8, act_scale, _ = ops.rms_norm_quantize(x, self.norm_weight, self.norm_eps)
        else:
            x_i8, act_scale = ops.quantize_act_int8(x)
        device_type = x.device.type
        autocast = torch.is_autocast_enabled(device_type)
        return ops.int8xint2_mm(
            x_i8,
            act_scale,
            self.packed,
            self.weight_scale,
            bias=self.bias,
            segments=self.segments,
            out_dtype=torch.get_autocast_dtype(device_type) if autocast else x.dtype,
        )

    def extra_repr(self) -> str:
        bits = 8 * self.packed.numel() / (self.in_features * self.out_features)
        return (
            f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, bits/weight={bits:.2f}"
        )
