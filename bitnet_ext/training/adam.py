"""Adam and AdamW for all parameters, in one pass that also sums up what the new ternary codes need."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

from bitnet_ext import ops
from bitnet_ext.ops import QuantizedWeight
from bitnet_ext.training.config import TrainConfig
from bitnet_ext.training.muon import Muon
from bitnet_ext.training.optimizer import Optimizer


class FusedAdam(Optimizer):
    """`adam_l2`, `adamw` or `muon`.

    Bias corrections are read from the device as learning rate and weight decay are. With `muon` the matrices between
    embedding and head go through :class:`Muon`, all else through AdamW.

    Args:
        model, config: see :class:`Optimizer`; betas, eps and muon_momentum are used too.
    """

    optimizers = ("adam_l2", "adamw", "muon")

    def __init__(self, model: nn.Module, config: TrainConfig) -> None:
        super().__init__(model, config)
        matrices = {name: p for name, p in self.named.items() if self._is_inner_matrix(name, p)}
        self._muon = Muon(matrices, config.muon_momentum) if config.optimizer == "muon" and matrices else None
        self._by_adam = [name for name in self.named if self._muon is None or name not in matrices]
        self.exp_avg = {name: torch.zeros_like(self.named[name]) for name in self._by_adam}
        self.exp_avg_sq = {name: torch.zeros_like(self.named[name]) for name in self._by_adam}
        self._abs_sums: Tensor | None = None

    @staticmethod
    def _is_inner_matrix(name: str, p: Tensor) -> bool:
        return p.dim() == 2 and "embed_tokens" not in name and "lm_head" not in name

    @property
    def takes_rows(self) -> bool:
        return not self.config.decay_before_clip  # which adds to every row

    def keep_codes(self, groups: Sequence[Sequence[Tensor]], codes: Sequence[QuantizedWeight]) -> None:
        super().keep_codes(groups, codes)
        by_adam = self._ternary and set(self._ternary) <= set(self._by_adam)
        self._abs_sums = ops.abs_sums_like([w for group in groups for w in group]) if by_adam else None

    def step(self, hyper: Tensor, grad_scale: Tensor, *, without: Collection[str] = ()) -> None:
        """One update, and the new codes.

        Gradients may be dense, and one of them sparse in its rows, as of an ``nn.Embedding(sparse=True)``.

        Args:
            hyper, grad_scale: see :meth:`Optimizer.step`; of hyper the first four suffice without Muon.
            without: parameters that are updated elsewhere; none of them ternary.
        """
        if self._muon is not None:
            self._muon.step(hyper[4], hyper[1], grad_scale)
        sums = self._abs_sums
        grads = self._clipped_gradients()
        if not grads.keys() >= set(self._ternary):
            sums = None  # not every weight goes through the update
        # Ternary weights in the order of their groups, first: their blocks are the longest.
        first = [] if sums is None else self._ternary
        rest = [name for name in self._by_adam if name not in set(first)]
        names = [name for name in [*first, *rest] if name in grads and name not in without]
        row_gradient = self.row_gradient
        if row_gradient is not None and row_gradient.name in without:
            row_gradient = None
        if names:
            ops.adam_step_(
                [self.named[name].detach() for name in names],
                [grads[name] for name in names],
                [self.exp_avg[name] for name in names],
                [self.exp_avg_sq[name] for name in names],
                hyper[:4],
                grad_scale,
                beta1=self.config.beta1,
                beta2=self.config.beta2,
                eps=self.config.eps,
                decoupled=self._decoupled,
                decay=[self.decays[name] and not self.config.decay_before_clip for name in names],
                ternary=[i < len(first) for i in range(len(names))],
                abs_sums=sums,
                slots=None if row_gradient is None else row_gradient.slots,
                row_param=-1 if row_gradient is None else names.index(row_gradient.name),
            )
        self.refresh_codes(sums)

    def step_rows(
        self,
        name: str,
        sums: Sequence[Tensor],
        slots: Tensor,
        hyper: Tensor,
        grad_scales: Sequence[Tensor],
        ids: Tensor | None = None,
        num_blocks: int = 0,
    ) -> None:
        """The updates for which rows of the embedding `name` wait: see :func:`bitnet_ext.ops.adam_rows_`.

        Args:
            sums, grad_scales: of each pending step, of :attr:`row_gradient` and :meth:`grad_norm_and_scale`.
            slots, hyper: of all steps.
            ids: of the next step, for its rows only.
            num_blocks: of a launch for all rows.
        """
        ops.adam_rows_(
            self.named[name].detach(),
            self.exp_avg[name],
            self.exp_avg_sq[name],
            sums,
            slots,
            hyper,
            grad_scales,
            ids,
            beta1=self.config.beta1,
            beta2=self.config.beta2,
            eps=self.config.eps,
            decoupled=self._decoupled,
            decay=self.decays[name],
            num_blocks=num_blocks,
        )

    def step_beside(
        self, name: str, grad: Tensor, hyper: Tensor, grad_scale: Tensor, num_blocks: int
    ) -> None:
        """The update of a large parameter that is not ternary, in a launch that leaves room for other streams.

        Args:
            grad: dense.
            num_blocks: of the launch.
        """
        ops.adam_step_(
            [self.named[name].detach()],
            [grad],
            [self.exp_avg[name]],
            [self.exp_avg_sq[name]],
            hyper[:4],
            grad_scale,
            beta1=self.config.beta1,
            beta2=self.config.beta2,
            eps=self.config.eps,
            decoupled=self._decoupled,
            decay=self.decays[name],
            num_blocks=num_blocks,
        )

    @property
    def _decoupled(self) -> bool:
        return self.config.optimizer != "adam_l2"

    def state(self) -> dict[str, Tensor]:
        moments = {f"exp_avg.{name}": value for name, value in self.exp_avg.items()}
        moments |= {f"exp_avg_sq.{name}": value for name, value in self.exp_avg_sq.items()}
        if self._muon is not None:
            moments |= {f"momentum.{name}": value for name, value in self._muon.momenta.items()}
        return moments
