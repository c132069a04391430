"""The fused optimiser update: Adam with coupled L2 (as torch.optim.Adam) or decoupled decay (AdamW)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

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


def square_partials(tensor: Tensor) -> Tensor:
    """The part of :func:`clip_gradients_` that reads a float32 `tensor`: sums of its squares over runs of
    elements, float64 [n]; how many depends on its size and device.
    """
    op = "square_partials"
    _checks.tensor(op, "tensor", tensor, dtypes=(torch.float32,))
    return _ops.square_partials(tensor.contiguous())


def clip_gradients_(
    grads: Sequence[Tensor],
    step: Tensor,
    max_norm: float | None,
    latch: Tensor,
    *,
    known: tuple[int, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """The global gradient norm and the factor that clips it, and a latch for gradients that are not finite.

    ``norm = sqrt(sum_i |g_i|^2)`` in float64, rounded once; ``grad_scale = min(1, max_norm / (norm + 1e-6))`` as
    ``torch.nn.utils.clip_grad_norm_``. The first time that the norm is not finite, latch takes the step and the
    sums of squares of every tensor (those of a tensor that holds NaN or Inf are not finite), and from then on
    grad_scale is NaN, which makes :func:`adam_step_` change nothing. The host may look at the latch much later.

    Args:
        grads: n float32 tensors on one device.
        step: int64 of one element, the number of this step, >= 0.
        max_norm: None for no clipping.
        latch: float64 [2 + n] on the same device, changed in place: the step, a counter of the kernel's,
            the sums. Before the first step the caller makes it 0 and latch[0] -1.
        known: an index into grads and that gradient's :func:`square_partials`: it is not read again.

    Returns:
        norm and grad_scale, float32 [].
    """
    op = "clip_gradients_"
    _check_list(op, "grads", grads)
    _checks.tensor(op, "step", step, dtypes=(torch.int64,))
    _checks.tensor(op, "latch", latch, dtypes=(torch.float64,))
    _checks.shape(op, "latch", latch, (2 + len(grads),), "a step, a counter, one sum for each of grads")
    _checks.same_device(op, "step", step, "grads", grads[0])
    _checks.same_device(op, "latch", latch, "grads", grads[0])
    if max_norm is not None:
        _checks.number(op, "max_norm", max_norm)
    if max_norm is not None and not max_norm > 0:
        raise ValueError(f"{op}: max_norm must be > 0 or None, got {max_norm}")
    bound = math.inf if max_norm is None else max_norm
    if known is not None:
        if not isinstance(known, (tuple, list)) or len(known) != 2:
            raise TypeError(f"{op}: known must be an index and a tensor, got {_checks.describe(known)}")
        _checks.integer(op, "known[0]", known[0], minimum=0)
        _checks.tensor(op, "known[1]", known[1], dtypes=(torch.float64,), dim=1)
    index, partials = (-1, None) if known is None else known
    norm, grad_scale = _ops.clip_gradients_(
        [g.contiguous() for g in grads], step, bound, latch, partials, index
    )
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(latch)
    return norm, grad_scale


def clip_gradients_ref(
    grads: Sequence[Tensor], step: Tensor, max_norm: float | None, latch: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`clip_gradients_` in plain PyTorch: norm, grad_scale and the new latch."""
    sums = torch.stack([g.double().square().sum() for g in grads])
    norm = sums.sum().sqrt().float()
    bad = latch[0] >= 0
    if not bad and not torch.isfinite(norm):
        latch, bad = torch.cat([step.reshape(1).double(), latch[1:2], sums]), torch.ones_like(bad)
    grad_scale = ((math.inf if max_norm is None else max_norm) / (norm + 1e-6)).clamp(max=1.0)
    return norm, torch.where(bad, math.nan, grad_scale), latch


def row_slots(ids: Tensor, V: int) -> Tensor:
    """Where each id of an embedding of V rows first occurs in int64 `ids` [T], or -1: int32 [V].

    For ids [S, T], of S steps, slots [S, V]. On CUDA every token of a step is compared with every other, so T
    should be at most a few thousand.

    Raises:
        RuntimeError: on the CPU, when an id is not in [0, V). On CUDA such a token is left out.
    """
    op = "row_slots"
    _checks.tensor(op, "ids", ids, dtypes=(torch.int64,), min_dim=1)
    _checks.at_least_one(op, "V", V, "ids")
    return _ops.row_slots(ids.contiguous(), V)


def row_slots_ref(ids: Tensor, V: int) -> Tensor:
    """:func:`row_slots` in plain PyTorch."""
    first = (ids[..., :, None] == ids[..., None, :]).int().argmax(-1)  # of each token's id
    slots = torch.full((*ids.shape[:-1], V), -1, dtype=torch.int32, device=ids.device)
    return slots.scatter_(-1, ids, first.int())


def sum_rows(ids: Tensor, rows: Tensor, slots: Tensor) -> Tensor:
    """The gradient of an embedding [V, H] without its zeros, from the rows of a step's tokens.

    Args:
        ids: int64 [T].
        rows: float32 [T, H], the gradient of each token's vector.
        slots: int32 [V], :func:`row_slots` of ids.

    Returns:
        float32 [T, H], at the first token of an id the sum of the rows of all its tokens, else 0.

    Raises:
        RuntimeError: on the CPU, when a token has no place in slots.
    """
    op = "sum_rows"
    _checks.tensor(op, "ids", ids, dtypes=(torch.int64,), dim=1)
    _checks.tensor(op, "rows", rows, dtypes=(torch.float32,), dim=2)
    _checks.tensor(op, "slots", slots, dtypes=(torch.int32,), dim=1)
    _checks.same_device(op, "rows", rows, "ids", ids)
    _checks.same_device(op, "slots", slots, "ids", ids)
    _checks.shape(op, "rows", rows, (ids.shape[0], rows.shape[1]), "a row for each of ids")
    return _ops.sum_rows(ids.contiguous(), rows.contiguous(), slots.contiguous())


def sum_rows_ref(ids: Tensor, rows: Tensor, slots: Tensor) -> Tensor:
    """:func:`sum_rows` in plain PyTorch."""
    same = ids[:, None] == ids[None, :]
    places = torch.arange(ids.shape[0], device=ids.device)
    return torch.where((slots[ids] == places)[:, None], same.to(rows.dtype) @ rows, 0.0)


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
    decay: bool | Sequence[bool] = True,
    ternary: Sequence[bool] | None = None,
    abs_sums: Tensor | None = None,
    slots: Tensor | None = None,
    row_param: int = -1,
    num_blocks: int = 0,
) -> None:
    """One Adam update of `params` in place, in one pass over memory; on CUDA one launch for up to 72 tensors.

    ``g = grad * grad_scale``; with coupled L2 (``decoupled=False``, Kingma & Ba with the L2 term in the
    gradient, as ``torch.optim.Adam``) ``g += weight_decay * p``; with decoupled decay (AdamW, arXiv
    1711.05101) ``p *= 1 - lr * weight_decay``. Then ``m = beta1 m + (1 - beta1) g``,
    ``v = beta2 v + (1 - beta2) g^2``, ``p -= lr / bc1 * m / (sqrt(v) / sqrt(bc2) + eps)``.

    Args:
        params, grads, exp_avg, exp_avg_sq: equally many float32 tensors of equal shapes on one device.
        hyper: float32 [4] on that device: lr, weight_decay, bc1 = 1 - beta1^t, bc2 = 1 - beta2^t. On the
            device, so that a captured graph follows a schedule.
        grad_scale: float32 [], the factor of the gradients (clipping, accumulation); NaN for no update at all,
            as :func:`clip_gradients_` gives when a gradient is not finite.
        decay: whether weight_decay applies, for all of params or for each.
        ternary: for each of params, whether it will be quantised.
        abs_sums: float64 as from :func:`abs_sums_like` of the ternary params: takes the sums of their new
            magnitudes, in this order, for :func:`quantize_weight_groups_`.
        slots, row_param: the gradient of params[row_param], an embedding [V, H], is given by :func:`sum_rows`:
            grads[row_param] is its sums [T, H], slots int32 [V]. Rows without a slot have gradient 0.
        num_blocks: on CUDA, blocks of 256 threads that do it all and leave room for kernels of other streams; 0
            for as many as there is work for. Not with ternary params or slots. Without effect on the CPU.
    """
    op = "adam_step_"
    _check_list(op, "params", params)
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
            by_rows = name == "grads" and index == row_param
            if (t.shape != p.shape and not by_rows) or t.device != p.device:
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
    if abs_sums is not None:
        _checks.tensor(op, "abs_sums", abs_sums, dtypes=(torch.float64,))
        _checks.same_device(op, "abs_sums", abs_sums, "params", params[0])
    if slots is not None:
        _checks.tensor(op, "slots", slots, dtypes=(torch.int32,), dim=1)
        _checks.same_device(op, "slots", slots, "params", params[0])
    _checks.integer(op, "row_param", row_param)
    _check_rule(op, beta1, beta2, eps, decoupled, num_blocks)
    decays: Any = [decay] * len(params) if isinstance(decay, bool) else decay
    flags: Any = [False] * len(params) if ternary is None else ternary
    for name, values in (("decay", decays), ("ternary", flags)):
        _checks.sequence(op, name, values, of="bool")
        for value in values:
            _checks.boolean(op, name, value)
    _ops.adam_step_(
        list(params),
        [g.contiguous() for g in grads],
        list(exp_avg),
        list(exp_avg_sq),
        hyper.contiguous(),
        grad_scale,
        [int(d) for d in decays],
        [int(t) for t in flags],
        abs_sums,
        slots,
        row_param,
        beta1,
        beta2,
        eps,
        decoupled,
        num_blocks,
    )
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version([*params, *exp_avg, *exp_avg_sq])


def adam_rows_(
    param: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grads: Sequence[Tensor],
    slots: Tensor,
    hyper: Tensor,
    grad_scales: Sequence[Tensor],
    ids: Tensor | None = None,
    *,
    beta1: float = 0.9,
    beta2: float = 0.95,
    eps: float = 1e-8,
    decoupled: bool,
    decay: bool = True,
    num_blocks: int = 0,
) -> None:
    """:func:`adam_step_` of the steps 0 .. n - 1 for rows of one embedding that wait for them, in one pass.

    A step changes a row without a gradient by nothing but what is in it. So of the steps of a sequence each only
    needs the rows of its own ids to be up to date, and all others may wait. What a row waits for are the updates
    from the last step on whose ids hold it, or from step 0 on: it was brought up to date before that step. The
    results are the bits of one :func:`adam_step_` after the other.

    Args:
        param, exp_avg, exp_avg_sq: float32 [V, H].
        grads: of n steps, 1 to 16, the float32 [T, H] of :func:`sum_rows`.
        slots: int32 [S, V], :func:`row_slots` of the steps' ids; S is n or more, and more with ids.
        hyper: float32 [S, 4 or more] with a row a step, which begins as that of :func:`adam_step_`; S >= n.
        grad_scales: n of float32 []; from the first NaN on no update is made.
        ids: int64 [T] of step n, whose slots are slots[n]: only its rows are brought up to date, those not in
            [0, V) left out. None for all rows.
        num_blocks: for all rows on CUDA, as in :func:`adam_step_`.
    """
    op = "adam_rows_"
    for name, t in (("param", param), ("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        _checks.tensor(op, name, t, dtypes=(torch.float32,), dim=2)
        _checks.same_device(op, name, t, "param", param)
        if not t.is_contiguous():
            raise ValueError(f"{op}: {name} must be contiguous, got strides {t.stride()}")
    for name, list_of in (("grads", grads), ("grad_scales", grad_scales)):
        _check_list(op, name, list_of)
        _checks.same_device(op, f"{name}[0]", list_of[0], "param", param)
    _checks.tensor(op, "slots", slots, dtypes=(torch.int32,), dim=2)
    _checks.tensor(op, "hyper", hyper, dtypes=(torch.float32,), dim=2)
    _checks.same_device(op, "slots", slots, "param", param)
    _checks.same_device(op, "hyper", hyper, "param", param)
    if ids is not None:
        _checks.tensor(op, "ids", ids, dtypes=(torch.int64,), dim=1)
        _checks.same_device(op, "ids", ids, "param", param)
        ids = ids.contiguous()
    _check_rule(op, beta1, beta2, eps, decoupled, num_blocks)
    _checks.boolean(op, "decay", decay)
    _ops.adam_rows_(
        param,
        exp_avg,
        exp_avg_sq,
        [g.contiguous() for g in grads],
        slots.contiguous(),
        hyper.contiguous(),
        list(grad_scales),
        ids,
        decay,
        beta1,
        beta2,
        eps,
        decoupled,
        num_blocks,
    )
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version([param, exp_avg, exp_avg_sq])


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


def _check_rule(op: str, beta1: float, beta2: float, eps: float, decoupled: bool, num_blocks: int) -> None:
    for name, value in (("beta1", beta1), ("beta2", beta2), ("eps", eps)):
        _checks.number(op, name, value)
    _checks.boolean(op, "decoupled", decoupled)
    _checks.integer(op, "num_blocks", num_blocks, minimum=0)


def _check_list(op: str, name: str, tensors: Sequence[Tensor]) -> None:
    _checks.sequence(op, name, tensors)
    for index, t in enumerate(tensors):
        _checks.tensor(op, f"{name}[{index}]", t, dtypes=(torch.float32,))
        _checks.same_device(op, f"{name}[{index}]", t, f"{name}[0]", tensors[0])
