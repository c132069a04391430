"""Statistics of a token stream."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

_CHUNK = 1 << 24  # ids counted at a time: numpy.bincount makes int64 of them


def token_counts(tokens: npt.NDArray[Any], vocab_size: int) -> npt.NDArray[np.int64]:
    """How often each id occurs: int64 [vocab_size].

    Raises:
        ValueError: `tokens` is not a row of integers in 0..vocab_size - 1.
    """
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise ValueError(
            f"tokens has shape {tokens.shape} and dtype {tokens.dtype}, accepted is one dimension of integers"
        )
    if vocab_size < 1:
        raise ValueError(f"vocab_size is {vocab_size}, accepted is 1 or more")
    counts = np.zeros(vocab_size, np.int64)
    for start in range(0, len(tokens), _CHUNK):
        chunk = tokens[start : start + _CHUNK]
        low, high = int(chunk.min()), int(chunk.max())
        if low < 0 or high >= vocab_size:
            raise ValueError(
                f"tokens holds the id {low if low < 0 else high}, "
                f"accepted are 0..{vocab_size - 1} (vocab_size {vocab_size})"
            )
        counts += np.bincount(chunk.astype(np.int64), minlength=vocab_size)
    return counts


def unigram_log_probs(
    train_tokens: npt.NDArray[Any], vocab_size: int, add: float = 0.1
) -> npt.NDArray[np.float64]:
    """Log probabilities (nats) of the additively smoothed unigram: float64 [vocab_size].

    log((count_v + add) / (num_tokens + add * vocab_size)): the best that a predictor blind to context can
    do on the training text, with a little mass for ids it never saw.

    Raises:
        ValueError: `add` is not positive and finite, or `train_tokens` does not fit `vocab_size`.
    """
    if not 0.0 < add < float("inf"):
        raise ValueError(f"add is {add!r}, accepted is a positive finite number")
    counts = token_counts(train_tokens, vocab_size)
    log_probs: npt.NDArray[np.float64] = np.log(counts + add) - np.log(len(train_tokens) + add * vocab_size)
    return log_probs
