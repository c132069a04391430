"""A linear layer with int8 weights and int8 activations, for the output head of a ternary model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bitnet_ext import ops
from bitnet_ext.nn.float_weight import NoFloatWeight
from bitnet_ext.nn.packed_state import check_scale
from bitnet_ext.ops.int8_mm import MAX_INT8_K, int8_mm, quantize_rows_int8, unprepack_int8
from bitnet_ext.ops.packed_linear import int8_linear, needs_gradient, served_dtype


class Int8Linear(nn.Module):
    """int8 weights with a scale a row x int8 activations with a scale a token (W8A8).

    Half the bytes of bfloat16, a quarter of float32. Of Gaussian weights and inputs with K from 256 to 4096,
    the result is 0.9 to 1.3 % from the float32 product (root mean square of the difference over that of the
    product); the int8 rounding of the weights and that of the activations each make up about half of its square.

    ``state_dict`` holds ``codes`` int8 [N, K], ``weight_scale`` float32 [N] and ``bias`` float32 [N] if there
    is one, whatever the device. In memory there is one copy of the weights, in the form that the device's
    product reads: the codes on the CPU, their prepacked form on CUDA.

    Gradients reach the input, straight through its quantiser, and the buffer ``bias`` where it requires one.

    Args:
        in_features, out_features: K and N.
        codes, weight_scale, bias: as in the state_dict.
        float_dtype: of the float weights around the layer; reported as ``weight.dtype``.

    Shapes: input [..., K], output [..., N] in the input's dtype (the autocast dtype under autocast).
    """

    weight_scale: Tensor
    bias: Tensor | None
    _weight: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        codes: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None = None,
        float_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if in_features > MAX_INT8_K:
            raise ValueError(f"Int8Linear: in_features must be <= {MAX_INT8_K}, got {in_features}")
        self.in_features = in_features
        self.out_features = out_features
        expected = {
            "codes": (codes, torch.int8, (out_features, in_features)),
            "weight_scale": (weight_scale, torch.float32, (out_features,)),
            "bias": (bias, torch.float32, (out_features,)),
        }
        for name, (value, dtype, shape) in expected.items():
            if value is not None and (value.dtype != dtype or tuple(value.shape) != shape):
                raise ValueError(
                    f"Int8Linear: {name} must be {dtype} of shape {shape}, got {value.dtype} "
                    f"of shape {tuple(value.shape)}"
                )
        fault = check_scale("weight_scale", weight_scale, 0, out_features)
        if fault is not None:
            raise ValueError(f"Int8Linear: {fault}")
        self._float_dtype = float_dtype
        # Not persistent: the state_dict has the codes, in the same form from every device.
        self.register_buffer("_weight", _device_form(codes), persistent=False)
        self.register_buffer("weight_scale", weight_scale)
        self.register_buffer("bias", bias)

    @classmethod
    @torch.no_grad()
    def from_linear(cls, layer: nn.Linear) -> Int8Linear:
        """Quantises a float layer, row by row; one on the meta device becomes an empty layer of the right shapes.

        Raises:
            ValueError: when the weights hold NaN or Inf.
        """
        return cls.from_weight(layer.weight, layer.bias)

    @classmethod
    @torch.no_grad()
    def from_weight(cls, weight: Tensor, bias: Tensor | None = None) -> Int8Linear:
        """Quantises a float matrix [N, K], for instance an embedding's, row by row; `bias` is [N] or None.

        Raises:
            ValueError: when the weights hold NaN or Inf.
        """
        if not weight.is_meta and not bool(torch.isfinite(weight).all()):
            raise ValueError("Int8Linear: the layer's weight holds NaN or Inf; finite values are needed")
        N, K = weight.shape
        codes, weight_scale = quantize_rows_int8(weight.detach())
        bias = None if bias is None else bias.detach().to(torch.float32, copy=True)
        return cls(K, N, codes, weight_scale, bias, weight.dtype)

    @property
    def codes(self) -> Tensor:
        """int8 [N, K]: the weights themselves on the CPU, a copy made on demand on CUDA."""
        if self._weight.dtype == torch.int8:
            return self._weight
        return unprepack_int8(self._weight, self.out_features, self.in_features)

    @property
    def weight(self) -> NoFloatWeight:
        """Shape, dtype and device of the float weight that this layer stands for. It has no values."""
        shape = (self.out_features, self.in_features)
        return NoFloatWeight("Int8Linear", shape, self._float_dtype, self._weight.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Int8Linear:
        """Moves as any module does and takes on the new device's form of the weights. A cast
        (``model.bfloat16()``) leaves the float32 buffers as they are: a rounded scale would be another weight.
        """
        exact = {"weight_scale": self.weight_scale, "bias": self.bias}
        super()._apply(fn, recurse)
        for name, value in exact.items():
            moved = getattr(self, name)
            if value is not None and moved.dtype != value.dtype:
                setattr(self, name, value.to(moved.device))
        if self._weight.dtype == torch.int32 and self._weight.device.type == "cpu":
            self._weight = self.codes
        else:
            self._weight = _device_form(self._weight)
        self._float_dtype = fn(torch.empty(0, dtype=self._float_dtype, device=self._weight.device)).dtype
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "codes"] = self.codes

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
        scale = state_dict.get(prefix + "weight_scale")
        if scale is not None:
            fault = check_scale(prefix + "weight_scale", scale, 0, self.out_features, shapes=False)
            if fault is not None:
                error_msgs.append(fault)
                return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        key = prefix + "codes"
        if key not in state_dict:
            if strict:
                missing_keys.append(key)
            return
        if key in unexpected_keys:
            unexpected_keys.remove(key)
        codes, shape = state_dict[key], (self.out_features, self.in_features)
        if codes.dtype != torch.int8 or tuple(codes.shape) != shape:
            error_msgs.append(
                f"{key} must be int8 of shape {shape}, got {codes.dtype} of shape {tuple(codes.shape)}"
            )
        elif local_metadata.get("assign_to_params_buffers", False):
            self._weight = _device_form(codes)
        else:
            with torch.no_grad():
                self._weight.copy_(_device_form(codes.to(self._weight.device)))

    def forward(self, x: Tensor) -> Tensor:
        out_dtype = served_dtype(x.device, x.dtype)
        if torch.is_grad_enabled() and needs_gradient(x, self.bias):
            return int8_linear(
                x,
                self._weight,
                self.weight_scale,
                out_features=self.out_features,
                bias=self.bias,
                out_dtype=out_dtype,
            )
        x_i8, act_scale = ops.quantize_act_int8(x)
        return int8_mm(
            x_i8,
            act_scale,
            self._weight,
            self.weight_scale,
            bias=self.bias,
            out_features=self.out_features,
            out_dtype=out_dtype,
            weight_is_constant=True,  # the kernel before it is the quantiser
        )

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"


def _device_form(weight: Tensor) -> Tensor:
    """Codes that lie on CUDA, prepacked; anything else as it is."""
    if weight.dtype == torch.int8 and weight.is_cuda:
        return torch.ops.bitnet_ext.prepack_int8(weight.contiguous())
    return weight
