"""Measures of generated text: how much of it is new, how much repeats, how even its tokens' frequencies are."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from bitnet_ext.metrics.distribution import heldout_rows
from bitnet_ext.metrics.diversity import distinct_n, seq_rep_n

#: Prompts, their length and the length of the continuations in the measurements of generated text.
PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 64, 16, 64


def heldout_prompts(tokens: np.ndarray, count: int = PROMPTS, length: int = PROMPT_TOKENS) -> Tensor:
    """Real contexts, spread evenly over a stream of token ids; the same ones at every call.

    Args:
        tokens: any integer dtype, [n], n > length.

    Returns:
        int64 [rows, length]; rows is count, or fewer when the stream is too short for that many without overlap.
    """
    return torch.from_numpy(heldout_rows(tokens, length, count * length)[:, :length])


def zipf_exponent(counts: Tensor | np.ndarray | Sequence[int]) -> float | None:
    """The s of frequency ~ rank^-s: minus the slope of log frequency over log rank (Holtzman et al. 2020,
    arXiv:1904.09751, section 5.3).

    Least squares over the ranks of the tokens that occur at least twice; those that occur once make a plateau whose
    length is that of the text. About 1 for natural text; larger for text that lives on few words.

    Args:
        counts: occurrences of each token, any shape, >= 0.

    Returns:
        None when fewer than three tokens occur twice.
    """
    values = (
        counts.detach().cpu().numpy().astype(np.float64)
        if isinstance(counts, Tensor)
        else np.asarray(counts, np.float64)
    )
    values = np.sort(values[values >= 2].reshape(-1))[::-1]
    if len(values) < 3:
        return None
    slope = np.polyfit(np.log(np.arange(1, len(values) + 1)), np.log(values), 1)[0]
    return float(-slope)


def continuation_metrics(continuations: Tensor) -> dict[str, float | None]:
    """distinct_1, distinct_2 (:func:`distinct_n`), seq_rep_4 (:func:`seq_rep_n`) and zipf (:func:`zipf_exponent`).

    Args:
        continuations: generated tokens without their prompts, int64 [B, T].
    """
    rows = continuations.tolist()
    return {
        "distinct_1": distinct_n(rows, 1),
        "distinct_2": distinct_n(rows, 2),
        "seq_rep_4": seq_rep_n(rows, 4),
        "zipf": zipf_exponent(torch.unique(continuations, return_counts=True)[1]),
    }
