"""What the Trainer's optimisers share: parameters, gradients, weight decay, clipping, and the codes to keep."""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Iterator, Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from bitnet_ext import ops
from bitnet_ext.ops import QuantizedWeight
from bitnet_ext.training.config import TrainConfig


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


class Optimizer(abc.ABC):
    """All parameters of a model at once; a subclass has the rule that updates them.

    Learning rate and weight decay are read from a device tensor at every step, so a captured CUDA graph follows the
    schedule. A gradient with NaN or Inf stops all further updates, without a word to the host: parameters and moments
    stay those of the last good step. :meth:`first_bad_step` says when it happened and where.

    A step is :meth:`zero_grad`, a backward, :meth:`add_decay`, :meth:`grad_norm_and_scale`, :meth:`step`.

    Args:
        model: every parameter that requires a gradient is optimised; float32.
        config: optimizer, decay_norms, decay_embeddings, decay_only, decay_before_clip, grad_clip and what the rule
            has are used.
    """

    #: Values of ``TrainConfig.optimizer`` that the rule is for.
    optimizers: ClassVar[tuple[str, ...]]

    def __init__(self, model: nn.Module, config: TrainConfig) -> None:
        own = type(self).__name__
        if config.optimizer not in self.optimizers:
            raise ValueError(
                f"{own}: optimizer must be one of {', '.join(self.optimizers)}, got {config.optimizer!r}"
            )
        self.config = config
        self.named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not self.named:
            raise ValueError(f"{own}: model must have parameters that require a gradient, it has none")
        for name, p in self.named.items():
            if p.dtype != torch.float32:
                raise ValueError(f"{own}: parameter {name} must be float32, got {p.dtype}")
        #: Whether weight decay reaches a parameter, by name.
        self.decays = {name: self._decays(name, p) for name, p in self.named.items()}
        device = next(iter(self.named.values())).device
        self._latch = torch.zeros(2 + len(self.named), dtype=torch.float64, device=device)
        self._latch[0] = -1.0
        self._no_step = torch.zeros(1, dtype=torch.int64, device=device)
        self._clipped: list[str] = []  # names behind the entries of the latch
        self._sparse: Tensor | None = None  # the sparse gradient, if there is one, and what it was made to
        self.row_gradient: RowGradient | None = None
        self._decayed: dict[str, Tensor] | None = None  # gradients with the L2 term, of add_decay
        self._groups: list[list[Tensor]] = []
        self._codes: list[QuantizedWeight] = []
        self._ternary: list[str] = []  # names of the weights of the groups, in order

    @property
    @abc.abstractmethod
    def takes_rows(self) -> bool:
        """Whether one gradient may be sparse in its rows, as of an ``nn.Embedding(sparse=True)``."""

    @abc.abstractmethod
    def step(self, hyper: Tensor, grad_scale: Tensor) -> None:
        """One update, and the new codes.

        Args:
            hyper: float32 [5], a row of :func:`bitnet_ext.training.schedules.hyper_table`.
            grad_scale: of :meth:`grad_norm_and_scale`.
        """

    @abc.abstractmethod
    def state(self) -> dict[str, Tensor]:
        """The moments, by flat names, for a checkpoint."""

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

    def refresh_codes(self, abs_sums: Tensor | None = None) -> None:
        """Quantises the groups of :meth:`keep_codes` from the parameters as they are.

        abs_sums: the sums of their magnitudes, where they are known (:func:`bitnet_ext.ops.adam_step_`).
        """
        if self._groups:
            ops.quantize_weight_groups_(self._groups, self._codes, abs_sums)

    def zero_grad(self) -> None:
        for p in self.named.values():
            p.grad = None
        self._sparse, self.row_gradient, self._decayed = None, None, None

    @torch.no_grad()
    def add_decay(self, weight_decay: Tensor) -> None:
        """With decay_before_clip adds weight_decay * p to the gradients that are clipped; else does nothing.

        The parameters' ``grad`` stay those of the loss.

        Args:
            weight_decay: float32 [] on the device.
        """
        if not self.config.decay_before_clip:
            return
        grads = self._dense_gradients()
        names = [name for name in grads if self.decays[name]]
        if names:
            sums = torch._foreach_mul([self.named[name].detach() for name in names], weight_decay)
            torch._foreach_add_(sums, [grads[name] for name in names])
            grads |= zip(names, sums, strict=True)
        self._decayed = grads

    def grad_norm_and_scale(
        self, step: Tensor | None = None, known: tuple[str, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Global gradient norm and the factor that clips it to grad_clip, float32 [] each, without a sync.

        The factor is NaN from the first step on whose norm is not finite; `step` int64 [1] is the step's number.
        known: a parameter's name and :func:`bitnet_ext.ops.square_partials` of its gradient.
        """
        grads = self._clipped_gradients()
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
                f"{type(self).__name__}: at most one gradient may be sparse, got those of {', '.join(by_rows)}"
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

    def _dense_gradients(self) -> dict[str, Tensor]:
        grads = self.gradients()
        if self.row_gradient is not None:
            raise ValueError(
                f"{type(self).__name__}: with optimizer {self.config.optimizer!r} and decay_before_clip "
                f"{self.config.decay_before_clip} gradients must be dense, that of {self.row_gradient.name} is sparse"
            )
        return grads

    def _clipped_gradients(self) -> dict[str, Tensor]:
        """The gradients that grad_scale is for: with decay_before_clip those of add_decay."""
        if not self.config.decay_before_clip:
            return self.gradients()
        if self._decayed is None:
            raise RuntimeError(
                f"{type(self).__name__}: with decay_before_clip add_decay comes before clipping"
            )
        return self._decayed

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

    @contextlib.contextmanager
    def held_still(self) -> Iterator[None]:
        """Within it steps do all their work but change neither parameters nor moments, as after a bad gradient."""
        before = self._latch.clone()
        self._latch[0] = 0.0
        try:
            yield
        finally:
            self._latch.copy_(before)

    def mark_changed(self) -> None:
        """Counts an update in the tensors' version counters, which a replayed graph does not do."""
        torch.autograd.graph.increment_version([*self.named.values(), *self.state().values()])

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensor]) -> None:
        for key, value in self.state().items():
            value.copy_(state[key])
