"""Statistics of a study whose unit is the seed: paired differences, intervals, exact tests, corrections.

Arms of one seed share initial weights and data order, so arms are compared by the differences within seeds.
Intervals are bias-corrected and accelerated bootstrap intervals (BCa; Efron 1987, "Better bootstrap confidence
intervals"), tests flip the signs of the differences (Fisher's randomisation test: under the null hypothesis a
difference is as likely negative as positive), families of tests are corrected by Holm's step-down procedure
(Holm 1979), and "no effect" is claimed by two one-sided t-tests against a margin (TOST; Schuirmann 1987), never
by a large p.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy import stats

from bitnet_ext.collapse.results import Run, Study, number

CONFIDENCE = 0.95
ALPHA = 0.05
RESAMPLES = 10_000
#: Up to here all 2^n sign patterns are gone through; beyond it as many are drawn as this one has.
EXACT_SEEDS = 16
#: Fewer seeds than this cannot give a two-sided sign-flip p below 0.05: the smallest one is 2 / 2^n.
MIN_SEEDS = 6
_SEED = 20_251_218
_EQUAL = 1e-12  # spread, relative to the largest magnitude, that is rounding and not a difference


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its interval and sign-flip p.

    Attributes:
        mean: of the values (NaN when there are none).
        low, high: bootstrap interval of the mean; None for fewer than two values.
        n: number of values, one a seed. Seeds without a finite value are left out.
        p: two-sided sign-flip p of the hypothesis that the values are symmetric about 0; 1 when there are none.
        values: in the order given, without those left out.
    """

    mean: float
    low: float | None
    high: float | None
    n: int
    p: float
    values: tuple[float, ...]


@dataclass(frozen=True)
class Equivalence:
    """Whether a mean difference lies within +-margin, by two one-sided t-tests.

    Attributes:
        margin: in the unit of the differences, above 0.
        p: the larger of the two one-sided p values; 1 for fewer than two values.
        holds: p is below 0.05, the same as the interval below lying inside the margin.
        low, high: 90 % t interval of the mean (the one that belongs to two tests at 5 %); None below two values.
    """

    margin: float
    p: float
    holds: bool
    low: float | None
    high: float | None


def finite_values(values: Iterable[float | None]) -> tuple[float, ...]:
    """The values that are finite numbers."""
    return tuple(float(v) for v in values if v is not None and math.isfinite(v))


def paired(differences: Iterable[float | None], confidence: float = CONFIDENCE) -> Estimate:
    """Estimate of the mean of paired differences (or of values), one a seed.

    Args:
        differences: one a seed; None and NaN are left out.
        confidence: of the interval, between 0 and 1.
    Raises:
        ValueError: for a confidence outside of (0, 1).
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence!r}")
    return _estimate(finite_values(differences), confidence)


@lru_cache(maxsize=4096)
def _estimate(values: tuple[float, ...], confidence: float) -> Estimate:
    n = len(values)
    mean = math.fsum(values) / n if n else math.nan
    low, high = _interval(values, mean, confidence) if n > 1 else (None, None)
    return Estimate(mean, low, high, n, sign_flip(values), values)


def _all_equal(values: Sequence[float]) -> bool:
    return max(values) - min(values) <= _EQUAL * max(map(abs, values))


def _interval(values: tuple[float, ...], mean: float, confidence: float) -> tuple[float, float]:
    if _all_equal(values):
        return mean, mean
    bounds = (math.nan, math.nan)
    for method in ("BCa", "percentile"):  # BCa is NaN where its corrections are undefined
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # SciPy warns of the NaN that is looked at next
            result = stats.bootstrap(
                (np.asarray(values),),
                np.mean,
                n_resamples=RESAMPLES,
                confidence_level=confidence,
                method=method,
                vectorized=True,
                rng=np.random.default_rng(_SEED),
            ).confidence_interval
        bounds = (float(result.low), float(result.high))
        if all(map(math.isfinite, bounds)):
            break
    return bounds


def sign_flip(differences: Iterable[float | None]) -> float:
    """Two-sided p of the sign-flip test of the mean: the share of sign patterns whose mean is as far from 0.

    All 2^n patterns for n up to 16. Beyond, 2^16 patterns drawn with a fixed seed, the observed one counted among
    them (Phipson & Smyth 2010), so that p is never 0.
    """
    values = finite_values(differences)
    if not values:
        return 1.0
    data = np.asarray(values)
    n = len(data)
    if n <= EXACT_SEEDS:
        # The first sign stays: a pattern and its opposite are equally far from 0.
        patterns = np.arange(1 << (n - 1))[:, None] >> np.arange(n)[None, :] & 1
    else:
        patterns = np.random.default_rng(_SEED).integers(0, 2, size=(1 << EXACT_SEEDS, n))
    sums = np.abs((1 - 2 * patterns) @ data)
    # Patterns that tie with the observed one must not be lost to rounding.
    far = int((sums >= abs(data.sum()) - _EQUAL * np.abs(data).sum()).sum())
    if n <= EXACT_SEEDS:
        return far / len(sums)
    return (far + 1) / (len(sums) + 1)


def smallest_p(n: int, family: int = 1) -> float:
    """The smallest Holm-adjusted sign-flip p that `n` seeds can give the best of `family` contrasts."""
    return 1.0 if n < 1 else min(1.0, family * 2.0 / 2 ** min(n, EXACT_SEEDS))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p values, in the order given.

    The k-th smallest of m is multiplied by m - k + 1; none becomes smaller than one before it, or larger than 1.

    Raises:
        ValueError: for a value outside of [0, 1].
    """
    for p in p_values:
        if not 0 <= p <= 1:
            raise ValueError(f"p_values must lie in [0, 1], got {p!r}")
    adjusted = [0.0] * len(p_values)
    highest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted


def equivalence(differences: Iterable[float | None], margin: float) -> Equivalence:
    """Two one-sided t-tests at 5 %: is the mean difference shown to lie within +-margin?

    Args:
        differences: one a seed; None and NaN are left out.
        margin: largest difference that counts as none, in the unit of the differences.
    Raises:
        ValueError: for a margin that is not above 0.
    """
    if not margin > 0:
        raise ValueError(f"margin must be above 0, got {margin!r}")
    values = finite_values(differences)
    if len(values) < 2:
        return Equivalence(margin, 1.0, False, None, None)
    if _all_equal(values):  # no spread, no t: the mean is the interval
        mean = math.fsum(values) / len(values)
        holds = abs(mean) < margin
        return Equivalence(margin, 0.0 if holds else 1.0, holds, mean, mean)
    above = stats.ttest_1samp(values, -margin, alternative="greater")
    below = stats.ttest_1samp(values, margin, alternative="less")
    p = max(float(above.pvalue), float(below.pvalue))
    interval = stats.ttest_1samp(values, 0.0).confidence_interval(1 - 2 * ALPHA)
    return Equivalence(margin, p, p < ALPHA, float(interval.low), float(interval.high))


def steps_of(run: Run) -> set[int]:
    """The evaluated steps of a run."""
    return {int(row["step"]) for row in run.evals}


def last_common_step(runs: Iterable[Run]) -> int | None:
    """The last step at which all of the runs were evaluated; None when there is none."""
    sets = [steps_of(run) for run in runs]
    return max(set.intersection(*sets), default=None) if sets else None


def value_of(run: Run, key: str, step: int) -> float | None:
    """A metric of a run at exactly this step, as a finite number; else None."""
    value = next((number(row.get(key)) for row in run.evals if row["step"] == step), None)
    return value if value is not None and math.isfinite(value) else None


def values(study: Study, arm: str, key: str, step: int | None = None) -> dict[int, float]:
    """Seed -> a metric of an arm at `step`, or at the last step at which all of its runs were evaluated.

    Seeds without a finite value there are left out.
    """
    runs = study.of(arm)
    at = last_common_step(runs) if step is None else step
    if at is None:
        return {}
    return {run.seed: value for run in runs if (value := value_of(run, key, at)) is not None}


def differences(study: Study, base: str, other: str, key: str, step: int | None = None) -> dict[int, float]:
    """Seed -> `other` minus `base` in a metric, at `step` or at the last step that both runs of all common seeds have.

    Seeds that lack a finite value of either are left out.
    """
    common = {run.seed for run in study.of(base)} & {run.seed for run in study.of(other)}
    runs = [run for arm in (base, other) for run in study.of(arm) if run.seed in common]
    at = last_common_step(runs) if step is None else step
    if at is None:
        return {}
    first, second = values(study, base, key, at), values(study, other, key, at)
    return {seed: second[seed] - first[seed] for seed in sorted(common) if seed in first and seed in second}
