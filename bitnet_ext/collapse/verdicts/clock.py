"""Is a run with another learning rate the same course at another speed? Distances of curves on two clocks."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from bitnet_ext.collapse.results import Run, Study
from bitnet_ext.collapse.results.status import CLOCK_RATIO, SAME_NATS
from bitnet_ext.collapse.verdicts.judging import amount, interval
from bitnet_ext.collapse.verdicts.statistics import MIN_SEEDS, Estimate, paired

SAME_GAIN = 0.02  # mean distance of two gains below which the two clocks cannot be told apart
_GRID = 256
_POINTS = 4  # evaluations that a curve needs
#: Metric -> (its name, unit, distance below which two curves are the same on either clock).
CURVES = {
    "heldout_cross_entropy": ("held-out cross-entropy", " nats", SAME_NATS),
    "final_gain_mean_abs": ("the final gain", "", SAME_GAIN),
}
RULE = (
    "Two runs are called one course at two speeds when, over seeds, the interval of the ratio of the mean "
    "distance between their curves over the cumulative learning rate to that over steps lies below 1/3; two courses "
    "when it lies above 1."
)


@dataclass(frozen=True)
class Clock:
    """Mean absolute distances of the curves of two arms over steps and over tau, and their ratio, over seeds."""

    base: str
    other: str
    key: str
    by_step: Estimate
    by_rate: Estimate
    ratio: Estimate

    @property
    def reading(self) -> str:
        """One of "same" (too alike to tell), "rescaled", "different", "partly" and "open"."""
        floor = CURVES[self.key][2]
        if self.by_step.n and max(self.by_step.mean, self.by_rate.mean) < floor:
            return "same"
        if not self.ratio.n:  # one course over steps, exactly, and not over tau
            return "different" if self.by_step.n >= MIN_SEEDS else "open"
        low, high = self.ratio.low, self.ratio.high
        if low is None or high is None or self.ratio.n < MIN_SEEDS:
            return "open"
        if high < CLOCK_RATIO:
            return "rescaled"
        if low > 1:
            return "different"
        return "partly" if low > CLOCK_RATIO and high < 1 else "open"


def distance(base: Run, other: Run, key: str, over: str) -> float | None:
    """Mean absolute difference of two curves (linear interpolation) over the range of `over` that both cover.

    None when a curve has fewer than four points or the ranges do not overlap.
    """
    curves = []
    for run in (base, other):
        xs, ys = run.series(key, over)
        points = [(x, y) for x, y in zip(xs, ys, strict=True) if math.isfinite(x + y)]
        if len(points) < _POINTS:
            return None
        curves.append(points)
    low, high = max(points[0][0] for points in curves), min(points[-1][0] for points in curves)
    if not low < high:
        return None
    grid = np.linspace(low, high, _GRID)
    a, b = (np.interp(grid, [x for x, _ in points], [y for _, y in points]) for points in curves)
    return float(np.abs(a - b).mean())


def compare_clocks(study: Study, base: str, other: str, key: str) -> Clock | None:
    """The two distances of each seed that both arms have; None when no seed has both curves."""
    first, second = ({run.seed: run for run in study.leading(arm)} for arm in (base, other))
    by_step, by_rate = [], []
    for seed in sorted(first.keys() & second.keys()):
        found = [distance(first[seed], second[seed], key, over) for over in ("step", "cumulative_lr")]
        if found[0] is not None and found[1] is not None:
            by_step.append(found[0])
            by_rate.append(found[1])
    if not by_step:
        return None
    ratios = [rate / step if step > 0 else None for step, rate in zip(by_step, by_rate, strict=True)]
    return Clock(base, other, key, paired(by_step), paired(by_rate), paired(ratios))


def describe_clock(clock: Clock) -> str:
    """One sentence: the two distances, their ratio, and what it is called."""
    name, unit, floor = CURVES[clock.key]
    words = {
        "same": f"both below {amount(floor)}{unit}, too alike to tell which clock fits",
        "rescaled": "one course at two speeds: the cumulative learning rate is its clock",
        "different": "not the same course at another speed",
        "partly": "the cumulative learning rate brings the curves closer, but not together",
        "open": "the interval, or fewer than six seeds, does not tell which clock fits",
    }[clock.reading]
    return (
        f"{clock.other} and {clock.base}: their curves of {name} are {interval(clock.by_step)}{unit} apart over "
        f"steps and {interval(clock.by_rate)}{unit} over the cumulative learning rate, ratio {interval(clock.ratio)}, "
        f"n = {clock.by_step.n}: {words}."
    )
