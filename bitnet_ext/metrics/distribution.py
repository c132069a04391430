"""What a model predicts on held-out text, from streamed logits.

Notation, for positions i = 1..n with logits z_i over V tokens: p_i = softmax(z_i), H(p) = -sum_j p_j ln p_j,
p_bar = mean_i p_i, pi = the unigram distribution of the training text. Everything is in nats.

``mutual_information`` = H(p_bar) - mean_i H(p_i) is the generalised Jensen-Shannon divergence of the
predictions (Lin 1991, IEEE Trans. Inf. Theory 37(1)): 0 when every position gets the same distribution,
whatever that distribution is, so a network that ignores its context scores 0 however many distinct argmaxes
it has.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from bitnet_ext import ops
from bitnet_ext.metrics.evaluation import evaluation_mode
from bitnet_ext.metrics.rarefaction import rarefied_unique

#: Training-unigram mass at which the head of the vocabulary ends and the tail begins.
FREQUENCY_BINS = (0.5, 0.9)

# Rows of one pass over [rows, V]: 16 rows of 50,257 fp32 (3.2 MB) were the fastest of 4..128 on a CPU,
# because the three element-wise steps then meet the block in cache; a GPU wants blocks that fill it.
_CPU_BLOCK_BYTES = 16 * 50_257 * 4
_CUDA_BLOCK_BYTES = 256 << 20
# Logits that evaluate_heldout holds at once.
_CPU_LOGITS_BYTES = 128 * 50_257 * 4
_CUDA_LOGITS_BYTES = 512 << 20


def frequency_bins(unigram_log_probs: Tensor) -> Tensor:
    """Bin of each token id by its frequency in the training text: 0 head, 1 torso, 2 tail.

    The ids are taken from the most frequent one down (equal frequencies: the lower id first). The head is the
    ids that are needed to cover the first 50 % of the unigram mass, the torso those up to 90 %, the tail
    the rest.

    Args:
        unigram_log_probs: natural logarithms of the unigram distribution, [V], any float dtype.

    Returns:
        int64 [V], on the device of the argument.
    """
    probabilities = unigram_log_probs.double().exp()
    order = torch.argsort(probabilities, descending=True, stable=True)
    mass_before = probabilities[order].cumsum(0) - probabilities[order]
    bins = torch.empty_like(order)
    # The slack keeps a mass that is 0.5 but for rounding out of the head.
    bins[order] = sum((mass_before >= edge - 1e-12).long() for edge in FREQUENCY_BINS)
    return bins


class PredictionStatistics:
    """Streams logits and targets into the held-out statistics; no logits are kept.

    >>> statistics = PredictionStatistics(vocab_size, unigram_log_probs, device)
    >>> for logits, target in chunks:
    ...     statistics.update(logits, target)
    >>> row = statistics.result()

    One ``update`` costs one :func:`bitnet_ext.ops.softmax_stats` and one more pass over the logits. Sums over
    positions are fp64, so the result does not depend on how the positions were cut into chunks beyond
    rounding.

    Args:
        vocab_size: V.
        unigram_log_probs: natural logarithms of the training unigram distribution, [V], finite, summing to 1
            after exp (smooth the counts, so that no token has probability 0).
        device: where the logits will be.

    Raises:
        ValueError: for a distribution of another length, with infinite entries, or not summing to 1 within
        1e-3.
    """

    def __init__(self, vocab_size: int, unigram_log_probs: Tensor, device: torch.device | str) -> None:
        if tuple(unigram_log_probs.shape) != (vocab_size,):
            raise ValueError(
                f"unigram_log_probs must have shape [{vocab_size}] (vocab_size); "
                f"got {list(unigram_log_probs.shape)}"
            )
        log_probs = unigram_log_probs.detach().to(device="cpu", dtype=torch.float64)
        total = float(log_probs.exp().sum())
        if not bool(torch.isfinite(log_probs).all()) or abs(total - 1.0) > 1e-3:
            raise ValueError(
                "unigram_log_probs must be finite natural logarithms of probabilities that sum to 1; "
                f"got values that sum to {total:.6g} after exp"
            )
        self.vocab_size = vocab_size
        self.device = torch.device(device)
        self.positions = 0
        self._unigram_log_probs = log_probs.to(self.device)
        self._bins = frequency_bins(log_probs).to(self.device)
        # fp64 sums over positions: cross-entropy, unigram cross-entropy, entropy, logit std, probability of the
        # argmax; then a count of rows that are not finite.
        self._sums = torch.zeros(6, dtype=torch.float64, device=self.device)
        self._mass = torch.zeros(vocab_size, dtype=torch.float64, device=self.device)
        self._argmax_counts = torch.zeros(vocab_size, dtype=torch.int64, device=self.device)
        self._bin_counts = torch.zeros(2, len(FREQUENCY_BINS) + 1, dtype=torch.int64, device=self.device)

    @torch.no_grad()
    def update(self, logits: Tensor, target: Tensor) -> None:
        """Adds T positions.

        Args:
            logits: [T, V], fp32, bf16 or fp16. Not changed.
            target: the next token of each position, int64 [T], every value in [0, V).

        Raises:
            ValueError: for other shapes, or a target outside the vocabulary.
        """
        if logits.dim() != 2 or logits.size(1) != self.vocab_size:
            raise ValueError(f"logits must have shape [T, {self.vocab_size}]; got {list(logits.shape)}")
        if target.shape != logits.shape[:1] or target.dtype != torch.int64:
            raise ValueError(
                f"target must be int64 of shape [{logits.size(0)}] (one for each row of logits); "
                f"got {target.dtype} {list(target.shape)}"
            )
        if target.numel() == 0:
            return
        low, high = torch.stack(torch.aminmax(target)).tolist()
        if low < 0 or high >= self.vocab_size:
            raise ValueError(f"target must lie in [0, {self.vocab_size}); got values from {low} to {high}")

        logits = logits.detach().contiguous()
        lse, target_logit, mean_logit, expected_logit, argmax = ops.softmax_stats(logits, target)
        centred_norm = self._accumulate_mass(logits, lse, mean_logit)
        top_logit = logits.gather(1, argmax[:, None])[:, 0]

        self.positions += target.numel()
        self._sums += torch.stack(
            [
                (lse - target_logit).double().sum(),
                -self._unigram_log_probs[target].sum(),
                (lse - expected_logit).double().sum(),
                centred_norm.double().sum() / math.sqrt(self.vocab_size),
                (top_logit.double() - lse).exp().sum(),
                (~(torch.isfinite(lse) & torch.isfinite(expected_logit))).double().sum(),
            ]
        )
        self._argmax_counts += torch.bincount(argmax, minlength=self.vocab_size)
        bins = self._bins[target]
        number = len(FREQUENCY_BINS) + 1
        self._bin_counts[0] += torch.bincount(bins, minlength=number)
        self._bin_counts[1] += torch.bincount(bins[argmax == target], minlength=number)

    def _accumulate_mass(self, logits: Tensor, lse: Tensor, mean_logit: Tensor) -> Tensor:
        """Adds sum_i p_i to the mass, in one blocked pass; returns the norms of z_i - mean(z_i), fp32 [T]."""
        budget = _CUDA_BLOCK_BYTES if logits.is_cuda else _CPU_BLOCK_BYTES
        rows = max(1, min(logits.size(0), budget // (4 * self.vocab_size)))
        block = torch.empty(rows, self.vocab_size, dtype=torch.float32, device=logits.device)
        norms = torch.empty(logits.size(0), dtype=torch.float32, device=logits.device)
        shift = (mean_logit - lse).float()
        for start in range(0, logits.size(0), rows):
            here = slice(start, min(start + rows, logits.size(0)))
            centred = block[: here.stop - here.start]
            torch.sub(logits[here], mean_logit[here, None], out=centred)
            torch.linalg.vector_norm(centred, dim=1, out=norms[here])
            self._mass += centred.add_(shift[here, None]).exp_().sum(0)
        return norms

    def result(self) -> dict[str, float | int | None]:
        """The statistics of all positions so far.

        Returns:
            heldout_cross_entropy: mean_i -ln p_i[target_i].
            unigram_cross_entropy: the same targets under pi; excess_over_unigram: the difference, negative
                when the model is better than counting words.
            predictive_entropy: mean_i H(p_i), at most ln V. marginal_entropy: H(p_bar).
            mutual_information: their difference, the use of context. kl_to_unigram: KL(p_bar || pi).
            logit_std: the standard deviation of a position's logits over the vocabulary, mean over positions.
            argmax_vocabulary: distinct argmaxes over all positions; effective_argmax_vocabulary: exp of the
                entropy of their histogram. Both grow with the number of positions, and both are large for a
                dead network, whose argmax is rounding noise: read them only beside cross-entropy and mutual
                information. unique_20_real: distinct argmaxes to expect among 20 of the positions
                (:func:`bitnet_ext.metrics.rarefied_unique`), which does not depend on their number; None when there
                are fewer than 20.
            accuracy: share of right argmaxes. top1_probability: the mean probability of the argmax; it equals the
                accuracy of a calibrated model (Guo et al. 2017, arXiv:1706.04599) and is above it for one that is too
                sure.
            head_accuracy, torso_accuracy, tail_accuracy: share of right argmaxes where the target lies in
                that bin of :func:`frequency_bins`; None where no target does.
            When some logits were NaN or infinite, every number that depends on the model is NaN.

        Raises:
            ValueError: before the first position.
        """
        if self.positions == 0:
            raise ValueError(
                "PredictionStatistics.result needs at least one position; update was never given any"
            )
        cross_entropy, unigram, entropy, logit_std, top, nonfinite = (self._sums / self.positions).tolist()
        mass = self._mass / self._mass.sum()
        log_mass = torch.where(mass > 0, mass, torch.ones_like(mass)).log()
        marginal = float(-(mass * log_mass).sum())
        kl_to_unigram = float((mass * (log_mass - self._unigram_log_probs)).sum())
        occurrences = self._argmax_counts[self._argmax_counts > 0]
        counts = occurrences.double() / self.positions
        effective = float(torch.exp(-(counts * counts.log()).sum()))
        in_bin, right = self._bin_counts.tolist()
        accuracy = [r / n if n else None for r, n in zip(right, in_bin, strict=True)]
        result: dict[str, float | int | None] = {
            "heldout_cross_entropy": cross_entropy,
            "unigram_cross_entropy": unigram,
            "excess_over_unigram": cross_entropy - unigram,
            "predictive_entropy": entropy,
            "marginal_entropy": marginal,
            "mutual_information": marginal - entropy,
            "kl_to_unigram": kl_to_unigram,
            "logit_std": logit_std,
            "argmax_vocabulary": counts.numel(),
            "effective_argmax_vocabulary": effective,
            "unique_20_real": rarefied_unique(occurrences, 20) if self.positions >= 20 else None,
            "accuracy": sum(right) / self.positions,
            "top1_probability": top,
            "head_accuracy": accuracy[0],
            "torso_accuracy": accuracy[1],
            "tail_accuracy": accuracy[2],
        }
        if nonfinite > 0:
            result = {
                key: value if value is None or key == "unigram_cross_entropy" else math.nan
                for key, value in result.items()
            }
        return result


def heldout_rows(tokens: np.ndarray, seq_len: int, max_tokens: int) -> np.ndarray:
    """Rows of ``seq_len + 1`` consecutive tokens, spread evenly over a stream; the same rows at every call.

    As many rows as fit into ``max_tokens`` targets (``seq_len`` a row, at least one row) without two rows
    sharing a target. The first row starts at the first token, the last one ends at the last.

    Args:
        tokens: any integer dtype, [n].
        seq_len: inputs of a row. max_tokens: the most targets in all.

    Returns:
        int64 [rows, seq_len + 1].

    Raises:
        ValueError: when the stream is shorter than one row, or a number is below 1.
    """
    if seq_len < 1 or max_tokens < 1:
        raise ValueError(f"seq_len and max_tokens must be at least 1; got {seq_len} and {max_tokens}")
    if tokens.ndim != 1 or tokens.shape[0] < seq_len + 1:
        raise ValueError(
            f"tokens must be one stream of at least seq_len + 1 = {seq_len + 1} held-out tokens; "
            f"got shape {list(tokens.shape)}"
        )
    last_start = tokens.shape[0] - (seq_len + 1)
    rows = max(1, min(max_tokens // seq_len, last_start // seq_len + 1))
    starts = [last_start * i // (rows - 1) for i in range(rows)] if rows > 1 else [0]
    return np.stack([np.asarray(tokens[start : start + seq_len + 1], dtype=np.int64) for start in starts])


def evaluate_heldout(
    model: nn.Module,
    tokens: np.ndarray,
    unigram_log_probs: Tensor,
    *,
    seq_len: int,
    max_tokens: int,
    batch_rows: int,
    device: torch.device | str,
) -> dict[str, float | int | None]:
    """:class:`PredictionStatistics` of a model on a held-out token stream, with the rows of
    :func:`heldout_rows`.

    The model runs in eval mode without gradients; each module's own mode is restored. The head is applied
    to a few positions at a time, so that the logits never take more than 26 MB on a CPU or 512 MB on a GPU.

    Args:
        model: has ``hidden_states(input_ids [B, T]) -> [B, T, H]`` and ``head_weight`` [V, H], on ``device``.
        tokens: the held-out stream, integers, [n] (a memory map will do).
        unigram_log_probs: [V], see :class:`PredictionStatistics`.
        seq_len: inputs a row. max_tokens: the most targets. batch_rows: rows in one forward pass.
        device: where the model is.

    Returns:
        See :meth:`PredictionStatistics.result`.
    """
    if batch_rows < 1:
        raise ValueError(f"batch_rows must be at least 1; got {batch_rows}")
    device = torch.device(device)
    rows = torch.from_numpy(heldout_rows(tokens, seq_len, max_tokens))
    head: Tensor = model.head_weight  # type: ignore[assignment]
    statistics = PredictionStatistics(head.size(0), unigram_log_probs, device)
    buffer: Tensor | None = None
    weight_t = head.t()
    with evaluation_mode(model):
        for first in range(0, rows.size(0), batch_rows):
            batch = rows[first : first + batch_rows].to(device)
            hidden: Tensor = model.hidden_states(batch[:, :-1])  # type: ignore[operator]
            hidden = hidden.reshape(-1, hidden.size(-1))
            target = batch[:, 1:].reshape(-1)
            if buffer is None:
                weight_t = head.to(hidden.dtype).t()
                budget = _CUDA_LOGITS_BYTES if device.type == "cuda" else _CPU_LOGITS_BYTES
                chunk = max(1, min(hidden.size(0), budget // (hidden.element_size() * head.size(0))))
                buffer = torch.empty(chunk, head.size(0), dtype=hidden.dtype, device=device)
            for start in range(0, hidden.size(0), buffer.size(0)):
                part = hidden[start : start + buffer.size(0)]
                # One buffer for all chunks: a fresh 26 MB allocation costs as much as the product itself.
                logits = torch.mm(part, weight_t, out=buffer[: part.size(0)])
                statistics.update(logits, target[start : start + part.size(0)])
    return statistics.result()
