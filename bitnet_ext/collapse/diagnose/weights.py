"""The rules of a diagnosis about decay that drives weights to zero, and about an output that has become uniform.

How coupled L2 kills: Adam divides gradient plus ``weight_decay * w`` by its own size, so a weight whose task
gradient is small moves by ``lr`` a step towards 0 whatever the decay's size, and the mean |w| of a group falls
with a slope of about -1 against the cumulative learning rate (Loshchilov & Hutter, arXiv:1711.05101, on why L2 is
not weight decay for Adam). Decoupled decay shrinks a weight by ``exp(-sum of lr * weight_decay)`` instead.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from bitnet_ext.collapse.diagnose.inputs import Case
from bitnet_ext.collapse.diagnose.sizes import SIZES
from bitnet_ext.collapse.diagnose.words import (
    CERTAIN,
    LIKELY,
    POSSIBLE,
    Evidence,
    Finding,
    course_of_output,
    evidence,
    stalled,
)
from bitnet_ext.collapse.results import number
from bitnet_ext.collapse.results.status import (
    NEAR_UNIFORM_SHARE,
    SHRUNK_SHARE,
    STALL_NATS,
    UNIFORM_NATS,
    is_alive,
)
from bitnet_ext.training.schedules import learning_rates, weight_decays

CLOCK_RATE = (
    0.5  # fall of a mean |w| per unit of cumulative learning rate; 1 when decay alone moves the weights
)
CLOCK_FALL = 0.05  # of the initial size that must have been lost before a rate counts
DECAY_SHARE = 0.5  # of a group's coordinates whose update the decay term dominates
DECOUPLED_PART = 0.5  # of the fall (in logarithms) that decoupled decay must explain to be its cause

_SHARES = {
    "final_gain_mean_abs": "decay_share_final_gain",
    "gain_mean_abs": "decay_share_gains",
    "lm_head_mean_abs": "decay_share_lm_head",
    "embedding_mean_abs": "decay_share_embedding",
    "latent_mean_abs": "decay_share_latent",
}
#: Names of the groups in TrainConfig.decay_only.
_DECAY_GROUPS = {
    "final_gain_mean_abs": "final_gain",
    "gain_mean_abs": "gains",
    "lm_head_mean_abs": "head",
    "embedding_mean_abs": "embedding",
    "latent_mean_abs": "linear",
}


@dataclass(frozen=True)
class Decay:
    """What the settings and rows say of weight decay; None where they do not say.

    Attributes:
        coupled: whether it is L2 in Adam's gradient. now, ever: weight decay at the last step, and the largest.
        exposure: sum of lr * weight_decay over the steps, what decoupled decay takes from the logarithm of a weight;
            with SGD's momentum each step counts 1 / (1 - momentum) times.
    """

    coupled: bool | None
    now: float | None
    ever: float | None
    exposure: float | None

    def acts(self) -> bool:
        """Whether a decay acted at some step, or may have."""
        return self.ever is None or self.ever > 0


def decay_of(case: Case) -> Decay:
    """Weight decay by the rows of the metrics, else by the settings."""
    settings = case.settings
    coupled = None if settings is None else settings.optimizer == "adam_l2"
    rows = sorted(case.train + case.evals, key=lambda row: float(row["step"]))
    seen = [
        (value, number(row.get("cumulative_lr")))
        for row in rows
        if (value := number(row.get("weight_decay"))) is not None
    ]
    now = seen[-1][0] if seen else None
    ever = max((value for value, _ in seen), default=None)
    exposure = None
    if seen and all(tau is not None for _, tau in seen):
        exposure, before = 0.0, 0.0
        for value, tau in seen:
            exposure += value * max((tau or 0.0) - before, 0.0)
            before = tau or 0.0
    elif settings is not None and case.last_step:
        count = min(case.last_step, settings.steps)
        decays, rates = weight_decays(settings)[:count], learning_rates(settings)[:count]
        if not seen and count:
            now, ever = float(decays[-1]), float(decays.max())
        exposure = float((decays * rates).sum())
    if exposure is not None and settings is not None and settings.optimizer == "sgd_l2":
        exposure /= 1 - settings.momentum
    return Decay(coupled, now, ever, exposure)


def _reached(case: Case, key: str) -> bool:
    """Whether the settings let a decay reach a group; True where they do not say."""
    settings = case.settings
    if settings is None or (key == "lm_head_mean_abs" and settings.output_l2 > 0):
        return True
    if settings.decay_only is not None:
        return _DECAY_GROUPS[key] in settings.decay_only.split(",")
    if key == "latent_mean_abs":
        return True
    return settings.decay_norms if "gain" in key else settings.decay_embeddings


def _carriers(case: Case) -> list[str]:
    """The groups whose death this rule is about. Latent weights only in full precision: ternary layers have a
    scale of their own and a rule of their own."""
    keys = [key for key in SIZES if key != "latent_mean_abs" or case.ternary is False]
    if case.model is not None and case.model.tie_embeddings:
        keys.remove("lm_head_mean_abs")
    return keys


# --- death by decay -----------------------------------------------------------------------------------------------


def decay_death(case: Case) -> tuple[Finding | None, list[str]]:
    """The finding of a decay that drives what the output needs to zero, and notes on decay that does no harm."""
    decay, initial = decay_of(case), case.initial_sizes()
    gone: dict[str, Evidence] = {}
    falling: dict[str, Evidence] = {}
    for key in _carriers(case):
        last = case.last(key)
        if last is None or not initial.get(key) or not decay.acts() or not _reached(case, key):
            continue
        share = last[1] / initial[key]
        if share < SHRUNK_SHARE:
            if _explained(decay, share):
                text = f"{100 * share:.2g} % of the initial {initial[key]:.3g}"
                gone[key] = evidence(f"mean |w|, {SIZES[key]}", last[1], last[0], text)
        elif (fall := _clock(case, key, initial[key], decay)) is not None:
            falling[key] = fall
    uniform = uniform_output(case)
    notes = []
    if set(gone) | set(falling) == {"embedding_mean_abs"} and not uniform and _works(case):
        (size,) = (gone | falling).values()
        notes.append(
            f"decay is shrinking the embedding ({size.name} {size.value:.3g}, {size.text}), which happens "
            "first to rows that the text seldom has; the output does not suffer so far"
        )
        return None, notes
    if decay.now == 0 and not uniform and _works(case):
        return None, [
            f"{SIZES[key]} all but vanished earlier, while weight decay was on: {size.text}"
            for key, size in gone.items()
        ]
    if not gone and not falling and not (uniform and decay.acts()):
        return None, [*notes, *_unseen_risk(case, decay)]
    found = [
        *gone.values(),
        *falling.values(),
        *_shares(case, [*gone, *falling]),
        *(uniform or _output(case)),
    ]
    measured = bool(_shares(case, [*gone, *falling]))
    if decay.ever is not None:
        coupling = {True: "coupled (Adam with L2)", False: "decoupled (AdamW)", None: "coupled or decoupled"}
        sgd = case.settings is not None and case.settings.optimizer == "sgd_l2"
        kind = "SGD with L2" if sgd else coupling[decay.coupled]
        found.append(evidence("weight decay", decay.ever, case.last_step, kind))
    return (
        Finding(
            "decay-death",
            _headline(list(gone), list(falling), uniform, case.ln_vocab),
            tuple(found),
            _against_decay(case, decay, bool(gone)),
            _certainty(decay, bool(gone), bool(falling), measured),
            f"decay acts, and the mean |w| of {_list([SIZES[key] for key in _carriers(case)])} is below "
            f"{SHRUNK_SHARE:.0%} of its initial size (decoupled decay must explain at least half of that), or "
            f"falls, with coupled decay, by at least {CLOCK_RATE} per unit of cumulative learning rate (1 when "
            f"decay alone moves it) and has lost {CLOCK_FALL:.0%}; or, where no sizes tell, {_UNIFORM_RULE}. "
            "An embedding alone that shrinks while the output works is a note",
        ),
        notes,
    )


def _unseen_risk(case: Case, decay: Decay) -> list[str]:
    """A note when coupled decay had the time to erase weights whose sizes are not in the file."""
    reach, smallest = case.reach(), case.smallest_initial_size()
    measured = any(case.last(key) is not None for key in SIZES)
    if measured or not decay.coupled or not decay.ever or reach is None or reach[1] < smallest:
        return []
    return [
        f"the settings have Adam with coupled L2, and the learning rates add up to {reach[1]:.3g} by step "
        f"{reach[0]:,}: enough to bring weights of {smallest:.3g} to zero; only sizes (a checkpoint) can "
        "tell whether it did"
    ]


def _explained(decay: Decay, share: float) -> bool:
    """Whether decay can have brought a group to this share of its size."""
    if decay.coupled is not False:
        return True  # Adam moves no weight by more than about lr a step: L2 is as fast as anything
    needed = -DECOUPLED_PART * math.log(max(share, 1e-30))
    return decay.exposure is None or decay.exposure >= min(needed, -DECOUPLED_PART * math.log(SHRUNK_SHARE))


def _clock(case: Case, key: str, initial: float, decay: Decay) -> Evidence | None:
    """The rate at which a group falls against the cumulative learning rate, when it is that of coupled decay."""
    if decay.coupled is False or decay.now == 0:
        return None
    points = [(0.0, initial)] if case.model is not None or "gain" in key else []
    for row, size in case.points(key):
        tau = number(row.get("cumulative_lr"))
        if tau is not None and tau > 0:
            points.append((tau, size))
    if len(points) < 2:
        return None
    tau, size = points[-1]
    earlier = [point for point in points[:-1] if point[0] >= tau / 2] or [points[-2]]
    since, before = earlier[0]
    if tau <= since:
        return None
    rate = (before - size) / (tau - since)
    if rate < CLOCK_RATE or initial - size < CLOCK_FALL * initial:
        return None
    step = case.last(key)
    text = f"initially {initial:.3g}; falls by {rate:.2g} per unit of cumulative learning rate"
    lr = case.last("lr") or case.last("lr", "train")
    if lr is not None and lr[1] > 0 and step is not None:
        text += f", so it is gone about {size / rate / lr[1]:,.0f} steps later at this learning rate"
    return evidence(f"mean |w|, {SIZES[key]}", size, step[0] if step else None, text)


def _shares(case: Case, keys: list[str]) -> list[Evidence]:
    found = []
    for key in keys:
        share = case.last(_SHARES[key])
        if share is not None and share[1] >= DECAY_SHARE:
            text = "share of coordinates whose update decay dominates"
            found.append(evidence(f"decay share, {SIZES[key]}", share[1], share[0], text))
    return found


def _certainty(decay: Decay, gone: bool, falling: bool, measured: bool) -> str:
    if (gone or falling) and (measured or decay.coupled is not None):
        return CERTAIN
    return LIKELY if gone or falling or decay.coupled else POSSIBLE


def _works(case: Case) -> bool:
    """Whether the output still works: alive at the last evaluation, or, without one, its loss still falling."""
    for row in reversed(case.evals):
        if row.get("heldout_cross_entropy") is not None:
            alive = is_alive(row)
            return not _failing(case) if alive is None else alive
    return bool(course_of_output(case)) and not _failing(case)


def _headline(gone: list[str], falling: list[str], uniform: list[Evidence] | None, ln_v: float | None) -> str:
    flat = all(abs((each.value or 0.0) - (ln_v or 0.0)) <= UNIFORM_NATS for each in uniform or [])
    end = "" if uniform is None else f": the output is {'uniform' if flat else 'nearly uniform'}"
    if gone:
        return f"Weight decay has driven the {_list([SIZES[key] for key in gone])} to zero{end}"
    if falling:
        return f"Weight decay is driving the {_list([SIZES[key] for key in falling])} to zero"
    return "The output has died away to a uniform one while weight decay was on"


def _against_decay(case: Case, decay: Decay, gone: bool) -> tuple[str, ...]:
    settings, changes = case.settings, []
    if decay.coupled is not False:
        was = ' (it is "adam_l2")' if decay.coupled else ""
        changes.append(
            f'optimizer="adamw"{was}: with L2 in its gradient Adam moves weights with a small gradient by lr a step, '
            "so a smaller weight_decay alone does not help"
        )
    else:
        now = f" (it was {decay.ever:.3g})" if decay.ever is not None else ""
        changes.append(f"weight_decay=0.1 or less{now}")
    if settings is not None and settings.decay_only is not None:
        changes.append(
            f'decay_only="linear" (it is "{settings.decay_only}"): no decay on gains, embedding and head'
        )
    elif settings is None or settings.decay_norms:
        changes.append("decay_norms=False: no decay on the norm gains")
    if settings is not None and settings.output_l2 > 0:
        changes.append(f"output_l2=0 (it is {settings.output_l2:.3g})")
    changes.append("or weight_decay=0")
    if gone:
        changes.append("start again from the initialisation: what has vanished is erased")
    return tuple(changes)


# --- uniform output -----------------------------------------------------------------------------------------------

_UNIFORM_RULE = (
    f"the output is uniform (cross-entropy and entropy within {UNIFORM_NATS} nats of ln V) or nearly so (entropy "
    f"at least {NEAR_UNIFORM_SHARE:.0%} of ln V, with a cross-entropy {STALL_NATS} "
    "nats above its best or standing still), and the sum of learning rates is above the smallest initial mean |w|"
)


def uniform_output(case: Case) -> list[Evidence] | None:
    """The numbers of an output that has become uniform, or nearly so without getting better; None when it is not."""
    ln_v, course = case.ln_vocab, course_of_output(case)
    if ln_v is None or len(course) < 3:
        return None
    reach = case.reach()
    if reach is not None and reach[1] < case.smallest_initial_size():
        return None  # a network that has not moved yet is uniform too, after some initialisations
    step, ce, entropy = course[-1]
    flat = abs(ce - ln_v) <= UNIFORM_NATS and abs(entropy - ln_v) <= UNIFORM_NATS
    if not flat and not (entropy >= NEAR_UNIFORM_SHARE * ln_v and _failing(case)):
        return None
    return [
        evidence("cross-entropy", ce, step, f"ln V = {ln_v:.4g}, best {min(each[1] for each in course):.4g}"),
        evidence("predictive entropy", entropy, step, f"at most ln V = {ln_v:.4g}"),
    ]


def _failing(case: Case) -> bool:
    """Whether cross-entropy has risen above its best, or stands still over the second half of the course."""
    course = [(step, ce) for step, ce, _ in course_of_output(case)]
    return len(course) > 1 and (course[-1][1] > min(ce for _, ce in course) + STALL_NATS or stalled(course))


def uniform_without_decay(case: Case) -> Finding | None:
    """A uniform output that no weight decay can explain."""
    found = uniform_output(case)
    if found is None or decay_of(case).acts():
        return None
    changes, settings = [], case.settings
    if settings is not None and (settings.entropy_weight > 0 or settings.label_smoothing > 0):
        changes.append(
            f"entropy_weight=0 (it is {settings.entropy_weight:.3g}) and label_smoothing=0 (it is "
            f"{settings.label_smoothing:.3g}): both pull the output to the uniform distribution"
        )
    changes.append("a smaller lr, and a look at whether rows and targets belong together")
    rule = f"no weight decay acts, and {_UNIFORM_RULE}"
    return Finding(
        "uniform-output",
        "The output is uniform, and no decay explains it",
        tuple(found),
        tuple(changes),
        LIKELY,
        rule,
    )


def _output(case: Case) -> list[Evidence]:
    """What the output does, for the reader of a finding about weights."""
    found = []
    for key, name in (
        ("heldout_cross_entropy", "held-out cross-entropy"),
        ("predictive_entropy", "predictive entropy"),
        ("mutual_information", "mutual information (use of context)"),
    ):
        last = case.last(key)
        if last is not None:
            text = f"ln V = {case.ln_vocab:.4g}" if case.ln_vocab and key != "mutual_information" else ""
            found.append(evidence(name, last[1], last[0], text))
    return found


def _list(names: list[str]) -> str:
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]
