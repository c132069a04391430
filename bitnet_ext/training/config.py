"""Everything that defines a training run, as data."""

from __future__ import annotations

import dataclasses
import math
import textwrap
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
FINAL_CHECKPOINTS = ("full", "model", "none")
#: Parts of a model's parameters that weight decay can be given to one by one.
DECAY_GROUPS = ("gains", "final_gain", "embedding", "head", "linear")


#: Groups of fields, in the order in which help and documentation show them.
GROUPS = {
    "length": "length and batches",
    "arithmetic": "arithmetic",
    "optimiser": "optimiser",
    "schedule": "schedule of learning rate and weight decay",
    "objective": "objective",
    "evaluation": "evaluation",
    "output": "output",
}

#: Steps of the longest warm-up that is chosen when none is given.
LONGEST_WARMUP = 375


def _field(default: Any, group: str, words: str, choices: tuple[str, ...] | None = None) -> Any:
    """A field with its words: the only place they are written. ``bitnet-ext train --help`` and TrainConfig's docstring
    take them from here.
    """
    return dataclasses.field(default=default, metadata={"group": group, "words": words, "choices": choices})


@dataclass(frozen=True)
class TrainConfig:
    """A training run, as data: the same fields are options of ``bitnet-ext train``."""

    steps: int = _field(1000, "length", "optimiser steps")
    batch_size: int = _field(
        16, "length", "rows of an optimiser step over all processes; a row is seq_len + 1 consecutive tokens"
    )
    seq_len: int = _field(256, "length", "predictions in a row")
    accumulation: int = _field(1, "length", "micro-batches that the rows of a step are cut into")
    sampling: str = _field(
        "shuffled",
        "length",
        "order of the rows: shuffled (each row once an epoch, a new order every epoch) or sequential",
        SAMPLING,
    )
    seed: int = _field(0, "length", "seed of the order of the rows")
    document_separator: int | None = _field(
        None,
        "length",
        "id of the token that ends a document; with it, attention does not cross from one document of a row into "
        "the next; none for attention over the whole row",
    )

    precision: str = _field(
        "fp32",
        "arithmetic",
        "fp32, or bf16: autocast with float32 parameters and optimiser state",
        PRECISIONS,
    )
    backward: str = _field(
        "exact",
        "arithmetic",
        "gradients of ternary layers: exact, or int8 products (bitnet_ext.ops.bit_linear)",
        BACKWARDS,
    )
    cuda_graph: bool = _field(
        True,
        "arithmetic",
        "capture the whole step in a CUDA graph; without effect on a CPU and with several processes",
    )

    optimizer: str = _field(
        "adamw",
        "optimiser",
        "adamw (decoupled weight decay), adam_l2 (decay in the gradient, as torch.optim.Adam), muon (for the matrices "
        "between embedding and head, adamw for the rest) or sgd_l2 (torch.optim.SGD with momentum)",
        OPTIMIZERS,
    )
    lr: float = _field(1.5e-3, "optimiser", "peak learning rate")
    beta1: float = _field(0.9, "optimiser", "decay of Adam's first moment")
    beta2: float = _field(0.95, "optimiser", "decay of Adam's second moment")
    eps: float = _field(1e-8, "optimiser", "epsilon of Adam")
    weight_decay: float = _field(0.1, "optimiser", "weight decay")
    muon_lr: float = _field(
        0.02, "optimiser", "peak learning rate of Muon's matrices; it follows the schedule of lr"
    )
    muon_momentum: float = _field(0.95, "optimiser", "momentum of Muon")
    momentum: float = _field(0.9, "optimiser", "momentum of SGD")
    grad_clip: float | None = _field(1.0, "optimiser", "largest global gradient norm; none for no clipping")
    decay_before_clip: bool = _field(
        False,
        "optimiser",
        "add the L2 term to the gradient before its norm is clipped instead of after; for adam_l2 and sgd_l2. "
        "grad_norm is then the norm of the sum",
    )
    decay_norms: bool = _field(
        False, "optimiser", "apply weight decay to norm gains and biases (all 1-D parameters)"
    )
    decay_embeddings: bool = _field(
        True, "optimiser", "apply weight decay to the embedding and the output head"
    )
    decay_only: str | None = _field(
        None,
        "optimiser",
        "groups that weight decay reaches, separated by commas, instead of the two options before: gains (of all "
        "norms but the last; biases too), final_gain, embedding, head (a tied head is embedding), linear (all other "
        "matrices)",
    )

    lr_schedule: str = _field(
        "two-stage",
        "schedule",
        "learning rate over the run: constant, linear, cosine, two-stage (b1.58 FAQ) or report (the collapse "
        "report's); see bitnet_ext.training.learning_rates",
        LR_SCHEDULES,
    )
    warmup_steps: int | None = _field(
        None,
        "schedule",
        f"steps of a linear warm-up from 0; none for a tenth of the schedule, at most {LONGEST_WARMUP}",
    )
    schedule_steps: int | None = _field(None, "schedule", "length of the schedule; none for steps")
    lr_second: float | None = _field(
        None, "schedule", "peak of the second stage of two-stage; none for 2/3 of lr, as in the b1.58 FAQ"
    )
    lr_final: float = _field(0.0, "schedule", "end of linear and cosine, as a share of lr")
    first_step_at_peak: bool = _field(
        False,
        "schedule",
        "take the first step at the full learning rate and each later one at that of the step before (the collapse "
        "report's off-by-one)",
    )
    wd_schedule: str = _field(
        "two-stage",
        "schedule",
        "weight decay over the run: constant, two-stage (weight_decay, then wd_second from half of the schedule) or "
        "cosine-then-off; see bitnet_ext.training.weight_decays",
        WD_SCHEDULES,
    )
    wd_second: float = _field(0.0, "schedule", "weight decay of the second half")

    label_smoothing: float = _field(
        0.0, "objective", "share of the target that is spread over the vocabulary"
    )
    z_loss: float = _field(0.0, "objective", "weight of the mean squared log-sum-exp of the logits")
    entropy_weight: float = _field(
        0.0, "objective", "weight of the mean entropy of the predictions, which is rewarded"
    )
    diversity_weight: float = _field(
        0.0, "objective", "weight of the entropy of the mean prediction, which is rewarded"
    )
    output_l2: float = _field(0.0, "objective", "weight of the sum of squares of the output head")

    eval_interval: int | None = _field(
        None,
        "evaluation",
        "steps between measurements of held-out loss, perplexity and bits per byte; none for none",
    )
    eval_tokens: int = _field(
        8192, "evaluation", "most held-out predictions of a measurement, spread evenly over the held-out text"
    )

    log_interval: int = _field(10, "output", 'steps between "train" lines of metrics.jsonl')
    checkpoint_interval: int | None = _field(
        None, "output", "steps between checkpoints; none for none by steps"
    )
    checkpoint_seconds: float | None = _field(
        120.0, "output", "seconds between checkpoints of a run of one process; none for none by time"
    )
    final_checkpoint: str = _field(
        "full",
        "output",
        "contents of the checkpoint at the end: full, model (weights only) or none",
        FINAL_CHECKPOINTS,
    )
    tensorboard: bool = _field(
        False, "output", "also write scalars for TensorBoard (needs the package tensorboard)"
    )

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "seq_len", "accumulation", "log_interval", "eval_tokens"):
            self._require(
                name, isinstance(getattr(self, name), int) and getattr(self, name) >= 1, "an integer >= 1"
            )
        for name in ("schedule_steps", "checkpoint_interval", "eval_interval"):
            value = getattr(self, name)
            self._require(
                name, value is None or (isinstance(value, int) and value >= 1), "an integer >= 1 or None"
            )
        for name in ("warmup_steps", "document_separator"):
            value = getattr(self, name)
            self._require(
                name, value is None or (isinstance(value, int) and value >= 0), "an integer >= 0 or None"
            )
        self._require("batch_size", self.batch_size % self.accumulation == 0, "a multiple of accumulation")
        for field in dataclasses.fields(self):
            choices = field.metadata["choices"]
            if choices is not None:
                self._require(
                    field.name, getattr(self, field.name) in choices, f"one of {', '.join(choices)}"
                )
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
    def warmup(self) -> int:
        """Steps of the warm-up: warmup_steps, or a tenth of the schedule's steps when that is None."""
        if self.warmup_steps is not None:
            return self.warmup_steps
        return min(LONGEST_WARMUP, math.ceil((self.schedule_steps or self.steps) / 10))

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


def _described() -> str:
    """The docstring's list of fields, from the words of each."""
    lines = [TrainConfig.__doc__ or "", "", "    Attributes:"]
    for key, title in GROUPS.items():
        lines += ["", f"        {title[0].upper()}{title[1:]}:"]
        for field in dataclasses.fields(TrainConfig):
            if field.metadata["group"] == key:
                words = f"{field.name}: {field.metadata['words']} (default {field.default!r})."
                lines += textwrap.wrap(words, 110, initial_indent=" " * 12, subsequent_indent=" " * 16)
    return "\n".join([*lines, "    "])


TrainConfig.__doc__ = _described()
