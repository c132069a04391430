"""The rules of a diagnosis about the course of a training: diverged, frozen, over-confident, the unigram stage."""

from __future__ import annotations

import math
from collections.abc import Sequence

from bitnet_ext.collapse.diagnose.inputs import Case
from bitnet_ext.collapse.diagnose.sizes import SIZES
from bitnet_ext.collapse.diagnose.words import (
    CERTAIN,
    LIKELY,
    POSSIBLE,
    Evidence,
    Finding,
    evidence,
    improvement,
    numbers,
    stalled,
    start_of,
    tail_mean,
    training_course,
)
from bitnet_ext.collapse.results import number
from bitnet_ext.collapse.results.status import (
    COLLAPSE_NATS,
    CONFIDENCE_NATS,
    CONTEXT_NATS,
    RISE_NATS,
    RULES,
    STALL_NATS,
    STATUS,
    UNTRAINED_NATS,
)

EXPLODED_NATS = 1.0  # training loss above its start (and above ln V), or above its own best: exploded
REACH_SHARE = 0.05  # of the smallest initial size: a sum of learning rates that cannot have trained anything
STRONG_CONFIDENCE_NATS = 1.0  # cross-entropy above entropy that is over-confident by itself, seen twice
OVERCONFIDENT_SHARE = 0.15  # mean probability of the argmax above its accuracy
TRAIN_ROWS = 5  # "train" lines that a mean over single batches needs


# --- diverged -----------------------------------------------------------------------------------------------------


def divergence(case: Case, vanishing: bool) -> Finding | None:
    """NaN or infinity at the end, a training loss above its start, or one that rose far above its own best.

    Args:
        vanishing: whether another rule explains a rise, by weights that go to zero.
    """
    bad = _not_finite(case)
    if bad:
        return Finding(
            "diverged",
            "Loss, gradient or weights are not finite numbers",
            tuple(bad),
            _calmer(case),
            CERTAIN,
            "the last loss, cross-entropy or gradient norm of the file is NaN or infinite (written as null), or a "
            "parameter of the checkpoint is, or the trainer stopped the run for it (ended.json)",
        )
    course = training_course(case)
    if len(course) < 2:
        return None
    start = max([course[0][1], *([case.ln_vocab] if case.ln_vocab is not None else [])])
    (step, last), recent = course[-1], sorted(value for _, value in course[-3:])[len(course[-3:]) // 2]
    rule = (
        f"the last training cross-entropy is more than {EXPLODED_NATS} nat above both its first value and ln V, or "
        f"the median of the last three is more than {EXPLODED_NATS} nat above its own best (mean of a window) "
        "while no parameter vanishes"
    )
    if last > start + EXPLODED_NATS:
        return Finding(
            "diverged",
            "The training loss exploded above its start",
            (
                evidence("training cross-entropy", last, step, f"at first {course[0][1]:.4g}"),
                *_gradient(case),
            ),
            _calmer(case),
            CERTAIN,
            rule,
        )
    best = _best_window([value for _, value in course])
    if recent > best + EXPLODED_NATS and not vanishing:
        return Finding(
            "diverged",
            "The training loss has risen far above its own best",
            (
                evidence(
                    "training cross-entropy", recent, step, f"median of the last three; best {best:.4g}"
                ),
                *_gradient(case),
            ),
            _calmer(case),
            LIKELY,
            rule,
        )
    return None


def no_convergence(case: Case) -> Finding | None:
    """Worse than word counts on training text too, and no longer getting better."""
    held = numbers(case.points("heldout_cross_entropy"))
    unigram, entropy = case.last("unigram_cross_entropy"), case.last("predictive_entropy")
    course = [value for _, value in training_course(case)]
    if not held or unigram is None or not course:
        return None
    step, ce = held[-1]
    training = course[-max(1, len(course) // 4) :]
    level = sum(training) / len(training)
    unsure = entropy is None or ce - entropy[1] <= CONFIDENCE_NATS
    if ce <= unigram[1] + (COLLAPSE_NATS if unsure else 0.0) or level <= unigram[1] or not stalled(held):
        return None
    return Finding(
        "diverged",
        "It does not converge: worse than word counts, on the training text too, and no longer getting better",
        (
            evidence("held-out cross-entropy", ce, step, f"word counts alone reach {unigram[1]:.4g}"),
            evidence("training cross-entropy", level, step, "mean of the last quarter"),
            *_gradient(case),
        ),
        _calmer(case),
        POSSIBLE,
        "training cross-entropy is above the held-out unigram's; held-out cross-entropy is more than "
        f"{COLLAPSE_NATS} nats above it (or above it and over-confident by {CONFIDENCE_NATS}) and improved by at most "
        f"{STALL_NATS} nats over the second half of the run; no parameter vanishes",
    )


def _not_finite(case: Case) -> list[Evidence]:
    """The last rows whose loss is there, but not a finite number, and the tensors that hold such values."""
    found = []
    if case.ended is not None:
        found.append(evidence("what the trainer said", None, case.last_step, case.ended))
    for rows, keys in (
        (case.train, ("loss", "cross_entropy", "grad_norm")),
        (case.evals, ("heldout_cross_entropy", "train_cross_entropy")),
    ):
        for key in keys:
            having = [row for row in rows if key in row]
            if having and not _is_finite(having[-1][key]):
                found.append(evidence(key, None, int(having[-1]["step"]), "NaN or infinite"))
    for fact in case.tensors:
        if fact.nonfinite:
            found.append(
                evidence(
                    fact.name, None, None, f"{fact.nonfinite:,} of {fact.numel:,} values are NaN or infinite"
                )
            )
    return found[:6]


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _best_window(values: Sequence[float]) -> float:
    """The lowest mean of a window of a tenth of the values, so that one lucky batch is not a best."""
    size = max(1, min(len(values) // 10, 20))
    return min(sum(values[i : i + size]) / size for i in range(len(values) - size + 1))


def _gradient(case: Case) -> list[Evidence]:
    points = case.points("grad_norm", "train") or case.points("grad_norm")
    if not points:
        return []
    ordered = sorted(value for _, value in points)
    middle = ordered[len(ordered) // 2]
    return [evidence("gradient norm", points[-1][1], int(points[-1][0]["step"]), f"median {middle:.3g}")]


def _calmer(case: Case) -> tuple[str, ...]:
    settings = case.settings
    rate = f"{settings.lr / 3:.2g} (it is {settings.lr:.2g})" if settings is not None else "a third of it"
    changes = [f"lr={rate}; start again, or from a checkpoint before the rise"]
    if settings is None or settings.first_step_at_peak or settings.warmup < settings.steps // 20:
        changes.append("a longer warm-up (warmup_steps) and first_step_at_peak=False")
    if settings is None or settings.grad_clip is None or settings.grad_clip > 1:
        changes.append("grad_clip=1.0")
    if settings is not None and settings.precision != "fp32":
        changes.append('precision="fp32" to see whether rounding is the cause')
    return tuple(changes)


# --- frozen -------------------------------------------------------------------------------------------------------


def frozen(case: Case) -> Finding | None:
    """Nothing moves: a learning rate of zero, a sum of learning rates too small to train, or no gradient."""
    rates = [value for kind in ("train", "eval") for _, value in case.points("lr", kind)]
    reach = case.reach()
    trained_by_adam = case.settings is None or case.settings.optimizer not in ("muon", "sgd_l2")
    start, best = start_of(case), improvement(case)
    rule = (
        "every learning rate of the file is 0; or the gains are exactly 1 after the first step, or all measured "
        "sizes stay the same; or cross-entropy improved by at most "
        f"{UNTRAINED_NATS} nats and the sum of learning rates, which no weight moves further than under Adam, is "
        f"below the smallest initial mean |w| (certain below {REACH_SHARE:.0%} of it)"
    )
    larger = ("a larger lr (the package's default is 1.5e-3)", "more steps")
    if rates and not any(rates):
        step = case.last_step
        return Finding(
            "frozen",
            "The learning rate is zero: nothing is trained",
            (evidence("learning rate", 0.0, step, "at every step of the file"),),
            ("lr above 0 (the package's default is 1.5e-3); look at lr_schedule and schedule_steps",),
            CERTAIN,
            rule,
        )
    unmoved = _unmoved(case)
    if unmoved is not None:
        return Finding(
            "frozen",
            "The parameters do not move",
            (unmoved, *_gradient(case)),
            ("look whether the optimiser gets the model's parameters and a gradient that is not 0", *larger),
            CERTAIN,
            rule,
        )
    if reach is None or not trained_by_adam or (best is not None and best > UNTRAINED_NATS):
        return None
    smallest = case.smallest_initial_size()
    if reach[1] >= (smallest if best is not None else REACH_SHARE * smallest):
        return None
    if best is not None and not _far_from_counts(case):
        return None
    found = [
        evidence("sum of learning rates", reach[1], reach[0], f"smallest initial mean |w| {smallest:.3g}")
    ]
    if best is not None and start is not None:
        found.append(
            evidence("improvement of cross-entropy", best, case.last_step, f"from {start:.4g}, in nats")
        )
    return Finding(
        "frozen",
        "Barely trained: the learning rates add up to too little",
        tuple(found),
        larger,
        CERTAIN if reach[1] < REACH_SHARE * smallest else LIKELY,
        rule,
    )


def barely_trained(case: Case, status: str | None) -> Finding | None:
    """The report's "barely trained": the loss has hardly moved, whatever the learning rates add up to."""
    if status != "untrained":
        return None
    return Finding(
        "frozen",
        f"{_label(status)}: {STATUS[status][1]}",
        tuple(_standing(case)),
        ("more steps", "a larger lr (the package's default is 1.5e-3)"),
        LIKELY,
        _rule("Barely trained"),
    )


def _unmoved(case: Case) -> Evidence | None:
    gain = case.last("gain_mean_abs")
    if gain is not None and gain[0] > 0 and gain[1] == 1.0 and len(case.tensors) > 0:
        return evidence("norm gains", 1.0, gain[0], "exactly as initialised")
    series = [points for key in SIZES if len(points := case.points(key)) > 1]
    same = [points for points in series if len({f"{value:.6g}" for _, value in points}) == 1]
    if series and len(same) == len(series):
        step = int(same[0][-1][0]["step"])
        return evidence("mean |w| of every group", same[0][-1][1], step, "the same at every evaluation")
    return None


def _far_from_counts(case: Case) -> bool:
    """Whether cross-entropy is far above the unigram's, or unknown to be near it."""
    ce, unigram = case.last("heldout_cross_entropy"), case.last("unigram_cross_entropy")
    return ce is None or unigram is None or ce[1] > unigram[1] + COLLAPSE_NATS


# --- over-confidence ----------------------------------------------------------------------------------------------


def over_confidence(case: Case) -> Finding | None:
    """Predictions that are surer than they are right; equal for a calibrated network."""
    found: list[Evidence] = []
    sure = CERTAIN
    gaps = [
        (int(row["step"]), ce - float(row["predictive_entropy"]))
        for row, ce in case.points("heldout_cross_entropy")
        if _is_finite(row.get("predictive_entropy"))
    ]
    ce, unigram = case.last("heldout_cross_entropy"), case.last("unigram_cross_entropy")
    wide = bool(gaps) and gaps[-1][1] > CONFIDENCE_NATS
    text = "held-out cross-entropy minus predictive entropy, nats; 0 when calibrated"
    if wide and ce is not None and unigram is not None and ce[1] > unigram[1]:
        found.append(evidence("excess of cross-entropy over entropy", gaps[-1][1], gaps[-1][0], text))
        found.append(
            evidence("held-out cross-entropy", ce[1], ce[0], f"word counts alone reach {unigram[1]:.4g}")
        )
    elif len(gaps) > 1 and min(gap for _, gap in gaps[-2:]) > STRONG_CONFIDENCE_NATS:
        found.append(evidence("excess of cross-entropy over entropy", gaps[-1][1], gaps[-1][0], text))
    rise = _rise(case)
    if rise is not None and (wide or not gaps):
        found += rise
        sure = sure if wide else LIKELY
    top, right = case.last("top1_probability"), case.last("accuracy")
    if top is not None and right is not None and top[1] - right[1] > OVERCONFIDENT_SHARE:
        found.append(
            evidence("probability of the likeliest token", top[1], top[0], f"right in {right[1]:.3g}")
        )
    if not found and not gaps:
        inside = tail_mean(case, "cross_entropy", "entropy", TRAIN_ROWS)
        if inside is not None and inside[1] > CONFIDENCE_NATS:
            sure = LIKELY
            text = "on the training batches, mean of the last quarter of the lines"
            found.append(evidence("excess of cross-entropy over entropy", inside[1], inside[0], text))
    if not found:
        return None
    changes = ["more training text, or fewer steps: stop where held-out cross-entropy is lowest"]
    settings = case.settings
    if settings is None or settings.sampling == "sequential":
        changes.append('sampling="shuffled", and a larger batch_size')
    if settings is None or not settings.label_smoothing:
        changes.append("label_smoothing=0.1, which cures confidence only")
    changes.append(f"a smaller lr (it is {settings.lr:.2g})" if settings is not None else "a smaller lr")
    return Finding(
        "over-confidence",
        "The network is surer of its predictions than it is right",
        tuple(found),
        tuple(changes),
        sure,
        f"held-out cross-entropy is more than {CONFIDENCE_NATS} nats above the predictive entropy, and above the "
        f"unigram's or risen by more than {RISE_NATS} nats above its best while training cross-entropy did not rise; "
        f"or more than {STRONG_CONFIDENCE_NATS} nat above the entropy at two evaluations running; or the mean "
        f"probability of the likeliest token is more than {OVERCONFIDENT_SHARE} above its accuracy; without "
        "held-out numbers, cross-entropy more than that above the entropy on "
        f"at least {TRAIN_ROWS} training batches",
    )


def _rise(case: Case) -> list[Evidence] | None:
    """Held-out cross-entropy above its best, while the training's went on falling."""
    held = case.points("heldout_cross_entropy")
    if len(held) < 2:
        return None
    best_row, best = min(held, key=lambda point: point[1])
    last_row, last = held[-1]
    then, now = (
        number(row.get("train_cross_entropy", row.get("train_loss"))) for row in (best_row, last_row)
    )
    if last - best <= RISE_NATS or then is None or now is None or not now <= then:
        return None
    step = int(last_row["step"])
    return [
        evidence("held-out cross-entropy", last, step, f"best {best:.4g} at step {int(best_row['step']):,}"),
        evidence("training cross-entropy", now, step, f"{then:.4g} then"),
    ]


# --- too early ----------------------------------------------------------------------------------------------------


def warm_up(case: Case, status: str | None) -> Finding | None:
    """The learning rate still rises, and nothing has failed: too early for any judgement of the course."""
    settings, last = case.settings, case.last_step
    if settings is None or last is None or status not in ("warmup", None) or last > settings.warmup:
        return None
    changes = ["nothing: keep training"]
    if settings.steps <= settings.warmup:
        changes = [
            f"warmup_steps={max(1, settings.steps // 10)} (it is {settings.warmup}), or more steps: the run ends "
            "before its learning rate has reached the peak"
        ]
    lr = case.last("lr") or case.last("lr", "train")
    rate = [evidence("learning rate", lr[1], lr[0], f"rises to {settings.lr:.3g}")] if lr is not None else []
    return Finding(
        "warm-up",
        f"Too early to tell: step {last:,} of a warm-up of {settings.warmup:,}",
        (*rate, *_standing(case)),
        tuple(changes),
        CERTAIN,
        _rule(STATUS["warmup"][0]),
    )


def _standing(case: Case) -> list[Evidence]:
    """Held-out cross-entropy against word counts and the use of context, as far as they were measured."""
    found = []
    ce, unigram, context = (
        case.last(key) for key in ("heldout_cross_entropy", "unigram_cross_entropy", "mutual_information")
    )
    if ce is not None:
        text = f"word counts alone reach {unigram[1]:.4g}" if unigram is not None else ""
        found.append(evidence("held-out cross-entropy", ce[1], ce[0], text))
    if context is not None:
        text = f"nats; above {CONTEXT_NATS} counts as use of context"
        found.append(evidence("mutual information", context[1], context[0], text))
    return found


def _label(status: str) -> str:
    label = STATUS[status][0]
    return label[:1].upper() + label[1:]


def _rule(title: str) -> str:
    """The rule of a study's report under a title."""
    return dict(RULES)[title[:1].upper() + title[1:]]


# --- collapsed ----------------------------------------------------------------------------------------------------


def collapsed(case: Case, status: str | None) -> Finding | None:
    """The report's "collapsed" or "failing", where no other rule names a cause."""
    if status not in ("collapsed", "failing"):
        return None
    return Finding(
        "collapsed",
        f"{_label(status)}: {STATUS[status][1]}",
        tuple(_standing(case)),
        _calmer(case),
        POSSIBLE,
        _rule("Collapsed" if status == "collapsed" else "Failing"),
    )


# --- the unigram stage --------------------------------------------------------------------------------------------


def unigram_stage(case: Case) -> Finding | None:
    """Not yet better than word counts, or blind to context, with nothing else the matter."""
    ce, unigram = case.last("heldout_cross_entropy"), case.last("unigram_cross_entropy")
    context = case.last("mutual_information")
    if ce is None or unigram is None:
        return None
    blind = context is not None and context[1] <= CONTEXT_NATS
    if ce[1] < unigram[1] and not blind:
        return None
    found = _standing(case)
    argmaxes = case.last("effective_argmax_vocabulary")
    if argmaxes is not None:
        found.append(evidence("effective number of different argmaxes", argmaxes[1], argmaxes[0]))
    rule = (
        f"held-out cross-entropy is not below the unigram's, or mutual information is at most {CONTEXT_NATS}, and no "
        "other rule holds: nothing vanishes, explodes or stands still"
    )
    near = ce[1] <= unigram[1] + COLLAPSE_NATS
    return Finding(
        "unigram-stage",
        "It knows how frequent words are, and little of their context yet"
        if near
        else "Too early: on its way to word counts, with nothing failing",
        tuple(found),
        ("nothing: keep training", "few different argmaxes are normal at this stage"),
        CERTAIN if near and context is not None else LIKELY,
        rule,
    )
