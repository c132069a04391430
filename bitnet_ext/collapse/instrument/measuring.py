"""The metrics of one predictor with their sampling errors.

Sampling errors are standard errors of the delete-a-group jackknife (Efron & Stein 1981, Annals of Statistics 9(3)):
groups of held-out rows, of random prompts, or of generated texts are left out in turn. It suits counts of distinct
things, where resampling with replacement would draw the same text twice and count too few.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bitnet_ext import metrics
from bitnet_ext.collapse.evaluator import NUCLEUS
from bitnet_ext.collapse.instrument.judging import finite
from bitnet_ext.collapse.instrument.predictors import HUMAN, Predictor, continuations
from bitnet_ext.collapse.results import Row
from bitnet_ext.metrics.generation import PROMPT_TOKENS

#: Groups that the jackknife leaves out, of held-out rows and of generated texts.
ROW_GROUPS, TEXT_GROUPS = 32, 16
#: Choices of 20 of the random prompts, whose spread is the error of the report's count.
PROMPT_SETS = 200


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
        values = [finite(one.get(key)) for one in left_out]
        numbers = np.array([value for value in values if value is not None])
        if len(numbers) == groups:
            result[key] = math.sqrt((groups - 1) / groups * float(((numbers - numbers.mean()) ** 2).sum()))
    return result


@dataclass(frozen=True)
class Samples:
    """What every predictor is measured on, on the device."""

    rows: Tensor  # held-out text, int64 [rows, T + 1]
    unigram: Tensor  # [V]
    prompts: Tensor  # of random ids, int64 [PROMPTS, 8]
    texts: Tensor  # prompts of real text with what follows, int64 [texts, PROMPT_TOKENS + new tokens]
    row_bins: Tensor  # [V]


def measure(predictor: Predictor, samples: Samples, generation: bool) -> tuple[Row, dict[str, float]]:
    """The metrics of a predictor, with "network" and "kind", and their standard errors by key.

    Args:
        generation: whether text is generated, too.
    """
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
    values = {key: finite(value) for key, value in values.items()}
    return {"network": predictor.name, "kind": predictor.kind, **values}, errors


def _heldout(predictor: Predictor, samples: Samples) -> tuple[Row, dict[str, float]]:
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


def _random_prompts(predictor: Predictor, samples: Samples) -> tuple[Row, dict[str, float]]:
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


def _generated(predictor: Predictor, samples: Samples) -> tuple[Row, dict[str, float]]:
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
