"""Everything that defines a training run, as data."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

OPTIMIZERS = ("adam_l2", "adamw", "muon", "sgd_l2")
#: Those whose weight decay is L2 in the gradient.
COUPLED = ("adam_l2", "sgd_l2")
LR_SCHEDULES = ("constant", "linear", "cosine", "two-stage", "report")
WD_SCHEDULES = ("constant", "two-stage", "cosine-then-off")
PRECISIONS = ("fp32", "bf16")
BACKWARDS = ("exact", "int8")
SAMPLING = ("shuffled", "sequential")
#: Parts of a model's parameters that weight decay can be given to one by one.
DECAY_GROUPS = ("gains", "final_gain", "embedding", "head", "linear")


@dataclass(frozen=True)
class TrainConfig:
    """A training run.

    Attributes:
        steps: optimiser steps.
        batch_size: rows of an optimiser step over all processes; a row is seq_len + 1 consecutive tokens.
        seq_len: predictions in a row.
        accumulation: micro-batches that a step's rows are cut into.
        sampling: "shuffled" (each row once an epoch, a new order every epoch) or "sequential".
        seed: of the order of rows.
        precision: "fp32", or "bf16" autocast with float32 parameters and optimiser state.

        backward: how ternary layers compute their gradients, "exact" or "int8", see
            :func:`bitnet_ext.ops.bit_linear`.

        optimizer: "adam_l2", L2 in the gradient as ``torch.optim.Adam(weight_decay=...)``, "adamw",
            decoupled decay, "muon" (:class:`bitnet_ext.training.muon.Muon`) for the matrices between
            embedding and head with "adamw" for all else, or "sgd_l2", ``torch.optim.SGD(momentum, weight_decay)``.
        lr, weight_decay: of the optimiser.
        beta1, beta2, eps: of Adam. momentum: of SGD.
        muon_lr: peak learning rate of Muon's matrices, which follow the schedule of lr.
        muon_momentum: of Muon.
        decay_before_clip: whether the L2 term is in the gradient before its norm is clipped, instead of added to the
            clipped gradient; only with "adam_l2" and "sgd_l2". "grad_norm" is then that of the sum.
        decay_norms: whether weight decay reaches norm gains and biases (all 1-D parameters).
        decay_embeddings: whether it reaches the embedding and the output head.
        decay_only: the groups that weight decay reaches, separated by commas, instead of what the two before say:
            "gains" (of all norms but the last; biases too), "final_gain", "embedding", "head" (of its own, a tied
            one is "embedding"), "linear" (all other matrices).
        lr_schedule: see :func:`bitnet_ext.training.schedules.learning_rates`.
        warmup_steps: linear warm-up from 0.
        schedule_steps: length of the schedule; None for `steps`.
        lr_second: peak of the second stage of "two-stage"; None for 2/3 of lr, as in the b1.58 FAQ.
        lr_final: LR at the end of "linear" and "cosine", as a share of lr.
        first_step_at_peak: the collapse report's off-by-one: the first step is taken at the full LR and
            each later one at the previous step's.
        wd_schedule: see :func:`bitnet_ext.training.schedules.weight_decays`.
        wd_second: weight decay of the second stage.
        grad_clip: largest global gradient norm; None for no clipping.

        label_smoothing, z_loss, entropy_weight, diversity_weight, output_l2: terms of the objective, see
            :func:`bitnet_ext.ops.linear_cross_entropy`; the last weighs the sum of squares of the output head.

        cuda_graph: capture the whole step in a CUDA graph (one process on a GPU; else without effect).
        log_interval: steps between "train" lines of the metrics file.
        checkpoint_interval: steps between checkpoints; None for none by steps.
        checkpoint_seconds: seconds between checkpoints of a run of one process; None for none by time.
        final_checkpoint: what the checkpoint at the end holds: "full", "model" (weights only) or "none".
        tensorboard: also write scalars for TensorBoard (extra `tensorboard`).
    """

    steps: int = 1000
    batch_size: int = 16
    seq_len: int = 256
    accumulation: int = 1
    sampling: str = "shuffled"
    seed: int = 0
    precision: str = "fp32"
    backward: str = "exact"

    optimizer: str = "adamw"
    lr: float = 1.5e-3
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    muon_lr: float = 0.02
    muon_momentum: float = 0.95
    momentum: float = 0.9
    decay_before_clip: bool = False
    decay_norms: bool = False
    decay_embeddings: bool = True
    decay_only: str | None = None
    lr_schedule: str = "two-stage"
    warmup_steps: int = 375
    schedule_steps: int | None = None
    lr_second: float | None = None
    lr_final: float = 0.0
    first_step_at_peak: bool = False
    wd_schedule: str = "two-stage"
    wd_second: float = 0.0
    grad_clip: float | None = 1.0

    label_smoothing: float = 0.0
    z_loss: float = 0.0
    entropy_weight: float = 0.0
    diversity_weight: float = 0.0
    output_l2: float = 0.0

    cuda_graph: bool = True
    log_interval: int = 10
    checkpoint_interval: int | None = None
    checkpoint_seconds: float | None = 120.0
    final_checkpoint: str = "full"
    tensorboard: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "seq_len", "accumulation", "log_interval"):
            self._require(
                name, isinstance(getattr(self, name), int) and getattr(self, name) >= 1, "an integer >= 1"
            )
        for name in ("schedule_steps", "checkpoint_interval"):
            value = getattr(self, name)
            self._require(
                name, value is None or (isinstance(value, int) and value >= 1), "an integer >= 1 or None"
            )
        self._require("warmup_steps", self.warmup_steps >= 0, ">= 0")
        self._require("batch_size", self.batch_size % self.accumulation == 0, "a multiple of accumulation")
        for name, accepted in (
            ("optimizer", OPTIMIZERS),
            ("lr_schedule", LR_SCHEDULES),
            ("wd_schedule", WD_SCHEDULES),
            ("precision", PRECISIONS),
            ("backward", BACKWARDS),
            ("sampling", SAMPLING),
            ("final_checkpoint", ("full", "model", "none")),
        ):
            self._require(name, getattr(self, name) in accepted, f"one of {', '.join(accepted)}")
        for name in ("lr", "muon_lr", "weight_decay", "wd_second", "eps", "lr_final"):
            value = getattr(self, name)
            self._require(name, math.isfinite(value) and value >= 0, "finite and >= 0")
        for name in ("beta1", "beta2", "muon_momentum", "momentum", "label_smoothing"):
            self._require(name, 0 <= getattr(self, name) < 1, "in [0, 1)")
        for name in ("z_loss", "entropy_weight", "diversity_weight", "output_l2"):
            self._require(name, math.isfinite(getattr(self, name)), "finite")
        self._require(
            "decay_before_clip",
            not self.decay_before_clip or self.decay_is_coupled,
            f"False unless optimizer is one of {', '.join(COUPLED)} (it is {self.optimizer!r})",
        )
        groups = [] if self.decay_only is None else self.decay_only.split(",")
        self._require(
            "decay_only",
            set(groups) <= set(DECAY_GROUPS) and len(set(groups)) == len(groups),
            f"None or different names of {', '.join(DECAY_GROUPS)}, separated by commas",
        )
        if self.grad_clip is not None:
            self._require("grad_clip", self.grad_clip > 0, "> 0 or None")

    def _require(self, name: str, condition: bool, accepted: str) -> None:
        if not condition:
            raise ValueError(f"TrainConfig: {name} must be {accepted}, got {getattr(self, name)!r}")

    @property
    def decay_is_coupled(self) -> bool:
        """Whether weight decay is L2 in the gradient."""
        return self.optimizer in COUPLED

    @property
    def tokens_per_step(self) -> int:
        """Predictions of an optimiser step."""
        return self.batch_size * self.seq_len

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainConfig:
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"TrainConfig: unknown keys {unknown}; accepted are {sorted(known)}")
        return cls(**values)
