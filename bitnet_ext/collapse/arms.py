"""The arms of the collapse experiments: each a named change of one setting of the report's run.

The report's own settings (its scripts, not only its text): Adam with coupled L2 of 0.1 on every parameter,
norm gains and embeddings included; batches of 4 x 32 consecutive tokens; gradient clipped to norm 1; a
learning rate of 1.5e-3 warmed up over 375 steps with the first step at full rate; fp32.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from bitnet_ext.training import TrainConfig

#: Length of the learning-rate schedule of the report's standard run; its other runs used 10,000.
STANDARD_SCHEDULE_STEPS = 30_000
SHORT_SCHEDULE_STEPS = 10_000


@dataclass(frozen=True)
class Arm:
    """One training recipe of the comparison.

    Attributes:
        name: as on the command line.
        summary: what differs, for a reader.
        source: "report" (run there), "proposed" (named there, never run) or "control".
        train: fields of TrainConfig that differ from :func:`report_config`.
        quantization: "b1.58" or, for a full-precision twin, "none".
        model: preset of the network; None for the study's.
        steps: optimiser steps; None for the study's.
        start: (arm, step) of a run with the same seed that this one goes on from; None to begin anew.
        reset_moments: with start, whether it goes on with moments of 0.
        books: whether it reads the study's second, larger text.
    """

    name: str
    summary: str
    source: str
    train: Mapping[str, Any] = field(default_factory=dict)
    quantization: str = "b1.58"
    model: str | None = None
    steps: int | None = None
    start: tuple[str, int] | None = None
    reset_moments: bool = False
    books: bool = False


def _arm(name: str, source: str, summary: str, quantization: str = "b1.58", **train: Any) -> Arm:
    return Arm(name, summary, source, train, quantization)


ARMS: dict[str, Arm] = {
    arm.name: arm
    for arm in (
        _arm("standard-lr", "report", "the report's standard run: Adam with coupled L2 0.1, LR 1.5e-3"),
        _arm(
            "reduced-lr",
            "report",
            "a third of the learning rate, 5e-4",
            lr=5e-4,
            schedule_steps=SHORT_SCHEDULE_STEPS,
        ),
        _arm(
            "two-stage",
            "report",
            "weight decay 0.1, then 0 from half of the run",
            wd_schedule="two-stage",
            wd_second=0.0,
            schedule_steps=None,
        ),
        _arm(
            "label-smoothing",
            "report",
            "targets smoothed by 0.1",
            label_smoothing=0.1,
            schedule_steps=SHORT_SCHEDULE_STEPS,
        ),
        _arm(
            "grad-clip",
            "report",
            "gradient clipped to norm 0.1 instead of 1",
            grad_clip=0.1,
            schedule_steps=SHORT_SCHEDULE_STEPS,
        ),
        _arm("entropy", "proposed", "a reward of 0.1 x predictive entropy", entropy_weight=0.1),
        _arm(
            "diversity",
            "proposed",
            "a reward of 0.1 x entropy of the batch's mean prediction, the differentiable form of "
            "'unique tokens'",
            diversity_weight=0.1,
        ),
        _arm(
            "output-l2", "proposed", "a penalty of 1e-4 x sum of squares of the output layer", output_l2=1e-4
        ),
        _arm("adamw", "control", "the same decay of 0.1, decoupled (AdamW)", optimizer="adamw"),
        _arm("no-decay", "control", "no weight decay at all", weight_decay=0.0),
        _arm("fp-twin", "control", "the standard run in full precision", quantization="none"),
        _arm(
            "fp-twin-adamw",
            "control",
            "full precision with decoupled decay",
            quantization="none",
            optimizer="adamw",
        ),
    )
}


def report_config(steps: int, seed: int) -> TrainConfig:
    """The report's standard run, with data order and initialisation fixed by `seed`."""
    return TrainConfig(
        steps=steps,
        seed=seed,
        batch_size=4,
        seq_len=31,  # rows of 32 tokens, 31 predictions each
        sampling="sequential",
        optimizer="adam_l2",
        lr=1.5e-3,
        beta1=0.9,
        beta2=0.95,
        eps=1e-8,
        weight_decay=0.1,
        decay_norms=True,
        decay_embeddings=True,
        lr_schedule="report",
        warmup_steps=375,
        schedule_steps=STANDARD_SCHEDULE_STEPS,
        first_step_at_peak=True,
        wd_schedule="constant",
        grad_clip=1.0,
        log_interval=10,
    )


def config_of(arm: Arm, steps: int, seed: int, **run_settings: Any) -> TrainConfig:
    """TrainConfig of an arm; `run_settings` are fields that do not belong to the comparison (checkpoints, ...)."""
    return dataclasses.replace(report_config(steps, seed), **arm.train, **run_settings)


def arm_config(name: str, steps: int, seed: int, **run_settings: Any) -> TrainConfig:
    """:func:`config_of` an arm by name."""
    return config_of(get_arm(name), steps, seed, **run_settings)


def get_arm(name: str) -> Arm:
    """An arm of the small comparison by name; ValueError names the known ones."""
    if name not in ARMS:
        raise ValueError(f"arm {name!r} is unknown; accepted are {', '.join(ARMS)}")
    return ARMS[name]
