"""What the arms of a study show against each other, in words, by stated rules."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from bitnet_ext.collapse.results import Study
from bitnet_ext.collapse.results.settings import setting_changes
from bitnet_ext.collapse.results.status import (
    CLOCK_RATIO,
    DEAD,
    SAME_NATS,
    STATUS,
    UNDECIDED,
    arm_status,
    course,
    get,
)
from bitnet_ext.collapse.verdicts.findings import Finding
from bitnet_ext.collapse.verdicts.wording import count, nats, signed, steps

_GRID = 64
_MAX_SETTINGS = 5


@dataclass(frozen=True)
class Contrast:
    """Two arms that differ in one intended thing, and what each outcome of the pair would say about it."""

    base: str
    other: str
    change: str  # what the other arm changes
    only_base: str  # only the base arm collapsed
    both: str  # both collapsed
    only_other: str  # only the other arm collapsed
    neither: str = "Neither network collapsed."


def _remedy(other: str, change: str, base: str = "standard-lr") -> Contrast:
    return Contrast(
        base,
        other,
        change,
        "In this run the change was enough to keep the network from collapsing.",
        "The change did not prevent the collapse.",
        "In this run the change itself brought the collapse about.",
    )


def _decoupled(base: str, other: str) -> Contrast:
    return Contrast(
        base,
        other,
        "decoupled weight decay in place of an L2 term inside Adam",
        "Both minimise the same cross-entropy, so the loss alone does not bring the collapse: the L2 term "
        "inside Adam does, or needs to be there for it.",
        "Decoupling the decay did not prevent the collapse, so the L2 term inside Adam does not explain it "
        "alone.",
        "Only the network with decoupled decay collapsed: the L2 term inside Adam is not the cause.",
        "Neither network collapsed, so this run cannot tell whether the L2 term inside Adam does harm.",
    )


def _twin(base: str, other: str) -> Contrast:
    return Contrast(
        base,
        other,
        "full precision in place of ternary weights and int8 activations",
        "Only the ternary network collapsed: quantisation takes part in it.",
        "The full-precision twin collapsed as well: quantisation is not needed for it.",
        "Only the full-precision twin collapsed: quantisation is not the cause.",
        "Neither collapsed; the difference in cross-entropy is the price of ternary weights here.",
    )


CONTRASTS = (
    _decoupled("standard-lr", "adamw"),
    _remedy("no-decay", "no weight decay"),
    _twin("standard-lr", "fp-twin"),
    _twin("adamw", "fp-twin-adamw"),
    _decoupled("fp-twin", "fp-twin-adamw"),
    _remedy("reduced-lr", "a lower learning rate"),
    _remedy("two-stage", "the two-stage schedule"),
    _remedy("label-smoothing", "label smoothing"),
    _remedy("grad-clip", "tighter gradient clipping"),
    _remedy("entropy", "the entropy term"),
    _remedy("diversity", "the diversity term"),
    _remedy("output-l2", "an L2 penalty on the output layer"),
)


def contrast_findings(study: Study) -> list[Finding]:
    """One finding for each pair of ``CONTRASTS`` whose two arms both have evaluations in this study."""
    here = set(study.measured_arms)
    found = []
    for contrast in CONTRASTS:
        if {contrast.base, contrast.other} <= here:
            finding = _compare(study, contrast)
            if finding is not None:
                found.append(finding)
            decided = not {arm_status(study, arm) for arm in (contrast.base, contrast.other)} & UNDECIDED
            if contrast.other == "reduced-lr" and decided:
                clock = clock_finding(study, contrast.base, contrast.other)
                if clock is not None:
                    found.append(clock)
    return found


def _compare(study: Study, contrast: Contrast) -> Finding | None:
    base, other = course(study, contrast.base), course(study, contrast.other)
    common = sorted({row["step"] for row in base} & {row["step"] for row in other})
    if not common:
        return None
    step = common[-1]
    a_rows = [row for row in base if row["step"] <= step]
    b_rows = [row for row in other if row["step"] <= step]
    a, b = a_rows[-1], b_rows[-1]
    ce_a, ce_b = get(a, "heldout_cross_entropy"), get(b, "heldout_cross_entropy")
    status_a, status_b = (
        arm_status(study, contrast.base, a_rows),
        arm_status(study, contrast.other, b_rows),
    )
    if status_a is None or status_b is None:
        return None
    label = f"{contrast.other} against {contrast.base}"
    text = f"The change: {contrast.change}"
    changed = setting_changes(study, contrast.base, contrast.other)
    if 0 < len(changed) <= _MAX_SETTINGS:
        text += f" ({', '.join(changed)})"
    text += f". At step {steps(step)}: "
    if ce_a is None or ce_b is None:
        names = [name for name, ce in ((contrast.base, ce_a), (contrast.other, ce_b)) if ce is None]
        text += (
            f"held-out cross-entropy is not a number for {' and '.join(names)}, so the two cannot be "
            "compared."
        )
        return Finding("contrast-diverged", label, text)
    text += f"held-out cross-entropy {nats(ce_b)} against {nats(ce_a)} ({signed(ce_b - ce_a)} nats)"
    for key, template, form in (
        ("mutual_information", "mutual information {} against {}", nats),
        ("unique_of_20", "unique tokens {} against {}", count),
    ):
        va, vb = get(a, key), get(b, key)
        if va is not None and vb is not None:
            text += f", {template.format(form(vb), form(va))}"
    text += f"; {STATUS[status_b][0]} against {STATUS[status_a][0]}."
    dead = (status_a in DEAD, status_b in DEAD)
    kind, conclusion = {
        (True, False): ("only-base", contrast.only_base),
        (True, True): ("both", contrast.both),
        (False, True): ("only-other", contrast.only_other),
        (False, False): ("neither", contrast.neither),
    }[dead]
    if {status_a, status_b} & UNDECIDED:
        kind, conclusion = "too-early", "It is too early to say more."
    text += f" {conclusion}"
    if kind == "both" and abs(ce_b - ce_a) > SAME_NATS:
        text += (
            f" It was {'milder' if ce_b < ce_a else 'worse'} by {nats(abs(ce_b - ce_a))} nats at this step."
        )
    return Finding(f"contrast-{kind}", label, f"{text} {_seeds(study, contrast, step)}".rstrip())


def _seeds(study: Study, contrast: Contrast, step: int) -> str:
    """What the seeds say about a difference: paired by seed, because the arms of a seed start alike."""
    differences = []
    for run in study.of(contrast.base):
        twin = next((r for r in study.of(contrast.other) if r.seed == run.seed), None)
        if twin is None or run.last_step < step or twin.last_step < step:
            continue
        a, b = run.value_at("heldout_cross_entropy", step), twin.value_at("heldout_cross_entropy", step)
        if a is not None and b is not None and math.isfinite(a) and math.isfinite(b):
            differences.append(b - a)
    if len(differences) < 2:
        return "(One seed: no spread is known.)"
    low, high = min(differences), max(differences)
    text = f"Over {len(differences)} seeds the difference runs from {signed(low)} to {signed(high)} nats"
    return text + ("." if low * high > 0 else ": its sign is not the same for all, so it is not established.")


def clock_finding(study: Study, base: str, other: str) -> Finding | None:
    """Whether two arms go through one course at different speeds: distances over steps and over cumulative
    LR.

    The distance is the mean absolute difference of the held-out cross-entropy curves (linear interpolation)
    over the range that both cover, from zero to the shorter end.
    """
    key = "heldout_cross_entropy"
    distances = []
    for over in ("step", "cumulative_lr"):
        (xa, ya), (xb, yb) = (_finite_series(study, arm, key, over) for arm in (base, other))
        if len(xa) < 4 or len(xb) < 4:
            return None
        low, high = max(xa[0], xb[0]), min(xa[-1], xb[-1])
        if high <= low:
            return None
        grid = np.linspace(low, high, _GRID)
        gap = np.abs(np.interp(grid, xa, ya) - np.interp(grid, xb, yb))
        distances.append(float(gap.mean()))
    by_step, by_rate = distances
    label = f"{other} and {base} by the cumulative learning rate"
    text = (
        f"The two curves of held-out cross-entropy are {nats(by_step)} nats apart on average over steps, and "
        f"{nats(by_rate)} over the cumulative learning rate (the sum of the learning rates so far)."
    )
    if max(by_step, by_rate) < SAME_NATS:
        return Finding("clock-same", label, text + " They are too alike to tell which clock fits.")
    if by_rate < CLOCK_RATIO * by_step:
        return Finding(
            "clock-rescaled",
            label,
            text
            + " So the cumulative learning rate is the clock: the lower rate goes through the same course, "
            "slower, and what it shows at a step is what the other one showed earlier.",
        )
    if by_rate > by_step:
        return Finding(
            "clock-not", label, text + " So the lower rate is not the same course at another speed."
        )
    return Finding(
        "clock-partly",
        label,
        text + " The cumulative learning rate brings the curves closer, but not together.",
    )


def _finite_series(study: Study, arm: str, key: str, over: str) -> tuple[list[float], list[float]]:
    points = [(x, y) for x, y in zip(*study.mean_series(arm, key, over), strict=True) if math.isfinite(x + y)]
    return [x for x, _ in points], [y for _, y in points]


def context_rule() -> str:
    """The sentence that states what `collapsed` means in the contrasts."""
    return "A network counts as collapsed here when it ends as collapsed or as dead by the rules below."
