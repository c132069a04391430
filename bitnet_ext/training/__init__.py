"""Training of ternary language models and their full-precision twins."""

from bitnet_ext.training.adam import FusedAdam
from bitnet_ext.training.checkpoint import (
    CheckpointError,
    load_model,
    read_checkpoint,
    resolve_checkpoint,
)
from bitnet_ext.training.config import TrainConfig
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

__all__ = [
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
