"""Int8 activations straight from what stands before the quantiser: residual and norm, or the gated product.

Both give what the separate operators give; only the results of the steps between do not reach memory.
"""

from __future__ import annotations

import itertools
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from bitnet_ext.ops import _checks
from bitnet_ext.ops.quantize import quantize_act_int8_ref
from bitnet_ext.ops.rms_norm import check_gain, rms_norm_quantize_ref

_ops = torch.ops.bitnet_ext

Activation = Literal["relu2", "silu"]
ACTIVATIONS = ("relu2", "silu")


def add_rms_norm_quantize(
    x: Tensor, residual: Tensor, gain: Tensor | None, eps: float = 1e-5
) -> tuple[Tensor, Tensor, Tensor]:
    """``sum = x + residual``, then :func:`rms_norm_quantize` of it, in one pass.

    The sum is rounded to its dtype before the norm: x_i8 and act_scale are those of ``x + residual`` in PyTorch
    followed by ``rms_norm_quantize``, bit for bit.

    Args:
        x: [..., K] float32, bfloat16 or float16, the output of a block.
        residual: what it is added to, of x's shape and dtype.
        gain: float32 [K], or None for a norm without a gain.
        eps: added to the mean square; >= 0.

    Returns:
        x_i8 int8 [..., K], act_scale float32 [...], sum [..., K] in x's dtype.

    Raises:
        RuntimeError: on the CPU, when the sum or the normalised values hold NaN or Inf. On CUDA act_scale of
            such a token is NaN.

    Source: RMSNorm is arXiv 1910.07467; the quantiser that of :func:`quantize_act_int8`.
    """
    op = "add_rms_norm_quantize"
    _checks.tensor(op, "x", x, dtypes=_checks.FLOATS, min_dim=1)
    _checks.at_least_one(op, "x", x.shape[-1], "a last dimension (K)")
    _checks.tensor(op, "residual", residual, dtypes=(x.dtype,))
    _checks.shape(op, "residual", residual, x.shape, "the shape of x")
    _checks.same_device(op, "residual", residual, "x", x)
    gain = _norm_arguments(op, gain, eps, x)
    return _ops.add_rms_norm_quantize(x.contiguous(), residual.contiguous(), gain, eps)


def add_rms_norm_quantize_ref(
    x: Tensor, residual: Tensor, gain: Tensor | None, eps: float = 1e-5
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`add_rms_norm_quantize` in plain PyTorch."""
    total = x + residual
    x_i8, act_scale, _ = rms_norm_quantize_ref(total, gain, eps)
    return x_i8, act_scale, total


def glu_quantize(
    gate: Tensor,
    up: Tensor,
    activation: Activation,
    gain: Tensor | None = None,
    eps: float = 1e-5,
    normalize: bool = True,
) -> tuple[Tensor, Tensor]:
    """``h = act(gate) * up``, an RMSNorm of it (the sub-norm of BitNet b1.58 2B4T), then
    :func:`quantize_act_int8`, in one pass.

    ``act`` is ``relu(gate)^2`` for "relu2" or ``gate / (1 + exp(-gate))`` for "silu". Its result and the product
    are rounded to the dtype of gate, as PyTorch rounds them when each is an operator of its own; the norm and
    the quantiser then compute in float32. With "relu2" the integers are those of the separate operators, with
    "silu" as far as the exponentials of this build and of PyTorch agree.

    Args:
        gate: [..., K] float32, bfloat16 or float16. Its rows, and those of `up`, may lie apart, so that both can
            be halves of one fused product ([..., 2K]`.chunk(2, -1)`); other strides cost a copy.
        up: of gate's shape and dtype.
        activation: "relu2" or "silu".
        gain: of the norm, float32 [K], or None for a norm without a gain.
        eps: added to the mean square; >= 0.
        normalize: False leaves the norm out; gain must be None then.

    Returns:
        x_i8 int8 [..., K] and act_scale float32 [...].

    Raises:
        RuntimeError: on the CPU, when h or the normalised values hold NaN or Inf. On CUDA act_scale of such a
            token is NaN.

    Source: squared ReLU and the sub-norm: "BitNet b1.58 2B4T Technical Report" (arXiv 2504.12285); gated units:
    "GLU Variants Improve Transformer" (arXiv 2002.05202).
    """
    op = "glu_quantize"
    _checks.tensor(op, "gate", gate, dtypes=_checks.FLOATS, min_dim=1)
    _checks.at_least_one(op, "gate", gate.shape[-1], "a last dimension (K)")
    _checks.tensor(op, "up", up, dtypes=(gate.dtype,))
    _checks.shape(op, "up", up, gate.shape, "the shape of gate")
    _checks.same_device(op, "up", up, "gate", gate)
    check_activation(op, activation)
    _checks.boolean(op, "normalize", normalize)
    if gain is not None and not normalize:
        raise ValueError(f"{op}: gain must be None when normalize is False, got a gain")
    gain = _norm_arguments(op, gain, eps, gate)
    return _ops.glu_quantize(_evenly_spaced(gate), _evenly_spaced(up), activation, gain, eps, normalize)


def glu_quantize_ref(
    gate: Tensor,
    up: Tensor,
    activation: Activation,
    gain: Tensor | None = None,
    eps: float = 1e-5,
    normalize: bool = True,
) -> tuple[Tensor, Tensor]:
    """:func:`glu_quantize` in plain PyTorch."""
    check_activation("glu_quantize_ref", activation)
    h = (F.relu(gate).square() if activation == "relu2" else F.silu(gate)) * up
    if not normalize:
        return quantize_act_int8_ref(h)
    return rms_norm_quantize_ref(h, gain, eps)[:2]


def check_activation(op: str, activation: str) -> None:
    _checks.one_of(op, "activation", activation, ACTIVATIONS)


def _norm_arguments(op: str, gain: Tensor | None, eps: float, x: Tensor) -> Tensor | None:
    """Checks the norm's arguments; returns the gain as the kernels take it."""
    _checks.number(op, "eps", eps, minimum=0)
    if gain is None:
        return None
    check_gain(op, "gain", gain, x)
    return gain.contiguous()


def _evenly_spaced(t: Tensor) -> Tensor:
    """`t` itself where its rows are contiguous and all one stride apart, else a contiguous copy."""
    if t.shape[-1] > 1 and t.stride(-1) != 1:
        return t.contiguous()
    sizes = [(size, stride) for size, stride in zip(t.shape[:-1], t.stride()[:-1], strict=True) if size != 1]
    even = all(
        outer_stride == inner_size * inner_stride
        for (_, outer_stride), (inner_size, inner_stride) in itertools.pairwise(sizes)
    )
    return t if even else t.contiguous()
