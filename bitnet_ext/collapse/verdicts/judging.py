"""What a verdict is made of: the state of an arm by intervals over its seeds, families of contrasts, and words.

An arm is never judged by its mean. Its state follows from two intervals over seeds, of its held-out cross-entropy
above the unigram's and of its context use, both compared with the thresholds of
:mod:`bitnet_ext.collapse.results.status`; when an interval lies on both sides of a threshold the state is open.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from bitnet_ext.collapse.results import Row, Run, Study
from bitnet_ext.collapse.results.status import COLLAPSE_NATS, CONFIDENCE_NATS, CONTEXT_NATS, get
from bitnet_ext.collapse.verdicts.statistics import (
    ALPHA,
    CONFIDENCE,
    MIN_SEEDS,
    Estimate,
    differences,
    holm,
    last_common_step,
    paired,
    smallest_p,
)

BASE, HEALTHY = "standard-lr", "adamw"
MIN_STEPS = 1_000  # an arm that has not come so far is not judged
MIN_RECOVERY_STEPS = 500  # the same, from the checkpoint on, for an arm that goes on from one
EQUAL_NATS = 0.05  # margin of cross-entropy within which two arms are called equal

CE, MI, EXCESS = "heldout_cross_entropy", "mutual_information", "excess_over_unigram"
#: Metric -> (name in a sentence, unit).
METRICS = {
    CE: ("held-out cross-entropy", "nats"),
    MI: ("context use (mutual information)", "nats"),
    EXCESS: ("held-out cross-entropy above the unigram's", "nats"),
    "predictive_entropy": ("predictive entropy", "nats"),
    "effective_argmax_vocabulary": ("effective vocabulary of the argmax", "tokens"),
    "unique_of_20": ("unique tokens of 20", "tokens"),
}

Answer = Literal["supported", "refuted", "undecided"]
#: State of an arm -> what it means. The first three work; the next three do not; the others cannot be judged.
STATES = {
    "alive": "uses its context and predicts better than word counts",
    "learning": f"uses its context, less than {COLLAPSE_NATS} nats worse than word counts",
    "overconfident": "uses its context, but is wrong with too much confidence",
    "collapsed": "ignores its context and predicts worse than word counts: collapsed",
    "failing": "uses some context, but predicts worse than word counts",
    "words": "predicts word counts only",
    "open": "the intervals do not tell which state it is in",
    "diverged": "at least one seed diverged",
    "few": f"fewer than {MIN_SEEDS} seeds",
    "short": "too short to be judged",
    "missing": "not measured",
}
WELL = frozenset({"alive", "learning"})
WORKING = WELL | {"overconfident"}
BROKEN = frozenset({"collapsed", "failing", "words"})
STATE_RULE = (
    f"An arm 'works' when, at its last evaluation, the {CONFIDENCE:.0%} interval over seeds of its context use lies "
    f"above {CONTEXT_NATS} nats and that of its held-out cross-entropy lies less than {COLLAPSE_NATS} nats above the "
    f"unigram's; it is 'collapsed' when context use lies at or below {CONTEXT_NATS} and cross-entropy more than "
    f"{COLLAPSE_NATS} above; 'broken' when collapsed, at word counts only, or more than {COLLAPSE_NATS} above in spite "
    f"of context use (unless its cross-entropy is more than {CONFIDENCE_NATS} above its entropy: over-confident, which "
    f"is not the collapse). At least {MIN_SEEDS} seeds and {MIN_STEPS:,} steps. 'At least one of m arms' is judged "
    f"with intervals of 1 - {ALPHA}/m."
)


@dataclass(frozen=True)
class Verdict:
    """A claim, the rule it is judged by, and what decided.

    Attributes:
        key: q1..q5, quantisation, s1..s4. title: a few words. claim: the statement judged. answer: by the rule.
        rule: in words, with thresholds. reasons: plain sentences with the numbers.
        limits: what the metrics or this data set cannot say.
    """

    key: str
    title: str
    claim: str
    answer: Answer
    rule: str
    reasons: list[str]
    limits: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class ContrastResult:
    """Paired differences, `other` minus `base`, of a metric at a step; p_holm over its family and metric."""

    base: str
    other: str
    key: str
    step: int
    estimate: Estimate
    p_holm: float
    family: str = ""
    family_size: int = 1


@dataclass(frozen=True)
class Family:
    """The contrasts of one verdict: (base, other) pairs, each in every one of some metrics."""

    pairs: tuple[tuple[str, str], ...]
    keys: tuple[str, ...] = (CE, MI)


@dataclass(frozen=True)
class Ending:
    """An arm at one evaluation, over its seeds; nats."""

    arm: str
    step: int
    rows: tuple[Row, ...]
    state: str
    left_out: int = 0  # runs that did not come so far or lack a number
    unigram: float | None = None  # where the rows do not say

    def estimate(self, key: str, confidence: float = CONFIDENCE) -> Estimate:
        return paired([value_in(row, key, self.unigram) for row in self.rows], confidence)

    @cached_property
    def excess(self) -> Estimate:
        return self.estimate(EXCESS)

    @cached_property
    def context(self) -> Estimate:
        return self.estimate(MI)


def value_in(row: Row, key: str, unigram: float | None = None) -> float | None:
    """A metric of a row; the excess over the unigram also where only its two terms are there."""
    value = get(row, key)
    if value is None and key == EXCESS:
        ce, floor = get(row, CE), get(row, "unigram_cross_entropy")
        floor = unigram if floor is None else floor
        return None if ce is None or floor is None else ce - floor
    return value


def state_of(rows: Sequence[Row], confidence: float = CONFIDENCE, unigram: float | None = None) -> str:
    """The state of an arm (a key of ``STATES``) from one row a seed.

    Seeds without cross-entropy or context use count as not there.
    """
    pairs = [(value_in(row, EXCESS, unigram), value_in(row, MI)) for row in rows]
    present = [(e, m) for e, m in pairs if e is not None and m is not None]
    if not present:
        return "missing"
    if len(present) < MIN_SEEDS:
        return "few"
    excess = paired([e for e, _ in present], confidence)
    context = paired([m for _, m in present], confidence)
    assert excess.low is not None and excess.high is not None
    assert context.low is not None and context.high is not None
    if context.high <= CONTEXT_NATS:
        if excess.low > COLLAPSE_NATS:
            return "collapsed"
        return "words" if excess.high <= COLLAPSE_NATS else "open"
    if context.low <= CONTEXT_NATS:
        return "open"
    if excess.high < COLLAPSE_NATS:
        return "alive" if excess.high < 0 else "learning"
    gaps = [
        None if (ce := get(row, CE)) is None or (h := get(row, "predictive_entropy")) is None else ce - h
        for row in rows
    ]
    sure = paired(gaps, confidence)
    if sure.n >= MIN_SEEDS and sure.low is not None and sure.low > CONFIDENCE_NATS:
        return "overconfident"
    measured = sure.n >= MIN_SEEDS and sure.high is not None and sure.high <= CONFIDENCE_NATS
    return "failing" if excess.low > COLLAPSE_NATS and measured else "open"


class Evidence:
    """A study as verdicts look at it; every number is computed once."""

    def __init__(self, study: Study) -> None:
        self.study = study
        self._endings: dict[str, Ending] = {}

    def ending(self, arm: str) -> Ending:
        """The arm at the last step that any of its runs reached."""
        if arm not in self._endings:
            self._endings[arm] = self._ending(arm)
        return self._endings[arm]

    def _ending(self, arm: str) -> Ending:
        runs = self.study.of(arm)
        unigram = self.study.unigram_cross_entropy
        if not runs:
            return Ending(arm, -1, (), "missing")
        leading = self.study.leading(arm)
        step = leading[0].last_step
        rows = tuple(run.evals[-1] for run in leading)
        if any(run.ended is not None for run in runs):
            return Ending(arm, step, rows, "diverged", len(runs) - len(leading), unigram)
        whole = [
            row for row in rows if value_in(row, EXCESS, unigram) is not None and get(row, MI) is not None
        ]
        begun = int(leading[0].evals[0]["step"])
        short = step - begun < MIN_RECOVERY_STEPS if is_recovery(arm) else step < MIN_STEPS
        state = "short" if short else state_of(rows, unigram=unigram)
        return Ending(arm, step, rows, state, len(runs) - len(whole), unigram)

    def start(self, arm: str) -> Ending:
        """The arm at its first evaluation: for one that goes on from a checkpoint, what it began with."""
        runs = [run for run in self.study.of(arm)]
        rows = tuple(run.evals[0] for run in runs)
        unigram = self.study.unigram_cross_entropy
        step = int(rows[0]["step"]) if rows else -1
        return Ending(arm, step, rows, state_of(rows, unigram=unigram), 0, unigram)

    def endings(self, arms: Iterable[str]) -> list[Ending]:
        return [self.ending(arm) for arm in arms]

    def prevailing(self, arms: Sequence[str], states: frozenset[str]) -> list[str]:
        """The arms that are in one of the states also by the wider intervals that looking at all of them asks for."""
        confidence = 1 - ALPHA / max(1, len(arms))
        return [
            end.arm
            for end in self.endings(arms)
            if end.state in states and state_of(end.rows, confidence, end.unigram) in states
        ]

    def contrast(self, base: str, other: str, key: str) -> tuple[int, Estimate] | None:
        """Step and paired differences at the last step that the farthest runs of both arms share."""
        first, second = ({run.seed: run for run in self.study.leading(arm)} for arm in (base, other))
        common = sorted(first.keys() & second.keys())
        runs: list[Run] = [table[seed] for table in (first, second) for seed in common]
        step = last_common_step(runs)
        if step is None:
            return None
        found = differences(self.study, base, other, key, step)
        if not found:
            return None
        return step, paired([found[seed] for seed in common if seed in found])

    def family(self, name: str, family: Family) -> list[ContrastResult]:
        """The contrasts of a family that this study can make, with Holm's correction within each metric."""
        results: list[ContrastResult] = []
        for key in family.keys:
            made = [
                (base, other, *found)
                for base, other in family.pairs
                if (found := self.contrast(base, other, key)) is not None
            ]
            adjusted = holm([estimate.p for *_, estimate in made])
            results += [
                ContrastResult(base, other, key, step, estimate, p, name, len(made))
                for (base, other, step, estimate), p in zip(made, adjusted, strict=True)
            ]
        return results


def is_recovery(arm: str) -> bool:
    """Whether an arm goes on from a checkpoint of another one, by its name."""
    return arm.startswith("from-")


# ------------------------------------------------------------------------------------------------------------
# Words


def amount(value: float) -> str:
    """Two decimals, three below 0.1."""
    text = f"{value:.3f}" if abs(value) < 0.0995 else f"{value:.2f}"
    return text.lstrip("-") if float(text) == 0 else text.replace("-", "\N{MINUS SIGN}")


def probability(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def interval(estimate: Estimate) -> str:
    """Mean and interval: `0.31 [0.20, 0.42]`."""
    if not estimate.n:
        return "not measured"
    if estimate.low is None or estimate.high is None:
        return f"{amount(estimate.mean)} (no interval)"
    return f"{amount(estimate.mean)} [{amount(estimate.low)}, {amount(estimate.high)}]"


def listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1] if names else "none"


def describe(end: Ending) -> str:
    """One sentence: where an arm ended and what that is called."""
    if end.state == "missing":
        return f"{end.arm}: {STATES['missing']}."
    left = f", {end.left_out} left out" if end.left_out else ""
    return (
        f"{end.arm} at step {end.step:,}: cross-entropy {interval(end.excess)} nats above the unigram's, context use "
        f"{interval(end.context)} nats, n = {end.excess.n}{left}: {STATES[end.state]}."
    )


def describe_contrast(result: ContrastResult) -> str:
    """One sentence: a paired difference with its interval, n and p values."""
    name, unit = METRICS.get(result.key, (result.key, ""))
    return (
        f"{result.other} minus {result.base} at step {result.step:,}: {name} {interval(result.estimate)} {unit}, "
        f"n = {result.estimate.n}, {probability(result.estimate.p)}, Holm-adjusted {probability(result.p_holm)} over "
        f"{result.family_size} contrast{'s' if result.family_size != 1 else ''}."
    )


def not_collapsed(base: Ending, consequence: str) -> str:
    """One sentence: the arm that all others are held against is not shown to collapse."""
    return f"{base.arm} is not shown to collapse ({STATES[base.state]}), so {consequence}."


def shortcomings(ends: Sequence[Ending]) -> list[str]:
    """Why arms cannot be judged: missing ones, too few seeds, too few steps, diverged, open."""
    found = []
    for state, words in (
        ("missing", "Missing arms: {}."),
        (
            "few",
            f"Fewer than {MIN_SEEDS} seeds with these numbers: {{}}. An exact sign-flip test over so few cannot reach "
            f"p < {ALPHA} (over five seeds the smallest p is {smallest_p(5):.4f}), so nothing is decided by them.",
        ),
        ("short", f"Too short to be judged (fewer than {MIN_STEPS:,} steps): {{}}."),
        ("diverged", "Not judged because the training of at least one seed diverged: {}."),
        ("open", "Intervals on both sides of a threshold: {}."),
    ):
        arms = [end.arm for end in ends if end.state == state]
        if arms:
            found.append(words.format(listed(arms)))
    return found


def limits_of(
    evidence: Evidence, ends: Sequence[Ending], results: Sequence[ContrastResult] = ()
) -> list[str]:
    """What the numbers that a verdict rests on cannot say."""
    study, found = evidence.study, []
    measured = [end for end in ends if end.rows]
    data = study.settings.get("data")
    text = data.get("name") if isinstance(data, dict) else data
    named = f" ({text})" if isinstance(text, str) else ""
    books = any(end.arm.startswith("books-") for end in measured)
    if not books:
        found.append(f"One text{named}: other texts may differ.")
    if measured:
        seeds = sorted({end.excess.n for end in measured})
        last = sorted({end.step for end in measured})
        found.append(
            f"{_span(seeds)} seeds an arm and {_span(last)} steps: what happens later is not known. "
            + (
                "The bootstrap interval of so few seeds is narrower than its name says: of normal values it held the "
                "mean 87 % of the time with 6 seeds and 90 % with 10 (simulated)."
                if seeds[0] < 20
                else ""
            ).strip()
        )
    beyond = [r for r in results if r.estimate.n and smallest_p(r.estimate.n, r.family_size) >= ALPHA]
    if beyond:
        worst = max(beyond, key=lambda r: smallest_p(r.estimate.n, r.family_size))
        found.append(
            f"With n = {worst.estimate.n} in a family of {worst.family_size} the smallest Holm-adjusted p is "
            f"{smallest_p(worst.estimate.n, worst.family_size):.3f}: those contrasts rest on their intervals."
        )
    sick, well = evidence.ending(BASE), evidence.ending(HEALTHY)
    if sick.state == "collapsed" and well.state in WORKING:
        a, b = sick.estimate("unique_of_20"), well.estimate("unique_of_20")
        if a.low is not None and b.high is not None and a.low > b.high:
            found.append(
                f"The count of unique tokens gives the collapsed {BASE} {interval(a)} of 20 and the working {HEALTHY} "
                f"{interval(b)}: it ranks them the wrong way round, and no verdict uses it."
            )
    return [sentence.strip() for sentence in found]


def _span(numbers: Sequence[int]) -> str:
    low, high = min(numbers), max(numbers)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"
