"""Everything that is measured of a model at an evaluated step of a collapse experiment."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bitnet_ext import metrics
from bitnet_ext.models import BitNetForCausalLM

#: Seed of the report's 20 random prompts, the same for every run of every study.
PROMPT_SEED = 20


class CollapseEvaluator:
    """The measurements of an "eval" line: see ``bitnet_ext.metrics`` for each one's definition.

    Args:
        heldout: token ids [n] that training never sees.
        unigram_log_probs: float64 [V] of the training text.
        seq_len: of the rows.
        max_tokens: predictions per evaluation.
        device: of the model.
    """

    def __init__(
        self,
        heldout: NDArray[Any],
        unigram_log_probs: NDArray[np.float64],
        *,
        seq_len: int,
        max_tokens: int,
        device: torch.device,
    ) -> None:
        self.heldout = heldout
        self.seq_len = seq_len
        self.max_tokens = max_tokens
        self.device = device
        self.unigram = torch.from_numpy(unigram_log_probs)
        self.prompts = metrics.fixed_prompts(len(unigram_log_probs), seed=PROMPT_SEED).to(device)
        self._codes: list[metrics.PackedCodes] = []

    def before_step(self, model: BitNetForCausalLM) -> None:
        self._codes = metrics.packed_codes(model)

    def evaluate(self, model: BitNetForCausalLM) -> dict[str, Any]:
        codes = metrics.packed_codes(model)
        result: dict[str, Any] = metrics.evaluate_heldout(
            model,
            self.heldout,
            self.unigram,
            seq_len=self.seq_len,
            max_tokens=self.max_tokens,
            batch_rows=max(1, 4096 // self.seq_len),
            device=self.device,
        )
        result["unique_of_20"] = metrics.unique_predictions(model, self.prompts)
        result |= metrics.weight_norms(model)
        result |= metrics.code_fractions(codes)
        result["flip_rate"] = metrics.flip_rate(self._codes, codes)
        return result
