"""The optimiser of the Trainer: clipping, the update and the new ternary codes, in four launches on CUDA."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bitnet_ext import ops
from bitnet_ext.ops import QuantizedWeight
from bitnet_ext.training.config import TrainConfig
from bitnet_ext.training.muon import Muon


def parameter_group(name: str, p: Tensor) -> str:
    """Which of ``config.DECAY_GROUPS`` a model's parameter belongs to."""
    if p.dim() < 2:
        return "final_gain" if name.startswith("final_norm.") else "gains"
    if "embed_tokens" in name:
        return "embedding"
    return "head" if "lm_head" in name else "linear"


class RowGradient(NamedTuple):
    """The gradient of an embedding [V, H] by rows: see :func:`bitnet_ext.ops.sum_rows`."""

    name: str
    sums: Tensor
    slots: Tensor


class FusedAdam:
    """`adam_l2`, `adamw` or `muon` over all parameters at once.

    Learning rate, weight decay and bias corrections are read from a device tensor at every step, so a
    captured CUDA graph follows the schedule. With `muon` the matrices between embedding and head go through
    :class:`Muon`, all else through AdamW.

    A gradient with NaN or Inf stops all further updates, without a word to the host: parameters and moments
    stay those of the last good step. :meth:`first_bad_step` says when it happened and where.

    Args:
        model: every parameter that requires a gradient is optimised; float32.
        config: optimizer, betas, eps, muon_momentum, decay_norms, decay_embeddings, decay_only and grad_clip are
            used.
    """

    def __init__(self, model: nn.Module, config: TrainConfig) -> None:
        self.config = config
        self.named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not self.named:
            raise ValueError("FusedAdam: model must have parameters that require a gradient, it has none")
        for name, p in self.named.items():
            if p.dtype != torch.float32:
                raise ValueError(f"FusedAdam: parameter {name} must be float32, got {p.dtype}")
        #: Whether weight decay reaches a parameter, by name.
        self.decays = {name: self._decays(name, p) for name, p in self.named.items()}
        matrices = {name: p for name, p in self.named.items() if self._is_inner_matrix(name, p)}
        self._muon = Muon(matrices, config.muon_momentum) if config.optimizer == "muon" and matrices else None
        self._by_adam = [name for name in self.named if self._muon is None or name not in matrices]
        self.exp_avg = {name: torch.zeros_like(self.named[name]) for name in self._by_adam}
        self.exp_avg_sq = {name: torch.zeros_like(self.named[name]) for name in self._by_adam}
        device = next(iter(self.named.values())).device
        self._latch = torch.zeros(2 + len(self.named), dtype=torch.float64, device=device)
        self._latch[0] = -1.0
        self._no_step = torch.zeros(1, dtype=torch.int64, device=device)
        self._clipped: list[str] = []  # names behind the entries of the latch
        self._sparse: Tensor | None = None  # the sparse gradient, if there is one, and what it was made to
        self.row_gradient: RowGradient | None = None
        self._groups: list[list[Tensor]] = []
        self._codes: list[QuantizedWeight] = []
        self._ternary: list[str] = []  # names of the weights of the groups, in order
        self._abs_sums: Tensor | None = None

    @staticmethod
    def _is_inner_matrix(name: str, p: Tensor) -> bool:
        return p.dim() == 2 and "embed_tokens" not in name and "lm_head" not in name

    def _decays(self, name: str, p: nn.Parameter) -> bool:
        group = parameter_group(name, p)
        if self.config.decay_only is not None:
            return group in self.config.decay_only.split(",")
        if group in ("gains", "final_gain"):
            return self.config.decay_norms
        if group in ("embedding", "head"):
            return self.config.decay_embeddings
        return True

    def keep_codes(self, groups: Sequence[Sequence[Tensor]], codes: Sequence[QuantizedWeight]) -> None:
        """From now on every update also quantises these groups of parameters into these codes."""
        names = {id(p): name for name, p in self.named.items()}
        self._groups, self._codes = [list(group) for group in groups], list(codes)
        self._ternary = [names[id(w)] for group in groups for w in group]
        by_adam = self._ternary and set(self._ternary) <= set(self._by_adam)
        self._abs_sums = ops.abs_sums_like([w for group in groups for w in group]) if by_adam else None

    def refresh_codes(self) -> None:
        """Quantises the groups of :meth:`keep_codes` from the parameters as they are."""
        if self._groups:
            ops.quantize_weight_groups_(self._groups, self._codes)

    def zero_grad(self) -> None:
        for p in self.named.values():
            p.grad = None
        self._sparse, self.row_gradient = None, None

    def grad_norm_and_scale(
        self, step: Tensor | None = None, known: tuple[str, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Global gradient norm and the factor that clips it to grad_clip, float32 [] each, without a sync.

        The factor is NaN from the first step on whose norm is not finite; `step` int64 [1] is the step's number.
        known: a parameter's name and :func:`bitnet_ext.ops.square_partials` of its gradient.
        """
        grads = self.gradients()
        self._clipped = list(grads)
        return ops.clip_gradients_(
            list(grads.values()),
            self._no_step if step is None else step,
            self.config.grad_clip,
            self._latch[: 2 + len(grads)],
            known=None if known is None else (self._clipped.index(known[0]), known[1]),
        )

    def gradients(self, slots: Tensor | None = None) -> dict[str, Tensor]:
        """The gradients there are; of a sparse one the rows, with `row_gradient` to go with them.

        slots: of the ids of the sparse one, if they are known (:func:`bitnet_ext.ops.row_slots`).
        """
        grads = {name: p.grad for name, p in self.named.items() if p.grad is not None}
        by_rows = [name for name, grad in grads.items() if grad.is_sparse]
        if len(by_rows) > 1:
            raise ValueError(
                f"FusedAdam: at most one gradient may be sparse, got those of {', '.join(by_rows)}"
            )
        if not by_rows:
            self._sparse, self.row_gradient = None, None
        elif self._sparse is not grads[by_rows[0]]:
            self._sparse, name = grads[by_rows[0]], by_rows[0]
            ids, rows = self._sparse._indices()[0], self._sparse._values()
            if slots is None:
                slots = ops.row_slots(ids, self.named[name].shape[0])
            self.row_gradient = RowGradient(name, ops.sum_rows(ids, rows, slots), slots)
        if self.row_gradient is not None:
            grads[self.row_gradient.name] = self.row_gradient.sums
        return grads

    def first_bad_step(self) -> tuple[int, list[str]] | None:
        """The number of the first step whose gradient norm was not finite, and the parameters whose gradient
        held NaN or Inf. Waits for the device."""
        latch = self._latch.cpu()
        if not latch[0] >= 0:
            return None
        finite = torch.isfinite(latch[2 : 2 + len(self._clipped)]).tolist()
        return int(latch[0]), [name for name, good in zip(self._clipped, finite, strict=True) if not good]

    def forget_bad_step(self) -> None:
        """Lets updates happen again after a gradient that was not finite."""
        self._latch[0] = -1.0

    def step(self, hyper: Tensor, grad_scale: Tensor, *, without: Collection[str] = ()) -> None:
        """One update, and the new codes.

        Gradients may be dense, and one of them sparse in its rows, as of an ``nn.Embedding(sparse=True)``.

        Args:
            hyper: float32 [5], a row of :func:`bitnet_ext.training.schedules.hyper_table`; with Adam the first
                four suffice.
            grad_scale: of :meth:`grad_norm_and_scale`.
            without: parameters that are updated elsewhere; none of them ternary.
        """
        if self._muon is not None:
            self._muon.step(hyper[4], hyper[1], grad_scale)
        sums = self._abs_sums
        grads = self.gradients()
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
                decay=[self.decays[name] for name in names],
                ternary=[i < len(first) for i in range(len(names))],
                abs_sums=sums,
                slots=None if row_gradient is None else row_gradient.slots,
                row_param=-1 if row_gradient is None else names.index(row_gradient.name),
            )
        if self._groups:
            ops.quantize_weight_groups_(self._groups, self._codes, sums)

    def step_rows(self, ids: Tensor, place: Tensor, hyper: Tensor, grad_scale: Tensor) -> None:
        """The update of the rows `ids` int64 [T] of the parameter of `row_gradient`.

        place: :func:`bitnet_ext.ops.row_slots` of ids, which tells :meth:`step_beside` what was done here.
        """
        assert self.row_gradient is not None
        name, sums, slots = self.row_gradient
        ops.adam_rows_(
            self.named[name].detach(),
            sums,
            self.exp_avg[name],
            self.exp_avg_sq[name],
            ids,
            place,
            slots,
            hyper[:4],
            grad_scale,
            beta1=self.config.beta1,
            beta2=self.config.beta2,
            eps=self.config.eps,
            decoupled=self._decoupled,
            decay=self.decays[name],
        )

    def step_beside(
        self,
        grads: dict[str, Tensor],
        rows: tuple[RowGradient, slice, Tensor] | None,
        hyper: Tensor,
        grad_scale: Tensor,
        num_blocks: int,
    ) -> None:
        """The update of large parameters that are not ternary, in a launch that leaves room for other streams.

        Args:
            grads: dense, by name.
            rows: a gradient by rows, which rows of its parameter to update, and where :meth:`step_rows` was.
            num_blocks: of the launch.
        """
        whole = slice(None)
        parts = [(name, whole, grad) for name, grad in grads.items()]
        if rows is not None:
            parts.append((rows[0].name, rows[1], rows[0].sums))
        ops.adam_step_(
            [self.named[name].detach()[part] for name, part, _ in parts],
            [grad for *_, grad in parts],
            [self.exp_avg[name][part] for name, part, _ in parts],
            [self.exp_avg_sq[name][part] for name, part, _ in parts],
            hyper[:4],
            grad_scale,
            beta1=self.config.beta1,
            beta2=self.config.beta2,
            eps=self.config.eps,
            decoupled=self._decoupled,
            decay=[self.decays[name] for name, *_ in parts],
            slots=None if rows is None else rows[0].slots[rows[1]],
            row_param=-1 if rows is None else len(parts) - 1,
            done=None if rows is None else rows[2][rows[1]],
            num_blocks=num_blocks,
        )

    @property
    def _decoupled(self) -> bool:
        return self.config.optimizer != "adam_l2"

    def mark_changed(self) -> None:
        """Counts an update in the tensors' version counters, which a replayed graph does not do."""
        torch.autograd.graph.increment_version([*self.named.values(), *self.state().values()])

    def state(self) -> dict[str, Tensor]:
        """The moments, by flat names, for a checkpoint."""
        moments = {f"exp_avg.{name}": value for name, value in self.exp_avg.items()}
        moments |= {f"exp_avg_sq.{name}": value for name, value in self.exp_avg_sq.items()}
        if self._muon is not None:
            moments |= {f"momentum.{name}": value for name, value in self._muon.momenta.items()}
        return moments

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensor]) -> None:
        for key, value in self.state().items():
            value.copy_(state[key])
