"""SGD with momentum and L2 in the gradient, in plain PyTorch: weight decay without Adam's normalisation.

The definition of ``torch.optim.SGD(momentum, weight_decay)``, without dampening and Nesterov:
``m = momentum m + (g * grad_scale + weight_decay p)``, ``p -= lr m``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bitnet_ext.training.config import TrainConfig
from bitnet_ext.training.optimizer import Optimizer


class MomentumSGD(Optimizer):
    """`sgd_l2`. A weight without gradient shrinks by ``lr weight_decay / (1 - momentum)`` of itself a step.

    Args:
        model, config: see :class:`Optimizer`; momentum is used too.
    """

    optimizers = ("sgd_l2",)

    def __init__(self, model: nn.Module, config: TrainConfig) -> None:
        super().__init__(model, config)
        self.momenta = {name: torch.zeros_like(p) for name, p in self.named.items()}

    @property
    def takes_rows(self) -> bool:
        return False  # momentum and decay move every row anyway

    @torch.no_grad()
    def step(self, hyper: Tensor, grad_scale: Tensor) -> None:
        self._dense_gradients()
        grads = self._clipped_gradients()
        if grads:
            go = torch.isfinite(grad_scale)
            lr, weight_decay = torch.where(go, hyper[:2], 0.0).unbind()
            params = [self.named[name].detach() for name in grads]
            momenta = [self.momenta[name] for name in grads]
            # 0 * NaN is NaN, so a bad gradient is replaced before it is scaled.
            sums = [torch.where(go, grad, 0.0) for grad in grads.values()]
            torch._foreach_mul_(sums, torch.where(go, grad_scale, 0.0))
            decayed = [i for i, name in enumerate(grads) if self.decays[name]]
            if decayed and not self.config.decay_before_clip:
                terms = torch._foreach_mul([params[i] for i in decayed], weight_decay)
                torch._foreach_add_([sums[i] for i in decayed], terms)
            torch._foreach_mul_(momenta, torch.where(go, self.config.momentum, 1.0))
            torch._foreach_add_(momenta, sums)
            torch._foreach_sub_(params, torch._foreach_mul(momenta, lr))
        self.refresh_codes()

    def state(self) -> dict[str, Tensor]:
        return {f"momentum.{name}": value for name, value in self.momenta.items()}
