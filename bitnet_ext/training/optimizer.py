"""Adam with coupled L2 or decoupled decay, updated by one fused kernel a parameter group."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bitnet_ext import ops
from bitnet_ext.training.config import TrainConfig


class FusedAdam:
    """The optimiser of :class:`Trainer`: `adam_l2` or `adamw` over two groups, decayed and not.

    Learning rate, weight decay and bias corrections are read from a device tensor at every step, so a
    captured CUDA graph follows the schedule.

    Args:
        model: every parameter that requires a gradient is optimised; float32.
        config: optimizer, betas, eps, decay_norms, decay_embeddings and grad_clip are used.
    """

    def __init__(self, model: nn.Module, config: TrainConfig) -> None:
        self.config = config
        self.named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not self.named:
            raise ValueError("FusedAdam: model must have parameters that require a gradient, it has none")
        for name, p in self.named.items():
            if p.dtype != torch.float32:
                raise ValueError(f"FusedAdam: parameter {name} must be float32, got {p.dtype}")
        self.exp_avg = {name: torch.zeros_like(p) for name, p in self.named.items()}
        self.exp_avg_sq = {name: torch.zeros_like(p) for name, p in self.named.items()}
        self._decayed = {name: self._decays(name, p) for name, p in self.named.items()}

    def _decays(self, name: str, p: nn.Parameter) -> bool:
        if p.dim() < 2:
            return self.config.decay_norms
        if "embed_tokens" in name or "lm_head" in name:
            return self.config.decay_embeddings
        return True

    def zero_grad(self) -> None:
        for p in self.named.values():
            p.grad = None

    def non_finite(self) -> list[str]:
        """Names of parameters whose gradient holds NaN or Inf."""
        return [
            name
            for name, p in self.named.items()
            if p.grad is not None and not bool(torch.isfinite(p.grad).all())
        ]

    def grad_norm_and_scale(self) -> tuple[Tensor, Tensor]:
        """Global gradient norm and the factor that clips it to grad_clip, float32 [] each, without a sync."""
        grads = [p.grad for p in self.named.values() if p.grad is not None]
        norm = ops.sum_of_squares(grads).sqrt().float()
        if self.config.grad_clip is None:
            return norm, torch.ones_like(norm)
        # As torch.nn.utils.clip_grad_norm_.
        return norm, (self.config.grad_clip / (norm + 1e-6)).clamp(max=1.0)

    def step(self, hyper: Tensor, grad_scale: Tensor) -> None:
        """One update; `hyper` float32 [4] as in :func:`bitnet_ext.ops.adam_step_`."""
        for decay in (True, False):
            names = [n for n, p in self.named.items() if self._decayed[n] == decay and p.grad is not None]
            if names:
                ops.adam_step_(
                    [self.named[n].detach() for n in names],
                    [self.named[n].grad for n in names],  # type: ignore[misc]
                    [self.exp_avg[n] for n in names],
                    [self.exp_avg_sq[n] for n in names],
                    hyper,
                    grad_scale,
                    beta1=self.config.beta1,
                    beta2=self.config.beta2,
                    eps=self.config.eps,
                    decoupled=self.config.optimizer == "adamw",
                    decay=decay,
                )

    def state(self) -> dict[str, Tensor]:
        """The moments, by flat names, for a checkpoint."""
        moments = {f"exp_avg.{name}": value for name, value in self.exp_avg.items()}
        return moments | {f"exp_avg_sq.{name}": value for name, value in self.exp_avg_sq.items()}

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensor]) -> None:
        for key, value in self.state().items():
            value.copy_(state[key])
