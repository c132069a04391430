"""The inference form of a ternary linear layer: a quarter of a byte a weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bitnet_ext import ops
from bitnet_ext.nn.bit_linear import BitLinear
from bitnet_ext.ops.packing import packed_width


class PackedBitLinear(nn.Module):
    """Packed 2-bit weights x int8 activations; the forward of the :class:`BitLinear` it was made from.

    ``state_dict`` holds ``packed`` uint8 [N, ceil(K / 4)], ``weight_scale`` float32 (1, N or one a segment),
    ``bias`` float32 [N] or None and ``norm_weight`` float32 [K] or None, whatever the device. In memory there is
    one copy of the weights, the buffer ``weight``, in the form that the device's product reads: packed on the
    CPU, prepacked (docs/packing.md) on CUDA. The property ``packed`` gives the packed form everywhere.

    Args:
        in_features, out_features: K and N.
        packed, weight_scale, bias, norm_weight: as in the state_dict; with `packed` on CUDA the layer makes the
            prepacked form of it and does not keep it.
        norm_eps: epsilon of the norm.
        segments: rows of each segment of a fused weight, when weight_scale has one element a segment.

    Shapes: input [..., K], output [..., N] in the input's dtype (the autocast dtype under autocast).
    """

    weight: Tensor
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
        # Not persistent: the state_dict has the packed form, the same from every device.
        self.register_buffer("weight", self._device_form(packed), persistent=False)
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
            None if layer.bias is None else layer.bias.detach().to(torch.float32, copy=True),
            None if layer.norm_weight is None else layer.norm_weight.detach().to(torch.float32, copy=True),
            layer.norm_eps,
        )

    @property
    def packed(self) -> Tensor:
        """uint8 [N, ceil(K / 4)]: the weights themselves on the CPU, a copy made on demand on CUDA."""
        if self.weight.dtype == torch.uint8:
            return self.weight
        return ops.unprepack_ternary(self.weight, self.out_features, self.in_features)

    def _device_form(self, weight: Tensor) -> Tensor:
        """Weights in either form, in the one of the device on which they lie."""
        if weight.is_cuda and weight.dtype == torch.uint8:
            return ops.prepack_ternary(weight, self.in_features)
        if not weight.is_cuda and weight.dtype == torch.int32:
            return ops.unprepack_ternary(weight, self.out_features, self.in_features)
        return weight

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedBitLinear:
        """Moves as any module does and takes on the new device's form of the weights. A cast
        (``model.bfloat16()``) leaves the float32 buffers as they are: a rounded scale would be another weight.
        """
        exact = {name: getattr(self, name) for name in ("weight_scale", "bias", "norm_weight")}
        super()._apply(fn, recurse)
        for name, value in exact.items():
            moved = getattr(self, name)
            if moved is not None and moved.dtype != value.dtype:
                setattr(self, name, value.to(moved.device))
        self.weight = self._device_form(self.weight)
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # torch.load(map_location=...) has moved the buffers without _apply.
        self.weight = self._device_form(self.weight)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[prefix + "packed"] = self.packed if keep_vars else self.packed.detach()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        """As if ``packed`` were a buffer: it is one while the base class loads, which thereby checks the shape,
        reports missing keys and copies or assigns.
        """
        packed = self.packed
        self._buffers["packed"] = packed
        try:
            super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)
        finally:
            loaded = self._buffers.pop("packed")
        assert loaded is not None
        if loaded is not packed:  # assigned
            self.weight = self._device_form(loaded)
        elif packed is not self.weight:  # copied; in place, because a CUDA graph may hold the address
            self.weight.copy_(self._device_form(packed))

    def forward(self, x: Tensor) -> Tensor:
        if self.norm_weight is not None:
            x_i8, act_scale, _ = ops.rms_norm_quantize(x, self.norm_weight, self.norm_eps)
        else:
            x_i8, act_scale = ops.quantize_act_int8(x)
        return self.product(x_i8, act_scale, x.dtype)

    def product(self, x_i8: Tensor, act_scale: Tensor, dtype: torch.dtype) -> Tensor:
        """The layer on an input that is quantised already (and normalised, if the layer has a norm).

        Args:
            x_i8, act_scale: int8 [..., K] and float32 [...].
            dtype: of the result, unless autocast is on.
        """
        device_type = x_i8.device.type
        autocast = torch.is_autocast_enabled(device_type)
        return ops.int8xint2_mm(
            x_i8,
            act_scale,
            self.weight,
            self.weight_scale,
            bias=self.bias,
            segments=self.segments,
            out_features=self.out_features,
            out_dtype=torch.get_autocast_dtype(device_type) if autocast else dtype,
            weight_is_constant=True,  # the kernel before it is the quantiser, or another such product
        )

    def extra_repr(self) -> str:
        bits = 8 * self.weight.numel() * self.weight.element_size() / (self.in_features * self.out_features)
        return (
            f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, bits/weight={bits:.2f}"
        )
