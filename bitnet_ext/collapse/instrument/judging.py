"""Which metrics find a dead network better than a healthy predictor, from measured numbers and their errors."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bitnet_ext.collapse.instrument.predictors import DEAD, HEALTHY, HUMAN
from bitnet_ext.collapse.instrument.scales import HIGHER, HUMAN_LIKE, LOWER, Scale

#: Standard errors of a difference that chance may make.
ERRORS = 2.0

USABLE, INVERTED, BLUNT = "usable", "not for verdicts", "does not separate"
DESCRIPTIVE, UNMEASURED = "description", "not measured"


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
        values = {row["network"]: finite(row.get(scale.key)) for row in rows}
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


def finite(value: Any) -> float | None:
    """A number that can be compared; None for what is missing, NaN or infinite."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _score(scale: Scale, value: float, human: float | None) -> float:
    """The value on a scale where more is better."""
    if scale.better == HUMAN_LIKE:
        return -abs(value - (human if human is not None else math.nan))
    return {HIGHER: value, LOWER: -value}[scale.better or HIGHER]
