"""The training objective of a language model as one module, which DDP can wrap."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bitnet_ext import ops
from bitnet_ext.models import BitNetForCausalLM
from bitnet_ext.training.config import TrainConfig

#: A loss of one's own: of the model and ids and targets int64 [B, seq_len], the loss (a tensor of one number) alone or
#: with named parts of it.
LossFunction = Callable[[nn.Module, Tensor, Tensor], "Tensor | tuple[Tensor, Mapping[str, Tensor | float]]"]

#: Parts of a loss of one's own that a step's record has room for.
MAX_PARTS = 8
PARTS = ("cross_entropy", "entropy")


class LanguageModelLoss(nn.Module):
    """Ids and targets int64 [B, seq_len] -> (objective, its parts ...).

    Args:
        model, config: of the run.
        loss_fn: computes the loss instead of the terms of the configuration.
    """

    def __init__(
        self, model: BitNetForCausalLM, config: TrainConfig, loss_fn: LossFunction | None = None
    ) -> None:
        super().__init__()
        self.model = model
        self.config = config
        self.loss_fn = loss_fn
        #: Names of the parts: cross-entropy and mean predictive entropy, or those of loss_fn after the first call.
        self.parts: tuple[str, ...] = PARTS if loss_fn is None else ()
        #: Called when the body has been run and before the output matrix is read.
        self.before_head: Callable[[], None] | None = None

    def forward(self, ids: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        if self.loss_fn is not None:
            return self._own(self.loss_fn, ids, targets)
        config = self.config
        bf16 = config.precision == "bf16"
        with torch.autocast(ids.device.type, dtype=torch.bfloat16, enabled=bf16):
            separator = config.document_separator
            documents = None if separator is None else self.model.document_numbers(ids, separator)
            hidden = self.model.hidden_states(ids, documents=documents)
        if self.before_head is not None:
            self.before_head()
        out = ops.linear_cross_entropy(
            hidden.bfloat16() if bf16 else hidden,
            self.model.head_weight,
            targets,
            label_smoothing=config.label_smoothing,
            z_loss=config.z_loss,
            entropy_weight=config.entropy_weight,
            diversity_weight=config.diversity_weight,
            output_l2=config.output_l2,
        )
        return out.loss, out.cross_entropy, out.entropy

    def _own(self, loss_fn: LossFunction, ids: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        bf16 = self.config.precision == "bf16"
        with torch.autocast(ids.device.type, dtype=torch.bfloat16, enabled=bf16):
            out: Any = loss_fn(self.model, ids, targets)
        loss, parts = out if isinstance(out, tuple) else (out, {})
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
            found = (
                f"a tensor of shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            )
            raise ValueError(
                f"Trainer: loss_fn must return a loss with a gradient, one number, alone or with a dict of parts; "
                f"got {found}"
            )
        if len(parts) > MAX_PARTS or {"loss", "grad_norm", "step", "kind"} & set(parts):
            raise ValueError(
                f"Trainer: loss_fn must return at most {MAX_PARTS} parts, none named loss, grad_norm, step or kind; "
                f"got {', '.join(parts)}"
            )
        self.parts = tuple(parts)
        values = [torch.as_tensor(value, dtype=torch.float32, device=ids.device) for value in parts.values()]
        return (loss.float().reshape(()), *(value.detach().reshape(()) for value in values))
