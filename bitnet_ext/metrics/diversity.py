"""Counts of distinct predictions and n-grams, with what they can and cannot say."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from bitnet_ext.metrics.distribution import evaluation_mode


def fixed_prompts(vocab_size: int, count: int = 20, length: int = 8, seed: int = 0) -> Tensor:
    """Prompts of token ids drawn uniformly from the vocabulary: the prompts of the unique-of-20 count.

    The same for the same arguments on every machine (a frozen generator: NumPy's RandomState). Uniform ids
    are far from real text: most of them are rare words that the training text may not hold at all.

    Returns:
        int64 [count, length], on the CPU.
    """
    if min(vocab_size, count, length) < 1:
        raise ValueError(
            f"vocab_size, count and length must be at least 1; got {vocab_size}, {count} and {length}"
        )
    return torch.from_numpy(
        np.random.RandomState(seed).randint(0, vocab_size, (count, length), dtype=np.int64)
    )


def unique_predictions(model: nn.Module, prompts: Tensor) -> int | None:
    """How many distinct tokens the model's greedy argmax picks at the last position of the prompts.

    The maximum is the number of prompts (20 by default), by construction. It is never a verdict by itself: an
    untrained network scores 20, a network whose logits have all become equal scores 13 to 17 of 20 (the
    argmax of rounding noise), and a network that is learning well can score 3. Read it beside held-out
    cross-entropy and mutual information (:mod:`bitnet_ext.metrics.distribution`).

    Args:
        model: has ``hidden_states(input_ids) -> [B, T, H]`` and ``head_weight`` [V, H].
        prompts: int64 [count, length].

    Returns:
        1..count, or None when the logits hold NaN, because then there is no prediction to count.
    """
    if prompts.dim() != 2 or prompts.numel() == 0 or prompts.dtype != torch.int64:
        raise ValueError(
            f"prompts must be int64 of shape [count, length]; got {prompts.dtype} {list(prompts.shape)}"
        )
    head: Tensor = model.head_weight  # type: ignore[assignment]
    with evaluation_mode(model):
        hidden: Tensor = model.hidden_states(prompts.to(head.device))  # type: ignore[operator]
        logits = hidden[:, -1] @ head.to(hidden.dtype).t()
        if bool(torch.isnan(logits).any()):
            return None
        return int(torch.unique(logits.argmax(-1)).numel())


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


def _ngrams(sequence: Sequence[int] | Tensor, n: int) -> list[tuple[int, ...]]:
    tokens = sequence.tolist() if isinstance(sequence, Tensor) else list(sequence)
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def _check_order(n: int) -> None:
    if n < 1:
        raise ValueError(f"n must be at least 1; got {n}")


def distinct_n(sequences: Sequence[Sequence[int] | Tensor], n: int) -> float | None:
    """Distinct n-grams over all n-grams of the generated sequences together (Li et al. 2016,
    arXiv:1510.03055).

    1: no n-gram occurs twice. It falls with the amount of text, so compare equal amounts only.

    Returns:
        In (0, 1], or None when every sequence is shorter than n.
    """
    _check_order(n)
    grams = [gram for sequence in sequences for gram in _ngrams(sequence, n)]
    return len(set(grams)) / len(grams) if grams else None


def seq_rep_n(sequences: Sequence[Sequence[int] | Tensor], n: int = 4) -> float | None:
    """Share of repeated n-grams within a continuation, mean over continuations (Welleck et al. 2020,
    arXiv:1908.04319).

    1 - distinct / all n-grams of one continuation; 0: no repetition, near 1: a loop.

    Returns:
        In [0, 1), or None when every sequence is shorter than n (shorter ones are left out of the mean).
    """
    _check_order(n)
    shares = []
    for sequence in sequences:
        grams = _ngrams(sequence, n)
        if grams:
            shares.append(1.0 - len(set(grams)) / len(grams))
    return sum(shares) / len(shares) if shares else None
