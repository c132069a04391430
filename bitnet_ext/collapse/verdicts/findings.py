"""What the curves of an arm show, in words: every sentence follows from the study's numbers by a stated rule.

Nothing is concluded in advance. A rule looks at the evaluations of one arm (the mean over its seeds), and
gives a sentence only when its condition holds; other data give other sentences. The thresholds are in
:mod:`bitnet_ext.collapse.results.status`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from bitnet_ext.collapse.results import Row, Study
from bitnet_ext.collapse.results.status import (
    COLLAPSE_NATS,
    CONFIDENCE_NATS,
    CONTEXT_NATS,
    EARLY,
    NEAR_UNIFORM_SHARE,
    RISE_NATS,
    RISE_TOKENS,
    SHRUNK_SHARE,
    STATUS,
    UNIFORM_NATS,
    arm_status,
    course,
    find_fall,
    finite,
    get,
    is_uniform,
    log_vocab,
    row_at,
)
from bitnet_ext.collapse.verdicts.wording import count, nats, percent, steps


@dataclass(frozen=True)
class Finding:
    """One sentence or two. `kind` names the rule, `label` is its short title, `text` is plain (not HTML)."""

    kind: str
    label: str
    text: str


def _above(difference: float) -> str:
    return f"{nats(abs(difference))} nats {'above' if difference > 0 else 'below'}"


def arm_findings(study: Study, arm: str) -> list[Finding]:
    """The sentences about one arm."""
    rows, ln_v = course(study, arm), log_vocab(study)
    if not rows:
        return []
    status = arm_status(study, arm, rows)
    early = status in EARLY  # what a run shows so soon says nothing about where it goes
    found = [
        _ending(study, arm, rows, status),
        None if early else _tokens(rows, ln_v),
        _uniform(rows, ln_v),
        _unigram_crossing(rows),
        *([] if early else _disagreements(rows)),
        None if early else _confidence(rows),
        _norms(rows),
        _codes(rows),
    ]
    return [finding for finding in found if finding is not None]


def _ending(study: Study, arm: str, rows: Sequence[Row], status: str | None) -> Finding | None:
    last = rows[-1]
    if status is None:
        return None
    if status == "diverged":
        first = next(r for r in rows if get(r, "heldout_cross_entropy") is None)
        return Finding(
            "ending-diverged",
            "At the end",
            f"{_capital(STATUS[status][1])} (first seen at step {steps(first['step'])}).",
        )
    ce, unigram, mi = (
        get(last, k) for k in ("heldout_cross_entropy", "unigram_cross_entropy", "mutual_information")
    )
    text = f"At step {steps(last['step'])} held-out cross-entropy is {nats(ce or 0.0)} nats"
    if unigram is not None and ce is not None:
        text += f", {_above(ce - unigram)} the unigram's {nats(unigram)}"
    if mi is not None:
        text += f"; mutual information (the use of context) is {nats(mi)}"
    text += f". By the rules below: {STATUS[status][1]}."
    runs = study.leading(arm)
    if len(runs) > 1:
        kinds = [arm_status(study, arm, run.evals) for run in runs]
        values = [
            v for run in runs if (v := run.final("heldout_cross_entropy")) is not None and math.isfinite(v)
        ]
        if values and nats(min(values)) != nats(max(values)):
            text += f" (Mean of {len(runs)} seeds; from {nats(min(values))} to {nats(max(values))}.)"
        if len(set(kinds)) > 1:
            each = ", ".join(
                f"seed {run.seed}: {STATUS[k][0] if k else 'unknown'}"
                for run, k in zip(runs, kinds, strict=True)
            )
            text += f" The seeds disagree: {each}."
    return Finding(f"ending-{status}", "At the end", text)


def _tokens(rows: Sequence[Row], ln_v: float | None) -> Finding | None:
    counts = [(row, u) for row in rows if (u := get(row, "unique_of_20")) is not None]
    if len(counts) < 2:
        return None
    fall = find_fall(rows)
    if fall is None:
        low_row, low = min(counts, key=lambda pair: pair[1])
        return Finding(
            "tokens-kept",
            "Unique of 20",
            f"The count never fell to half of its initial {count(counts[0][1])}; its lowest value is "
            f"{count(low)} (step {steps(low_row['step'])}), its last {count(counts[-1][1])}.",
        )
    at = row_at(rows, fall.lowest_step)
    text = (
        f"The count fell from {count(fall.initial)} to {count(fall.lowest)} at step {steps(fall.lowest_step)}"
        + (
            f" (to half or less by step {steps(fall.fall_step)})"
            if fall.fall_step != fall.lowest_step
            else ""
        )
        + "."
    )
    kind = "tokens-fell"
    start, ce = get(rows[0], "heldout_cross_entropy"), get(at, "heldout_cross_entropy")
    unigram, mi = get(at, "unigram_cross_entropy"), get(at, "mutual_information")
    if start is not None and ce is not None:
        way = "fallen" if ce < start else "risen"
        text += f" By then held-out cross-entropy had {way} from {nats(start)} to {nats(ce)}"
        if unigram is not None:
            text += f", {_above(ce - unigram)} the unigram's"
        if mi is not None:
            text += f", and mutual information was {nats(mi)}"
        text += "."
        if unigram is not None and mi is not None:
            if mi > CONTEXT_NATS:
                kind = "tokens-fell-learning"
                text += (
                    " Predictions depended on the context all the same: these few tokens are not a collapse."
                )
            elif ce - unigram > COLLAPSE_NATS:
                kind = "tokens-fell-collapse"
                text += (
                    " Predictions hardly depended on the context, and fixed word counts would have scored "
                    "better: the "
                    "loss had fallen, but cross-entropy does not reward this state."
                    if ce < start
                    else " Predictions hardly depended on the context."
                )
            else:
                kind = "tokens-fell-unigram"
                text += (
                    " That is the stage at which every language model has learned the word frequencies "
                    "only: the most frequent token is then the best guess everywhere."
                )
    entropy = get(at, "predictive_entropy")
    if ln_v is not None and entropy is not None and entropy >= NEAR_UNIFORM_SHARE * ln_v:
        text += (
            f" The output was then nearly uniform (entropy {nats(entropy)} of at most {nats(ln_v)}): few "
            "distinct argmaxes do not mean a confident model."
        )
    if fall.rise_step is not None and fall.highest is not None and fall.highest_step is not None:
        last = counts[-1][1]
        text += f" Later it rose again, to {count(fall.highest)} at step {steps(fall.highest_step)}"
        text += f", and ended at {count(last)}." if counts[-1][0]["step"] != fall.highest_step else "."
    else:
        text += f" It did not rise to half of its initial value again (last: {count(counts[-1][1])})."
    return Finding(kind, "Unique of 20", text)


def _uniform(rows: Sequence[Row], ln_v: float | None) -> Finding | None:
    flags = [is_uniform(row, ln_v) for row in rows]
    # An initialisation with small logits is uniform as well: only what became uniform is told.
    first = next((i for i in range(1, len(flags)) if flags[i] and not all(flags[:i])), None)
    if ln_v is None or first is None:
        return None
    after = next((i for i in range(first, len(flags)) if not flags[i]), None)
    text = f"From step {steps(rows[first]['step'])} "
    text += "to the end" if after is None else f"to step {steps(rows[after - 1]['step'])}"
    text += (
        " cross-entropy and predictive entropy equal that of the uniform distribution, ln V = "
        f"{nats(ln_v)}, within {UNIFORM_NATS} nats: the network says nothing about the next token."
    )
    here = rows[first : after if after is not None else len(rows)]
    unique = max(finite(here, "unique_of_20"), default=None)
    if unique is not None and unique > 1:
        text += f" The {count(unique)} unique tokens that are counted there are the argmax of rounding noise."
    return Finding("uniform", "Uniform output", text)


def _unigram_crossing(rows: Sequence[Row]) -> Finding | None:
    points = [(int(row["step"]), e) for row in rows if (e := _excess(row)) is not None]
    if len(points) < 2:
        return None
    below = [step for step, excess in points if excess < 0]
    best_step, best = min(points, key=lambda p: p[1])
    if not below:
        text = (
            f"Held-out cross-entropy never got below the unigram's; the nearest was +{nats(best)} nats at "
            f"step {steps(best_step)}."
        )
        return Finding("unigram-never", "Against word counts", text)
    text = f"Held-out cross-entropy is below the unigram's for the first time at step {steps(below[0])}"
    text += f"; its best is {nats(-best)} nats below, at step {steps(best_step)}"
    if points[-1][1] >= 0:
        return Finding("unigram-lost", "Against word counts", text + ", but at the end it is above again.")
    return Finding("unigram-crossed", "Against word counts", text + ".")


def _excess(row: Row) -> float | None:
    ce, unigram = get(row, "heldout_cross_entropy"), get(row, "unigram_cross_entropy")
    return None if ce is None or unigram is None else ce - unigram


def _disagreements(rows: Sequence[Row]) -> list[Finding]:
    """Intervals over which unique-of-20 and the quality of the predictions moved in opposite directions."""
    points = [
        (int(row["step"]), u, ce, mi)
        for row in rows
        if (u := get(row, "unique_of_20")) is not None
        and (ce := get(row, "heldout_cross_entropy")) is not None
        and (mi := get(row, "mutual_information")) is not None
    ]
    rises, falls = [], []
    for i, (_, u0, ce0, mi0) in enumerate(points):
        for j in range(i + 1, len(points)):
            _, u1, ce1, mi1 = points[j]
            if u1 - u0 >= RISE_TOKENS and ce1 - ce0 >= RISE_NATS:
                rises.append((u1 - u0, i, j))
            if u0 - u1 >= RISE_TOKENS and ce0 - ce1 >= RISE_NATS and mi1 > max(mi0, CONTEXT_NATS):
                falls.append((u0 - u1, i, j))
    found = []
    if rises:
        _, i, j = max(rises)
        (s0, u0, ce0, _), (s1, u1, ce1, _) = points[i], points[j]
        found.append(
            Finding(
                "count-up-loss-up",
                "Metrics disagree",
                f"From step {steps(s0)} to {steps(s1)} the count rose from {count(u0)} to {count(u1)} while "
                f"held-out cross-entropy got worse, from {nats(ce0)} to {nats(ce1)}: this rise is no "
                "recovery.",
            )
        )
    if falls:
        _, i, j = max(falls)
        (s0, u0, ce0, mi0), (s1, u1, ce1, mi1) = points[i], points[j]
        found.append(
            Finding(
                "count-down-loss-down",
                "Metrics disagree",
                f"From step {steps(s0)} to {steps(s1)} the count fell from {count(u0)} to {count(u1)} while "
                f"held-out cross-entropy improved from {nats(ce0)} to {nats(ce1)} and mutual information "
                f"grew from {nats(mi0)} to {nats(mi1)}: this fall is no collapse.",
            )
        )
    return found


def _confidence(rows: Sequence[Row]) -> Finding | None:
    last = rows[-1]
    ce, entropy = get(last, "heldout_cross_entropy"), get(last, "predictive_entropy")
    if ce is None or entropy is None or abs(ce - entropy) <= CONFIDENCE_NATS:
        return None
    over = ce > entropy
    return Finding(
        "over-confident" if over else "under-confident",
        "Confidence",
        f"At the end cross-entropy is {_above(ce - entropy)} the mean predictive entropy ({nats(entropy)}); "
        f"they are equal for a calibrated model, so this one is {'over' if over else 'under'}-confident on "
        "held-out text.",
    )


def _norms(rows: Sequence[Row]) -> Finding | None:
    names = (
        ("final_gain_mean_abs", "the final norm's gain"),
        ("gain_mean_abs", "all gains"),
        ("lm_head_mean_abs", "the head"),
        ("embedding_mean_abs", "the embedding"),
        ("latent_mean_abs", "the BitLinear weights"),
    )
    parts, gone = [], []
    for key, name in names:
        first, last = get(rows[0], key), get(rows[-1], key)
        if first and last is not None and rows[0] is not rows[-1]:
            parts.append(f"{name} {_growth(last / first)}")
            if last / first < SHRUNK_SHARE:
                gone.append(name)
    if not parts:
        return None
    text = f"Mean |w| at the end against step {steps(rows[0]['step'])}: {', '.join(parts)}."
    rate = get(rows[-1], "cumulative_lr")
    if rate is not None:
        text += f" (Cumulative learning rate {nats(rate)}.)"
    if gone:
        text += f" All but vanished (below {percent(SHRUNK_SHARE)}): {', '.join(gone)}."
    return Finding("norms-shrunk" if gone else "norms", "Sizes", text)


def _codes(rows: Sequence[Row]) -> Finding | None:
    first, last = get(rows[0], "ternary_zero"), get(rows[-1], "ternary_zero")
    if first is None or last is None or len(rows) < 2:
        return None
    text = f"The share of zero codes went from {percent(first)} to {percent(last)}"
    flips = [(row["step"], f) for row in rows if (f := get(row, "flip_rate")) is not None]
    if flips:
        text += f"; the last evaluated step changed {percent(flips[-1][1])} of the codes"
    return Finding("codes", "Ternary codes", text + ".")


def _growth(ratio: float) -> str:
    return f"{ratio:.3g} times" if ratio >= 2 else percent(ratio)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
