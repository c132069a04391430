"""Every arm of a block against its base arm, paired by seed."""

from __future__ import annotations

from collections.abc import Sequence

from bitnet_ext.collapse.results import Study
from bitnet_ext.collapse.verdicts.judging import ContrastResult
from bitnet_ext.collapse.verdicts.statistics import differences, holm, last_common_step, paired

#: What is compared: lower is better, higher is better.
KEYS = ("heldout_cross_entropy", "mutual_information")


def base_of(arm: str, arms: Sequence[str]) -> str | None:
    """The arm of a block that another one is a change of; None for a base arm itself.

    A run whose weight decay changes on its way is compared with the one that goes on with some of it, since both have
    the same course up to there; that one itself, which ``standard-lr`` does not outlast, with nothing. A recovery run
    is compared with the run that goes on unchanged from the same step, a full-precision twin with the
    ternary net of the same recipe, SGD with L2 with SGD without, what has decoupled decay with ``adamw``, and all else
    with ``standard-lr``.
    """
    if arm.startswith("from-"):
        base = "-".join(arm.split("-")[:2]) + "-continue"
    elif arm.startswith("books-"):
        base = "books-adamw" if arm == "books-fp-adamw" else "books-l2"
    elif arm.startswith("wd-to-"):
        base = "wd-to-0.05"
    elif arm.startswith("fp-"):
        base = {"fp-twin": "standard-lr", "fp-twin-adamw": "adamw"}.get(arm, arm.removeprefix("fp-"))
    elif arm.startswith("sgd-"):
        base = arm.replace("-l2", "-no-decay")
    elif arm.endswith("-adamw") or arm.startswith("adamw-"):
        base = "adamw"
    else:
        base = "standard-lr"
    return None if base == arm or base not in arms else base


def block_contrasts(study: Study, arms: Sequence[str]) -> list[ContrastResult]:
    """The differences of a block's arms to their bases, p Holm-adjusted over the block for each metric.

    At the last step that all runs of the two arms have, over the seeds that both have; a pair without a common step or
    seed is left out.
    """
    here = [arm for arm in arms if study.of(arm)]
    results = []
    for key in KEYS:
        found = []
        for other in here:
            base = base_of(other, here)
            step = (
                last_common_step([*study.leading(base), *study.leading(other)]) if base is not None else None
            )
            if base is None or step is None:
                continue
            gaps = differences(study, base, other, key, step)
            if gaps:
                found.append((base, other, step, paired(gaps.values())))
        adjusted = holm([estimate.p for *_, estimate in found])
        results += [
            ContrastResult(base, other, key, step, estimate, p)
            for (base, other, step, estimate), p in zip(found, adjusted, strict=True)
        ]
    return results
