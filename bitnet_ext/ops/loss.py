"""Output layer and training objective in one differentiable function, with exact gradients.

With logits z = hidden W^T (or z = c tanh(hidden W^T / c) under a logit soft-cap c), p = softmax(z), y the
target, V the vocabulary and the mean over tokens with ``target != ignore_index``, the objective is::

    loss = (1 - s) CE + s (lse - mean_j z_j)          s = label_smoothing
         + z_loss * lse^2                             (PaLM, arXiv 2204.02311, section 5)
         - entropy_weight * H(p)                      (confidence penalty, arXiv 1701.06548)
         - diversity_weight * H(mean_tokens p)        (marginal entropy, as in arXiv 2002.08546)
         + output_l2 * sum W^2

and its gradient in z has a closed form (csrc/cuda/cross_entropy.cu), so no autograd graph over the [T, V]
logits exists. What the mean divides by is known before the first logit, so the gradients are computed with the
loss, a chunk of tokens at a time: one product for the logits, one kernel that reads each row once and
overwrites it by its gradient, two products with that gradient. The diversity term alone needs the logits twice.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bitnet_ext._differentiation import first_order
from bitnet_ext.ops import _checks
from bitnet_ext.ops.side_stream import weight_gradient_side
from bitnet_ext.ops.skinny_mm import takes_skinny_mm

_ops = torch.ops.bitnet_ext

#: Bytes of logits held at once; larger batches are cut into chunks of tokens.
CHUNK_BYTES = 1 << 30


class SoftmaxStats(NamedTuple):
    """Statistics of each row of logits: see :func:`softmax_stats`."""

    lse: Tensor
    target_logit: Tensor
    mean_logit: Tensor
    expected_logit: Tensor
    argmax: Tensor

    @property
    def cross_entropy(self) -> Tensor:
        """-log p(target), float64 [T]; equal to lse where the target is ignored."""
        return self.lse - self.target_logit

    @property
    def entropy(self) -> Tensor:
        """H(p) in nats, float64 [T]."""
        return self.lse - self.expected_logit


class LinearCrossEntropyOutput(NamedTuple):
    """The objective, its parts, and statistics of the predictions that fall off on the way.

    Attributes:
        loss: the objective; all else carries no gradient. It and the means are float32 scalars.
        cross_entropy: mean over the targets, always the plain one.
        entropy: mean predictive entropy.
        marginal_entropy: entropy of the mean prediction; None unless diversity_weight is non-zero.
        z_loss: mean lse^2.
        token_cross_entropy: float32, of target's shape; 0 where the target is ignored.
        token_entropy: float32, of target's shape, ignored or not, in nats.
        argmax: int64, of target's shape: the most likely token, the lowest of equals.
        mean_p: float32 [V], the mean prediction over the targets; None unless diversity_weight is non-zero,
            because only that term computes it.
    """

    loss: Tensor
    cross_entropy: Tensor
    entropy: Tensor
    marginal_entropy: Tensor | None
    z_loss: Tensor
    token_cross_entropy: Tensor
    token_entropy: Tensor
    argmax: Tensor
    mean_p: Tensor | None


def softmax_stats(logits: Tensor, target: Tensor) -> SoftmaxStats:
    """Log-partition, target, mean and expected logit, and argmax of each row, in one pass.

    Args:
        logits: [T, V] float32, bfloat16 or float16.
        target: int64 [T]; a negative value marks an ignored row, whose target_logit is 0.

    Returns:
        lse float64 [T]; target_logit, mean_logit (over V) and expected_logit (sum_j p_j z_j), float32 [T];
        argmax int64 [T] (the lowest index of equal ones).
    """
    op = "softmax_stats"
    _checks.tensor(op, "logits", logits, dtypes=_checks.FLOATS, dim=2)
    _checks.at_least_one(op, "logits", logits.shape[1], "a vocabulary (V)")
    _checks.tensor(op, "target", target, dtypes=(torch.int64,), dim=1)
    _checks.shape(op, "target", target, logits.shape[:1], "one a row of logits")
    _checks.same_device(op, "target", target, "logits", logits)
    return SoftmaxStats(*_ops.softmax_stats(logits.contiguous(), target.contiguous()))


def softmax_stats_ref(logits: Tensor, target: Tensor) -> SoftmaxStats:
    """:func:`softmax_stats` in plain PyTorch, in float64."""
    z = logits.double()
    lse = z.logsumexp(-1)
    picked = z.gather(1, target.clamp(min=0).unsqueeze(1)).squeeze(1)
    expected = (z.softmax(-1) * z).sum(-1)
    return SoftmaxStats(
        lse,
        torch.where(target >= 0, picked, 0.0).float(),
        z.mean(-1).float(),
        expected.float(),
        logits.argmax(-1),
    )


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    entropy_weight: float = 0.0,
    diversity_weight: float = 0.0,
    logit_softcap: float | None = None,
    output_l2: float = 0.0,
    ignore_index: int = -100,
    chunk_bytes: int = CHUNK_BYTES,
) -> LinearCrossEntropyOutput:
    """The objective of the module's docstring for ``logits = hidden @ weight.T``.

    Args:
        hidden: [..., H] float32, bfloat16 or float16 (computed in float32); weight: [V, H] of any float
            dtype (cast to hidden's). On CUDA the logits of bfloat16 operands are bfloat16, as
            ``torch.nn.functional.linear`` would give them; everything behind them is float32 or better.
        target: int64 [...], in [0, V) or `ignore_index` (which must be negative; any negative value is
            ignored). On CUDA a value beyond the vocabulary gives NaN in loss and gradients.
        label_smoothing: in [0, 1); z_loss, entropy_weight, diversity_weight, output_l2: weights of the terms.
        logit_softcap: positive cap of the logits, or None.
        chunk_bytes: logits held at once; larger batches are cut into chunks of tokens.

    Returns:
        See :class:`LinearCrossEntropyOutput`. Gradients reach hidden and weight through loss only; they are
        computed together with it, exactly (no tile is skipped), and summed over chunks in float32. With no
        target to predict, loss and means are NaN, as in torch.nn.functional, and the gradients of the logits
        zero. A second derivative raises.

        Gradients of a float16 hidden or weight are kept in float32 between forward and backward, so that the
        scale of a ``torch.amp.GradScaler`` reaches them before they are rounded: 2 bytes more per element.
    """
    op = "linear_cross_entropy"
    _checks.tensor(op, "hidden", hidden, dtypes=_checks.FLOATS, min_dim=1)
    _checks.tensor(op, "weight", weight, dtypes=_checks.FLOATS, dim=2)
    _checks.at_least_one(op, "weight", weight.shape[0], "a vocabulary (V)")
    _checks.tensor(op, "target", target, dtypes=(torch.int64,))
    _checks.shape(op, "target", target, hidden.shape[:-1], "the leading dimensions of hidden")
    if weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"{op}: weight must have H = {hidden.shape[-1]} columns as hidden has, got {weight.shape[1]}"
        )
    _checks.same_device(op, "weight", weight, "hidden", hidden)
    _checks.same_device(op, "target", target, "hidden", hidden)
    for name, value in (
        ("label_smoothing", label_smoothing),
        ("z_loss", z_loss),
        ("entropy_weight", entropy_weight),
        ("diversity_weight", diversity_weight),
        ("output_l2", output_l2),
    ):
        _checks.number(op, name, value)
    _checks.integer(op, "ignore_index", ignore_index)
    _checks.integer(op, "chunk_bytes", chunk_bytes, minimum=1)
    if logit_softcap is not None and not isinstance(logit_softcap, (int, float)):
        raise TypeError(
            f"{op}: logit_softcap must be a number or None, got {_checks.describe(logit_softcap)}"
        )
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"{op}: label_smoothing must be in [0, 1), got {label_smoothing}")
    if logit_softcap is not None and not 0 < logit_softcap < math.inf:
        raise ValueError(f"{op}: logit_softcap must be positive and finite or None, got {logit_softcap}")
    if ignore_index >= 0:
        raise ValueError(f"{op}: ignore_index must be negative, got {ignore_index}")
    tracked = torch.is_grad_enabled()
    out = _ops.linear_cross_entropy(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        target.reshape(-1),
        label_smoothing,
        z_loss,
        entropy_weight,
        diversity_weight,
        logit_softcap or 0.0,
        output_l2,
        chunk_bytes,
        tracked and hidden.requires_grad,
        tracked and weight.requires_grad,
    )
    loss, mean_cross_entropy, mean_entropy, mean_square, marginal_entropy = out[:5]
    cross_entropy, entropy, argmax, mean_p = out[5:9]
    return LinearCrossEntropyOutput(
        loss,
        mean_cross_entropy,
        mean_entropy,
        marginal_entropy if diversity_weight else None,
        mean_square,
        cross_entropy.view(target.shape),
        entropy.view(target.shape),
        argmax.view(target.shape),
        mean_p if diversity_weight else None,
    )


def linear_cross_entropy_ref(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    entropy_weight: float = 0.0,
    diversity_weight: float = 0.0,
    logit_softcap: float | None = None,
    output_l2: float = 0.0,
) -> LinearCrossEntropyOutput:
    """:func:`linear_cross_entropy` in plain PyTorch, gradients by autograd. Negative targets are ignored."""
    flat = target.reshape(-1)
    keep = flat >= 0
    logits = hidden.reshape(-1, hidden.shape[-1]) @ weight.t().to(hidden.dtype)
    if logit_softcap is not None:
        logits = logit_softcap * torch.tanh(logits / logit_softcap)
    z = logits[keep]
    log_p = z.log_softmax(-1)
    lse = z.logsumexp(-1)
    p = log_p.exp()
    ce = -log_p.gather(1, flat[keep].unsqueeze(1)).squeeze(1)
    entropy = -(p * log_p).sum(-1)
    mean_p = p.mean(0)
    marginal = -(mean_p * mean_p.clamp(min=torch.finfo(mean_p.dtype).tiny).log()).sum()
    loss = (1 - label_smoothing) * ce + label_smoothing * (lse - z.mean(-1))
    loss = loss + z_loss * lse.square() - entropy_weight * entropy
    total = loss.mean() - diversity_weight * marginal
    if output_l2:
        total = total + output_l2 * weight.to(total.dtype).square().sum()
    all_log_p = logits.detach().log_softmax(-1)
    picked = all_log_p.gather(1, flat.clamp(min=0).unsqueeze(1)).squeeze(1)
    return LinearCrossEntropyOutput(
        total,
        ce.mean().detach(),
        entropy.mean().detach(),
        marginal.detach() if diversity_weight else None,
        lse.square().mean().detach(),
        torch.where(keep, -picked, 0.0).view(target.shape),
        -(all_log_p.exp() * all_log_p).sum(-1).view(target.shape),
        logits.detach().argmax(-1).view(target.shape),
        mean_p.detach() if diversity_weight else None,
    )


def padded_columns(V: int) -> int:
    """Columns of a buffer for the logits of V tokens: rows that begin at multiples of 16 bytes, whole tiles."""
    _checks.integer("padded_columns", "V", V, minimum=1)
    return -(-V // 64) * 64


# --- the operator: loss and gradients in one call -----------------------------------------------------------

# The three products. Logits, and then their gradient, are [T, S] rows of a buffer whose first V columns are the
# vocabulary; S is V rounded up to 64, and the columns behind it hold zeros when they hold a gradient. The head is
# [C, H], where C is V, or S with rows of zeros. With the odd V of a language model as the length of a row no
# row but the first would start at a 16-byte boundary; and as a size of a bfloat16 product it makes cuBLAS take
# kernels at a sixth of the speed (H200, H = 256, V = 50,257, 4,096 tokens: 1.24 ms for the logits, 0.19 padded).


def _head(weight: Tensor, hidden_dtype: torch.dtype, dtype: torch.dtype, stride: int) -> Tensor:
    """The weight in the dtype of the products, with rows of zeros where that makes them fast."""
    V, H = weight.shape
    if not weight.is_cuda or dtype == torch.float32 or V % 8 == 0:
        return weight.to(hidden_dtype).to(dtype).contiguous()
    head = torch.empty((stride, H), dtype=dtype, device=weight.device)
    head[:V].copy_(weight)
    head[V:].zero_()
    return head


def write_logits(hidden: Tensor, head: Tensor, buffer: Tensor) -> None:
    """buffer[:, :C] = hidden [T, H] x head [C, H]^T; buffer is [T, padded_columns(C)] or has C columns."""
    if buffer.is_contiguous() and takes_skinny_mm("nt", *hidden.shape, hidden, head, buffer):
        _ops.skinny_mm_nt_(buffer, hidden, head)
        return
    torch.mm(hidden, head.t(), out=buffer[:, : head.shape[0]])


# One row times a matrix is summed up product after product by some CPU libraries: on an Intel Xeon a token's gradient
# over 50,257 words was off by 2.2e-6 of its size, those of two tokens by 3.6e-7. Parts of the vocabulary are summed
# apart.
_PART = 2048


def _write_grad_hidden(grad: Tensor, head: Tensor, out: Tensor) -> None:
    """out [T, H] = grad[:, :C] x head."""
    columns = grad[:, : head.shape[0]]
    if takes_skinny_mm("nn", *out.shape, columns, head, out):
        _ops.skinny_mm_nn_(out, columns, head)
    elif out.is_cuda or out.shape[0] > 1:
        torch.mm(columns, head, out=out)
    else:
        parts = [part @ rows for part, rows in zip(columns.split(_PART, 1), head.split(_PART), strict=True)]
        torch.sum(torch.stack(parts), 0, out=out)


def _add_grad_head(
    grad: Tensor, hidden: Tensor, total: Tensor | None, rows: int, dtype: torch.dtype, max_blocks: int = 0
) -> Tensor:
    """total + grad[:, :C]^T x hidden as [C, H] of `dtype`; total, if given, is of `dtype` and overwritten.

    max_blocks: multiprocessors to take, 0 for all; the library's products take what they like.
    """
    columns = grad[:, :rows].t()
    if dtype == grad.dtype and takes_skinny_mm("tn", *hidden.shape, grad[:, :rows], hidden):
        out = torch.empty((rows, hidden.shape[1]), device=grad.device) if total is None else total
        _ops.skinny_mm_tn_(out, grad[:, :rows], hidden, total is not None, max_blocks)
        return out
    if dtype == grad.dtype:
        if total is not None:
            return total.addmm_(columns, hidden)
        out = torch.empty((rows, hidden.shape[1]), dtype=dtype, device=grad.device)
        if not out.is_cuda:
            # It is new memory in every step: 51 MB for 50,257 x 256, whose 4 kB pages take 19 ms to come, large
            # ones 5 (one thread of an AMD EPYC, the first write included).
            _ops._prefer_huge_pages(out)
        return torch.mm(columns, hidden, out=out)
    if total is None:
        return torch.mm(columns, hidden, out_dtype=dtype)
    return torch.ops.aten.addmm.dtype_out(total, columns, hidden, dtype, out=total)


def _rows_at_once(T: int, row_bytes: int, chunk_bytes: int) -> int:
    """Tokens of a chunk: equal shares of what fits, in whole tiles of the products where that still fits."""
    most = max(1, chunk_bytes // row_bytes)
    if most >= T:
        return max(T, 1)
    share = -(-T // -(-T // most))
    return min(most, -(-share // 128) * 128)


def forward(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    label_smoothing: float,
    z_loss: float,
    entropy_weight: float,
    diversity_weight: float,
    softcap: float,
    output_l2: float,
    chunk_bytes: int,
    needs_grad_hidden: bool,
    needs_grad_weight: bool,
) -> tuple[Tensor, ...]:
    """``bitnet_ext::linear_cross_entropy``; the gradients are those of a loss whose own gradient is 1."""
    with torch.autocast(hidden.device.type, enabled=False):
        T, (V, H) = hidden.shape[0], weight.shape
        on_cuda = hidden.is_cuda
        dtype = torch.bfloat16 if on_cuda and hidden.dtype == torch.bfloat16 else torch.float32
        x = hidden.to(dtype).contiguous()
        stride = padded_columns(V)
        head = _head(weight, hidden.dtype, dtype, stride)
        target = target.contiguous()
        step = _rows_at_once(T, stride * dtype.itemsize, chunk_bytes)
        buffer = torch.empty((step, stride), dtype=dtype, device=hidden.device)
        chunks = [slice(start, min(start + step, T)) for start in range(0, max(T, 1), step)]
        wants_gradient = needs_grad_hidden or needs_grad_weight
        count = _ops.count_targets(target)
        terms = (label_smoothing, z_loss, entropy_weight, diversity_weight)

        mean_p = torch.empty(0, device=hidden.device)
        marginal_entropy = log_marginal = None
        stats: list[tuple[Tensor, ...]] = []
        if diversity_weight:
            # The gradient needs the mean distribution of all tokens, so it has to wait for a second pass.
            sums = torch.zeros(V, device=hidden.device)
            for rows in chunks:
                logits = buffer[: rows.stop - rows.start]
                write_logits(x[rows], head, logits)
                stats.append(_ops.cross_entropy_rows_(logits, V, target[rows], None, None, *terms, softcap))
                sums += _ops.probability_sums(logits, V, target[rows], stats[-1][0], softcap).sum(0)
            mean_p = sums / count
            log_marginal = mean_p.clamp(min=torch.finfo(torch.float32).tiny).log()
            marginal_entropy = -(mean_p * log_marginal).sum()
            # The gradient has differences of log_marginal only; centred ones lose fewer digits.
            log_marginal = log_marginal + marginal_entropy
        logits_are_there = bool(stats) and len(chunks) == 1

        # float16 gradients stay float32: a loss scale must reach them before they are rounded.
        grad_hidden = torch.empty_like(x if needs_grad_hidden else x[:0])
        grad_weight_dtype = _saved_dtype(weight.dtype)
        total: Tensor | None = None
        # One chunk is rounded once to the dtype of the weight; several are summed in float32.
        total_dtype = dtype if weight.dtype == dtype and len(chunks) == 1 and not output_l2 else torch.float32
        # On another stream only where that stream makes all of it, while the logits stay as they are.
        at_once = len(chunks) == 1 and not output_l2 and weight.dtype == grad_weight_dtype
        side = weight_gradient_side() if needs_grad_weight and at_once else None
        if needs_grad_weight and output_l2:
            total = torch.zeros((head.shape[0], H), device=hidden.device)
            total[:V].copy_(weight).mul_(2.0 * output_l2)
        for rows in chunks if wants_gradient or not stats else []:
            logits = buffer[: rows.stop - rows.start]
            if not logits_are_there:
                write_logits(x[rows], head, logits)
            part = _ops.cross_entropy_rows_(
                logits, V, target[rows], count if wants_gradient else None, log_marginal, *terms, softcap
            )
            if not diversity_weight:
                stats.append(part)
            if needs_grad_hidden:
                _write_grad_hidden(logits, head, grad_hidden[rows])
            if side is not None:
                # Behind the gradient of hidden, which the backward waits for.
                with side.fork(buffer, x):
                    total = _add_grad_head(
                        logits, x[rows], None, head.shape[0], total_dtype, side.max_blocks
                    )[:V].to(weight.dtype)
                side.has_gradient = True
            elif needs_grad_weight:
                total = _add_grad_head(logits, x[rows], total, head.shape[0], total_dtype)

        lse, cross_entropy, entropy, smoothing, argmax = (
            parts[0] if len(parts) == 1 else torch.cat(parts) for parts in zip(*stats, strict=True)
        )
        square_sum = _ops.sum_of_squares([weight.contiguous()]) if output_l2 else None
        means = _ops.cross_entropy_mean(
            lse, cross_entropy, entropy, smoothing, target, marginal_entropy, square_sum, *terms, output_l2
        )
        if marginal_entropy is None:
            marginal_entropy = torch.empty((), device=hidden.device)  # not looked at
        grad_weight = weight.new_empty((0, H)) if total is None else total[:V]
        return (
            *means,
            marginal_entropy,
            cross_entropy,
            entropy,
            argmax,
            mean_p,
            grad_hidden.to(_saved_dtype(hidden.dtype)),
            grad_weight.to(grad_weight_dtype),
        )


def fake(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    label_smoothing: float,
    z_loss: float,
    entropy_weight: float,
    diversity_weight: float,
    softcap: float,
    output_l2: float,
    chunk_bytes: int,
    needs_grad_hidden: bool,
    needs_grad_weight: bool,
) -> tuple[Tensor, ...]:
    T, V = hidden.shape[0], weight.shape[0]

    def new(*shape: int) -> Tensor:
        return hidden.new_empty(shape, dtype=torch.float32)

    scalars = [new() for _ in range(5)]
    argmax = hidden.new_empty((T,), dtype=torch.int64)
    mean_p = new(V if diversity_weight else 0)
    hidden_shape = hidden.shape if needs_grad_hidden else (0, hidden.shape[1])
    weight_shape = weight.shape if needs_grad_weight else (0, weight.shape[1])
    grad_hidden = hidden.new_empty(hidden_shape, dtype=_saved_dtype(hidden.dtype))
    grad_weight = weight.new_empty(weight_shape, dtype=_saved_dtype(weight.dtype))
    return (*scalars, new(T), new(T), argmax, mean_p, grad_hidden, grad_weight)


def _saved_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of a gradient until the backward. float16 has too few exponents for a gradient without its scale."""
    return torch.float32 if dtype == torch.float16 else dtype


def prepare(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments with the gradients that the inputs ask for at this level of nested derivatives."""
    hidden, weight = args[:2]
    return (*args[:10], args[10] or hidden.requires_grad, args[11] or weight.requires_grad)


def setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.dtypes = [t.dtype for t in inputs[:2]]
    ctx.needs = inputs[10:]
    ctx.save_for_backward(*output[9:], output[0])
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    side = weight_gradient_side()  # the backward runs on a thread of its own
    ctx.side = side if side is not None and side.has_gradient else None


def backward(ctx: Any, grad_loss: Tensor | None, *_unused: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_loss is None:
        return (None,) * 12
    *grads, loss = ctx.saved_tensors
    saved = [grad if needed else None for grad, needed in zip(grads, ctx.needs, strict=True)]
    traced = type(grad_loss) is not Tensor or torch._C._are_functorch_transforms_active()
    # The saved gradients are handed on themselves where nothing can ask for them again: no copy of a large
    # weight, and nothing to do at all when the loss is the end of the graph and its gradient 1.
    if traced or torch._C._autograd._get_current_graph_task_keep_graph():
        if ctx.side is not None:
            ctx.side.join()
        with torch.no_grad():
            scaled = [None if grad is None else grad * grad_loss for grad in saved]
    else:
        scaled = [None if grad is None else grad.detach() for grad in saved]
        present = [grad for grad in scaled if grad is not None]
        if ctx.side is not None:
            with ctx.side.fork(grad_loss):
                _scale_([present.pop()], grad_loss)
        _scale_(present, grad_loss)
    results = [
        grad if grad is None else grad.to(dtype) for grad, dtype in zip(scaled, ctx.dtypes, strict=True)
    ]
    if torch.is_grad_enabled():  # create_graph=True
        results = list(first_order("linear_cross_entropy", tuple(results), loss))
    return (*results, *(None,) * 10)


def _scale_(grads: list[Tensor], factor: Tensor) -> None:
    """Multiplies grads by a scalar, without a sync, and on CUDA without touching them if it is 1."""
    if factor.is_cuda:
        _ops.scale_(grads, factor)
    elif float(factor) != 1.0:
        for grad in grads:
            grad.mul_(factor)
