"""The four proposed solutions, each judged by a stated rule: does it prevent the collapse, and what does it cost?"""

from __future__ import annotations

from bitnet_ext.collapse.verdicts.judging import (
    BASE,
    BROKEN,
    CE,
    EQUAL_NATS,
    HEALTHY,
    STATE_RULE,
    WELL,
    Answer,
    ContrastResult,
    Evidence,
    Family,
    Verdict,
    amount,
    describe,
    describe_contrast,
    limits_of,
    listed,
    not_collapsed,
    probability,
    shortcomings,
)
from bitnet_ext.collapse.verdicts.statistics import MIN_SEEDS, equivalence

#: Verdict -> (family of arms, levels, title, what it is called in a sentence).
SOLUTIONS = {
    "s1": ("smoothing", ("0.05", "0.1", "0.15"), "Label smoothing", "Label smoothing"),
    "s2": ("entropy", ("0.01", "0.1", "0.3"), "Entropy regularisation", "A reward of predictive entropy"),
    "s3": ("diversity", ("0.03", "0.1", "0.3"), "Diversity bonus", "A bonus for vocabulary diversity"),
    "s4": (
        "head-l2",
        ("1e-5", "1e-4", "1e-3"),
        "Output-layer regularisation",
        "An L2 penalty on the output layer",
    ),
}


def arms_on(key: str, optimizer: str) -> tuple[str, ...]:
    """The arms of a solution with the optimiser "l2" or "adamw", by level."""
    name, levels, *_ = SOLUTIONS[key]
    return tuple(f"{name}-{level}-{optimizer}" for level in levels)


#: Every arm that changes the loss alone and keeps the report's optimiser.
LOSS_ARMS = tuple(arm for key in SOLUTIONS for arm in arms_on(key, "l2"))

FAMILIES = {
    key: Family(
        tuple((BASE, arm) for arm in arms_on(key, "l2"))
        + tuple((HEALTHY, arm) for arm in arms_on(key, "adamw")),
        (CE, "predictive_entropy", "effective_argmax_vocabulary", "unique_of_20"),
    )
    for key in SOLUTIONS
}

_RULE = (
    f"Supported when {BASE} is collapsed and at least one of the {{m}} levels on the same optimiser works; refuted "
    f"when {BASE} is collapsed and every level is broken; undecided otherwise (no collapse to prevent, missing arms, "
    f"too few seeds, intervals on both sides). {STATE_RULE} The cost on the healthy optimiser does not enter the "
    f"answer: its cross-entropy is called equal to {HEALTHY}'s when two one-sided tests show the difference within "
    f"{EQUAL_NATS} nats."
)


def judge_solution(evidence: Evidence, key: str) -> Verdict:
    """The verdict on one of the four solutions, s1 to s4."""
    _, levels, title, named = SOLUTIONS[key]
    arms = arms_on(key, "l2")
    base, ends = evidence.ending(BASE), evidence.endings(arms)
    results = evidence.family(key, FAMILIES[key])
    working = evidence.prevailing(arms, WELL)
    answer: Answer = "undecided"
    reasons = []
    if base.state != "collapsed":
        reasons.append(not_collapsed(base, "there is nothing to prevent"))
    elif working:
        answer = "supported"
        reasons.append(f"Kept from collapsing: {listed(working)}.")
    elif all(end.state in BROKEN for end in ends):
        answer = "refuted"
        reasons.append(f"None of the {len(arms)} levels keeps the network from collapsing.")
    else:
        reasons.append("No level is shown to work, and not every level is shown to be broken.")
    reasons += shortcomings([base, *ends])
    reasons += [describe(end) for end in (base, *ends) if end.rows]
    reasons += [describe_contrast(r) for r in results if r.base == BASE and r.key in (CE, "unique_of_20")]
    reasons += _cost(evidence, key, results)
    return Verdict(
        key,
        title,
        f"{named} prevents the collapse with the report's optimiser.",
        answer,
        _RULE.format(m=len(levels)),
        reasons,
        limits_of(evidence, [base, *ends], results),
    )


def _cost(evidence: Evidence, key: str, results: list[ContrastResult]) -> list[str]:
    """What the solution costs or gains on the healthy optimiser: not part of the answer."""
    said = []
    for result in results:
        if result.base != HEALTHY or result.key == "unique_of_20":
            continue
        sentence = "On the healthy optimiser: " + describe_contrast(result)
        if result.key == CE:
            same = equivalence(result.estimate.values, EQUAL_NATS)
            bounds = (
                ""
                if same.low is None or same.high is None
                else f"[{amount(same.low)}, {amount(same.high)}], "
            )
            sentence += (
                f" It is {'shown to be' if same.holds else 'not shown to be'} within {EQUAL_NATS} nats (90 % interval "
                f"{bounds}{probability(same.p)})."
            )
            low, high = result.estimate.low, result.estimate.high
            if (
                low is not None
                and high is not None
                and result.estimate.n >= MIN_SEEDS
                and (low > 0 or high < 0)
            ):
                sentence += (
                    " It makes the predictions worse." if low > 0 else " It makes the predictions better."
                )
        said.append(sentence)
    missing = [arm for arm in (HEALTHY, *arms_on(key, "adamw")) if not evidence.study.of(arm)]
    if missing:
        said.append(f"The cost on the healthy optimiser is not fully known; missing arms: {listed(missing)}.")
    return said
