"""The second half of a gated feed-forward block: gated product, norm, quantiser and ternary product as one operator."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from bitnet_ext.ops import _checks
from bitnet_ext.ops.bit_linear import (
    Backward,
    bit_linear_ref,
    check_backward,
    check_bias,
    check_quantized,
    result_dtype,
)
from bitnet_ext.ops.fused_quantize import Activation, check_activation
from bitnet_ext.ops.quantize_groups import QuantizedWeight, quantize_weights
from bitnet_ext.ops.rms_norm import check_gain

_ops = torch.ops.bitnet_ext


def glu_bit_linear(
    gate_up: Tensor,
    weight: Tensor,
    activation: Activation,
    *,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_eps: float | None = None,
    out_dtype: torch.dtype | None = None,
    backward: Backward = "exact",
    quantized: QuantizedWeight | None = None,
) -> Tensor:
    """:func:`bit_linear` of ``h = act(gate) * up`` for gate and up side by side, as one product left them.

    h goes to int8 without reaching memory (:func:`glu_quantize` says how it is rounded), and the backward computes
    it again: gate_up and the int8 form are all that is kept.

    Args:
        gate_up: [..., 2 K] float32, bfloat16 or float16; gate is the first half of each row.
        weight: latent weight [N, K], same dtypes.
        activation: "relu2" or "silu".
        bias: float32 [N] or None.
        norm_weight: float32 [K], gain of an RMSNorm of h; needs `norm_eps`.
        norm_eps: epsilon of that norm; None for no norm.
        out_dtype, backward, quantized: as for :func:`bit_linear`.

    Returns:
        [..., N] of `out_dtype`. Gradients reach gate_up, weight, bias and norm_weight.

    Raises:
        RuntimeError: on the CPU, when h or the normalised values hold NaN or Inf.
    """
    op = "glu_bit_linear"
    _checks.tensor(op, "gate_up", gate_up, dtypes=_checks.FLOATS, min_dim=1)
    _checks.tensor(op, "weight", weight, dtypes=_checks.FLOATS, dim=2)
    _checks.same_device(op, "weight", weight, "gate_up", gate_up)
    N, K = weight.shape
    _checks.at_least_one(op, "weight", N, "out_features (N)")
    _checks.at_least_one(op, "weight", K, "in_features (K)")
    if gate_up.shape[-1] != 2 * K:
        raise ValueError(
            f"{op}: gate_up must have 2 K = {2 * K} as its last dimension (K in_features of weight), "
            f"got {gate_up.shape[-1]}"
        )
    check_activation(op, activation)
    check_bias(op, bias, N, gate_up)
    if norm_weight is not None:
        if norm_eps is None:
            raise ValueError(f"{op}: norm_weight needs norm_eps, got norm_eps=None")
        check_gain(op, "norm_weight", norm_weight, weight)
        norm_weight = norm_weight.contiguous()
    if norm_eps is not None:
        _checks.number(op, "norm_eps", norm_eps, minimum=0)
    check_backward(op, backward)
    check_quantized(op, quantized)
    weight = weight.contiguous()
    packed, weight_scale = quantize_weights([weight]) if quantized is None else quantized
    return _ops.glu_bit_linear(
        gate_up.contiguous(),
        weight,
        packed,
        weight_scale,
        None if bias is None else bias.contiguous(),
        norm_weight,
        0.0 if norm_eps is None else norm_eps,
        norm_eps is not None,
        activation,
        result_dtype(op, out_dtype, gate_up),
        backward,
    )[0]


def glu_bit_linear_ref(
    gate_up: Tensor,
    weight: Tensor,
    activation: Activation,
    *,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_eps: float | None = None,
) -> Tensor:
    """:func:`glu_bit_linear` in plain PyTorch, the result in float32."""
    check_activation("glu_bit_linear_ref", activation)
    gate, up = gate_up.chunk(2, dim=-1)
    h = (F.relu(gate).square() if activation == "relu2" else F.silu(gate)) * up
    return bit_linear_ref(h, weight, bias=bias, norm_weight=norm_weight, norm_eps=norm_eps)


def glu_backward_ref(
    grad_y: Tensor,
    gate_up: Tensor,
    activation: Activation,
    gain: Tensor | None,
    rstd: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of ``norm(act(gate) * up)`` (without a norm where rstd is None) by autograd in float64, h rounded to
    gate_up's dtype as the forward rounds it: grad_gate_up in that dtype, and grad_gain float32.
    """
    gate, up = gate_up.chunk(2, dim=-1)
    activated = F.relu(gate).square() if activation == "relu2" else F.silu(gate)
    h = (activated * up).double()
    grad = grad_y.double()
    grad_gain = None
    if rstd is not None:
        hhat = h * rstd.double().unsqueeze(-1)
        if gain is not None:
            grad_gain = (grad * hhat).reshape(-1, h.shape[-1]).sum(0).float()
            grad = grad * gain.double()
        grad = rstd.double().unsqueeze(-1) * (grad - hhat * (grad * hhat).mean(-1, keepdim=True))
    g = gate.double()
    if activation == "relu2":
        slope = 2 * F.relu(g)
    else:
        slope = g.sigmoid() * (1 + g * (1 - g.sigmoid()))
    return torch.cat([grad * up.double() * slope, grad * activated.double()], dim=-1).to(
        gate_up.dtype
    ), grad_gain
