"""Counts of distinct predictions and n-grams, with what they can and cannot say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bitnet_ext import ops
from bitnet_ext.metrics.evaluation import evaluation_mode
from bitnet_ext.metrics.measurement import Measurement, Numbers
from bitnet_ext.metrics.rarefaction import rarefied_unique


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


def last_predictions(model: nn.Module, prompts: Tensor) -> tuple[Tensor, Tensor]:
    """The model's greedy argmax at the last position of each prompt, and whether there is one.

    Args:
        model: has ``hidden_states(input_ids) -> [B, T, H]`` and ``head_weight`` [V, H].
        prompts: int64 [count, length].

    Returns:
        int64 [count]; bool [], False when the logits hold NaN, because then there is no prediction.
    """
    if prompts.dim() != 2 or prompts.numel() == 0 or prompts.dtype != torch.int64:
        raise ValueError(
            f"prompts must be int64 of shape [count, length]; got {prompts.dtype} {list(prompts.shape)}"
        )
    head: Tensor = model.head_weight  # type: ignore[assignment]
    with evaluation_mode(model):
        hidden: Tensor = model.hidden_states(prompts.to(head.device))  # type: ignore[operator]
        last = hidden[:, -1]
        buffer = ops.logits_buffer(len(last), head.size(0), dtype=last.dtype, device=last.device)
        # A row with NaN has it as its largest value.
        top, argmax = ops.logits_in(buffer, last, head.to(last.dtype)).max(-1)
        return argmax, ~torch.isnan(top).any()


def unique_predictions(model: nn.Module, prompts: Tensor) -> int | None:
    """How many distinct tokens the model's greedy argmax picks at the last position of the prompts.

    The maximum is the number of prompts (20 by default), by construction. It is never a verdict by itself: an
    untrained network scores 20, a network whose logits have all become equal scores 13 to 17 of 20 (the
    argmax of rounding noise), and a network that is learning well can score 3. Read it beside held-out
    cross-entropy and mutual information (:mod:`bitnet_ext.metrics.distribution`).

    Args:
        model, prompts: see :func:`last_predictions`.

    Returns:
        1..count, or None when the logits hold NaN.
    """
    number: int | None = measure_unique(model, prompts, len(prompts)).result()[f"unique_of_{len(prompts)}"]
    return number


def expected_unique(model: nn.Module, prompts: Tensor, sample: int = 20) -> float | None:
    """:func:`unique_predictions` of `sample` prompts, expected over all choices of them from `prompts`.

    From 256 prompts of random ids it says what the count of 20 says, with a fraction of its chance
    (:func:`rarefied_unique`).

    Returns:
        1..sample, or None when the logits hold NaN.
    """
    number: float | None = measure_unique(model, prompts, sample).result()[f"unique_{sample}_random"]
    return number


def measure_unique(model: nn.Module, prompts: Tensor, sample: int) -> Measurement:
    """Distinct predictions for the first `sample` prompts, and of as many of all of them; nothing waits for the device.

    Returns:
        values unique_of_<sample> (:func:`unique_predictions`) and unique_<sample>_random (:func:`expected_unique`).
    """
    names = (f"unique_of_{sample}", f"unique_{sample}_random")

    def finish(arrays: Sequence[Numbers]) -> dict[str, Any]:
        predictions, there = arrays
        if not there:
            return dict.fromkeys(names)
        first = len(np.unique(predictions[:sample]))
        expected = rarefied_unique(np.unique(predictions, return_counts=True)[1], sample)
        return dict(zip(names, (first, expected), strict=True))

    return Measurement(last_predictions(model, prompts), finish)


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
