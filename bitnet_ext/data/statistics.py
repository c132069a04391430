"""Statistics of a token stream."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

_CHUNK = 1 << 24  # ids counted at a time: numpy.bincount makes int64 of them


def as_token_array(tokens: Any, what: str = "tokens") -> npt.NDArray[Any]:
    """Token ids as a numpy array [num_tokens] of integers; arrays (and memory maps) are returned as they are.

    Args:
        tokens: a numpy array, a tensor on any device, or a sequence of integers, of one dimension.
        what: the argument's name in messages.

    Raises:
        TypeError: a text, a `Corpus` or anything else; not of one dimension, or not of integers.
    """
    if hasattr(tokens, "train") and hasattr(tokens, "heldout"):
        raise TypeError(
            f"{what} is a {type(tokens).__name__}, which has two streams: give its .train or its .heldout"
        )
    if isinstance(tokens, str | bytes):
        raise TypeError(
            f"{what} is {type(tokens).__name__}, accepted are token ids: load_corpus(path) gives those of a text file, "
            "load_tokenizer('gpt2').encode(text) those of a text"
        )
    if hasattr(tokens, "detach"):
        array = tokens.detach().cpu().numpy()
    elif isinstance(tokens, np.ndarray):
        array = tokens
    elif isinstance(tokens, Sequence):
        try:
            array = np.asarray(tokens)
        except (ValueError, OverflowError) as error:  # Rows of different lengths, or integers beyond 64 bits.
            raise TypeError(f"{what} is no row of integers ({error})") from error
        if not len(tokens):
            array = np.empty(0, np.int64)
    else:
        raise TypeError(
            f"{what} is {type(tokens).__name__}, accepted are token ids: a one-dimensional numpy array, tensor or "
            "list of integers"
        )
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise TypeError(
            f"{what} is {array.dtype} {list(array.shape)}, accepted is a one-dimensional array of integers"
        )
    return array


def token_counts(tokens: Any, vocab_size: int) -> npt.NDArray[np.int64]:
    """How often each id occurs: int64 [vocab_size].

    Args:
        tokens: ids [num_tokens], see `as_token_array`.

    Raises:
        TypeError: `tokens` is not a row of integers.
        ValueError: an id is not in 0..vocab_size - 1.
    """
    tokens = as_token_array(tokens)
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
    train_tokens: Any = None, vocab_size: int | None = None, add: float = 0.1, *, counts: Any = None
) -> npt.NDArray[np.float64]:
    """Log probabilities (nats) of the additively smoothed unigram: float64 [vocab_size].

    log((count_v + add) / (num_tokens + add * vocab_size)): the best that a predictor blind to context can
    do on the training text, with a little mass for ids it never saw. The measures of `bitnet_ext.metrics`
    take the array as it is.

    Args:
        train_tokens: ids [num_tokens], see `as_token_array`.
        vocab_size: number of ids; with `counts` their length.
        add: occurrences added to each id.
        counts: instead of `train_tokens`, what `token_counts` gives: integers [vocab_size], 0 or more.

    Raises:
        TypeError: the tokens (or counts) are not a row of integers, or both or neither are given.
        ValueError: `add` is not positive and finite, the tokens do not fit `vocab_size`, or they look like
            the counts of `token_counts`: int64 and exactly `vocab_size` of them.
    """
    if not 0.0 < add < float("inf"):
        raise ValueError(f"add is {add!r}, accepted is a positive finite number")
    if (train_tokens is None) == (counts is None):
        raise TypeError("unigram_log_probs takes either train_tokens or counts")
    if counts is None:
        if vocab_size is None:
            raise TypeError("unigram_log_probs needs vocab_size, the number of ids")
        tokens = as_token_array(train_tokens, "train_tokens")
        if len(tokens) == vocab_size and tokens.dtype == np.int64:
            raise ValueError(
                f"train_tokens has exactly vocab_size = {vocab_size} int64 values, as token_counts gives: pass counts "
                "as counts=, or token ids as uint32"
            )
        numbers = token_counts(tokens, vocab_size)
    else:
        numbers = as_token_array(counts, "counts").astype(np.int64)
        if vocab_size is not None and len(numbers) != vocab_size:
            raise ValueError(
                f"counts has {len(numbers)} values, accepted is one for each of {vocab_size} ids"
            )
        if not len(numbers) or int(numbers.min()) < 0:
            raise ValueError("counts must hold a number >= 0 for each id")
    total = int(numbers.sum())
    log_probs: npt.NDArray[np.float64] = np.log(numbers + add) - np.log(total + add * len(numbers))
    return log_probs
