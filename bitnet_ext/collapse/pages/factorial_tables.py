"""The tables of the factorial study's report."""

from __future__ import annotations

import collections
import math
from collections.abc import Sequence
from typing import Any

from bitnet_ext._files import read_json
from bitnet_ext.collapse.pages.table import MISSING, Table, spread_text
from bitnet_ext.collapse.results import Run, Study
from bitnet_ext.collapse.results.status import STATUS, arm_status
from bitnet_ext.collapse.verdicts.wording import count, nats, percent, steps

#: What the original report printed: arm, tokens at steps 1,000 and 4,000, loss at 1,000, "recovery?".
ORIGINAL = (
    ("standard-lr", "19", "2", "10.82", "No"),
    ("reduced-lr", "3", "18", "9.89", "YES!"),
    ("label-smoothing", "20 (a later log)", "2 (a later log)", MISSING, "?"),
    ("grad-clip", "12 (a later log)", "2 (a later log)", MISSING, MISSING),
)
_FINAL = (
    "heldout_cross_entropy",
    "excess_over_unigram",
    "mutual_information",
    "unique_of_20",
    "effective_argmax_vocabulary",
    "final_gain_mean_abs",
    "decay_share",
    "greedy_seq_rep_4",
)


def original_table(study: Study) -> Table:
    """The original report's own numbers beside ours at the same steps, with what it did not measure."""
    columns = [
        "Training",
        "Theirs: tokens @ 1k",
        "@ 4k",
        "loss @ 1k",
        "recovery?",
        "Ours: tokens @ 1k",
        "@ 4k",
        "loss @ 1k",
        "Held-out CE @ 1k",
        "@ 4k",
        "Context use @ 4k",
    ]
    rows = []
    for arm, *theirs in ORIGINAL:
        runs = _complete(study, arm)
        if not runs:
            continue
        ours = [
            _cell(runs, key, step, form)
            for key, step, form in (
                ("unique_of_20", 1000, count),
                ("unique_of_20", 4000, count),
                ("train_cross_entropy", 1000, nats),
                ("heldout_cross_entropy", 1000, nats),
                ("heldout_cross_entropy", 4000, nats),
                ("mutual_information", 4000, nats),
            )
        ]
        rows.append([arm, *theirs, *ours])
    notes = [
        "Theirs: the original report, one run each, no seed given; ours: mean over seeds (smallest-largest).",
        "Tokens: distinct greedy predictions after 20 prompts of random token ids, at most 20.",
        "Loss: training cross-entropy, nats. Theirs is one batch's, ours the mean since the evaluation before.",
        "Exact numbers cannot be expected to agree: the text is another one, and one run has no spread.",
    ]
    return Table(columns, rows, notes)


def _cell(runs: Sequence[Run], key: str, step: int, form: Any) -> str:
    values = [run.value_at(key, step) for run in runs if run.last_step >= step]
    return spread_text([value for value in values if value is not None], form)


def _complete(study: Study, arm: str) -> list[Run]:
    """The runs of an arm that ended, or those that got farthest."""
    return [run for run in study.of(arm) if run.finished] or study.leading(arm)


def _small(value: float) -> str:
    return f"{value:.2f}" if abs(value) >= 0.1 or value == 0 or math.isnan(value) else f"{value:.2g}"


_FORMS = (nats, nats, nats, count, lambda value: f"{value:.1f}", _small, percent, percent)


def block_table(study: Study, arms: Sequence[str]) -> Table:
    """How the arms of a block ended, in the order given."""
    columns = [
        "Arm",
        "How it ended",
        "Seeds",
        "Steps",
        "Held-out CE",
        "Over unigram",
        "Context use",
        "Unique of 20",
        "Effective argmax vocabulary",
        "Last gain",
        "Decay dominates",
        "Repeated 4-grams",
    ]
    rows = []
    for arm in arms:
        runs = _complete(study, arm)
        if not runs:
            continue
        final = [[run.final(k) for run in runs] for k in _FINAL]
        cells = [
            spread_text([v for v in values if v is not None], form)
            for values, form in zip(final, _FORMS, strict=True)
        ]
        ended = how_ended([arm_status(study, arm, run.evals) for run in runs])
        rows.append([arm, ended, str(len(runs)), steps(max(run.last_step for run in runs)), *cells])
    notes = [
        "At the last evaluation, mean over seeds (smallest-largest). CE and its excess in nats per token.",
        "Decay dominates: share of the coordinates of which the weight decay decides the next step.",
        "Repeated 4-grams: within greedy continuations of real text, seq-rep-4.",
    ]
    return Table(columns, rows, notes)


def how_ended(kinds: Sequence[str | None]) -> str:
    """How the runs of an arm ended, the most frequent way first; how many each, when there are several."""
    named = [STATUS[kind][0].replace(" (", ": ").rstrip(")") for kind in kinds if kind is not None]
    ways = collections.Counter(named).most_common()
    if len(ways) < 2:
        return ways[0][0] if ways else MISSING
    first, *rest = [f"{way} {number_of}/{len(named)}" for way, number_of in ways]
    return f"{first} ({', '.join(rest)})"


def metrics_table(study: Study) -> Table | None:
    """The check of the metrics on known predictors, when its file is beside the study's."""
    path = study.directory / "instrument.json"
    if not path.is_file():
        return None
    check = read_json(path, "the check of the metrics")
    try:
        return _metrics_table(check)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: it must hold the check of the metrics ({error!r})") from error


def _metrics_table(check: dict[str, Any]) -> Table:
    judged = {entry["key"]: entry["status"] for entry in check["judgements"]}
    body = [
        [
            scale["label"],
            *(_value(row.get(scale["key"])) for row in check["rows"]),
            judged.get(scale["key"], MISSING),
        ]
        for scale in check["scales"]
    ]
    notes = [
        "Every metric on predictors of known health, on this text. What ranks a dead network above a healthy "
        "reference by more than its sampling error is not for verdicts; instrument.md has errors and ranges."
    ]
    return Table(["Metric", *(str(row["network"]) for row in check["rows"]), "Judgement"], body, notes)


def _value(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, (int, float)) else MISSING
