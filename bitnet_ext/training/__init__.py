"""Training of ternary language models and their full-precision twins."""

from typing import TYPE_CHECKING

from bitnet_ext._lazy import lazy_names
from bitnet_ext.training.config import TrainConfig

if TYPE_CHECKING:
    from bitnet_ext.training.adam import FusedAdam
    from bitnet_ext.training.callbacks import Callback
    from bitnet_ext.training.checkpoint import (
        CheckpointError,
        load_model,
        read_checkpoint,
        resolve_checkpoint,
    )
    from bitnet_ext.training.optimizer import Optimizer
    from bitnet_ext.training.run_lock import RunInUseError
    from bitnet_ext.training.schedules import learning_rates, weight_decays
    from bitnet_ext.training.together import advance_together, streams_side_by_side
    from bitnet_ext.training.trainer import (
        EvaluatedStep,
        Evaluator,
        Trainer,
        TrainingDivergedError,
        TrainingInterrupted,
    )
    from bitnet_ext.training.update_rules import make_optimizer

# TrainConfig is read without torch, by the command line; what follows imports it.
__getattr__ = lazy_names(
    __name__,
    {
        "adam": ("FusedAdam",),
        "callbacks": ("Callback",),
        "checkpoint": ("CheckpointError", "load_model", "read_checkpoint", "resolve_checkpoint"),
        "optimizer": ("Optimizer",),
        "run_lock": ("RunInUseError",),
        "schedules": ("learning_rates", "weight_decays"),
        "together": ("advance_together", "streams_side_by_side"),
        "trainer": ("EvaluatedStep", "Evaluator", "Trainer", "TrainingDivergedError", "TrainingInterrupted"),
        "update_rules": ("make_optimizer",),
    },
)

__all__ = [
    "Callback",
    "CheckpointError",
    "EvaluatedStep",
    "Evaluator",
    "FusedAdam",
    "Optimizer",
    "RunInUseError",
    "TrainConfig",
    "Trainer",
    "TrainingDivergedError",
    "TrainingInterrupted",
    "advance_together",
    "learning_rates",
    "load_model",
    "make_optimizer",
    "read_checkpoint",
    "resolve_checkpoint",
    "streams_side_by_side",
    "weight_decays",
]
