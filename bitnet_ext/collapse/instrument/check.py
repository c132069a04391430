"""The instrument check: every metric on predictors whose health is known, before any of them is believed of a run.

A metric that finds a dead network better than a healthy predictor cannot carry a verdict. Which ones do is computed
from the measured numbers and their sampling errors (:mod:`bitnet_ext.collapse.instrument.judging`); nothing about it is
written down here.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from bitnet_ext import metrics
from bitnet_ext.collapse.evaluator import PROMPT_SEED, PROMPTS
from bitnet_ext.collapse.instrument.judging import USABLE, Judgement, judge
from bitnet_ext.collapse.instrument.measuring import Samples, measure
from bitnet_ext.collapse.instrument.predictors import (
    HEALTHY,
    NetworkPredictor,
    Predictor,
    count_predictors,
    network_predictors,
)
from bitnet_ext.collapse.instrument.scales import Scale, Sizes, scales
from bitnet_ext.collapse.options import INSTRUMENT_EVAL_TOKENS
from bitnet_ext.collapse.results import Row
from bitnet_ext.data.corpora import Corpus
from bitnet_ext.data.statistics import token_counts, unigram_log_probs
from bitnet_ext.metrics.generation import NEW_TOKENS, PROMPT_TOKENS
from bitnet_ext.metrics.generation import PROMPTS as TEXTS
from bitnet_ext.models import BitNetConfig
from bitnet_ext.training.checkpoint import load_model

SEQ_LEN = 31  # the report's rows of 32 tokens


@dataclass(frozen=True)
class InstrumentReport:
    """What :func:`instrument_check` measured.

    Attributes:
        settings: corpus, network, sizes of the samples.
        rows: for each predictor "network", "kind" and its metrics; None for what it does not have.
        errors: standard errors of the metrics of each predictor, by its name.
        scales: how each metric is read, with its range.
        judgements: one for each scale.
    """

    settings: dict[str, Any]
    rows: list[Row]
    errors: dict[str, dict[str, float]]
    scales: list[Scale]
    judgements: list[Judgement]

    @property
    def usable(self) -> list[str]:
        """Keys of the metrics that a verdict may rest on."""
        return [judgement.key for judgement in self.judgements if judgement.status == USABLE]


def instrument_check(
    corpus: Corpus,
    model_config: BitNetConfig,
    *,
    device: torch.device | str = "cpu",
    max_tokens: int = INSTRUMENT_EVAL_TOKENS,
    seq_len: int = SEQ_LEN,
    checkpoint: Path | str | None = None,
    generation: bool = True,
    progress: bool = False,
) -> InstrumentReport:
    """Measures the reference predictors and judges the metrics by them.

    Args:
        corpus: its training text gives the counts, its held-out text the positions.
        model_config: of the fresh and the dead networks.
        max_tokens: held-out positions. seq_len: of a row.
        checkpoint: of a network that is known to be healthy, a second reference beside the bigram.
        generation: whether text is generated, too: most of the time on a CPU.
        progress: whether a bar is shown.

    Raises:
        ValueError: the corpus does not fit the vocabulary; the checkpoint is damaged or of another vocabulary.
    """
    device = torch.device(device)
    vocab_size = model_config.vocab_size
    corpus.check_vocab(vocab_size)
    longest = max(seq_len, PROMPT_TOKENS + NEW_TOKENS)
    if model_config.max_seq_len < longest:
        raise ValueError(
            f"max_seq_len of the network must be at least {longest}, got {model_config.max_seq_len}"
        )
    trained = None if checkpoint is None else load_model(Path(checkpoint), device)
    if trained is not None and trained.config.vocab_size != vocab_size:
        raise ValueError(f"checkpoint must have vocab_size {vocab_size}, got {trained.config.vocab_size}")
    unigram = torch.from_numpy(unigram_log_probs(corpus.train, vocab_size))
    seen = torch.from_numpy(token_counts(corpus.train, vocab_size) > 0)
    texts = metrics.heldout_rows(
        corpus.heldout, PROMPT_TOKENS + NEW_TOKENS - 1, TEXTS * (PROMPT_TOKENS + NEW_TOKENS)
    )[:TEXTS]
    samples = Samples(
        torch.from_numpy(metrics.heldout_rows(corpus.heldout, seq_len, max_tokens)).to(device),
        unigram,
        metrics.fixed_prompts(vocab_size, PROMPTS, seed=PROMPT_SEED).to(device),
        torch.from_numpy(texts).to(device),
        metrics.row_bins(unigram, seen).to(device),
    )
    known: list[Predictor] = [] if trained is None else [NetworkPredictor("checkpoint", HEALTHY, trained)]
    predictors = itertools.chain(
        count_predictors(corpus.train, unigram, device), known, network_predictors(model_config, device)
    )
    rows, errors = [], {}
    with tqdm(total=10 + len(known), unit="predictor", disable=not progress, dynamic_ncols=True) as bar:
        for predictor in predictors:
            bar.set_description(predictor.name)
            row, error = measure(predictor, samples, generation)
            rows.append(row)
            errors[predictor.name] = error
            bar.update()
    positions = samples.rows[:, 1:].numel()
    sizes = Sizes(vocab_size, positions, float(unigram.min()), len(texts), NEW_TOKENS)
    metric_scales = [scale for scale in scales(sizes) if any(row.get(scale.key) is not None for row in rows)]
    settings = {
        "corpus": corpus.name,
        "description": corpus.description,
        "fingerprint": corpus.fingerprint,
        "model": model_config.to_dict(),
        "checkpoint": None if checkpoint is None else str(checkpoint),
        "vocab_size": vocab_size,
        "positions": positions,
        "rows": len(samples.rows),
        "random_prompts": PROMPTS,
        "texts": len(texts),
        "new_tokens": NEW_TOKENS,
        "unigram_cross_entropy": rows[0]["unigram_cross_entropy"],
    }
    return InstrumentReport(settings, rows, errors, metric_scales, judge(metric_scales, rows, errors))
