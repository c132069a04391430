"""Measures of what a language model predicts and of the network behind it. Nothing here computes a gradient.

``perplexity``    loss, perplexity and bits per byte of any language model
``distribution``  cross-entropy, entropies, mutual information, KL to the unigram, accuracy by word frequency
``diversity``     the unique-of-20 count, distinct-n, seq-rep-n
``generation``    generated text: distinct-n, seq-rep-4, Zipf exponent
``rarefaction``   sizes of a histogram that do not depend on the size of the sample
``ternary``       fractions of -1 / 0 / +1, the share of codes that flip, distances to the thresholds
``network``       sizes of gains, embedding, head and latent weights, over all and by word frequency
``decay``         where weight decay outweighs the gradient
``measurement``   numbers that are handed to the device first and fetched together
``evaluation``    eval mode for as long as something is measured
"""

from __future__ import annotations

from bitnet_ext.metrics.decay import (
    AdamDirection,
    DecayTerms,
    decay_dominates,
    decay_shares,
    measure_decay_shares,
)
from bitnet_ext.metrics.distribution import (
    FREQUENCY_BINS,
    HeldOut,
    PredictionStatistics,
    evaluate_heldout,
    frequency_bins,
    heldout_rows,
)
from bitnet_ext.metrics.diversity import (
    distinct_n,
    expected_unique,
    fixed_prompts,
    last_predictions,
    measure_unique,
    seq_rep_n,
    unique_predictions,
)
from bitnet_ext.metrics.evaluation import evaluation_mode
from bitnet_ext.metrics.generation import continuation_metrics, heldout_prompts, zipf_exponent
from bitnet_ext.metrics.measurement import Measurement, Repeated, combine
from bitnet_ext.metrics.network import (
    ROW_BINS,
    measure_row_norms,
    measure_weight_norms,
    row_bins,
    row_norms,
    weight_norms,
)
from bitnet_ext.metrics.perplexity import evaluate, perplexity
from bitnet_ext.metrics.rarefaction import effective_size, rarefied_unique
from bitnet_ext.metrics.ternary import (
    PackedCodes,
    code_fractions,
    flip_rate,
    measure_code_fractions,
    measure_flip_rate,
    measure_thresholds,
    packed_codes,
    ternary_fractions,
    threshold_statistics,
)

__all__ = [
    "FREQUENCY_BINS",
    "ROW_BINS",
    "AdamDirection",
    "DecayTerms",
    "HeldOut",
    "Measurement",
    "PackedCodes",
    "PredictionStatistics",
    "Repeated",
    "code_fractions",
    "combine",
    "continuation_metrics",
    "decay_dominates",
    "decay_shares",
    "distinct_n",
    "effective_size",
    "evaluate",
    "evaluate_heldout",
    "evaluation_mode",
    "expected_unique",
    "fixed_prompts",
    "flip_rate",
    "frequency_bins",
    "heldout_prompts",
    "heldout_rows",
    "last_predictions",
    "measure_code_fractions",
    "measure_decay_shares",
    "measure_flip_rate",
    "measure_row_norms",
    "measure_thresholds",
    "measure_unique",
    "measure_weight_norms",
    "packed_codes",
    "perplexity",
    "rarefied_unique",
    "row_bins",
    "row_norms",
    "seq_rep_n",
    "ternary_fractions",
    "threshold_statistics",
    "unique_predictions",
    "weight_norms",
    "zipf_exponent",
]
