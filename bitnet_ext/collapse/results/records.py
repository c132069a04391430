"""A study as data: its runs with their rows, and what it planned."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Row = dict[str, Any]  # of a metrics file

#: More seeds than any study has: a damaged study.json must not make lists of 10^12.
MAX_SEEDS = 100_000
_STEP_NAMES = ("steps", "max_steps", "total_steps", "num_steps")


@dataclass(frozen=True)
class Spread:
    """A number over seeds: mean, smallest, largest, and how many seeds had it."""

    mean: float
    low: float
    high: float
    count: int


def spread(values: Iterable[float | None]) -> Spread | None:
    """Mean, minimum and maximum of the values that exist (None and NaN are left out); None when none does."""
    present = [float(v) for v in values if v is not None and not math.isnan(v)]
    if not present:
        return None
    return Spread(sum(present) / len(present), min(present), max(present), len(present))


@dataclass(frozen=True)
class Run:
    """One arm with one seed. Rows are in order of their step, one row a step (a resumed run may write one
    twice).
    """

    arm: str
    seed: int
    directory: Path
    planned_steps: int | None = None
    config: dict[str, Any] = field(default_factory=dict)
    ended: str | None = None  # why it ended early and will not go on
    train: list[Row] = field(default_factory=list)
    evals: list[Row] = field(default_factory=list)
    times: list[Row] = field(default_factory=list)

    @property
    def last_step(self) -> int:
        """The last evaluated step, or -1 before the first evaluation."""
        return int(self.evals[-1]["step"]) if self.evals else -1

    @property
    def finished(self) -> bool:
        """Whether the last planned step was evaluated (also True when the plan is not known), or it diverged."""
        if self.ended is not None:
            return True
        return bool(self.evals) and (self.planned_steps is None or self.last_step >= self.planned_steps)

    def nearest(self, step: float) -> Row | None:
        """The evaluation nearest to a step (the earlier one of two equally near)."""
        if not self.evals:
            return None
        return min(self.evals, key=lambda row: (abs(row["step"] - step), row["step"]))

    def value_at(self, key: str, step: float) -> float | None:
        """A metric at the evaluation nearest to a step; None when there is none."""
        row = self.nearest(step)
        return None if row is None else number(row.get(key))

    def final(self, key: str) -> float | None:
        """A metric at the last evaluation."""
        return number(self.evals[-1].get(key)) if self.evals else None

    def series(self, key: str, over: str = "step") -> tuple[list[float], list[float]]:
        """A metric over another one (`step`, `cumulative_lr`, ...); evaluations that lack either are left
        out.
        """
        points = [(number(row.get(over)), number(row.get(key))) for row in self.evals]
        present = [(x, y) for x, y in points if x is not None and y is not None]
        return [x for x, _ in present], [y for _, y in present]


@dataclass(frozen=True)
class Study:
    """A study directory: its settings, its arms in the order of the settings, its runs by arm and seed."""

    directory: Path
    settings: dict[str, Any]
    arms: list[str]
    seeds: list[int]
    runs: list[Run]

    def of(self, arm: str) -> list[Run]:
        """The runs of an arm that have at least one evaluation, by seed."""
        return [run for run in self.runs if run.arm == arm and run.evals]

    def leading(self, arm: str) -> list[Run]:
        """The runs of an arm that got as far as its farthest one: the runs that a mean over seeds is taken
        of.
        """
        runs = self.of(arm)
        last = max((run.last_step for run in runs), default=-1)
        return [run for run in runs if run.last_step == last]

    @property
    def is_factorial(self) -> bool:
        """Whether the study has blocks, and so verdicts and their report instead of those of a small comparison."""
        return bool(self.settings.get("blocks"))

    @property
    def measured_arms(self) -> list[str]:
        """The arms with at least one evaluation."""
        return [arm for arm in self.arms if self.of(arm)]

    @property
    def last_step(self) -> int:
        """The last evaluated step of all runs, or -1."""
        return max((run.last_step for run in self.runs), default=-1)

    def planned_seeds(self, arm: str) -> list[int]:
        """The seeds that an arm is to be run with."""
        own = self.settings.get("seeds_of")
        number_of = own.get(arm) if isinstance(own, dict) else None
        given = isinstance(number_of, int) and number_of <= MAX_SEEDS
        return list(range(number_of)) if given else self.seeds  # type: ignore[arg-type]

    @property
    def unfinished(self) -> list[tuple[str, int, int, int | None]]:
        """(arm, seed, last evaluated step or -1, planned steps) of each planned run that is not complete."""
        missing = []
        for arm in self.arms:
            for seed in self.planned_seeds(arm):
                run = next((r for r in self.runs if r.arm == arm and r.seed == seed), None)
                if run is None:
                    missing.append((arm, seed, -1, planned_steps(self.settings, arm)))
                elif not run.finished:
                    missing.append((arm, seed, run.last_step, run.planned_steps))
        return missing

    @property
    def vocab_size(self) -> int | None:
        """V of the network, wherever the settings of a run or of the study name it; None when none does."""
        for source in (*(run.config for run in self.runs), self.settings):
            found = _find_number(source, "vocab_size")
            if found:
                return found
        return None

    @property
    def unigram_cross_entropy(self) -> float | None:
        """Cross-entropy of the held-out text under the training text's unigram distribution, nats."""
        for run in self.runs:
            value = run.final("unigram_cross_entropy")
            if value is not None:
                return value
        return None

    def mean_series(self, arm: str, key: str, over: str = "step") -> tuple[list[float], list[float]]:
        """Mean of a metric over the leading runs of an arm, at the evaluations that all of them have."""
        runs = self.leading(arm)
        columns = [
            {row["step"]: (number(row.get(over)), number(row.get(key))) for row in run.evals} for run in runs
        ]
        xs, ys = [], []
        for step in [row["step"] for row in runs[0].evals] if runs else []:
            points = [column.get(step, (None, None)) for column in columns]
            px = [x for x, _ in points if x is not None]
            py = [y for _, y in points if y is not None]
            if len(px) == len(py) == len(runs):
                xs.append(sum(px) / len(px))
                ys.append(sum(py) / len(py))
        return xs, ys


def number(value: object) -> float | None:
    """A JSON value as a float; None for null, strings and whatever else is not a number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value)
    except OverflowError:  # an integer beyond 1e308
        return None


def _find_number(tree: object, name: str) -> int | None:
    if isinstance(tree, dict):
        if isinstance(tree.get(name), int) and not isinstance(tree[name], bool):
            return int(tree[name])
        for value in tree.values():
            found = _find_number(value, name)
            if found is not None:
                return found
    return None


def configured_steps(config: dict[str, Any]) -> int | None:
    """Steps that the config.json of a run names, at whatever depth; None when it does not say."""
    return next((found for name in _STEP_NAMES if (found := _find_number(config, name))), None)


def planned_steps(settings: dict[str, Any], arm: str) -> int | None:
    """Steps that the settings of a study plan for an arm (one number, or a table by arm); None when they do
    not say.
    """
    for name in _STEP_NAMES:
        value = settings.get(name)
        if isinstance(value, dict):
            value = value.get(arm)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return None


def arm_settings(settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The arms of study.json, by name, in order: a list of names, a list of objects with `name`, or a
    table.
    """
    arms = settings.get("arms", [])
    if isinstance(arms, dict):
        return {str(name): value if isinstance(value, dict) else {} for name, value in arms.items()}
    named: dict[str, dict[str, Any]] = {}
    for arm in arms if isinstance(arms, list) else []:
        if isinstance(arm, dict) and "name" in arm:
            named[str(arm["name"])] = {key: value for key, value in arm.items() if key != "name"}
        elif isinstance(arm, str):
            named[arm] = {}
    return named


def require_evaluations(study: Study) -> None:
    """Raises ValueError, with one clear sentence, for a study without a single evaluation."""
    if not study.measured_arms:
        raise ValueError(
            f"study {str(study.directory)!r} has no evaluation yet: no metrics.jsonl of its "
            f'{len(study.arms)} arm(s) holds a row of kind "eval"; run the training first'
        )


def milestones(study: Study) -> Sequence[int]:
    """The two steps of the comparison table: 1,000 and 4,000, or what is nearest to them.

    A study of fewer than 4,000 steps ends at its last step. When that is not past 1,000, the first
    milestone is a quarter of it, so that the two keep the ratio that they have in the full run. Both are
    evaluated steps of the run that got farthest.
    """
    last = study.last_step
    second = min(4000, last)
    first = 1000 if last > 1000 else last / 4
    longest = max((run for run in study.runs if run.evals), key=lambda run: run.last_step)
    return [int((longest.nearest(step) or {"step": step})["step"]) for step in (first, second)]
