"""Statistics of a model's predictions, from logits that are made for them and used up: evaluation's output layer.

On a CPU one operator goes over each row of logits while it is in the cache. On a GPU the kernels of the loss do it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bitnet_ext.ops import _checks
from bitnet_ext.ops.loss import padded_columns, write_logits

_ops = torch.ops.bitnet_ext


class PredictedRows(NamedTuple):
    """Statistics of T predictions: see :func:`predicted_rows_`.

    Attributes:
        cross_entropy, entropy: [T], in nats; cross_entropy is 0 where the target is negative.
        top_log_probability: [T], of the likeliest token.
        logit_std: [T], standard deviation of the row's logits.
        argmax: int64 [T], the lowest of equals.
        mass: [V], the sum of the distributions of the rows whose target is not negative.
    """

    cross_entropy: Tensor
    entropy: Tensor
    top_log_probability: Tensor
    logit_std: Tensor
    argmax: Tensor
    mass: Tensor


def predicts_rows(hidden: Tensor) -> bool:
    """Whether :func:`predict_rows` takes hidden states of this device and dtype."""
    _checks.tensor("predicts_rows", "hidden", hidden, dtypes=_checks.FLOATS)
    return hidden.dtype == torch.float32 or (hidden.is_cuda and hidden.dtype == torch.bfloat16)


def logits_buffer(rows: int, V: int, *, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """An uninitialised buffer [rows, padded_columns(V)] for logits.

    The padding matters: with the 50,257 columns of GPT-2's vocabulary the same product runs at 0.6 of the speed (one
    thread of an AMD EPYC).
    """
    op = "logits_buffer"
    _checks.integer(op, "rows", rows, minimum=1)
    _checks.integer(op, "V", V, minimum=1)
    _checks.float_dtype(op, "dtype", dtype)
    _checks.device(op, "device", device)
    buffer = torch.empty(rows, padded_columns(V), dtype=dtype, device=device)
    if not buffer.is_cuda:
        _ops._prefer_huge_pages(buffer)
    return buffer


def logits_in(buffer: Tensor, hidden: Tensor, head: Tensor) -> Tensor:
    """The logits [T, V] of hidden states [T, H] and a head [V, H], as a view of a :func:`logits_buffer`."""
    hidden, head = _with_buffer("logits_in", hidden, head, buffer)
    rows = buffer[: hidden.shape[0]]
    write_logits(hidden.contiguous(), head, rows)
    return rows[:, : head.shape[0]]


def _with_buffer(op: str, hidden: Tensor, head: Tensor, buffer: Tensor) -> tuple[Tensor, Tensor]:
    """`hidden` and `head` without gradients, after the three were checked against each other."""
    _checks.tensor(op, "hidden", hidden, dtypes=_checks.FLOATS, dim=2)
    _checks.tensor(op, "head", head, dtypes=(hidden.dtype,), dim=2)
    _checks.at_least_one(op, "head", head.shape[0], "a vocabulary (V)")
    T, V = hidden.shape[0], head.shape[0]
    _checks.shape(op, "head", head, (V, hidden.shape[1]), "H as hidden has it")
    _checks.tensor(op, "buffer", buffer, dtypes=(hidden.dtype,), dim=2)
    for name, value in (("head", head), ("buffer", buffer)):
        _checks.same_device(op, name, value, "hidden", hidden)
    if buffer.shape[0] < T or buffer.shape[1] != padded_columns(V) or not buffer.is_contiguous():
        raise ValueError(
            f"{op}: buffer must be contiguous and have {T} rows or more of {padded_columns(V)} columns, "
            f"got shape {tuple(buffer.shape)} with strides {buffer.stride()}"
        )
    return hidden.detach(), head.detach()


def predict_rows(hidden: Tensor, head: Tensor, target: Tensor, buffer: Tensor) -> PredictedRows:
    """Statistics of the predictions for hidden states.

    Args:
        hidden: [T, H] of a dtype that :func:`predicts_rows` takes; head: [V, H] of the same dtype.
        target: int64 [T].
        buffer: a :func:`logits_buffer` of T rows or more; overwritten.

    The results carry no gradient.
    """
    op = "predict_rows"
    _checks.tensor(op, "hidden", hidden, dtypes=(torch.float32, torch.bfloat16), dim=2)
    _checks.tensor(op, "target", target, dtypes=(torch.int64,), dim=1)
    _checks.shape(op, "target", target, hidden.shape[:1], "one per row of hidden")
    _checks.same_device(op, "target", target, "hidden", hidden)
    hidden, head = _with_buffer(op, hidden, head, buffer)
    logits_in(buffer, hidden, head)
    return predicted_rows_(buffer[: hidden.shape[0]], head.shape[0], target)


def predicted_rows_(logits: Tensor, V: int, target: Tensor) -> PredictedRows:
    """Statistics of T rows of logits, which are used up.

    On a CPU the first three are float64 and mass is summed up in float64 over sums of 32 rows, so that the number of
    threads changes nothing; on a GPU all are float32.

    Args:
        logits: [T, S] contiguous, float32 or on a GPU bfloat16, with the vocabulary in the first V columns; on a GPU
            rows start at multiples of 16 bytes, as those of a :func:`logits_buffer` do.
        target: int64 [T], below V.
    """
    op = "predicted_rows_"
    _checks.tensor(op, "logits", logits, dtypes=_checks.FLOATS, dim=2)
    _checks.integer(op, "V", V)
    _checks.tensor(op, "target", target, dtypes=(torch.int64,), dim=1)
    _checks.shape(op, "target", target, logits.shape[:1], "one a row of logits")
    _checks.same_device(op, "target", target, "logits", logits)
    if not logits.is_cuda:
        return PredictedRows(*_ops.predicted_rows_(logits, V, target))
    lse, cross_entropy, entropy, _, argmax = _ops.cross_entropy_rows_(
        logits, V, target, None, None, 0.0, 0.0, 0.0, 0.0, 0.0
    )
    mass = _ops.probability_sums(logits, V, target, lse, 0.0).sum(0)
    top = logits.gather(1, argmax[:, None])[:, 0].double() - lse
    return PredictedRows(cross_entropy, entropy, top, logits[:, :V].std(dim=1, correction=0), argmax, mass)


def predicted_rows_ref(logits: Tensor, V: int, target: Tensor) -> PredictedRows:
    """:func:`predicted_rows_` in plain PyTorch, in the precision of the logits, which stay as they are."""
    z = logits[:, :V]
    log_p = z.log_softmax(-1)
    p = log_p.exp()
    picked = log_p.gather(1, target.clamp(min=0)[:, None])[:, 0]
    return PredictedRows(
        torch.where(target >= 0, -picked, 0.0),
        -torch.where(p > 0, p * log_p, 0.0).sum(-1),
        log_p.max(-1).values,
        z.std(dim=1, correction=0),
        z.argmax(-1),
        p[target >= 0].sum(0),
    )
