"""The training form of a ternary linear layer."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from bitnet_ext import ops
from bitnet_ext.nn.weight_cache import WeightCache

#: "b1.58": ternary weights and int8 activations (arXiv 2402.17764). "none": the full-precision twin.
QUANTIZATIONS = ("b1.58", "none")


class BitLinear(nn.Module):
    """A linear layer whose product is that of packed ternary inference, trained straight through.

    A drop-in for ``nn.Linear``: the same parameter names, initialisation and shapes. The latent weight is a
    float parameter; each forward quantises it (absmean) and the input (absmax per token).

    Args:
        in_features, out_features: K and N.
        bias: adds a float32 bias [N].
        norm: puts an RMSNorm with a gain (`norm_weight`, [K]) before the quantiser, fused with it.
        norm_eps: epsilon of that norm.
        quantization: "b1.58", or "none" for the full-precision twin with the same parameters.
        backward: how the two products of the backward pass are computed, "exact" or "int8", see
            :func:`bitnet_ext.ops.bit_linear`; may be set at any time. Full precision has only the first.

    Each forward uses the weight as it is then. Within :func:`bitnet_ext.nn.frozen_weights` it is quantised only once.

    Shapes: input [..., K], output [..., N].
    """

    norm_weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        *,
        norm: bool = False,
        norm_eps: float = 1e-5,
        quantization: str = "b1.58",
        backward: ops.Backward = "exact",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if in_features < 1 or out_features < 1:
            raise ValueError(
                f"BitLinear: in_features and out_features must be >= 1, got {in_features} and {out_features}"
            )
        if quantization not in QUANTIZATIONS:
            raise ValueError(f"BitLinear: quantization must be one of {QUANTIZATIONS}, got {quantization!r}")
        self.in_features = in_features
        self.out_features = out_features
        self.norm_eps = norm_eps
        self.quantization = quantization
        self.backward_mode: ops.Backward = backward
        self.cache = WeightCache()
        self.weight = nn.Parameter(torch.empty(out_features, in_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_features, device=device)) if bias else None
        self.norm_weight = nn.Parameter(torch.ones(in_features, device=device)) if norm else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As nn.Linear: uniform in +-1 / sqrt(K); the gain is 1."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.in_features)
            nn.init.uniform_(self.bias, -bound, bound)
        if self.norm_weight is not None:
            nn.init.ones_(self.norm_weight)

    @property
    def is_quantized(self) -> bool:
        return self.quantization != "none"

    @property
    def float_bias(self) -> Tensor | None:
        """The bias as it enters: in float32, also in a model cast to bfloat16."""
        return None if self.bias is None else self.bias.float()

    @property
    def float_gain(self) -> Tensor | None:
        """The norm's gain as it enters, in float32."""
        return None if self.norm_weight is None else self.norm_weight.float()

    def forward(self, x: Tensor) -> Tensor:
        gain = self.float_gain
        weight = self.weight  # read once: a parametrised layer computes it
        if self.is_quantized:
            norm_eps = None if gain is None else self.norm_eps
            return ops.bit_linear(
                x,
                weight,
                bias=self.float_bias,
                norm_weight=gain,
                norm_eps=norm_eps,
                backward=self.backward_mode,
                quantized=self.cache.get([weight]),
            )
        if gain is not None:
            x = ops.rms_norm(x, gain, self.norm_eps)
        return nn.functional.linear(x, weight, self.bias)

    def extra_repr(self) -> str:
        return (
            f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, "
            f"norm={self.norm_weight is not None}, quantization={self.quantization!r}, "
            f"backward={self.backward_mode!r}"
        )


def set_backward(model: nn.Module, backward: ops.Backward) -> None:
    """Has every :class:`BitLinear` of `model` compute its gradients by "exact" or "int8" products."""
    if backward not in ops.BACKWARDS:
        raise ValueError(f"set_backward: backward must be {' or '.join(ops.BACKWARDS)}, got {backward!r}")
    for module in model.modules():
        if isinstance(module, BitLinear):
            module.backward_mode = backward
