"""Sizes of a histogram that can be compared between samples of different sizes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from torch import Tensor


def _positive_counts(counts: Tensor | np.ndarray | Sequence[int]) -> np.ndarray:
    values = counts.detach().cpu().numpy() if isinstance(counts, Tensor) else np.asarray(counts)
    values = values.astype(np.float64).reshape(-1)
    if values.size and (not np.isfinite(values).all() or values.min() < 0):
        raise ValueError(
            "counts must be numbers of occurrences, 0 or more; got a negative or non-finite value"
        )
    values = values[values > 0]
    if values.size == 0:
        raise ValueError("counts must hold at least one occurrence; got none")
    return values


def effective_size(counts: Tensor | np.ndarray | Sequence[int]) -> float:
    """exp of the Shannon entropy of a histogram: the number of equally frequent classes with the same
    entropy.

    1 when one class takes everything, the number of classes when all are equal (Hill 1973, order 1).

    Args:
        counts: occurrences of each class, any shape.
    """
    share = _positive_counts(counts)
    share = share / share.sum()
    return float(math.exp(-(share * np.log(share)).sum()))


def rarefied_unique(counts: Tensor | np.ndarray | Sequence[int], sample: int) -> float:
    """Expected number of distinct classes among ``sample`` occurrences drawn without replacement (Hurlbert
    1971).

    E = sum_v [1 - C(N - N_v, sample) / C(N, sample)] with N_v the counts and N their sum. It makes counts
    from different numbers of positions comparable: distinct values always grow with the number looked at.

    Args:
        counts: occurrences of each class, any shape. sample: at most their sum.
    """
    occurrences = _positive_counts(counts)
    total = int(occurrences.sum())
    if not 1 <= sample <= total:
        raise ValueError(f"sample must lie in [1, {total}] (the number of occurrences); got {sample}")

    def log_choose(n: float) -> float:
        return math.lgamma(n + 1) - math.lgamma(sample + 1) - math.lgamma(n - sample + 1)

    all_samples = log_choose(total)
    values, multiplicity = np.unique(occurrences, return_counts=True)
    expected = 0.0
    for value, number in zip(values.tolist(), multiplicity.tolist(), strict=True):
        rest = total - value
        # Without `value` occurrences fewer than `sample` are left: the class is in every sample.
        missing = math.exp(log_choose(rest) - all_samples) if rest >= sample else 0.0
        expected += number * (1.0 - missing)
    return expected
