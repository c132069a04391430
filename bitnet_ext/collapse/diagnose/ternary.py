"""The rule of a diagnosis about dead ternary layers: codes all zero, scales next to nothing, codes that stand still."""

from __future__ import annotations

from bitnet_ext.collapse.diagnose.inputs import Case
from bitnet_ext.collapse.diagnose.words import CERTAIN, LIKELY, Evidence, Finding, evidence
from bitnet_ext.ops.quantize import SCALE_FLOOR

DEAD_ZERO_SHARE = 0.99  # of the ternary codes at which a network's (or a tensor's) codes count as all zero
DEAD_CLAMPED_SHARE = 0.5  # of the ternary tensors whose absmean is at its clamp
DEAD_SCALE_SHARE = 0.01  # of its initial size: a ternary scale at which a block adds next to nothing
STUCK_EVALUATIONS = 3  # last evaluations without a single flip that count as stuck codes
STUCK_RATE_SHARE = 0.1  # of the largest learning rate: below it, codes without flips are no surprise


def dead_ternary(case: Case) -> Finding | None:
    """Codes that are all zero, scales at their clamp or next to nothing, or codes that no longer change."""
    if case.ternary is not True:
        return None
    found, stuck = _dead_codes(case), False
    if not found:
        found, stuck = _stuck_codes(case), True
    if not found:
        return None
    if stuck:
        headline, changes = (
            "The ternary codes no longer change",
            ["a larger lr: no step reaches the next threshold"],
        )
    else:
        headline = "The ternary layers are dead: their blocks add next to nothing"
        changes = [
            "weight_decay=0 for the ternary layers, or much smaller",
            "start again from the initialisation: what has vanished is erased",
        ]
        if case.settings is not None and case.settings.optimizer == "adam_l2":
            changes.insert(
                0, 'optimizer="adamw" (it is "adam_l2", whose decay moves small weights by lr a step)'
            )
    return Finding(
        "dead-ternary",
        headline,
        tuple(found),
        tuple(changes),
        LIKELY if stuck else CERTAIN,
        f"at least {DEAD_ZERO_SHARE:.0%} of all codes (or of one tensor's) are 0; or the absmean of at least "
        f"{DEAD_CLAMPED_SHARE:.0%} of the tensors is at its clamp of {SCALE_FLOOR:g}; or the latent weights are "
        f"below {DEAD_SCALE_SHARE:.0%} of their initial size; or the last {STUCK_EVALUATIONS} evaluations saw no "
        f"flip at a learning rate of at least {STUCK_RATE_SHARE:.0%} of its largest",
    )


def _dead_codes(case: Case) -> list[Evidence]:
    found: list[Evidence] = []
    zero, clamped, latent = (case.last(key) for key in ("ternary_zero", "absmean_clamped", "latent_mean_abs"))
    dead = [fact for fact in case.tensors if (fact.zero_share or 0.0) >= DEAD_ZERO_SHARE]
    if zero is not None and zero[1] >= DEAD_ZERO_SHARE:
        found.append(evidence("share of ternary codes that are 0", zero[1], zero[0]))
    elif dead:
        names = ", ".join(fact.name for fact in dead[:3]) + (" ..." if len(dead) > 3 else "")
        found.append(evidence("tensors whose codes are all 0", len(dead), case.last_step, names))
    if clamped is not None and clamped[1] >= DEAD_CLAMPED_SHARE:
        text = f"absmean at or below {SCALE_FLOOR:g}"
        found.append(evidence("share of ternary tensors at the clamp", clamped[1], clamped[0], text))
    initial = case.initial_sizes().get("latent_mean_abs")
    if latent is not None and initial and latent[1] < DEAD_SCALE_SHARE * initial:
        text = f"{100 * latent[1] / initial:.2g} % of the initial {initial:.3g}"
        found.append(evidence("mean |w| of the ternary layers, their scale", latent[1], latent[0], text))
    return found


def _stuck_codes(case: Case) -> list[Evidence]:
    flips = case.points("flip_rate")[-STUCK_EVALUATIONS:]
    rates = [value for _, value in case.points("lr")]
    moving = bool(rates) and rates[-1] >= STUCK_RATE_SHARE * max(rates) > 0
    if len(flips) < STUCK_EVALUATIONS or any(value for _, value in flips) or not moving:
        return []
    text = f"0 at the last {STUCK_EVALUATIONS} evaluations"
    return [evidence("flip rate of the ternary codes", 0.0, int(flips[-1][0]["step"]), text)]
