"""What findings are made of, and the few ways in which the rules of a diagnosis read a course of numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from bitnet_ext.collapse.diagnose.inputs import Case
from bitnet_ext.collapse.results import Row, number
from bitnet_ext.collapse.results.status import STALL_NATS

#: How sure a finding is: measured directly; follows unless something unmeasured differs; fits, as others might.
CERTAIN, LIKELY, POSSIBLE = "certain", "likely", "possible"

EARLY_SHARE = 0.1  # of the steps: a first value up to there is a start


@dataclass(frozen=True)
class Evidence:
    """One number: what it is, its value (None when not finite), the step it is of, and what to hold it against."""

    name: str
    value: float | None
    step: int | None
    text: str = ""


@dataclass(frozen=True)
class Finding:
    """One trouble: its kind, a headline, the numbers, what to change, how sure it is, and by which rule."""

    kind: str
    headline: str
    evidence: tuple[Evidence, ...]
    change: tuple[str, ...]
    certainty: str
    rule: str


def evidence(name: str, value: float | None, step: int | None, text: str = "") -> Evidence:
    """An :class:`Evidence`; a value that is not finite becomes None."""
    return Evidence(name, value if value is None or math.isfinite(value) else None, step, text)


def training_course(case: Case) -> list[tuple[int, float]]:
    """(step, cross-entropy in nats) of the training text: the "train" lines, else the means of the "eval" lines."""
    for kind, key in (("train", "cross_entropy"), ("train", "loss"), ("eval", "train_cross_entropy")):
        points = case.points(key, kind)
        if len(points) > 1:
            return [(int(row["step"]), value) for row, value in points]
    return []


def start_of(case: Case) -> float | None:
    """Cross-entropy at the start: the first value when it is early, else ln V; None when neither is known."""
    for points in (numbers(case.points("heldout_cross_entropy")), training_course(case)):
        if len(points) > 1 and points[0][0] <= max(1.0, EARLY_SHARE * points[-1][0]):
            return points[0][1]
    return case.ln_vocab


def improvement(case: Case) -> float | None:
    """Largest fall of cross-entropy below its start, in nats, held-out where measured; None without a course."""
    start = start_of(case)
    held = numbers(case.points("heldout_cross_entropy"))
    if start is None:
        return None
    if held:
        return start - min(value for _, value in held)
    course = [value for _, value in training_course(case)]
    if not course:
        return None
    quarter = course[-max(1, len(course) // 4) :]
    return start - _mean(quarter)


def course_of_output(case: Case) -> list[tuple[int, float, float]]:
    """(step, cross-entropy, predictive entropy) of the held-out evaluations, else of the training batches.

    Single batches are noisy, so the training's are means over windows of a tenth of the lines.
    """
    for kind, ce, entropy in (
        ("eval", "heldout_cross_entropy", "predictive_entropy"),
        ("train", "cross_entropy", "entropy"),
    ):
        both = [
            (int(row["step"]), value, other)
            for row, value in case.points(ce, kind)
            if (other := number(row.get(entropy))) is not None and math.isfinite(other)
        ]
        if both:
            size = max(1, len(both) // 10) if kind == "train" else 1
            windows = [both[max(end - size, 0) : end] for end in range(len(both), 0, -size)][::-1]
            return [(w[-1][0], _mean([x[1] for x in w]), _mean([x[2] for x in w])) for w in windows]
    return []


def stalled(points: Sequence[tuple[int, float]]) -> bool:
    """Whether a course improved by at most STALL_NATS over the second half of its steps; False when too short."""
    if len(points) < 3:
        return False
    half = [value for step, value in points if step >= points[-1][0] / 2]
    return len(half) > 1 and half[0] - min(half) <= STALL_NATS


def tail_mean(case: Case, key: str, minus: str, at_least: int) -> tuple[int, float] | None:
    """(last step, mean of `key` - `minus`) over the last quarter of the "train" lines that have both."""
    both = [
        (int(row["step"]), value - other)
        for row, value in case.points(key, "train")
        if (other := number(row.get(minus))) is not None and math.isfinite(other)
    ]
    tail = both[-max(at_least, len(both) // 4) :]
    if len(tail) < at_least:
        return None
    return tail[-1][0], _mean([value for _, value in tail])


def numbers(points: Sequence[tuple[Row, float]]) -> list[tuple[int, float]]:
    """(step, value) of the points of a case."""
    return [(int(row["step"]), value) for row, value in points]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
