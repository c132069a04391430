"""What the arms of a small comparison come to together, in words, by stated rules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bitnet_ext.collapse.results import Row, Study
from bitnet_ext.collapse.results.status import (
    DEAD,
    EARLY,
    RISE_NATS,
    SAME_NATS,
    STATUS,
    UNDECIDED,
    arm_status,
    course,
    get,
    warmup_of,
)
from bitnet_ext.collapse.verdicts.contrasts import CONTRASTS
from bitnet_ext.collapse.verdicts.findings import Finding
from bitnet_ext.collapse.verdicts.wording import count, steps


def summary_findings(study: Study) -> list[Finding]:
    """The arms of a study together: how each ended, and whether the count of tokens ranks them as the loss does.

    Arms that are too short for a conclusion are named first and left out of every comparison.
    """
    ends = {arm: arm_status(study, arm) for arm in study.measured_arms}
    by_status: dict[str, list[str]] = {}
    for arm, status in ends.items():
        if status is not None:
            by_status.setdefault(status, []).append(arm)
    found = [_too_early(study, ends)] if any(status in EARLY for status in ends.values()) else []
    if by_status:
        number = len(study.measured_arms)
        parts = [
            f"{STATUS[status][0]}: {', '.join(by_status[status])}" for status in STATUS if status in by_status
        ]
        text = (
            f"{number} arm{'s' if number != 1 else ''} at the last evaluation. "
            f"{'. '.join(map(_first_up, parts))}."
        )
        found.append(Finding("summary", "How the arms ended", text))
    found.extend(_outcomes(study, ends))
    ranking = _ranking([course(study, arm)[-1] for arm, status in ends.items() if status not in EARLY])
    if ranking is not None:
        found.append(ranking)
    found.extend(_goodhart(study, ends))
    seeds = max(len(study.leading(arm)) for arm in study.measured_arms)
    if seeds == 1:
        text = (
            "Every arm was run with one seed, so there is no spread: a small difference between two "
            "arms may be chance."
        )
        found.append(Finding("one-seed", "Seeds", text))
    return found


def _too_early(study: Study, ends: Mapping[str, str | None]) -> Finding:
    """Says which arms are too short for a conclusion, and up to which step the learning rate still rises."""
    short = [arm for arm, status in ends.items() if status in EARLY]
    if len(short) == len(ends):
        text = "All arms are too short for a conclusion"
    else:
        text = f"{len(short)} of {len(ends)} arms are too short for a conclusion ({', '.join(short)})"
    text += ": nothing has failed in them and their loss may still fall. The comparison says nothing about them yet."
    warming = [arm for arm in short if ends[arm] == "warmup"]
    if warming:
        last = max(warmup_of(study, arm) for arm in warming)
        text += (
            f" Their learning rate rises until step {steps(last)}, and the last evaluation is at step "
            f"{steps(study.last_step)}: train for several times as many steps as the warm-up has, or shorten it."
        )
    return Finding("too-early", "Too early to tell", text)


def _outcomes(study: Study, ends: Mapping[str, str | None]) -> list[Finding]:
    """Which of the changes to an arm that collapsed went without a collapse, and which did not."""
    found = []
    for base in dict.fromkeys(contrast.base for contrast in CONTRASTS):
        changed = [c.other for c in CONTRASTS if c.base == base and study.of(c.other)]
        if not changed or ends.get(base) not in DEAD:
            continue
        kept = [arm for arm in changed if ends[arm] not in (*DEAD, *UNDECIDED, None)]
        fell = [arm for arm in changed if ends[arm] in DEAD]
        parts = [f"no failure with {', '.join(kept)}"] if kept else []
        parts += [f"failure all the same with {', '.join(fell)}"] if fell else []
        if parts:
            text = f"{base} failed. Of the arms that change it: {'; '.join(parts)}."
            found.append(Finding(f"outcomes-{base}", f"What matters for {base}", text))
    return found


def _first_up(text: str) -> str:
    return text[:1].upper() + text[1:]


def _ranking(last_rows: Sequence[Row]) -> Finding | None:
    """Over pairs of arms: does more unique tokens go with a better held-out cross-entropy?"""
    pairs = against = 0
    for i, a in enumerate(last_rows):
        for b in last_rows[i + 1 :]:
            ua, ub = get(a, "unique_of_20"), get(b, "unique_of_20")
            ca, cb = get(a, "heldout_cross_entropy"), get(b, "heldout_cross_entropy")
            if ua is None or ub is None or ca is None or cb is None:
                continue
            if abs(ua - ub) >= 1 and abs(ca - cb) >= SAME_NATS:
                pairs += 1
                against += (ua - ub) * (ca - cb) > 0
    if not pairs:
        return None
    text = (
        f"Of {pairs} pair{'s' if pairs != 1 else ''} of arms that differ in both at the end, the arm with "
        f"more unique tokens has the worse held-out cross-entropy in {against}."
    )
    if 2 * against > pairs:
        text += (
            " In this study the count is no measure of how good a model is; it rather points the wrong way."
        )
        return Finding("ranking-against", "The count as a measure", text)
    if against:
        return Finding(
            "ranking-mixed", "The count as a measure", text + " The two measures agree only in part."
        )
    return Finding(
        "ranking-agrees", "The count as a measure", text + " Here both measures rank the arms alike."
    )


def _goodhart(study: Study, ends: Mapping[str, str | None]) -> list[Finding]:
    """The arm with the highest count, when it is dead while an arm with a lower count is not."""
    counted = []
    for arm, status in ends.items():
        unique = get(course(study, arm)[-1], "unique_of_20")
        if unique is not None and status is not None and status not in EARLY:
            counted.append((unique, arm, status))
    if len(counted) < 2:
        return []
    unique, arm, status = max(counted, key=lambda end: end[0])
    better = [end for end in counted if end[2] == "alive" and end[0] + RISE_NATS < unique]
    if status not in DEAD or not better:
        return []
    low, alive, _ = min(better, key=lambda end: end[0])
    return [
        Finding(
            "highest-count-dead",
            "The highest count",
            f"{arm} ends with the highest count, {count(unique)} of 20, and is {STATUS[status][0]}; {alive} "
            f"counts {count(low)} and is alive.",
        )
    ]
