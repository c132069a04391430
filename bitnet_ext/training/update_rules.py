"""Which optimiser a configuration asks for."""

from __future__ import annotations

from torch import nn

from bitnet_ext.training.adam import FusedAdam
from bitnet_ext.training.config import TrainConfig
from bitnet_ext.training.optimizer import Optimizer
from bitnet_ext.training.sgd import MomentumSGD


def make_optimizer(model: nn.Module, config: TrainConfig) -> Optimizer:
    """The optimiser of ``config.optimizer`` for all parameters of `model` that require a gradient.

    Raises:
        ValueError: there are none, or one is not float32.
    """
    rules: tuple[type[Optimizer], ...] = (FusedAdam, MomentumSGD)
    return next(rule for rule in rules if config.optimizer in rule.optimizers)(model, config)
