"""Measures of what a language model predicts and of the network behind it. Nothing here needs a gradient.

``distribution``  cross-entropy, entropies, mutual information, KL to the unigram, accuracy by word frequency
``diversity``     the unique-of-20 count, effective sizes, rarefaction, distinct-n, seq-rep-n
``ternary``       fractions of -1 / 0 / +1 and the share of codes that flip
``network``       mean absolute values of gains, embedding, head and latent weights
"""

from __future__ import annotations

from bitnet_ext.metrics.distribution import (
    FREQUENCY_BINS,
    PredictionStatistics,
    evaluate_heldout,
    frequency_bins,
    heldout_rows,
)
from bitnet_ext.metrics.diversity import (
    distinct_n,
    effective_size,
    fixed_prompts,
    rarefied_unique,
    seq_rep_n,
    unique_predictions,
)
from bitnet_ext.metrics.network import weight_norms
from bitnet_ext.metrics.ternary import PackedCodes, code_fractions, flip_rate, packed_codes, ternary_fractions

__all__ = [
    "FREQUENCY_BINS",
    "PackedCodes",
    "PredictionStatistics",
    "code_fractions",
    "distinct_n",
    "effective_size",
    "evaluate_heldout",
    "fixed_prompts",
    "flip_rate",
    "frequency_bins",
    "heldout_rows",
    "packed_codes",
    "rarefied_unique",
    "seq_rep_n",
    "ternary_fractions",
    "unique_predictions",
    "weight_norms",
]
