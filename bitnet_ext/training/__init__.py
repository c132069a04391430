"""Training of ternary language models and their full-precision twins."""

from bitnet_ext.training.checkpoint import CheckpointError, load_model, read_checkpoint
from bitnet_ext.training.config import TrainConfig
from bitnet_ext.training.optimizer import FusedAdam
from bitnet_ext.training.schedules import learning_rates, weight_decays
from bitnet_ext.training.together import advance_together
from bitnet_ext.training.trainer import (
    EvaluatedStep,
    Evaluator,
    Trainer,
    TrainingDivergedError,
    TrainingInterrupted,
)

__all__ = [
    "CheckpointError",
    "EvaluatedStep",
    "Evaluator",
    "FusedAdam",
    "TrainConfig",
    "Trainer",
    "TrainingDivergedError",
    "TrainingInterrupted",
    "advance_together",
    "learning_rates",
    "load_model",
    "read_checkpoint",
    "weight_decays",
]
