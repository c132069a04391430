"""The report's five questions and that of quantisation, each judged by a stated rule from intervals over seeds.

Nothing is concluded in advance: a question's function states the claim and the rule, looks at the states of its arms
(:mod:`bitnet_ext.collapse.verdicts.judging`), and the numbers give the answer.
"""

from __future__ import annotations

from collections.abc import Sequence

from bitnet_ext.collapse.results.status import CONTEXT_NATS, SAME_NATS
from bitnet_ext.collapse.verdicts.clock import CURVES, compare_clocks, describe_clock
from bitnet_ext.collapse.verdicts.clock import RULE as CLOCK_RULE
from bitnet_ext.collapse.verdicts.judging import (
    BASE,
    BROKEN,
    CE,
    HEALTHY,
    MI,
    MIN_RECOVERY_STEPS,
    STATE_RULE,
    STATES,
    WELL,
    WORKING,
    Answer,
    ContrastResult,
    Ending,
    Evidence,
    Family,
    Verdict,
    describe,
    describe_contrast,
    interval,
    limits_of,
    listed,
    not_collapsed,
    shortcomings,
)
from bitnet_ext.collapse.verdicts.solutions import LOSS_ARMS
from bitnet_ext.collapse.verdicts.statistics import MIN_SEEDS

SAME_LOSS = (HEALTHY, "no-decay")  # the same cross-entropy, without the L2 term inside Adam
REPORT_LOSS_ARM = "label-smoothing"  # the report's own run, on a shorter schedule
REDUCED = ("reduced-lr", "reduced-lr-long")
STARTS = (350, 1_100, 4_000)
CHANGES = ("continue", "no-decay", "adamw", "no-decay-reset", "third-lr", "smoothing", "l2-0.01")
WIDTHS = (128, 256, 512, 768)
L2_LEVELS = ("0.01", "0.001", "0.0001")

#: (ternary arm, its full-precision twin).
TWINS = (
    (BASE, "fp-twin"),
    *((f"l2-{level}", f"fp-l2-{level}") for level in L2_LEVELS),
    (HEALTHY, "fp-twin-adamw"),
    ("no-decay", "fp-no-decay"),
    ("books-l2", "books-fp-l2"),
    ("books-adamw", "books-fp-adamw"),
)


def recovery_arm(start: int, change: str) -> str:
    """The arm that goes on from step `start` of the standard run with a change."""
    return f"from-{start}-{change}"


def width_arm(width: int, optimizer: str) -> str:
    """The arm of a width with the optimiser "l2" or "adamw"; 256 is the base arm's."""
    if width == 256:
        return BASE if optimizer == "l2" else HEALTHY
    return f"width-{width}-{optimizer}"


_ENDS = (WIDTHS[0], WIDTHS[-1])
FAMILIES = {
    "q1": Family(tuple((BASE, arm) for arm in SAME_LOSS)),
    "q2": Family(tuple((BASE, arm) for arm in (*LOSS_ARMS, REPORT_LOSS_ARM))),
    "q3": Family(
        tuple(
            (recovery_arm(start, "continue"), recovery_arm(start, change))
            for start in STARTS
            for change in CHANGES[1:]
        )
    ),
    "q4": Family(tuple((BASE, arm) for arm in REDUCED)),
    "q5": Family(tuple((width_arm(_ENDS[0], o), width_arm(_ENDS[1], o)) for o in ("l2", "adamw"))),
    "quantisation": Family(TWINS),
}


def _reasons(
    first: Sequence[str],
    ends: Sequence[Ending],
    results: Sequence[ContrastResult],
    short: Sequence[Ending] = (),
) -> list[str]:
    return [
        *first,
        *shortcomings(short or ends),
        *(describe(end) for end in ends if end.rows),
        *(describe_contrast(result) for result in results),
    ]


def judge_loss(evidence: Evidence) -> Verdict:
    """q1: is the loss function the cause?"""
    base, same = evidence.ending(BASE), evidence.endings(SAME_LOSS)
    changed = evidence.endings((*LOSS_ARMS, REPORT_LOSS_ARM))
    working = evidence.prevailing([end.arm for end in changed if end.rows], WELL)
    results = evidence.family("q1", FAMILIES["q1"])
    answer: Answer = "undecided"
    if base.state != "collapsed":
        said = [not_collapsed(base, "there is no collapse to explain")]
    elif all(end.state in WORKING for end in same):
        if working:
            said = [
                f"The same loss does not collapse with {listed(SAME_LOSS)}, but a changed loss does not either "
                f"({listed(working)}): the data do not single out one cause."
            ]
        elif not any(end.state in BROKEN for end in changed):
            said = [
                f"The same loss does not collapse with {listed(SAME_LOSS)}, but whether a changed loss removes the "
                "collapse was not measured well enough."
            ]
        else:
            answer = "refuted"
            said = [f"With the same cross-entropy loss neither {SAME_LOSS[0]} nor {SAME_LOSS[1]} collapses."]
    elif all(end.state in BROKEN for end in same) and working:
        answer = "supported"
        said = [
            f"With the same loss the trouble stays whatever the weight decay ({listed(SAME_LOSS)}), and a "
            f"changed loss alone removes it: {listed(working)}."
        ]
    else:
        said = ["Neither side of the rule holds."]
    needed = [base, *same] if any(end.rows for end in changed) else [base, *same, *changed]
    for result in results:
        if result.estimate.n < MIN_SEEDS:
            continue
        if result.key == CE and result.estimate.high is not None and result.estimate.high < 0:
            said.append(
                f"The loss itself does not prefer what {BASE} became: it is lower with {result.other}."
            )
        elif result.key == CE and result.estimate.low is not None and result.estimate.low > 0:
            said.append(f"The loss itself is lower with {BASE} than with {result.other}.")
    return Verdict(
        "q1",
        "Is the loss the cause?",
        "The loss function (cross-entropy) is the cause of the collapse.",
        answer,
        f"Refuted when {BASE} is collapsed, {listed(SAME_LOSS)}, which keep the loss and drop the L2 term inside Adam, "
        "both work or are over-confident, and of the changed losses with the L2 term kept at least one is broken and "
        "none works; supported when those two are broken as well and at least one changed loss works; undecided "
        "otherwise. " + STATE_RULE,
        _reasons(said, [base, *same, *(end for end in changed if end.arm in working)], results, needed),
        limits_of(evidence, [base, *same], results),
    )


def judge_loss_fix(evidence: Evidence) -> Verdict:
    """q2: can a change of the loss alone mend it?"""
    base, planned = evidence.ending(BASE), evidence.endings(LOSS_ARMS)
    own = evidence.ending(REPORT_LOSS_ARM)
    ends = [*planned, own] if own.rows else planned
    arms = [end.arm for end in ends]
    working = evidence.prevailing(arms, WELL)
    answer: Answer = "undecided"
    if base.state != "collapsed":
        said = [not_collapsed(base, "there is nothing to fix")]
    elif working:
        answer = "supported"
        said = [
            f"With every hyperparameter kept, these changes of the loss keep it working: {listed(working)}."
        ]
    elif all(end.state in BROKEN for end in ends):
        answer = "refuted"
        said = [f"None of the {len(ends)} changed losses, at any level, keeps the network working."]
    else:
        said = ["No changed loss is shown to work, and not every one is shown to be broken."]
    results = evidence.family("q2", FAMILIES["q2"])
    return Verdict(
        "q2",
        "Fixed by the loss alone?",
        "The collapse can be fixed by a change of the loss alone, with every hyperparameter kept.",
        answer,
        f"Supported when {BASE} is collapsed and at least one of the changed losses works with the report's optimiser; "
        f"refuted when {BASE} is collapsed and all {len(LOSS_ARMS)} arms (four kinds, three levels; and "
        f"{REPORT_LOSS_ARM} where it was run) are broken; undecided otherwise. " + STATE_RULE,
        _reasons(said, [base, *ends], [r for r in results if r.key == CE]),
        [
            *limits_of(evidence, [base, *ends], results),
            "Other losses, and levels outside of those tried, are not judged.",
        ],
    )


def judge_recovery(evidence: Evidence) -> Verdict:
    """q3: can a collapsed network be brought back?"""
    arms = [recovery_arm(start, change) for start in STARTS for change in CHANGES if change != "continue"]
    started = {arm: evidence.start(arm) for arm in arms}
    measured = [arm for arm in arms if started[arm].rows]
    fallen = [arm for arm in measured if started[arm].state == "collapsed"]
    back = [arm for arm in evidence.prevailing(measured, WELL) if arm in fallen]
    ends = evidence.endings(arms)
    lost = [end.arm for end in ends if end.state in BROKEN and end.arm in fallen]
    answer: Answer = "undecided"
    if back:
        answer = "supported"
        said = [f"Brought back: {listed(back)}."]
    elif len(lost) == len(arms):
        answer = "refuted"
        said = [f"None of the {len(arms)} changes brought a collapsed network back."]
    else:
        said = ["No change is shown to bring a collapsed network back, and not every one is shown to fail."]
    if lost and back:
        said.append(f"Not brought back: {listed(lost)}.")
    unsure = [arm for arm in measured if arm not in fallen]
    if unsure:
        states = sorted({f"{arm} ({STATES[started[arm].state]})" for arm in unsure})
        said.append(f"Not shown to begin from a collapsed network, and not counted: {listed(states)}.")
    results = evidence.family("q3", FAMILIES["q3"])
    kept = [evidence.ending(recovery_arm(start, "continue")) for start in STARTS]
    return Verdict(
        "q3",
        "Can it be brought back?",
        "A collapsed network can be brought back.",
        answer,
        f"Looks at {len(STARTS)} checkpoints of {BASE} and {len(CHANGES) - 1} changes from each. Supported when at "
        f"least one arm that begins collapsed works at its end; refuted when every arm begins collapsed and ends "
        f"broken; undecided otherwise. At least {MIN_RECOVERY_STEPS} steps from the checkpoint. "
        + STATE_RULE,
        _reasons(said, [*kept, *ends], [r for r in results if r.key == CE], ends),
        [
            *limits_of(evidence, ends, results),
            "Whether a network that was brought back becomes as good as one that never collapsed is not judged.",
        ],
    )


def judge_reduced_rate(evidence: Evidence) -> Verdict:
    """q4: does a reduced learning rate recover?"""
    ends = evidence.endings(REDUCED)
    base = evidence.ending(BASE)
    alive = evidence.prevailing(REDUCED, frozenset({"alive"}))
    answer: Answer = "undecided"
    if base.state != "collapsed":
        said = [not_collapsed(base, "there is nothing that a lower rate could recover from")]
    elif alive:
        answer = "supported"
        said = [f"Below the unigram's cross-entropy with context use at the end: {listed(alive)}."]
    elif all(map(_not_alive, ends)):
        answer = "refuted"
        said = ["With neither reduced learning rate does the network end below the unigram with context use."]
    else:
        said = ["No reduced learning rate is shown to recover, and not both are shown to fail."]
    clocks = [
        clock
        for arm in REDUCED
        for key in CURVES
        if (clock := compare_clocks(evidence.study, BASE, arm, key)) is not None
    ]
    said += [describe_clock(clock) for clock in clocks]
    results = evidence.family("q4", FAMILIES["q4"])
    return Verdict(
        "q4",
        "Does a reduced learning rate recover?",
        "A reduced learning rate recovers from the collapse.",
        answer,
        f"Supported when {BASE} is collapsed and at least one of {listed(REDUCED)} ends with the whole interval of its "
        f"cross-entropy below the unigram's and that of its context use above {CONTEXT_NATS} nats; refuted when both "
        f"end with one of the two intervals wholly on the other side; undecided otherwise. At least {MIN_SEEDS} seeds. "
        f"The clock does not enter the answer, it says how to read it. {CLOCK_RULE} Curves less than {SAME_NATS} nats "
        "apart on either clock tell nothing. " + STATE_RULE,
        _reasons(said, [base, *ends], results),
        limits_of(evidence, [base, *ends], results),
    )


def _not_alive(end: Ending) -> bool:
    """Shown not to be alive: above the unigram, or without context use."""
    if end.state in ("missing", "few", "short", "diverged"):
        return False
    above = end.excess.low is not None and end.excess.low > 0
    return above or (end.context.high is not None and end.context.high <= CONTEXT_NATS)


def judge_width(evidence: Evidence) -> Verdict:
    """q5: does the collapse go away with size?"""
    readings, said, ends = {}, [], []
    for optimizer, words in (("l2", "coupled L2"), ("adamw", "AdamW")):
        row = evidence.endings([width_arm(width, optimizer) for width in WIDTHS])
        ends += row
        readings[optimizer] = _with_width(row)
        said.append(
            {
                "goes": f"Under {words} a narrower network collapses and the widest one works.",
                "stays": f"Under {words} the network collapses at every width.",
                "never": f"Under {words} it collapses at no width.",
                "open": f"Under {words} the widths give no clear picture.",
            }[readings[optimizer]]
        )
    found = set(readings.values())
    answer: Answer = "undecided"
    if "goes" in found and "stays" not in found:
        answer = "supported"
    elif "stays" in found and not found & {"goes", "open"}:
        answer = "refuted"
    elif found == {"never"}:
        said.append("There is no collapse at any width that could go away.")
    results = evidence.family("q5", FAMILIES["q5"])
    return Verdict(
        "q5",
        "Does it go away with size?",
        "The collapse goes away with size.",
        answer,
        f"Looks at widths {listed([str(width) for width in WIDTHS])} under coupled L2 and under AdamW. Supported when, "
        "under one optimiser, a narrower network is collapsed and the widest works, and under the other it does not "
        "collapse at every width; refuted when it is collapsed at every width under one optimiser, and under the other "
        "at every width or at none; undecided otherwise. " + STATE_RULE,
        _reasons(said, ends, results),
        [
            *limits_of(evidence, ends, results),
            f"Widths from {WIDTHS[0]} to {WIDTHS[-1]}: nothing is said about larger networks, or deeper ones.",
        ],
    )


def _with_width(ends: Sequence[Ending]) -> str:
    states = [end.state for end in ends]
    if all(state == "collapsed" for state in states):
        return "stays"
    if all(state in WORKING for state in states):
        return "never"
    if "collapsed" in states[:-1] and states[-1] in WELL:
        return "goes"
    return "open"


def judge_quantisation(evidence: Evidence) -> Verdict:
    """Is ternary quantisation the cause?"""
    base, twin = evidence.endings(TWINS[0])
    answer: Answer = "undecided"
    if base.state != "collapsed":
        said = [not_collapsed(base, "there is no collapse to explain")]
    elif twin.state in WORKING:
        answer = "supported"
        said = [f"The full-precision twin {twin.arm} does not collapse where the ternary network does."]
    elif twin.state == "collapsed":
        answer = "refuted"
        said = [f"The full-precision twin {twin.arm} collapses as well: quantisation is not needed for it."]
    else:
        said = [f"{twin.arm}: {STATES[twin.state]}; neither side of the rule holds."]
    healthy = evidence.ending(HEALTHY)
    if healthy.state in WORKING:
        said.append(
            f"Ternary weights alone are not enough for a collapse: {HEALTHY}, ternary as well, has none."
        )
    elif healthy.state == "collapsed":
        said.append(f"The ternary network collapses with {HEALTHY} too.")
    others = evidence.endings([arm for pair in TWINS[1:] for arm in pair])
    measured = [end for end in others if end.rows]
    for ternary, full in TWINS[1:]:
        states = [evidence.ending(arm).state for arm in (ternary, full)]
        if states[0] == "collapsed" and states[1] in WORKING:
            said.append(f"At {ternary} only the ternary network collapses (its twin {full} works).")
        if states[1] == "collapsed" and states[0] in WORKING:
            said.append(f"At {full} only the full-precision network collapses ({ternary} works).")
    results = evidence.family("quantisation", FAMILIES["quantisation"])
    if twin.rows and base.rows:
        said.append(
            f"Context use at the end: ternary {interval(base.context)}, full precision {interval(twin.context)} nats."
        )
    return Verdict(
        "quantisation",
        "Does quantisation matter?",
        "Ternary quantisation causes the collapse.",
        answer,
        f"Supported when {BASE} is collapsed and its full-precision twin works; refuted when both are collapsed; "
        "undecided otherwise. The other pairs of twins are shown beside it and do not enter the answer. "
        + STATE_RULE,
        _reasons(said, [base, twin, *measured], [r for r in results if r.key in (CE, MI)], [base, twin]),
        limits_of(evidence, [base, twin], results),
    )


QUESTIONS = (judge_loss, judge_loss_fix, judge_recovery, judge_reduced_rate, judge_width, judge_quantisation)
