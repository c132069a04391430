"""Which kind of trouble a run shows, and what to change: stated rules over the numbers of one run.

A rule follows from what its trouble is, not from examples of it: each names its thresholds, which are constants of
``weights``, ``ternary``, ``course`` or :mod:`bitnet_ext.collapse.results.status`, and its words go
into every finding. What a file lacks is not guessed at; the diagnosis says what was not judged and how to get it.
"""

from __future__ import annotations

from dataclasses import dataclass

from bitnet_ext.collapse.diagnose.course import (
    barely_trained,
    collapsed,
    divergence,
    frozen,
    no_convergence,
    over_confidence,
    unigram_stage,
    warm_up,
)
from bitnet_ext.collapse.diagnose.inputs import Case, note_early_end
from bitnet_ext.collapse.diagnose.sizes import SIZES
from bitnet_ext.collapse.diagnose.ternary import dead_ternary
from bitnet_ext.collapse.diagnose.weights import decay_death, uniform_without_decay
from bitnet_ext.collapse.diagnose.words import CERTAIN, Evidence, Finding, evidence, training_course

#: Kinds of findings, the gravest first.
SEVERITY = (
    "diverged",
    "decay-death",
    "uniform-output",
    "dead-ternary",
    "collapsed",
    "frozen",
    "over-confidence",
    "warm-up",
    "unigram-stage",
)
NONE, UNKNOWN = "none", "unknown"


@dataclass(frozen=True)
class Diagnosis:
    """What the rules found in one run.

    Attributes:
        source: path that was read. steps: the last step known.
        findings: the gravest first; empty when no rule holds.
        kind: of the gravest finding; "none" when there is none, "unknown" when there was too little to judge.
        status: how the run stands by the rules of a study's report, a key of
            :data:`bitnet_ext.collapse.results.status.STATUS`; None without held-out evaluations.
        healthy: the numbers behind a "none".
        not_judged: what could not be judged, and how to get it. notes: what was left out of the reading.
    """

    source: str
    steps: int | None
    findings: list[Finding]
    kind: str
    status: str | None
    healthy: list[Evidence]
    not_judged: list[str]
    notes: list[str]


def diagnose(case: Case) -> Diagnosis:
    """Applies every rule to a run."""
    missing, ended = _not_judged(case), note_early_end(case)
    notes = [*case.notes, *([ended] if ended else [])]
    if not _enough(case):
        return Diagnosis(str(case.path), case.last_step, [], UNKNOWN, None, [], missing, notes)

    status = case.status()
    warm = warm_up(case, status)
    still = frozen(case)
    decay, watch = decay_death(case)
    if warm is not None:  # little has changed yet because the learning rate still rises
        still = still if still is not None and still.certainty == CERTAIN else None
        decay = decay if decay is not None and decay.certainty == CERTAIN else None
    diverged = divergence(case, vanishing=decay is not None)
    uniform = uniform_without_decay(case) if still is None else None
    findings = [found for found in (diverged, decay, uniform, dead_ternary(case), still) if found is not None]
    lost = no_convergence(case) or collapsed(case, status) or barely_trained(case, status)
    if not findings and lost is not None and warm is None:
        findings.append(lost)
    elif diverged is None and still is None:
        confident = over_confidence(case)
        if confident is not None:
            findings.append(confident)
    if not findings:
        stage = warm or unigram_stage(case)
        if stage is not None:
            findings.append(stage)
    findings.sort(key=lambda finding: SEVERITY.index(finding.kind))
    kind = findings[0].kind if findings else NONE
    healthy = _healthy(case) if not findings else []
    return Diagnosis(
        str(case.path), case.last_step, findings, kind, status, healthy, missing, [*notes, *watch]
    )


# --- around the findings ------------------------------------------------------------------------------------------


def _enough(case: Case) -> bool:
    """Whether there is a course, a held-out evaluation or a size: anything that a rule could judge."""
    if case.ended or case.tensors or any(case.last(key) for key in SIZES) or len(training_course(case)) > 1:
        return True
    rows = [row for row in case.evals if "heldout_cross_entropy" in row]
    nothing = any(key in row and row[key] is None for row in case.train for key in ("loss", "cross_entropy"))
    return bool(rows) or nothing


def _has_loss(case: Case) -> bool:
    keys = (("train", "loss"), ("train", "cross_entropy"), ("eval", "heldout_cross_entropy"))
    rows = {"train": case.train, "eval": case.evals}
    return any(key in row for kind, key in keys for row in rows[kind])


def _healthy(case: Case) -> list[Evidence]:
    """The numbers that a run without findings stands on."""
    found = []
    for key, name in (
        ("heldout_cross_entropy", "held-out cross-entropy"),
        ("unigram_cross_entropy", "cross-entropy of word counts"),
        ("mutual_information", "mutual information"),
        ("ternary_zero", "share of ternary codes that are 0"),
    ):
        last = case.last(key)
        if last is not None:
            found.append(evidence(name, last[1], last[0]))
    course = training_course(case)
    if course:
        found.append(
            evidence("training cross-entropy", course[-1][1], course[-1][0], f"at first {course[0][1]:.4g}")
        )
    initial = case.initial_sizes()
    for key, name in SIZES.items():
        last = case.last(key)
        if last is not None and key in initial:
            found.append(evidence(f"mean |w|, {name}", last[1], last[0], f"initially {initial[key]:.3g}"))
    return found


def _not_judged(case: Case) -> list[str]:
    missing = []
    if case.last("heldout_cross_entropy") is None:
        missing.append(
            "unigram stage and over-confidence on held-out text: there is no held-out evaluation; "
            "give the run folder or checkpoint with --data NAME|PATH"
        )
    elif case.last("unigram_cross_entropy") is None:
        missing.append(
            "unigram stage and over-confidence on held-out text: the evaluations of the run lack the loss of word "
            "counts and the entropy; give the run folder or checkpoint with --data NAME|PATH"
        )
    if not any(case.last(key) for key in SIZES):
        missing.append(
            "vanishing parameters: the file has no sizes of gains, head and embedding; give the run folder with its "
            "checkpoint"
        )
    if case.ternary is not False and case.last("ternary_zero") is None:
        missing.append(
            "dead ternary weights: the file has no shares of the codes; give the run folder with its checkpoint"
        )
    if case.ln_vocab is None:
        missing.append(
            "uniform output: the vocabulary's size is unknown; keep config.json or the checkpoint beside the metrics"
        )
    if case.settings is None:
        missing.append(
            "whether decay is coupled (adam_l2) or decoupled: the training settings are not beside the file"
        )
    if not _has_loss(case):
        missing.append("the course of the loss: there is no metrics.jsonl with a loss; give the run folder")
    return missing
