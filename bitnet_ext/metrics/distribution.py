"""What a model predicts on held-out text, from streamed logits.

Notation, for positions i = 1..n with logits z_i over V tokens: p_i = softmax(z_i), H(p) = -sum_j p_j ln p_j,
p_bar = mean_i p_i, pi = the unigram distribution of the training text. Everything is in nats.

``mutual_information`` = H(p_bar) - mean_i H(p_i) is the generalised Jensen-Shannon divergence of the
predictions (Lin 1991, IEEE Trans. Inf. Theory 37(1)): 0 when every position gets the same distribution,
whatever that distribution is, so a network that ignores its context scores 0 however many distinct argmaxes
it has.
"""

from __future__ import annotations

import copy
import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from bitnet_ext import ops
from bitnet_ext.metrics.evaluation import evaluation_mode
from bitnet_ext.metrics.measurement import Measurement, Numbers
from bitnet_ext.metrics.rarefaction import rarefied_unique

#: Training-unigram mass at which the head of the vocabulary ends and the tail begins.
FREQUENCY_BINS = (0.5, 0.9)

# A block of [rows, V] that a pass on a GPU writes.
_CUDA_BLOCK_BYTES = 256 << 20
# Logits that evaluate_heldout holds at once. 128 rows of 50,257 fp32 (26 MB) stay in the L2 cache of a large GPU for
# the passes over them; a CPU multiplies 512 rows at 85 GFLOP/s and 128 at 72 (one thread of an AMD EPYC).
_CUDA_LOGITS_BYTES = 128 * 50_257 * 4
_CPU_LOGITS_BYTES = 512 * 50_257 * 4
# Rows of logits that are copied at once on a CPU, whose statistics use them up.
_COPIED_ROWS = 128


def frequency_bins(unigram_log_probs: Tensor | np.ndarray) -> Tensor:
    """Bin of each token id by its frequency in the training text: 0 head, 1 torso, 2 tail.

    The ids are taken from the most frequent one down (equal frequencies: the lower id first). The head is the
    ids that are needed to cover the first 50 % of the unigram mass, the torso those up to 90 %, the tail
    the rest.

    Args:
        unigram_log_probs: natural logarithms of the unigram distribution, [V], any float dtype; a tensor or array.

    Returns:
        int64 [V], on the device of the argument.
    """
    probabilities = torch.as_tensor(unigram_log_probs).double().exp()
    order = torch.argsort(probabilities, descending=True, stable=True)
    mass_before = probabilities[order].cumsum(0) - probabilities[order]
    bins = torch.empty_like(order)
    # The slack keeps a mass that is 0.5 but for rounding out of the head.
    bins[order] = sum((mass_before >= edge - 1e-12).long() for edge in FREQUENCY_BINS)
    return bins


class _Rows(NamedTuple):
    """Statistics of positions, [T] each."""

    cross_entropy: Tensor
    entropy: Tensor
    argmax: Tensor
    top_log_probability: Tensor
    logit_std: Tensor


def _join(parts: list[_Rows]) -> _Rows:
    return parts[0] if len(parts) == 1 else _Rows(*map(torch.cat, zip(*parts, strict=True)))


class PredictionStatistics:
    """Streams logits and targets into the held-out statistics; no logits are kept.

    >>> statistics = PredictionStatistics(vocab_size, unigram_log_probs, device)
    >>> for logits, target in chunks:
    ...     statistics.update(logits, target)
    >>> row = statistics.result()

    One ``update`` costs one pass over the logits on a CPU, and on a GPU one :func:`bitnet_ext.ops.softmax_stats` and
    one more pass. Sums over positions are fp64, so the result does not depend on how the positions were cut into
    chunks beyond rounding.

    Args:
        vocab_size: V.
        unigram_log_probs: natural logarithms of the training unigram distribution, [V], finite, summing to 1
            after exp (smooth the counts, so that no token has probability 0).
        device: where the logits will be.

    Raises:
        ValueError: for a distribution of another length, with infinite entries, or not summing to 1 within
            1e-3.
    """

    def __init__(
        self, vocab_size: int, unigram_log_probs: Tensor | np.ndarray, device: torch.device | str
    ) -> None:
        if tuple(unigram_log_probs.shape) != (vocab_size,):
            raise ValueError(
                f"unigram_log_probs must have shape [{vocab_size}] (vocab_size); "
                f"got {list(unigram_log_probs.shape)}"
            )
        log_probs = torch.as_tensor(unigram_log_probs).detach().to(device="cpu", dtype=torch.float64)
        total = float(log_probs.exp().sum())
        if not bool(torch.isfinite(log_probs).all()) or abs(total - 1.0) > 1e-3:
            raise ValueError(
                "unigram_log_probs must be finite natural logarithms of probabilities that sum to 1; "
                f"got values that sum to {total:.6g} after exp"
            )
        self.vocab_size = vocab_size
        self.device = torch.device(device)
        self._unigram_log_probs = log_probs.to(self.device)
        self._bins = frequency_bins(log_probs).to(self.device)
        self._clear()

    def emptied(self) -> PredictionStatistics:
        """Statistics of no position yet, for the same vocabulary."""
        new = copy.copy(self)
        new._clear()
        return new

    def _clear(self) -> None:
        self.positions = 0
        # fp64 sums over positions: cross-entropy, unigram cross-entropy, entropy, logit std, probability of the
        # argmax; then a count of rows that are not finite.
        self._sums = torch.zeros(6, dtype=torch.float64, device=self.device)
        self._mass = torch.zeros(self.vocab_size, dtype=torch.float64, device=self.device)
        self._argmax_counts = torch.zeros(self.vocab_size, dtype=torch.int64, device=self.device)
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
        check_targets(target, self.vocab_size)
        self._add(self._rows(logits.detach().contiguous(), target), target)

    def _rows(self, logits: Tensor, target: Tensor) -> _Rows:
        """Statistics of each position; adds the positions' distributions to the mass."""
        if not logits.is_cuda:
            return self._copied_rows(logits, target)
        lse, target_logit, mean_logit, expected_logit, argmax = ops.softmax_stats(logits, target)
        top_logit = logits.gather(1, argmax[:, None])[:, 0]
        norms = self._accumulate_mass(logits, lse, mean_logit)
        return _Rows(
            lse - target_logit,
            lse - expected_logit,
            argmax,
            top_logit - lse,
            norms.double() / math.sqrt(self.vocab_size),
        )

    def _copied_rows(self, logits: Tensor, target: Tensor) -> _Rows:
        """:meth:`_rows` on a CPU, by the operator that uses logits up."""
        rows_at_once = min(len(logits), _COPIED_ROWS)
        buffer = ops.logits_buffer(rows_at_once, self.vocab_size, dtype=torch.float32, device=logits.device)
        parts = []
        for rows, here in zip(logits.split(rows_at_once), target.split(rows_at_once), strict=True):
            copied = buffer[: len(rows)]
            copied[:, : self.vocab_size].copy_(rows)
            parts.append(self._take(ops.predicted_rows_(copied, self.vocab_size, here)))
        return _join(parts)

    def _predicted(self, hidden: Tensor, head: Tensor, target: Tensor, buffer: Tensor) -> _Rows:
        """:meth:`_rows` of logits that are made for it, with fewer passes over them."""
        return self._take(ops.predict_rows(hidden, head, target, buffer))

    def _take(self, found: ops.PredictedRows) -> _Rows:
        self._mass += found.mass
        return _Rows(
            found.cross_entropy.double(),
            found.entropy.double(),
            found.argmax,
            found.top_log_probability,
            found.logit_std.double(),
        )

    def _add(self, rows: _Rows, target: Tensor) -> None:
        """Adds what :meth:`_rows` found. No number is read on the host."""
        self.positions += target.numel()
        self._sums += torch.stack(
            [
                rows.cross_entropy,
                -self._unigram_log_probs[target],
                rows.entropy,
                rows.logit_std,
                rows.top_log_probability.exp(),
                (~(torch.isfinite(rows.cross_entropy) & torch.isfinite(rows.entropy))).double(),
            ]
        ).sum(1)
        one = torch.ones_like(target)
        self._argmax_counts.index_add_(0, rows.argmax, one)
        bins = self._bins[target]
        self._bin_counts[0].index_add_(0, bins, one)
        self._bin_counts[1].index_add_(0, bins, (rows.argmax == target).long())

    def _accumulate_mass(self, logits: Tensor, lse: Tensor, mean_logit: Tensor) -> Tensor:
        """Adds sum_i p_i to the mass, in one blocked pass; returns the norms of z_i - mean(z_i), fp32 [T]."""
        rows = max(1, min(logits.size(0), _CUDA_BLOCK_BYTES // (4 * self.vocab_size)))
        block = torch.empty(rows, self.vocab_size, device=logits.device)
        norms = torch.empty(logits.size(0), dtype=torch.float32, device=logits.device)
        shift = (mean_logit - lse).float()
        for start in range(0, logits.size(0), rows):
            here = slice(start, min(start + rows, logits.size(0)))
            centred = block[: here.stop - here.start]
            torch.sub(logits[here], mean_logit[here, None], out=centred)
            torch.linalg.vector_norm(centred, dim=1, out=norms[here])
            self._mass += centred.add_(shift[here, None]).exp_().sum(0)
        return norms

    def measurement(self) -> Measurement:
        """:meth:`result` without waiting for the device.

        Raises:
            ValueError: before the first position.
        """
        if self.positions == 0:
            raise ValueError(
                "PredictionStatistics.result needs at least one position; update was never given any"
            )
        mass = self._mass / self._mass.sum()
        log_mass = torch.where(mass > 0, mass, torch.ones_like(mass)).log()
        marginal = torch.stack(
            [-(mass * log_mass).sum(), (mass * (log_mass - self._unigram_log_probs)).sum()]
        )
        positions = self.positions
        return Measurement(
            (self._sums, marginal, self._argmax_counts, self._bin_counts),
            lambda arrays: _numbers(positions, *arrays),
        )

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
        return self.measurement().result()


def _numbers(
    positions: int, sums: Numbers, marginals: Numbers, argmax_counts: Numbers, bin_counts: Numbers
) -> dict[str, float | int | None]:
    """:meth:`PredictionStatistics.result` from its sums."""
    cross_entropy, unigram, entropy, logit_std, top, nonfinite = (sums / positions).tolist()
    marginal, kl_to_unigram = marginals.tolist()
    occurrences = argmax_counts[argmax_counts > 0]
    share = occurrences / positions
    in_bin, right = bin_counts.tolist()
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
        "argmax_vocabulary": len(occurrences),
        "effective_argmax_vocabulary": math.exp(-float((share * np.log(share)).sum())),
        "unique_20_real": rarefied_unique(occurrences, 20) if positions >= 20 else None,
        "accuracy": sum(right) / positions,
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


def check_targets(target: Tensor, vocab_size: int) -> None:
    """ValueError for a target outside of the vocabulary. Waits for the device."""
    low, high = torch.stack(torch.aminmax(target)).tolist()
    if low < 0 or high >= vocab_size:
        raise ValueError(f"target must lie in [0, {vocab_size}); got values from {low} to {high}")


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


class HeldOut:
    """A held-out token stream, cut into rows and put on a device, for one model after another.

    Args:
        tokens: integers, [n] (a memory map will do).
        unigram_log_probs: [V], see :class:`PredictionStatistics`.
        seq_len: inputs a row. max_tokens: the most targets. batch_rows: rows in one forward pass.
        device: where the models will be.

    Raises:
        ValueError: for a stream shorter than a row, a target outside of the vocabulary, a number below 1.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        unigram_log_probs: Tensor | np.ndarray,
        *,
        seq_len: int,
        max_tokens: int,
        batch_rows: int,
        device: torch.device | str,
    ) -> None:
        if batch_rows < 1:
            raise ValueError(f"batch_rows must be at least 1; got {batch_rows}")
        rows = torch.from_numpy(heldout_rows(tokens, seq_len, max_tokens))
        check_targets(rows[:, 1:], len(unigram_log_probs))
        self.device = torch.device(device)
        self._batches = [
            (batch[:, :-1].contiguous(), batch[:, 1:].reshape(-1))
            for batch in rows.to(self.device).split(batch_rows)
        ]
        self._empty = PredictionStatistics(len(unigram_log_probs), unigram_log_probs, self.device)

    def measure(self, model: nn.Module) -> Measurement:
        """:class:`PredictionStatistics` of a model; nothing in it waits for the device.

        The model runs in eval mode without gradients; each module's own mode is restored. The head is applied
        to a few positions at a time, so that the logits never take more than 26 MB, on a CPU 103 MB.

        Args:
            model: has ``hidden_states(input_ids [B, T]) -> [B, T, H]`` and ``head_weight`` [V, H], on the device.
        """
        head: Tensor = model.head_weight  # type: ignore[assignment]
        statistics = self._empty.emptied()
        if head.size(0) != statistics.vocab_size:
            raise ValueError(
                f"unigram_log_probs must have shape [{head.size(0)}] (the model's vocabulary); "
                f"got [{statistics.vocab_size}]"
            )
        buffer: Tensor | None = None
        with evaluation_mode(model):
            for inputs, target in self._batches:
                hidden: Tensor = model.hidden_states(inputs)  # type: ignore[operator]
                hidden = hidden.reshape(-1, hidden.size(-1))
                fused = ops.predicts_rows(hidden)
                if buffer is None:
                    head = head.to(hidden.dtype)
                    budget = _CUDA_LOGITS_BYTES if hidden.is_cuda else _CPU_LOGITS_BYTES
                    chunk = max(1, budget // (hidden.element_size() * head.size(0)))
                    # One buffer for all chunks: a fresh 26 MB allocation costs as much as the product itself.
                    rows = min(chunk, len(hidden))
                    buffer = ops.logits_buffer(rows, head.size(0), dtype=hidden.dtype, device=hidden.device)
                parts = []
                for start in range(0, hidden.size(0), buffer.size(0)):
                    part = hidden[start : start + buffer.size(0)]
                    here = target[start : start + part.size(0)]
                    if fused:
                        parts.append(statistics._predicted(part, head, here, buffer))
                    else:
                        logits = ops.logits_in(buffer, part, head)
                        parts.append(statistics._rows(logits.contiguous(), here))
                statistics._add(_join(parts), target)
            return statistics.measurement()


def evaluate_heldout(
    model: nn.Module,
    tokens: np.ndarray,
    unigram_log_probs: Tensor | np.ndarray,
    *,
    seq_len: int,
    max_tokens: int,
    batch_rows: int,
    device: torch.device | str,
) -> dict[str, float | int | None]:
    """What :class:`HeldOut` measures of one model: see :meth:`PredictionStatistics.result`.

    Args:
        model: of :meth:`HeldOut.measure`; the others are those of :class:`HeldOut`.
    """
    heldout = HeldOut(
        tokens,
        unigram_log_probs,
        seq_len=seq_len,
        max_tokens=max_tokens,
        batch_rows=batch_rows,
        device=device,
    )
    return heldout.measure(model).result()
