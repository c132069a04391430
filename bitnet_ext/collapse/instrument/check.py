"""The instrument check: every metric on predictors whose health is known, before any of them is believed of a run.

A metric that finds a dead network better than a healthy predictor cannot carry a verdict. Which ones do is computed
from the measured numbers and their sampling errors (:func:`judge`); nothing about it is written down here.

Sampling errors are standard errors of the delete-a-group jackknife (Efron & Stein 1981, Annals of Statistics 9(3)):
groups of held-out rows, of random prompts, or of generated texts are left out in turn. It suits counts of distinct
things, where resampling with replacement would draw the same text twice and count too few.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from bitnet_ext import metrics
from bitnet_ext.collapse.evaluator import NUCLEUS, PROMPT_SEED, PROMPTS
from bitnet_ext.collapse.instrument.predictors import (
    DEAD,
    HEALTHY,
    HUMAN,
    NetworkPredictor,
    Predictor,
    continuations,
    count_predictors,
    network_predictors,
)
from bitnet_ext.collapse.instrument.scales import HIGHER, HUMAN_LIKE, LOWER, Scale, Sizes, scales
from bitnet_ext.collapse.pages.table import Table
from bitnet_ext.data.corpora import Corpus, load_corpus
from bitnet_ext.data.statistics import token_counts, unigram_log_probs
from bitnet_ext.metrics.generation import NEW_TOKENS, PROMPT_TOKENS
from bitnet_ext.metrics.generation import PROMPTS as TEXTS
from bitnet_ext.models import BitNetConfig, preset
from bitnet_ext.training.checkpoint import load_model
from bitnet_ext.training.device import resolve_device

EVAL_TOKENS = 4096
SEQ_LEN = 31  # the report's rows of 32 tokens
#: Groups that the jackknife leaves out, of held-out rows and of generated texts.
ROW_GROUPS, TEXT_GROUPS = 32, 16
#: Choices of 20 of the random prompts, whose spread is the error of the report's count.
PROMPT_SETS = 200
#: Standard errors of a difference that chance may make.
ERRORS = 2.0

USABLE, INVERTED, BLUNT = "usable", "not for verdicts", "does not separate"
DESCRIPTIVE, UNMEASURED = "description", "not measured"

Row = dict[str, Any]


@dataclass(frozen=True)
class Judgement:
    """What the check says of one metric, with the pair of predictors that decided.

    Attributes:
        key: of the metric.
        status: INVERTED, when a dead network scores better than a healthy predictor by more than ERRORS standard errors
            of the difference; BLUNT, when one scores as well within that; USABLE, when every dead one scores worse;
            DESCRIPTIVE for a metric without a good side; UNMEASURED when a side is missing.
        healthy, dead: names of the pair. healthy_value, dead_value: their values.
    """

    key: str
    status: str
    healthy: str | None = None
    healthy_value: float | None = None
    dead: str | None = None
    dead_value: float | None = None


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

    def table(self) -> Table:
        """Metrics x predictors with errors, attainable range and judgement."""
        from bitnet_ext.collapse.instrument.page import instrument_table

        return instrument_table(self)


def judge(
    metric_scales: Iterable[Scale],
    rows: Sequence[Mapping[str, Any]],
    errors: Mapping[str, Mapping[str, float]],
    errors_allowed: float = ERRORS,
) -> list[Judgement]:
    """Which metrics find a dead network better than a healthy predictor: see :class:`Judgement`.

    Args:
        rows: predictors with "network", "kind" ("healthy", "dead" and "human" are looked at) and metrics.
        errors: standard errors by name of the predictor and key; a missing one is 0.
    """
    result = []
    for scale in metric_scales:
        if scale.better is None:
            result.append(Judgement(scale.key, DESCRIPTIVE))
            continue
        values = {row["network"]: _finite(row.get(scale.key)) for row in rows}
        names = {
            kind: [
                row["network"] for row in rows if row["kind"] == kind and values[row["network"]] is not None
            ]
            for kind in (HEALTHY, DEAD, HUMAN)
        }
        human = values[names[HUMAN][0]] if names[HUMAN] else None
        pairs = list(itertools.product(names[HEALTHY], names[DEAD]))
        if not pairs or (scale.better == HUMAN_LIKE and human is None):
            result.append(Judgement(scale.key, UNMEASURED))
            continue

        def advantage(
            pair: tuple[str, str], scale: Scale = scale, values: Any = values, human: Any = human
        ) -> tuple[float, float]:
            """By how much the dead one scores better, and what chance may make of it."""
            good, bad = (_score(scale, values[name], human) for name in pair)
            spread = math.hypot(*(errors.get(name, {}).get(scale.key, 0.0) for name in pair))
            return bad - good, errors_allowed * spread

        def surplus(pair: tuple[str, str]) -> tuple[bool, float]:
            gain, chance = advantage(pair)
            return gain > chance, gain + chance

        healthy, dead = worst = max(pairs, key=surplus)
        gain, chance = advantage(worst)
        status = INVERTED if gain > chance else BLUNT if gain >= -chance else USABLE
        result.append(Judgement(scale.key, status, healthy, values[healthy], dead, values[dead]))
    return result


def _finite(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _score(scale: Scale, value: float, human: float | None) -> float:
    """The value on a scale where more is better."""
    if scale.better == HUMAN_LIKE:
        return -abs(value - (human if human is not None else math.nan))
    return {HIGHER: value, LOWER: -value}[scale.better or HIGHER]


class _Jackknife(metrics.PredictionStatistics):
    """Statistics of groups of positions, which can be left out again."""

    def __init__(self, vocab_size: int, unigram: Tensor, device: torch.device) -> None:
        super().__init__(vocab_size, unigram, device)
        self._groups: list[tuple[int, list[Tensor]]] = []
        self._before = self._state()

    def _state(self) -> tuple[int, list[Tensor]]:
        sums = (self._sums, self._mass, self._argmax_counts, self._bin_counts)
        return self.positions, [t.clone() for t in sums]

    def end_group(self) -> None:
        """What came since the last call is a group."""
        now = self._state()
        new = [after - before for after, before in zip(now[1], self._before[1], strict=True)]
        self._groups.append((now[0] - self._before[0], new))
        self._before = now

    def without_each(self) -> Iterator[dict[str, float | int | None]]:
        """:meth:`result` without the first group, without the second, ..."""
        whole = self._state()
        for number, group in self._groups:
            self.positions = whole[0] - number
            self._sums, self._mass, self._argmax_counts, self._bin_counts = (
                total - part for total, part in zip(whole[1], group, strict=True)
            )
            # What is left of a mass may be 0 but for rounding, on either side.
            self._mass.clamp_(min=0)
            yield self.result()
        self.positions, (self._sums, self._mass, self._argmax_counts, self._bin_counts) = whole


def jackknife_errors(left_out: Sequence[Mapping[str, float | None]]) -> dict[str, float]:
    """Standard error of each number from its values without one group each: sqrt((k - 1) / k sum (x - mean)^2).

    Numbers that are missing or not finite without some group have none, and so have all for fewer than two groups.
    """
    groups = len(left_out)
    if groups < 2:
        return {}
    result = {}
    for key in left_out[0]:
        values = [_finite(one.get(key)) for one in left_out]
        numbers = np.array([value for value in values if value is not None])
        if len(numbers) == groups:
            result[key] = math.sqrt((groups - 1) / groups * float(((numbers - numbers.mean()) ** 2).sum()))
    return result


@dataclass(frozen=True)
class _Samples:
    """What every predictor is measured on, on the device."""

    rows: Tensor  # held-out text, int64 [rows, T + 1]
    unigram: Tensor  # [V]
    prompts: Tensor  # of random ids, int64 [PROMPTS, 8]
    texts: Tensor  # prompts of real text with what follows, int64 [texts, PROMPT_TOKENS + new tokens]
    row_bins: Tensor  # [V]


def _measure(predictor: Predictor, samples: _Samples, generation: bool) -> tuple[Row, dict[str, float]]:
    values, errors = _heldout(predictor, samples)
    for measured, error in (
        _random_prompts(predictor, samples),
        _generated(predictor, samples) if generation else ({}, {}),
    ):
        values |= measured
        errors |= error
    if predictor.model is not None:
        values |= metrics.weight_norms(predictor.model)
        values |= metrics.row_norms(predictor.model, samples.row_bins)
        values |= metrics.ternary_fractions(predictor.model)
        values |= metrics.threshold_statistics(predictor.model)
    values = {key: _finite(value) for key, value in values.items()}
    return {"network": predictor.name, "kind": predictor.kind, **values}, errors


def _heldout(predictor: Predictor, samples: _Samples) -> tuple[Row, dict[str, float]]:
    statistics = _Jackknife(len(samples.unigram), samples.unigram, samples.rows.device)
    for group in samples.rows.tensor_split(min(ROW_GROUPS, len(samples.rows))):
        for logits, target in predictor.heldout(group):
            statistics.update(logits, target)
        statistics.end_group()
    result: Row = dict(statistics.result())
    errors = jackknife_errors(list(statistics.without_each()))
    if predictor.kind == HUMAN:  # its logits are a convention
        result["logit_std"] = None
        errors.pop("logit_std", None)
    return result, errors


def _random_prompts(predictor: Predictor, samples: _Samples) -> tuple[Row, dict[str, float]]:
    session = predictor.session(*samples.prompts.shape)
    if session is None:
        return {}, {}
    logits = session(samples.prompts)
    if bool(torch.isnan(logits).any()):
        return {"unique_of_20": None, "unique_20_random": None}, {}
    predictions = logits.argmax(-1).cpu().numpy()
    _, which, counts = np.unique(predictions, return_inverse=True, return_counts=True)
    left_out = []
    for prompt in which:
        rest = counts.copy()
        rest[prompt] -= 1
        left_out.append({"unique_20_random": metrics.rarefied_unique(rest, 20)})
    rng = np.random.default_rng(0)
    sets = [len(np.unique(rng.choice(predictions, 20, replace=False))) for _ in range(PROMPT_SETS)]
    values = {
        "unique_of_20": len(np.unique(predictions[:20])),
        "unique_20_random": metrics.rarefied_unique(counts, 20),
    }
    return values, jackknife_errors(left_out) | {"unique_of_20": float(np.std(sets, ddof=1))}


def _generated(predictor: Predictor, samples: _Samples) -> tuple[Row, dict[str, float]]:
    prompts = samples.texts[:, :PROMPT_TOKENS]
    new_tokens = samples.texts.shape[1] - PROMPT_TOKENS
    values: Row = {}
    errors: dict[str, float] = {}
    for mode, top_p in (("greedy", None), ("nucleus", NUCLEUS)):
        session = predictor.session(*samples.texts.shape)
        written: Tensor | None = samples.texts[:, PROMPT_TOKENS:]  # the human goes on as the text does
        if session is not None:
            written = continuations(session, prompts, new_tokens, top_p=top_p)
        if written is None:
            continue
        written = written.cpu()
        groups = torch.arange(len(written)).tensor_split(min(TEXT_GROUPS, len(written)))
        left_out = []
        for group in groups if len(groups) > 1 else ():
            kept = torch.ones(len(written), dtype=torch.bool)
            kept[group] = False
            left_out.append(metrics.continuation_metrics(written[kept]))
        values |= {f"{mode}_{k}": value for k, value in metrics.continuation_metrics(written).items()}
        errors |= {f"{mode}_{k}": error for k, error in jackknife_errors(left_out).items()}
    return values, errors


def instrument_check(
    corpus: Corpus,
    model_config: BitNetConfig,
    *,
    device: torch.device | str = "cpu",
    max_tokens: int = EVAL_TOKENS,
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
    samples = _Samples(
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
            row, error = _measure(predictor, samples, generation)
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the check."""
    parser.add_argument(
        "--data",
        default="wiki-leads",
        metavar="NAME|PATH",
        help="text: wiki-leads (default), wikitext-2, a path",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the results")
    parser.add_argument(
        "--model", default="collapse-256", metavar="PRESET", help="network (default collapse-256)"
    )
    parser.add_argument(
        "--checkpoint", type=Path, metavar="PATH", help="of a healthy network, to compare with"
    )
    parser.add_argument(
        "--eval-tokens",
        type=int,
        default=EVAL_TOKENS,
        metavar="N",
        help=f"held-out positions (default {EVAL_TOKENS:,})",
    )
    parser.add_argument(
        "--generation",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="measure generated text, too (default)",
    )
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda or cuda:N")


def run(args: argparse.Namespace) -> int:
    """Runs the check that `args` describe, prints the table; returns the exit status: 2 for bad input."""
    from bitnet_ext.collapse.instrument.page import write_instrument

    try:
        report = instrument_check(
            load_corpus(args.data),
            preset(args.model),
            device=resolve_device(args.device),
            max_tokens=args.eval_tokens,
            checkpoint=args.checkpoint,
            generation=args.generation,
            progress=True,
        )
        paths = write_instrument(report, args.out)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(report.table().text())
    for path in paths:
        print(path)
    return 0
