"""Reads one course of evaluations by fixed rules: how it ended, and where the count of unique tokens fell.

The thresholds are constants of this module, and ``RULES`` states them for the reader of the report.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from bitnet_ext.collapse.results.records import Row, Run, Study, number
from bitnet_ext.collapse.results.settings import settings_of

UNIFORM_NATS = 0.02  # distance from ln V at which an output counts as uniform
CONTEXT_NATS = 0.1  # mutual information above which an output counts as depending on its context
COLLAPSE_NATS = 0.5  # excess over the unigram above which a context-free output counts as collapsed
FRESH_GAIN = 0.9  # mean final gain, which is 1 in a new network, from which on a run may have begun with one
UNTRAINED_NATS = 0.3  # change of held-out cross-entropy below which a network counts as barely trained
STALL_NATS = 0.1  # change of held-out cross-entropy over half of a run that counts as none
CONFIDENCE_NATS = 0.5  # |cross-entropy - entropy| above which an output counts as over- or under-confident
FALL_SHARE = 0.5  # of the initial unique-of-20: the report's "collapse" and "recovery"
NEAR_UNIFORM_SHARE = 0.95  # of ln V: an entropy that is "nearly uniform"
RISE_TOKENS = 4.0  # change of unique-of-20 that counts as a rise or fall in a disagreement of metrics
RISE_NATS = 0.2  # change of held-out cross-entropy that counts in a disagreement of metrics
SAME_NATS = 0.1  # difference of two arms' cross-entropy that is called small
CLOCK_RATIO = (
    1 / 3
)  # of two curves' distance over the cumulative rate to that over steps: below, the rate is the clock
SHRUNK_SHARE = 0.1  # of its initial size: a parameter group that has "all but vanished"

#: Status of a run at its last evaluation -> (short label, what it means).
STATUS = {
    "diverged": ("not a number", "its held-out cross-entropy is not a finite number: the training diverged"),
    "uniform": (
        "dead (uniform output)",
        "the output is the uniform distribution: every token is equally likely",
    ),
    "collapsed": ("collapsed", "it ignores its context and predicts worse than fixed word counts"),
    "failing": (
        "failing",
        "its predictions still vary with the context, but they are worse than fixed word counts and have "
        "stopped getting better",
    ),
    "warmup": (
        "still in warm-up",
        "its learning rate is still rising to its peak, and nothing has failed",
    ),
    "untrained": ("barely trained", "it has hardly moved from where it started"),
    "early": (
        "too early to tell",
        "it is worse than fixed word counts and does not use its context yet, but its loss is falling and "
        "nothing has failed",
    ),
    "unigram": (
        "word counts only",
        "it has learned how frequent each token is, and nothing of the context yet",
    ),
    "overconfident": ("over-confident", "it uses its context, but is wrong with too much confidence"),
    "learning": ("learning", "it uses its context, but does not predict better than fixed word counts yet"),
    "alive": ("alive", "it uses its context and predicts better than fixed word counts"),
}
DEAD = frozenset({"uniform", "collapsed", "failing"})
#: Statuses of a run that is too short for a conclusion.
EARLY = frozenset({"warmup", "early", "untrained"})
UNDECIDED = EARLY | {"diverged"}

RULES = (
    ("Not a number", "Held-out cross-entropy is NaN or infinite."),
    (
        "Dead (uniform output)",
        f"Held-out cross-entropy and mean predictive entropy are both within {UNIFORM_NATS} nats of ln V, "
        "and were not always, or the run goes on from another one.",
    ),
    (
        "Alive",
        f"Held-out cross-entropy is below the unigram's and mutual information is above {CONTEXT_NATS} nats.",
    ),
    (
        "Still in warm-up",
        "The last evaluation is within the warm-up of the learning rate, and by the rules below the network would be "
        "barely trained, collapsed, failing or too early to tell. A final gain or a head below "
        f"{SHRUNK_SHARE:.0%} of its initial size is a failure all the same.",
    ),
    (
        "Barely trained",
        f"Held-out cross-entropy was never more than {UNTRAINED_NATS} nats below where it started and is more than "
        f"{COLLAPSE_NATS} nats above the unigram's, the final gain began at {FRESH_GAIN} or more (norms begin with 1; "
        f"less has a run that goes on from another one), and neither it nor the head fell below {SHRUNK_SHARE:.0%} of "
        "where it began; or the output of such a network has been uniform all along.",
    ),
    (
        "Collapsed",
        f"Mutual information is at most {CONTEXT_NATS}, held-out cross-entropy is more than {COLLAPSE_NATS} "
        f"nats above the unigram's, and one of these holds: the final gain or the head is below "
        f"{SHRUNK_SHARE:.0%} of its initial size; held-out cross-entropy is more than {STALL_NATS} nats above its own "
        f"best; it improved by at most {STALL_NATS} nats over the second half of the run; the predictive "
        f"entropy is at least {NEAR_UNIFORM_SHARE:.0%} of ln V in a run that goes on from another one, or rose to that "
        "in a run that began with a new network and is not known to be falling.",
    ),
    ("Too early to tell", "As collapsed, but none of its signs of failure holds."),
    (
        "Failing",
        f"Mutual information is above {CONTEXT_NATS}, held-out cross-entropy is more than {COLLAPSE_NATS} nats "
        "above the unigram's and not above the predictive entropy by as much as an over-confident output's, "
        "and a sign of failure named under 'Collapsed' holds.",
    ),
    ("Word counts only", f"Mutual information is at most {CONTEXT_NATS}."),
    (
        "Over-confident",
        f"Held-out cross-entropy is above the unigram's and more than {CONFIDENCE_NATS} nats above the mean "
        "predictive entropy (they are equal for a calibrated model).",
    ),
    ("Learning", "None of the others."),
)


@dataclass(frozen=True)
class Fall:
    """The course of unique-of-20 by the report's rule: a fall to half of the initial count, and a later
    rise.
    """

    initial: float
    fall_step: int  # first evaluation at or below half of the initial count
    lowest: float
    lowest_step: int  # the lowest count before the rise
    rise_step: int | None  # first evaluation after the lowest one at or above half again
    highest: float | None  # the highest count from there on
    highest_step: int | None


def course(study: Study, arm: str) -> list[Row]:
    """The mean over an arm's leading runs, as evaluation rows at the steps that all of them have."""
    runs = study.leading(arm)
    return mean_rows(runs)


def mean_rows(runs: Sequence[Run]) -> list[Row]:
    """Rows with the mean of each metric over runs; None where a run lacks it. One run: its own rows."""
    if len(runs) == 1:
        return runs[0].evals
    tables = [{row["step"]: row for row in run.evals} for run in runs]
    rows = []
    for row in runs[0].evals if runs else []:
        if all(row["step"] in table for table in tables):
            together = [table[row["step"]] for table in tables]
            mean: Row = {"kind": "eval", "step": row["step"]}
            for key in row:
                values = [number(other.get(key)) for other in together]
                present = [value for value in values if value is not None]
                if key not in mean:
                    mean[key] = sum(present) / len(present) if len(present) == len(values) else None
            rows.append(mean)
    return rows


def get(row: Row, key: str) -> float | None:
    """A metric of a row as a finite number, else None."""
    value = number(row.get(key))
    return value if value is not None and math.isfinite(value) else None


def log_vocab(study: Study) -> float | None:
    """ln V: cross-entropy and entropy of the uniform distribution."""
    return math.log(study.vocab_size) if study.vocab_size else None


def is_uniform(row: Row, ln_v: float | None) -> bool:
    ce, entropy = get(row, "heldout_cross_entropy"), get(row, "predictive_entropy")
    if ln_v is None or ce is None or entropy is None:
        return False
    return abs(ce - ln_v) <= UNIFORM_NATS and abs(entropy - ln_v) <= UNIFORM_NATS


def is_alive(row: Row) -> bool | None:
    """Held-out cross-entropy below the unigram's and mutual information above 0.1; None when a number is
    missing.
    """
    if number(row.get("heldout_cross_entropy")) is None:
        return None
    ce, unigram, mi = (
        get(row, k) for k in ("heldout_cross_entropy", "unigram_cross_entropy", "mutual_information")
    )
    if ce is None:
        return False
    if unigram is None or mi is None:
        return None
    return ce < unigram and mi > CONTEXT_NATS


def arm_status(study: Study, arm: str, rows: Sequence[Row] | None = None) -> str | None:
    """:func:`classify` of the mean over an arm's leading runs, or of other `rows` of that arm.

    The report and ``diagnose`` both judge by :func:`classify`, so one run has one verdict.
    """
    return classify(course(study, arm) if rows is None else rows, log_vocab(study), warmup_of(study, arm))


def warmup_of(study: Study, arm: str) -> int:
    """Steps of the learning rate's warm-up that an arm's settings name; 0 when they name none."""
    flat = settings_of(study, arm)
    found = next((value for key, value in flat.items() if key.rsplit(".", 1)[-1] == "warmup_steps"), "0")
    return int(found.replace(",", "")) if found.replace(",", "").isdigit() else 0


def classify(rows: Sequence[Row], ln_v: float | None, warmup_steps: int = 0) -> str | None:
    """The status of a run at its last evaluation, by ``RULES``.

    Args:
        rows: evaluations of the run, at least one.
        ln_v: log of the vocabulary's size, nats; None when it is not known.
        warmup_steps: steps over which the learning rate rises to its peak.

    Returns:
        A key of ``STATUS``; None when the rows lack the numbers.
    """
    status = _status(rows, ln_v)
    too_short = status in ("untrained", "early", "collapsed", "failing")
    if too_short and rows[-1]["step"] <= warmup_steps and not _has_vanished(rows):
        return "warmup"
    return status


def _status(rows: Sequence[Row], ln_v: float | None) -> str | None:
    last = rows[-1]
    raw = number(last.get("heldout_cross_entropy"))
    if raw is None:
        return None
    if not math.isfinite(raw):
        return "diverged"
    if is_uniform(last, ln_v):
        # An initialisation with small logits is uniform too; death is to become so, or to have been so before.
        return "untrained" if _is_fresh(rows[0]) and all(is_uniform(row, ln_v) for row in rows) else "uniform"
    unigram, mi = get(last, "unigram_cross_entropy"), get(last, "mutual_information")
    if unigram is None or mi is None:
        return None
    if is_alive(last):
        return "alive"
    far = raw > unigram + COLLAPSE_NATS
    if far and _is_untrained(rows):
        return "untrained"
    if mi <= CONTEXT_NATS:
        return "unigram" if not far else "collapsed" if _has_failed(rows, ln_v) else "early"
    entropy = get(last, "predictive_entropy")
    if entropy is not None and raw - entropy > CONFIDENCE_NATS:
        return "overconfident"
    return "failing" if far and _has_failed(rows, ln_v) else "learning"


def _is_untrained(rows: Sequence[Row]) -> bool:
    """Whether a network began fresh and has hardly moved since: its loss did not fall, and nothing in it vanished."""
    start, best = get(rows[0], "heldout_cross_entropy"), min(finite(rows, "heldout_cross_entropy"))
    slow = start is not None and start - best <= UNTRAINED_NATS
    return _is_fresh(rows[0]) and slow and not _has_vanished(rows)


def _is_fresh(first: Row) -> bool:
    """Whether a run may have begun with a new network, by its first evaluation."""
    gain = get(first, "final_gain_mean_abs")
    return gain is None or gain >= FRESH_GAIN


def _has_vanished(rows: Sequence[Row]) -> bool:
    """Whether what carries the logits, the final gain or the head, has shrunk to next to nothing."""
    for key in ("final_gain_mean_abs", "lm_head_mean_abs"):
        first, now = get(rows[0], key), get(rows[-1], key)
        if first and now is not None and now < SHRUNK_SHARE * first:
            return True
    return False


def _has_failed(rows: Sequence[Row], ln_v: float | None) -> bool:
    """Whether a network that is worse than word counts shows a failure, and is not just on its way to them."""
    if _has_vanished(rows):
        return True
    points = [(row["step"], ce) for row in rows if (ce := get(row, "heldout_cross_entropy")) is not None]
    if points[-1][1] > min(ce for _, ce in points) + STALL_NATS:
        return True  # the loss was better before
    half = [ce for step, ce in points if step >= rows[-1]["step"] / 2]
    falls = len(half) > 1 and half[0] - min(half) > STALL_NATS
    if len(half) > 1 and not falls:
        return True  # the loss does not fall any more
    if not _is_nearly_uniform(rows[-1], ln_v):
        return False
    # The output of a new network is nearly uniform too, and stays so while its loss begins to fall.
    return not _is_fresh(rows[0]) or not (falls or _is_nearly_uniform(rows[0], ln_v))


def _is_nearly_uniform(row: Row, ln_v: float | None) -> bool:
    entropy = get(row, "predictive_entropy")
    return ln_v is not None and entropy is not None and entropy >= NEAR_UNIFORM_SHARE * ln_v


def find_fall(rows: Sequence[Row]) -> Fall | None:
    """The fall and rise of unique-of-20, or None when it never was at or below half of its initial value."""
    points = [(int(row["step"]), u) for row in rows if (u := get(row, "unique_of_20")) is not None]
    if not points:
        return None
    half = FALL_SHARE * points[0][1]
    start = next((i for i, (_, u) in enumerate(points) if i and u <= half), None)
    if start is None:
        return None
    rise = next(
        (
            i
            for i in range(start + 1, len(points))
            if points[i][1] >= half and points[i][1] > points[start][1]
        ),
        None,
    )
    lowest_step, lowest = min(points[start:rise], key=lambda p: p[1])
    highest_step, highest = max(points[rise:], key=lambda p: p[1]) if rise is not None else (None, None)
    rise_step = points[rise][0] if rise is not None else None
    return Fall(points[0][1], points[start][0], lowest, lowest_step, rise_step, highest, highest_step)


def finite(rows: Sequence[Row], key: str) -> list[float]:
    return [value for row in rows if (value := get(row, key)) is not None]


def row_at(rows: Sequence[Row], step: int) -> Row:
    return next(row for row in rows if row["step"] == step)
