"""The inference form of a ternary linear layer: a quarter of a byte a weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bitnet_ext import ops
from bitnet_ext.nn.bit_linear import BitLinear
from bitnet_ext.nn.float_weight import NoFloatWeight
from bitnet_ext.nn.packed_state import check_codes, check_scale, check_vector
from bitnet_ext.ops.fused_quantize import Activation
from bitnet_ext.ops.packed_linear import needs_gradient, packed_glu_linear, packed_linear, served_dtype


class PackedBitLinear(nn.Module):
    """Packed 2-bit weights x int8 activations; the forward of the :class:`BitLinear` it was made from.

    ``state_dict`` holds ``packed`` uint8 [N, ceil(K / 4)], ``weight_scale`` float32 (1, N or one a segment),
    ``bias`` float32 [N] or None and ``norm_weight`` float32 [K] or None, whatever the device. In memory there is
    one copy of the weights, in the form that the device's product reads: packed on the CPU, prepacked
    (docs/packing.md) on CUDA. The property ``packed`` gives the packed form everywhere.

    Gradients reach the input, by the rule of the training form, so that adapters and prompts train in front of packed
    layers. They reach the buffers ``bias`` and ``norm_weight`` too where these require a gradient. The codes are
    constants.

    Args:
        in_features, out_features: K and N.
        packed, weight_scale, bias, norm_weight: as in the state_dict; with `packed` on CUDA the layer makes the
            prepacked form of it and does not keep it.
        norm_eps: epsilon of the norm.
        segments: rows of each segment of a fused weight, when weight_scale has one element a segment.
        float_dtype: of the float weights around the layer; reported as ``weight.dtype``.

    Shapes: input [..., K], output [..., N] in the input's dtype (the autocast dtype under autocast).

    Raises:
        ValueError: for a tensor of another dtype or shape, a stored code of 3, padding that is not 0, or a scale that
            is negative, NaN or Inf.
    """

    _weight: Tensor
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
        float_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        for fault in (
            check_codes("packed", packed, out_features, in_features),
            check_scale("weight_scale", weight_scale, len(segments), out_features),
            check_vector("bias", bias, out_features),
            check_vector("norm_weight", norm_weight, in_features),
        ):
            if fault is not None:
                raise ValueError(f"PackedBitLinear: {fault}")
        self.in_features = in_features
        self.out_features = out_features
        self.norm_eps = norm_eps
        self.segments = tuple(segments)
        self._float_dtype = float_dtype
        # Not persistent: the state_dict has the packed form, the same from every device.
        self.register_buffer("_weight", self._device_form(packed), persistent=False)
        self.register_buffer("weight_scale", weight_scale)
        self.register_buffer("bias", bias)
        self.register_buffer("norm_weight", norm_weight)

    @classmethod
    @torch.no_grad()
    def from_bit_linear(cls, layer: BitLinear) -> PackedBitLinear:
        """Quantises and packs a trained layer; one on the meta device becomes an empty layer of the right shapes.

        Raises:
            ValueError: when the weights hold NaN or Inf.
        """
        if not layer.is_quantized:
            raise ValueError("PackedBitLinear: the layer must have quantization 'b1.58', got 'none'")
        weight = layer.weight.detach()
        if not weight.is_meta and not bool(torch.isfinite(weight).all()):
            raise ValueError("PackedBitLinear: the layer's weight holds NaN or Inf; finite values are needed")
        packed, weight_scale = ops.quantize_pack_weight(weight)
        bias, gain = layer.bias, layer.norm_weight
        return cls(
            layer.in_features,
            layer.out_features,
            packed,
            weight_scale,
            None if bias is None else bias.detach().to(torch.float32, copy=True),
            None if gain is None else gain.detach().to(torch.float32, copy=True),
            layer.norm_eps,
            float_dtype=weight.dtype,
        )

    @property
    def packed(self) -> Tensor:
        """uint8 [N, ceil(K / 4)]: the weights themselves on the CPU, a copy made on demand on CUDA."""
        if self._weight.dtype == torch.uint8:
            return self._weight
        return ops.unprepack_ternary(self._weight, self.out_features, self.in_features)

    @property
    def weight(self) -> NoFloatWeight:
        """Shape, dtype and device of the float weight that this layer stands for. It has no values."""
        shape = (self.out_features, self.in_features)
        return NoFloatWeight("PackedBitLinear", shape, self._float_dtype, self._weight.device)

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
        self._weight = self._device_form(self._weight)
        self._float_dtype = fn(torch.empty(0, dtype=self._float_dtype, device=self._weight.device)).dtype
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # torch.load(map_location=...) has moved the buffers without _apply.
        self._weight = self._device_form(self._weight)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[prefix + "packed"] = self.packed if keep_vars else self.packed.detach()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """As if ``packed`` were a buffer: it is one while the base class loads, which thereby checks the shape,
        reports missing keys and copies or assigns. Values that no ternary weight has leave the layer as it is.
        """
        faults = []
        codes, scale = (state_dict.get(prefix + name) for name in ("packed", "weight_scale"))
        if codes is not None:
            faults.append(
                check_codes(prefix + "packed", codes, self.out_features, self.in_features, shapes=False)
            )
        if scale is not None:
            faults.append(
                check_scale(
                    prefix + "weight_scale", scale, len(self.segments), self.out_features, shapes=False
                )
            )
        if strict and codes is None and prefix + "weight" in state_dict:
            faults.append(
                f"{prefix}weight is a weight of the training form; load it before pack_model, which packs it"
            )
        if any(faults):
            error_msgs.extend(fault for fault in faults if fault is not None)
            return
        packed = self.packed
        self._buffers["packed"] = packed
        try:
            super()._load_from_state_dict(
                state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
            )
        finally:
            loaded = self._buffers.pop("packed")
        assert loaded is not None
        if loaded is not packed:  # assigned
            self._weight = self._device_form(loaded)
            for name in ("weight_scale", "bias", "norm_weight"):
                value = getattr(self, name)
                if value is not None:
                    setattr(self, name, value.float())
        elif packed is not self._weight:  # copied; in place, because a CUDA graph may hold the address
            self._weight.copy_(self._device_form(packed))

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and needs_gradient(x, self.bias, self.norm_weight):
            return self.trainable(x, self.norm_weight, self.norm_eps)
        if self.norm_weight is not None:
            x_i8, act_scale, _ = ops.rms_norm_quantize(x, self.norm_weight, self.norm_eps)
        else:
            x_i8, act_scale = ops.quantize_act_int8(x)
        return self.product(x_i8, act_scale, x.dtype)

    def trainable(self, x: Tensor, norm_weight: Tensor | None, norm_eps: float) -> Tensor:
        """The layer on x after a norm, if there is a gain of one, with gradients of x, of that gain and of the bias."""
        return packed_linear(
            x,
            self._weight,
            self.weight_scale,
            out_features=self.out_features,
            bias=self.bias,
            norm_weight=norm_weight,
            norm_eps=None if norm_weight is None else norm_eps,
            segments=self.segments,
            out_dtype=served_dtype(x.device, x.dtype),
        )

    def trainable_glu(self, gate_up: Tensor, activation: Activation) -> Tensor:
        """The layer on ``act(gate) * up`` with gradients; gate and up side by side."""
        if self.segments:
            gate, up = gate_up.chunk(2, dim=-1)
            h = (F.relu(gate).square() if activation == "relu2" else F.silu(gate)) * up
            return self.trainable(h, self.norm_weight, self.norm_eps)
        return packed_glu_linear(
            gate_up,
            self._weight,
            self.weight_scale,
            activation,
            out_features=self.out_features,
            bias=self.bias,
            norm_weight=self.norm_weight,
            norm_eps=None if self.norm_weight is None else self.norm_eps,
            out_dtype=served_dtype(gate_up.device, gate_up.dtype),
        )

    def product(self, x_i8: Tensor, act_scale: Tensor, dtype: torch.dtype) -> Tensor:
        """The layer on an input that is quantised already (and normalised, if the layer has a norm).

        Args:
            x_i8, act_scale: int8 [..., K] and float32 [...].
            dtype: of the result, unless autocast is on.
        """
        return ops.int8xint2_mm(
            x_i8,
            act_scale,
            self._weight,
            self.weight_scale,
            bias=self.bias,
            segments=self.segments,
            out_features=self.out_features,
            out_dtype=served_dtype(x_i8.device, dtype),
            weight_is_constant=True,  # the kernel before it is the quantiser, or another such product
        )

    def extra_repr(self) -> str:
        bits = 8 * self._weight.numel() * self._weight.element_size() / (self.in_features * self.out_features)
        return (
            f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, bits/weight={bits:.2f}"
        )
