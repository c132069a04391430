"""The training objective of a language model as one module, which DDP can wrap."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from bitnet_ext import ops
from bitnet_ext.models import BitNetForCausalLM
from bitnet_ext.training.config import TrainConfig


class LanguageModelLoss(nn.Module):
    """Ids and targets int64 [B, seq_len] -> (objective, cross-entropy, mean predictive entropy)."""

    def __init__(self, model: BitNetForCausalLM, config: TrainConfig) -> None:
        super().__init__()
        self.model = model
        self.config = config
        #: Called when the body has been run and before the output matrix is read.
        self.before_head: Callable[[], None] | None = None

    def forward(self, ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        config = self.config
        bf16 = config.precision == "bf16"
        with torch.autocast(ids.device.type, dtype=torch.bfloat16, enabled=bf16):
            hidden = self.model.hidden_states(ids)
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
