"""RMSNorm with a gain (Zhang & Sennrich, arXiv 1910.07467)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bitnet_ext import ops


class RMSNorm(nn.Module):
    """``x / sqrt(mean x^2 + eps) * weight`` over the last dimension, computed in float32, returned in x's dtype.

    Args:
        features: size of the last dimension.
        eps: added to the mean square.
    """

    def __init__(self, features: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.features = features
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(features))

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight.float(), self.eps)

    def add(self, x: Tensor, delta: Tensor | None) -> tuple[Tensor, Tensor]:
        """The norm of ``x + delta``, and that sum; of x itself where there is nothing to add."""
        if delta is None:
            return self(x), x
        return ops.add_rms_norm(x, delta, self.weight.float(), self.eps)

    def extra_repr(self) -> str:
        return f"{self.features}, eps={self.eps}"
