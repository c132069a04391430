"""The factorial study as data: blocks of arms, each with the question that it is to answer.

Every arm is the report's recipe (:func:`bitnet_ext.collapse.arms.report_config`) with a few settings changed, and every
run of a seed has the same initial weights and data order as the other arms of that seed, so arms are compared pair by
pair. The levels of the proposed remedies lie around the ones that were named or are usual: label smoothing 0.1
(Szegedy et al. 2016), confidence penalty 0.1 (Pereyra et al. 2017, arXiv:1701.06548).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from bitnet_ext.collapse.arms import ARMS, SHORT_SCHEDULE_STEPS, Arm

#: Lengths of runs: as far as the report looked (a cumulative learning rate of 5.3); until all parameters that decay
#: alone have come to their end (4.0); and until the gains and most of the embedding have (3.4).
_LONG, _STEPS, _SHORT = 4_000, 3_000, 2_500
#: Steps of the standard run from whose checkpoints block D goes on: cumulative learning rates of about 0.25, 1.4, 5.3.
RECOVERY_STARTS = (350, 1_100, 4_000)
RECOVERY_STEPS = 1_000
#: Learning rate at which SGD trains the network, which it hardly does at Adam's: training cross-entropy of collapse-64
#: at steps 320 to 400 without decay 7.2 nats, against 10.7 at 1.5e-3, 7.7 at 0.05, and 7.9 and unsteady at 2.
SGD_RATE = 0.5
#: Arms of the contrasts that matter most, which are given more seeds.
HEADLINE = ("standard-lr", "adamw", "no-decay", "fp-twin", "fp-twin-adamw")
#: Seeds that a headline arm has beyond the others'.
HEADLINE_EXTRA = 4


@dataclass(frozen=True)
class Block:
    """Arms that answer one question together."""

    key: str
    title: str
    question: str
    arms: tuple[str, ...]


def _changed(base: str, name: str, summary: str, **changes: Any) -> Arm:
    """The arm `base` with other TrainConfig fields; fields of Arm itself begin with `arm_`."""
    own = {key[4:]: value for key, value in changes.items() if key.startswith("arm_")}
    train = {key: value for key, value in changes.items() if not key.startswith("arm_")}
    arm = ARMS[base]
    return dataclasses.replace(
        arm, name=name, summary=summary, source="control", train={**arm.train, **train}, **own
    )


def _replication() -> Iterator[Arm]:
    """The report's own runs; those with the short schedule end where the report looked last, or when all is decided."""
    yield dataclasses.replace(ARMS["standard-lr"], steps=5_000)
    yield dataclasses.replace(ARMS["reduced-lr"], steps=10_000)
    yield _changed(
        "standard-lr",
        "reduced-lr-long",
        "a third of the learning rate, on the standard run's schedule, until it has gone as far",
        lr=5e-4,
        arm_steps=13_000,
    )
    yield dataclasses.replace(ARMS["label-smoothing"], steps=_LONG)
    yield dataclasses.replace(ARMS["grad-clip"], steps=_LONG)
    for second, name in ((0.05, "wd-to-0.05"), (0.0, "wd-to-0")):
        arm = _changed(
            "standard-lr",
            name,
            f"weight decay 0.1, then {second:g} from step 5,000",
            wd_schedule="two-stage",
            wd_second=second,
            schedule_steps=SHORT_SCHEDULE_STEPS,
            arm_steps=8_000,
        )
        yield dataclasses.replace(arm, source="report")


def _causes() -> Iterator[Arm]:
    for name in ("adamw", "no-decay", "fp-twin", "fp-twin-adamw"):
        yield dataclasses.replace(ARMS[name], steps=_LONG)
    yield _changed("fp-twin", "fp-no-decay", "full precision without weight decay", weight_decay=0.0)
    for base, prefix, words in (("standard-lr", "", ""), ("fp-twin", "fp-", "full precision, ")):
        for level in ("0.01", "0.001", "0.0001"):
            yield _changed(
                base, f"{prefix}l2-{level}", f"{words}coupled L2 of {level}", weight_decay=float(level)
            )
    yield _changed("standard-lr", "lr-3e-3", "twice the learning rate", lr=3e-3)
    yield _changed("adamw", "lr-3e-3-adamw", "decoupled decay, twice the learning rate", lr=3e-3)
    yield _changed("adamw", "lr-5e-4-adamw", "decoupled decay, a third of the learning rate", lr=5e-4)


_PARTS = {
    "gains": ("gains,final_gain", "embedding,head,linear", "all gains"),
    "final-gain": ("final_gain", "gains,embedding,head,linear", "the last gain"),
    "head": ("head", "gains,final_gain,embedding,linear", "the output head"),
    "embedding": ("embedding", "gains,final_gain,head,linear", "the embedding"),
    "ternary": ("linear", "gains,final_gain,embedding,head", "the ternary weights"),
}


def _tensors() -> Iterator[Arm]:
    for name, (only, _, words) in _PARTS.items():
        yield _changed(
            "standard-lr", f"l2-only-{name}", f"coupled L2 on {words} only", decay_only=only, arm_steps=_SHORT
        )
    for name, (_, others, words) in _PARTS.items():
        summary = f"coupled L2 on everything but {words}"
        yield _changed("standard-lr", f"l2-not-{name}", summary, decay_only=others, arm_steps=_SHORT)


def _details() -> Iterator[Arm]:
    yield _changed("adamw", "adamw-gains-free", "decoupled decay, not on gains", decay_norms=False)
    yield _changed(
        "standard-lr", "beta2-0.999", "Adam's beta2 0.999 instead of 0.95", beta2=0.999, arm_steps=_SHORT
    )
    yield _changed("standard-lr", "eps-1e-5", "Adam's eps 1e-5 instead of 1e-8", eps=1e-5, arm_steps=_SHORT)
    yield _changed(
        "standard-lr",
        "l2-before-clip",
        "L2 added to the gradient before it is clipped",
        decay_before_clip=True,
        arm_steps=_SHORT,
    )
    for lr, suffix, words in ((1.5e-3, "", ""), (SGD_RATE, f"-lr-{SGD_RATE:g}", f", LR {SGD_RATE:g}")):
        for decay, name in ((0.1, "l2"), (0.0, "no-decay")):
            yield _changed(
                "standard-lr",
                f"sgd-{name}{suffix}",
                f"SGD with momentum {'and L2 of 0.1' if decay else 'without weight decay'}{words}",
                optimizer="sgd_l2",
                lr=lr,
                weight_decay=decay,
                arm_steps=_SHORT,
            )


def _solutions() -> Iterator[Arm]:
    """The four proposed solutions on the report's optimiser and on a healthy one."""
    remedies = (
        ("smoothing", "label_smoothing", ("0.05", "0.1", "0.15"), "label smoothing of {}"),
        ("entropy", "entropy_weight", ("0.01", "0.1", "0.3"), "a reward of {} x predictive entropy"),
        (
            "diversity",
            "diversity_weight",
            ("0.03", "0.1", "0.3"),
            "a reward of {} x entropy of the mean prediction",
        ),
        (
            "head-l2",
            "output_l2",
            ("1e-5", "1e-4", "1e-3"),
            "a penalty of {} x sum of squares of the output head",
        ),
    )
    for base, suffix, words in (("standard-lr", "l2", "coupled L2"), ("adamw", "adamw", "decoupled decay")):
        for name, key, levels, summary in remedies:
            for level in levels:
                text = f"{words}, {summary.format(level)}"
                arm = _changed(
                    base, f"{name}-{level}-{suffix}", text, **{key: float(level)}, arm_steps=_SHORT
                )
                yield dataclasses.replace(arm, source="proposed")


def _recoveries() -> Iterator[Arm]:
    changes: dict[str, tuple[str, dict[str, Any]]] = {
        "continue": ("nothing changed", {}),
        "no-decay": ("weight decay off", {"weight_decay": 0.0}),
        "adamw": ("decay decoupled", {"optimizer": "adamw"}),
        "no-decay-reset": (
            "weight decay off, Adam's moments reset",
            {"weight_decay": 0.0, "arm_reset_moments": True},
        ),
        "third-lr": ("a third of the learning rate", {"lr": 5e-4}),
        "smoothing": ("label smoothing of 0.1", {"label_smoothing": 0.1}),
        "l2-0.01": ("a tenth of the L2 term", {"weight_decay": 0.01}),
    }
    for start in RECOVERY_STARTS:
        for name, (words, settings) in changes.items():
            yield _changed(
                "standard-lr",
                f"from-{start}-{name}",
                f"from step {start:,} of the standard run: {words}",
                arm_start=("standard-lr", start),
                arm_steps=start + RECOVERY_STEPS,
                **settings,
            )


def _widths() -> Iterator[Arm]:
    for width in (128, 512, 768):
        for base, suffix, words in (
            ("standard-lr", "l2", "coupled L2"),
            ("adamw", "adamw", "decoupled decay"),
        ):
            name, summary = f"width-{width}-{suffix}", f"{width} hidden units, {words}"
            yield _changed(base, name, summary, arm_model=f"collapse-{width}", arm_steps=_SHORT)


def _books() -> Iterator[Arm]:
    setting = dict(
        batch_size=64,
        seq_len=127,
        sampling="shuffled",
        precision="bf16",
        lr_schedule="linear",
        lr_final=0.1,
        warmup_steps=100,
        first_step_at_peak=False,
        schedule_steps=None,
        arm_steps=1_000,
        arm_books=True,
    )
    for base, name, words in (
        ("standard-lr", "books-l2", "ternary, coupled L2"),
        ("adamw", "books-adamw", "ternary, decoupled decay"),
        ("fp-twin", "books-fp-l2", "full precision, coupled L2"),
        ("fp-twin-adamw", "books-fp-adamw", "full precision, decoupled decay"),
    ):
        yield _changed(base, name, f"64 x 128 shuffled tokens a step: {words}", **setting)


def _with_steps(arms: Iterator[Arm]) -> dict[str, Arm]:
    return {
        arm.name: arm if arm.steps is not None else dataclasses.replace(arm, steps=_STEPS) for arm in arms
    }


_REPLICATION = _with_steps(_replication())
_CAUSES = _with_steps(_causes())
_TENSORS = _with_steps(_tensors())
_DETAILS = _with_steps(_details())
_SOLUTIONS = _with_steps(_solutions())
_RECOVERIES = _with_steps(_recoveries())
_WIDTHS = _with_steps(_widths())
_BOOKS = _with_steps(_books())

#: Every arm of the factorial study, by name.
FACTORIAL: dict[str, Arm] = {
    **_REPLICATION,
    **_CAUSES,
    **_TENSORS,
    **_DETAILS,
    **_SOLUTIONS,
    **_RECOVERIES,
    **_WIDTHS,
    **_BOOKS,
}

#: The blocks of the factorial study, by key. Those of one base arm share its runs.
BLOCKS: dict[str, Block] = {
    block.key: block
    for block in (
        Block(
            "A",
            "Replication",
            "Do the report's own runs show what it says, and what do metrics on held-out text say about them?",
            tuple(_REPLICATION),
        ),
        Block(
            "B",
            "Cause",
            "Is it the decay inside Adam, its size, the learning rate, or the quantiser?",
            ("standard-lr", *_CAUSES, "reduced-lr-long"),
        ),
        Block(
            "B1",
            "Which tensors",
            "On which parameters does the L2 term do the harm?",
            ("standard-lr", *_TENSORS),
        ),
        Block(
            "B2",
            "Details of the optimiser",
            "Do Adam's constants matter, clipping after the L2 term, L2 without Adam, and decay on gains once it is "
            "decoupled?",
            ("standard-lr", "adamw", *_DETAILS),
        ),
        Block(
            "C",
            "The four proposed solutions",
            "Does a term of the loss prevent the collapse, and what does it do to a healthy network?",
            ("standard-lr", "adamw", *_SOLUTIONS),
        ),
        Block(
            "D",
            "Recovery",
            "Which changes bring a collapsed network back, and how soon?",
            tuple(_RECOVERIES),
        ),
        Block("E", "Width", "Does the collapse go away with size?", ("standard-lr", "adamw", *_WIDTHS)),
        Block(
            "F",
            "A realistic regime",
            "Does it happen with shuffled text and batches of 8,192 tokens?",
            tuple(_BOOKS),
        ),
    )
}


def arms_of(blocks: tuple[str, ...]) -> tuple[str, ...]:
    """The arms of blocks, each once, in order; ValueError for a block that does not exist."""
    for key in blocks:
        if key not in BLOCKS:
            raise ValueError(f"block {key!r} is unknown; accepted are {', '.join(BLOCKS)}")
    return tuple(dict.fromkeys(arm for key in blocks for arm in BLOCKS[key].arms))
