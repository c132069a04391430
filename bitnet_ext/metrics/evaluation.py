"""Eval mode for as long as something is measured."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from bitnet_ext.nn import frozen_weights


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Puts every module into eval mode without gradients, and gives each its own mode back, also after an
    error.

    Ternary weights are quantised once within it and must not change there: see :func:`bitnet_ext.nn.frozen_weights`.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad(), frozen_weights(model):
            yield
    finally:
        for module, training in modes:
            module.training = training
