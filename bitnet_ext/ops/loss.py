"""Output layer and training objective in one differentiable function, with exact gradients.

With logits z = hidden W^T, p = softmax(z), y the target, V the vocabulary and the mean over tokens with
``target != ignore_index``, the objective is::

    loss = (1 - s) CE + s (lse - mean_j z_j)          s = label_smoothing
         + z_loss * lse^2                             (PaLM, arXiv 2204.02311, section 5)
         - entropy_weight * H(p)                      (confidence penalty, arXiv 1701.06548)
         - diversity_weight * H(mean_tokens p)        (marginal entropy, as in arXiv 2002.08546)

and its gradient in z has the closed form used below, so no autograd graph over the [T, V] logits exists.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from bitnet_ext.ops import _checks

_ops = torch.ops.bitnet_ext

#: Bytes of float32 logits held at once. Larger batches are cut into chunks of tokens whose logits are
#: computed again in the backward pass.
CHUNK_BYTES = 256 << 20


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
    """The objective and its parts; the parts carry no gradient."""

    loss: Tensor
    cross_entropy: Tensor
    entropy: Tensor
    marginal_entropy: Tensor | None
    z_loss: Tensor


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
    ignore_index: int = -100,
    chunk_bytes: int = CHUNK_BYTES,
) -> LinearCrossEntropyOutput:
    """The objective of the module's docstring for ``logits = hidden @ weight.T``.

    Args:
        hidden: [..., H] float32 or bfloat16; weight: [V, H] of any float dtype (cast to hidden's).
        target: int64 [...], in [0, V) or `ignore_index` (which must be negative).
        label_smoothing: in [0, 1); z_loss, entropy_weight, diversity_weight: weights of the terms.
        chunk_bytes: float32 logits held at once.

    Returns:
        loss, cross_entropy (always the plain one), entropy (mean predictive), marginal_entropy (None unless
        diversity_weight is non-zero) and z_loss (mean lse^2), float32 scalars. Gradients reach hidden and
        weight through loss only. With no target to predict, all are NaN, as in torch.nn.functional.
    """
    op = "linear_cross_entropy"
    _checks.tensor(op, "hidden", hidden, dtypes=_checks.FLOATS, min_dim=1)
    _checks.tensor(op, "weight", weight, dtypes=_checks.FLOATS, dim=2)
    _checks.tensor(op, "target", target, dtypes=(torch.int64,))
    _checks.shape(op, "target", target, hidden.shape[:-1], "the leading dimensions of hidden")
    if weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"{op}: weight must have H = {hidden.shape[-1]} columns as hidden has, got {weight.shape[1]}"
        )
    _checks.same_device(op, "weight", weight, "hidden", hidden)
    _checks.same_device(op, "target", target, "hidden", hidden)
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"{op}: label_smoothing must be in [0, 1), got {label_smoothing}")
    if ignore_index >= 0:
        raise ValueError(f"{op}: ignore_index must be negative, got {ignore_index}")
    terms = (label_smoothing, z_loss, entropy_weight, diversity_weight)
    chunk = max(1, chunk_bytes // (4 * weight.shape[0]))
    flat = hidden.reshape(-1, hidden.shape[-1])
    loss, ce, entropy, marginal, z = _LinearCrossEntropy.apply(flat, weight, target.reshape(-1), terms, chunk)
    return LinearCrossEntropyOutput(loss, ce, entropy, marginal if diversity_weight else None, z)


def linear_cross_entropy_ref(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    entropy_weight: float = 0.0,
    diversity_weight: float = 0.0,
) -> LinearCrossEntropyOutput:
    """:func:`linear_cross_entropy` in plain PyTorch, gradients by autograd. Negative targets are ignored."""
    keep = target.reshape(-1) >= 0
    z = (hidden.reshape(-1, hidden.shape[-1]) @ weight.t().to(hidden.dtype))[keep]
    log_p = z.log_softmax(-1)
    lse = z.logsumexp(-1)
    p = log_p.exp()
    ce = -log_p.gather(1, target.reshape(-1)[keep].unsqueeze(1)).squeeze(1)
    entropy = -(p * log_p).sum(-1)
    mean_p = p.mean(0)
    marginal = -(mean_p * mean_p.clamp(min=torch.finfo(mean_p.dtype).tiny).log()).sum()
    loss = (1 - label_smoothing) * ce + label_smoothing * (lse - z.mean(-1))
    loss = loss + z_loss * lse.square() - entropy_weight * entropy
    total = loss.mean() - diversity_weight * marginal
    return LinearCrossEntropyOutput(
        total,
        ce.mean().detach(),
        entropy.mean().detach(),
        marginal.detach() if diversity_weight else None,
        lse.square().mean().detach(),
    )


def _logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """float32 [T, V]; bfloat16 operands keep a float32 result where the library offers one."""
    if hidden.dtype == torch.float32:
        return torch.mm(hidden, weight.t())
    if hidden.is_cuda:
        return torch.mm(hidden, weight.t(), out_dtype=torch.float32)
    return torch.mm(hidden.float(), weight.float().t())


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, target: Tensor, terms: tuple[float, ...], chunk: int
    ) -> tuple[Tensor, ...]:
        smoothing, z_weight, entropy_weight, diversity_weight = terms
        hidden = hidden.contiguous()
        head = weight.detach().to(hidden.dtype)
        keep = target >= 0
        share = keep.float() / keep.sum().float()  # weight of each token in the mean

        stats: list[SoftmaxStats] = []
        mean_p = torch.zeros(weight.shape[0], device=weight.device) if diversity_weight else None
        logits = hidden.new_empty(0)
        for start in range(0, max(hidden.shape[0], 1), chunk):
            rows = slice(start, start + chunk)
            logits = _logits(hidden[rows], head)
            stats.append(SoftmaxStats(*_ops.softmax_stats(logits, target[rows])))
            if mean_p is not None:
                mean_p += share[rows] @ torch.exp(logits - stats[-1].lse.float().unsqueeze(1))
        lse, target_logit, mean_logit, expected_logit, _ = (
            torch.cat(parts) for parts in zip(*stats, strict=True)
        )

        # An ignored token has weight 0; `where` keeps its possible NaN out of the sums.
        def average(values: Tensor) -> Tensor:
            return (torch.where(keep, values, 0.0) * share).sum().float()

        cross_entropy = average(lse - target_logit)
        entropy = average(lse - expected_logit)
        mean_square = average(lse.square())
        loss = (1 - smoothing) * cross_entropy + z_weight * mean_square - entropy_weight * entropy
        if smoothing:
            loss = loss + smoothing * average(lse - mean_logit)
        log_marginal = None
        marginal_entropy = hidden.new_zeros((), dtype=torch.float32)
        if mean_p is not None:
            log_marginal = mean_p.clamp(min=torch.finfo(torch.float32).tiny).log()
            marginal_entropy = -(mean_p * log_marginal).sum()
            loss = loss - diversity_weight * marginal_entropy
            # The gradient has differences of log_marginal only; centred ones lose fewer digits.
            log_marginal = log_marginal + marginal_entropy

        single = hidden.shape[0] <= chunk
        needs_grad = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        # The logits of a single chunk are kept and overwritten by their gradient in backward.
        ctx.logits = logits if single and needs_grad else None
        ctx.save_for_backward(hidden, weight, target, share, lse, expected_logit, log_marginal)
        ctx.terms, ctx.chunk = terms, chunk
        ctx.mark_non_differentiable(cross_entropy, entropy, marginal_entropy, mean_square)
        return loss, cross_entropy, entropy, marginal_entropy, mean_square

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_unused: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, target, share, lse, expected_logit, log_marginal = ctx.saved_tensors
        smoothing, z_weight, entropy_weight, diversity_weight = ctx.terms
        head = weight.detach().to(hidden.dtype)
        row_scale = grad_loss * share
        row_coef = 1.0 + 2.0 * z_weight * lse + entropy_weight * (lse - expected_logit)
        # p = exp(z - lse) takes lse in float32, whose rounding (5e-7 at lse = 10) would scale a whole row.
        lse, exact = lse.float(), lse
        row_coef = (row_coef * (1.0 - (exact - lse))).float()

        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_head: Tensor | None = None
        logits, ctx.logits = ctx.logits, None  # a second backward computes them again
        for start in range(0, max(hidden.shape[0], 1), ctx.chunk):
            rows = slice(start, start + ctx.chunk)
            grad = logits if logits is not None else _logits(hidden[rows], head)
            coef = row_coef[rows]
            if log_marginal is not None:
                expected_log = torch.exp(grad - lse[rows].unsqueeze(1)) @ log_marginal
                coef = coef - diversity_weight * expected_log
            _ops.softmax_grad_(
                grad,
                target[rows],
                lse[rows],
                row_scale[rows],
                coef,
                log_marginal,
                entropy_weight,
                diversity_weight,
                1.0 - smoothing,
                smoothing / weight.shape[0],
            )
            grad = grad.to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(grad, head, out=grad_hidden[rows])
            if ctx.needs_input_grad[1]:
                if grad_head is None:
                    grad_head = torch.mm(grad.t(), hidden[rows])
                else:
                    grad_head.addmm_(grad.t(), hidden[rows])
        if grad_head is not None:
            grad_head = grad_head.to(weight.dtype)
        return grad_hidden, grad_head, None, None, None
