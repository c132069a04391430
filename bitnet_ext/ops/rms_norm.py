"""RMSNorm, alone or fused with the sum in front of it or the int8 quantiser behind it, and its backward."""

from __future__ import annotations

import torch
from torch import Tensor

from bitnet_ext.ops import _checks
from bitnet_ext.ops.quantize import quantize_act_int8_ref

_ops = torch.ops.bitnet_ext


def rms_norm_quantize(x: Tensor, gain: Tensor | None, eps: float = 1e-5) -> tuple[Tensor, Tensor, Tensor]:
    """RMSNorm (arXiv 1910.07467), then :func:`quantize_act_int8`, in one pass over x.

    ``rstd = 1 / sqrt(mean_k x^2 + eps)`` with the mean in float64; ``y = (x * rstd) * gain`` in float32.

    Args:
        x: [..., K] float32, bfloat16 or float16.
        gain: float32 [K], or None for a norm without a gain.
        eps: added to the mean square; >= 0.

    Returns:
        x_i8 int8 [..., K], act_scale float32 [...], rstd float32 [...].
    """
    op = "rms_norm_quantize"
    _checks.tensor(op, "x", x, dtypes=_checks.FLOATS, min_dim=1)
    _checks.at_least_one(op, "x", x.shape[-1], "a last dimension (K)")
    _checks.number(op, "eps", eps, minimum=0)
    if gain is not None:
        check_gain(op, "gain", gain, x)
        gain = gain.contiguous()
    return _ops.rms_norm_quantize(x.contiguous(), gain, eps)


def rms_norm_quantize_ref(x: Tensor, gain: Tensor | None, eps: float = 1e-5) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`rms_norm_quantize` in plain PyTorch."""
    rstd = (x.double().square().mean(-1) + eps).rsqrt().float()
    y = x.float() * rstd.unsqueeze(-1)
    if gain is not None:
        y = y * gain
    return (*quantize_act_int8_ref(y), rstd)


def rms_norm(x: Tensor, gain: Tensor | None, eps: float = 1e-5) -> Tensor:
    """RMSNorm (arXiv 1910.07467) in one pass, with a fused backward.

    ``rstd = 1 / sqrt(mean_k x^2 + eps)`` with the mean in float64; ``y = (x * rstd) * gain`` in float32.

    Args:
        x: [..., K] float32, bfloat16 or float16.
        gain: float32 [K], or None for a norm without a gain.
        eps: added to the mean square; >= 0.

    Returns:
        y [..., K] in x's dtype. Gradients reach x and gain.
    """
    op = "rms_norm"
    return _ops.rms_norm(*_norm_operands(op, x, None, gain, eps))[0]


def rms_norm_ref(x: Tensor, gain: Tensor | None, eps: float = 1e-5) -> Tensor:
    """:func:`rms_norm` in plain PyTorch."""
    rstd = (x.double().square().mean(-1) + eps).rsqrt().float()
    y = x.float() * rstd.unsqueeze(-1)
    return (y if gain is None else y * gain).to(x.dtype)


def add_rms_norm(x: Tensor, delta: Tensor, gain: Tensor | None, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """``sum = x + delta``, rounded to x's dtype, and :func:`rms_norm` of it, in one pass; in the backward too.

    For the residual stream x of a transformer and the output `delta` of the block before: with
    ``y, x = add_rms_norm(x, delta, ...)`` no sum, forward or backward, is a pass of its own.

    Args:
        x: [..., K] float32, bfloat16 or float16.
        delta: of x's shape and dtype, or bfloat16 or float16 where x is float32.
        gain, eps: of the norm.

    Returns:
        y and sum, both of x's shape and dtype. Gradients reach x, delta and gain, from both results.
    """
    op = "add_rms_norm"
    check_delta(op, x, delta)
    y, total, _ = _ops.rms_norm(*_norm_operands(op, x, delta, gain, eps))
    return y, total


def add_rms_norm_ref(
    x: Tensor, delta: Tensor, gain: Tensor | None, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """:func:`add_rms_norm` in plain PyTorch."""
    total = (x + delta).to(x.dtype)
    return rms_norm_ref(total, gain, eps), total


def rms_norm_backward(
    grad_y: Tensor,
    x: Tensor,
    gain: Tensor | None,
    rstd: Tensor,
    grad_residual: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of ``y = x * rstd * gain``.

    Args:
        grad_y: [..., K]; x: [..., K]; gain: float32 [K] or None; rstd: float32 [...] from the forward.
        grad_residual: of x's shape and dtype, what reaches x by another way; added to its gradient.

    Returns:
        grad_x [..., K] in x's dtype and grad_gain float32 [K] (None without a gain).
    """
    op = "rms_norm_backward"
    _checks.tensor(op, "grad_y", grad_y, dtypes=_checks.FLOATS, min_dim=1)
    _checks.tensor(op, "x", x, dtypes=_checks.FLOATS, min_dim=1)
    _checks.shape(op, "grad_y", grad_y, x.shape, "the shape of x")
    _checks.tensor(op, "rstd", rstd, dtypes=(torch.float32,))
    _checks.shape(op, "rstd", rstd, x.shape[:-1], "the leading dimensions of x")
    _checks.same_device(op, "grad_y", grad_y, "x", x)
    _checks.same_device(op, "rstd", rstd, "x", x)
    if gain is not None:
        check_gain(op, "gain", gain, x)
        gain = gain.contiguous()
    if grad_residual is not None:
        _checks.tensor(op, "grad_residual", grad_residual, dtypes=(x.dtype,))
        _checks.shape(op, "grad_residual", grad_residual, x.shape, "the shape of x")
        _checks.same_device(op, "grad_residual", grad_residual, "x", x)
        grad_residual = grad_residual.contiguous()
    grad_x, _, grad_gain = _ops.rms_norm_backward(
        grad_y.contiguous(), x.contiguous(), gain, rstd.contiguous(), grad_residual, x.dtype
    )
    return grad_x, None if gain is None else grad_gain


def rms_norm_backward_ref(
    grad_y: Tensor,
    x: Tensor,
    gain: Tensor | None,
    rstd: Tensor,
    grad_residual: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """:func:`rms_norm_backward` in plain PyTorch, in float64."""
    xhat = x.double() * rstd.double().unsqueeze(-1)
    grad = grad_y.double()
    scaled = grad if gain is None else grad * gain.double()
    grad_x = rstd.double().unsqueeze(-1) * (scaled - xhat * (scaled * xhat).mean(-1, keepdim=True))
    if grad_residual is not None:
        grad_x = grad_x + grad_residual.double()
    if gain is None:
        return grad_x.to(x.dtype), None
    return grad_x.to(x.dtype), (grad * xhat).reshape(-1, x.shape[-1]).sum(0).float()


def _norm_operands(
    op: str, x: Tensor, delta: Tensor | None, gain: Tensor | None, eps: float
) -> tuple[Tensor, Tensor | None, Tensor | None, float]:
    _checks.tensor(op, "x", x, dtypes=_checks.FLOATS, min_dim=1)
    _checks.at_least_one(op, "x", x.shape[-1], "a last dimension (K)")
    _checks.number(op, "eps", eps, minimum=0)
    if gain is not None:
        check_gain(op, "gain", gain, x)
        gain = gain.contiguous()
    return x.contiguous(), None if delta is None else delta.contiguous(), gain, eps


def check_delta(op: str, x: Tensor, delta: Tensor) -> None:
    _checks.tensor(op, "x", x, dtypes=_checks.FLOATS, min_dim=1)
    accepted = _checks.FLOATS if x.dtype == torch.float32 else (x.dtype,)
    _checks.tensor(op, "delta", delta, dtypes=accepted)
    _checks.shape(op, "delta", delta, x.shape, "the shape of x")
    _checks.same_device(op, "delta", delta, "x", x)


def check_gain(op: str, name: str, gain: Tensor, x: Tensor) -> None:
    _checks.tensor(op, name, gain, dtypes=(torch.float32,), dim=1)
    _checks.shape(op, name, gain, (x.shape[-1],), "the last dimension of x")
    _checks.same_device(op, name, gain, "x", x)
