"""The fused optimiser update: Adam with coupled L2 (as torch.optim.Adam) or decoupled decay (AdamW)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from bitnet_ext.ops import _checks

_ops = torch.ops.bitnet_ext


def sum_of_squares(tensors: Sequence[Tensor]) -> Tensor:
    """Sum of the squares of all elements of float32 `tensors`, float64 [], the same on every run."""
    op = "sum_of_squares"
    _check_list(op, "tensors", tensors)
    return _ops.sum_of_squares([t.contiguous() for t in tensors])


def sum_of_squares_ref(tensors: Sequence[Tensor]) -> Tensor:
    """:func:`sum_of_squares` in plain PyTorch."""
    return torch.stack([t.double().square().sum() for t in tensors]).sum()


def adam_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avg: Sequence[Tensor],
    exp_avg_sq: Sequence[Tensor],
    hyper: Tensor,
    grad_scale: Tensor,
    *,
    beta1: float = 0.9,
    beta2: float = 0.95,
    eps: float = 1e-8,
    decoupled: bool,
    decay: bool = True,
) -> None:
    """One Adam update of `params` in place, in one pass over memory.

    ``g = grad * grad_scale``; with coupled L2 (``decoupled=False``, Kingma & Ba with the L2 term in the
    gradient, as ``torch.optim.Adam``) ``g += weight_decay * p``; with decoupled decay (AdamW, arXiv
    1711.05101) ``p *= 1 - lr * weight_decay``. Then ``m = beta1 m + (1 - beta1) g``,
    ``v = beta2 v + (1 - beta2) g^2``, ``p -= lr / bc1 * m / (sqrt(v) / sqrt(bc2) + eps)``.

    Args:
        params, grads, exp_avg, exp_avg_sq: equally many float32 tensors of equal shapes on one device.
        hyper: float32 [4] on that device: lr, weight_decay, bc1 = 1 - beta1^t, bc2 = 1 - beta2^t. On the
            device, so that a captured graph follows a schedule.
        grad_scale: float32 [], the factor of the gradients (clipping, accumulation).
        decay: whether weight_decay applies to these parameters at all.
    """
    op = "adam_step_"
    for name, tensors in (
        ("params", params),
        ("grads", grads),
        ("exp_avg", exp_avg),
        ("exp_avg_sq", exp_avg_sq),
    ):
        _check_list(op, name, tensors)
        if len(tensors) != len(params):
            raise ValueError(
                f"{op}: {name} must have as many tensors as params ({len(params)}), got {len(tensors)}"
            )
        for index, (t, p) in enumerate(zip(tensors, params, strict=True)):
            if t.shape != p.shape or t.device != p.device:
                raise ValueError(
                    f"{op}: {name}[{index}] must have the shape {tuple(p.shape)} and device {p.device} of "
                    f"params[{index}], got {tuple(t.shape)} on {t.device}"
                )
            if name != "grads" and not t.is_contiguous():
                raise ValueError(f"{op}: {name}[{index}] must be contiguous, got strides {t.stride()}")
    _checks.tensor(op, "hyper", hyper, dtypes=(torch.float32,))
    _checks.shape(op, "hyper", hyper, (4,), "lr, weight_decay, 1 - beta1^t, 1 - beta2^t")
    _checks.tensor(op, "grad_scale", grad_scale, dtypes=(torch.float32,))
    _checks.same_device(op, "hyper", hyper, "params", params[0])
    _checks.same_device(op, "grad_scale", grad_scale, "params", params[0])
    _ops.adam_step_(
        list(params),
        [g.contiguous() for g in grads],
        list(exp_avg),
        list(exp_avg_sq),
        hyper.contiguous(),
        grad_scale,
        beta1,
        beta2,
        eps,
        decoupled,
        decay,
    )
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version([*params, *exp_avg, *exp_avg_sq])


def adam_step_ref(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    lr: float,
    weight_decay: float,
    step: int,
    grad_scale: float = 1.0,
    beta1: float = 0.9,
    beta2: float = 0.95,
    eps: float = 1e-8,
    decoupled: bool,
    decay: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`adam_step_` for one tensor in plain PyTorch: the new param, exp_avg and exp_avg_sq."""
    grad = grad * grad_scale
    if decay and not decoupled:
        grad = grad + weight_decay * param
    if decay and decoupled:
        param = param * (1 - lr * weight_decay)
    exp_avg = beta1 * exp_avg + (1 - beta1) * grad
    exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * grad.square()
    denominator = exp_avg_sq.sqrt() / math.sqrt(1 - beta2**step) + eps
    return param - lr / (1 - beta1**step) * exp_avg / denominator, exp_avg, exp_avg_sq


def _check_list(op: str, name: str, tensors: Sequence[Tensor]) -> None:
    if isinstance(tensors, Tensor) or len(tensors) == 0:
        raise ValueError(f"{op}: {name} must be a list of at least one tensor, got {type(tensors).__name__}")
    for index, t in enumerate(tensors):
        _checks.tensor(op, f"{name}[{index}]", t, dtypes=(torch.float32,))
        _checks.same_device(op, f"{name}[{index}]", t, f"{name}[0]", tensors[0])
