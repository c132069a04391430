"""Muon: momentum, orthogonalised, for the matrices inside a network.

Source: Keller Jordan, "Muon: An optimizer for hidden layers in neural networks" (2024), and its reference code:
Nesterov momentum, five steps of a quintic Newton-Schulz iteration, the update scaled by sqrt(max(1, N / K)).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

#: a X + b (X X^T) X + c (X X^T)^2 X brings singular values from (0, 1] to about 1, fastest from the small ones.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)

#: Elements that go through the iteration together: bounds its temporary memory to some 1.5 GB.
_BATCH_ELEMENTS = 1 << 26


def newton_schulz(x: Tensor, steps: int = 5) -> Tensor:
    """Nearly orthogonal matrices with the singular vectors of x: all singular values between 0.7 and 1.2.

    Args:
        x: float32 [..., N, K]. The products are taken in bfloat16 on CUDA, in float32 on the CPU.

    Returns:
        float32 [..., N, K].
    """
    a, b, c = COEFFICIENTS
    wide = x.shape[-2] <= x.shape[-1]
    y = x.bfloat16() if x.is_cuda else x
    y = (y if wide else y.mT).reshape(-1, min(x.shape[-2:]), max(x.shape[-2:]))
    y = y / (torch.linalg.matrix_norm(y, keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = y @ y.mT
        y = torch.baddbmm(y, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    y = y.reshape(*x.shape[:-2], *y.shape[-2:])
    return (y if wide else y.mT).float()


class Muon:
    """Updates matrices; equal shapes go together. All that changes from step to step is read from the device.

    Args:
        matrices: named float32 parameters [N, K].
        momentum: of the running mean of gradients.
    """

    def __init__(self, matrices: Mapping[str, Tensor], momentum: float) -> None:
        self._momentum = momentum
        self._batches: list[tuple[list[Tensor], Tensor]] = []  # parameters and their momenta, stacked
        self.momenta: dict[str, Tensor] = {}
        by_shape: dict[torch.Size, list[str]] = {}
        for name, p in matrices.items():
            by_shape.setdefault(p.shape, []).append(name)
        for shape, names in by_shape.items():
            most = max(1, _BATCH_ELEMENTS // shape.numel())
            for start in range(0, len(names), most):
                part = names[start : start + most]
                params = [matrices[name] for name in part]
                momenta = torch.zeros(len(part), *shape, device=params[0].device)
                self._batches.append((params, momenta))
                self.momenta.update(zip(part, momenta.unbind(), strict=True))

    @torch.no_grad()
    def step(self, lr: Tensor, weight_decay: Tensor, grad_scale: Tensor) -> None:
        """One update; the arguments are float32 [] on the device. A NaN as grad_scale changes nothing."""
        beta = self._momentum
        go = torch.isfinite(grad_scale)
        weight = torch.where(go, 1 - beta, 0.0)
        keep = torch.where(go, 1 - lr * weight_decay, 1.0)
        for params, momenta in self._batches:
            grads = torch.stack([torch.zeros_like(p) if p.grad is None else p.grad for p in params])
            grads = torch.where(go, grads * grad_scale, 0.0)
            momenta.lerp_(grads, weight)
            update = newton_schulz(grads.lerp_(momenta, beta))
            N, K = update.shape[-2:]
            update *= torch.where(go, -lr * math.sqrt(max(1.0, N / K)), 0.0)
            torch._foreach_mul_(params, keep)
            torch._foreach_add_(params, list(update.unbind()))
