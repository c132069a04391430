"""Everything that is measured of a model at an evaluated step of a collapse experiment."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bitnet_ext import metrics
from bitnet_ext.inference import generate
from bitnet_ext.metrics.generation import NEW_TOKENS
from bitnet_ext.models import BitNetForCausalLM
from bitnet_ext.training import EvaluatedStep
from bitnet_ext.training.optimizer import parameter_group

#: Seed of the random prompts, the same for every run of every study.
PROMPT_SEED = 20
#: Random prompts of the expected count; the first 20 are the report's.
PROMPTS = 256
#: Probability of the nucleus that continuations are sampled from.
NUCLEUS = 0.95
#: Names of the groups of parameters in the measurements of the decay.
_GROUPS = {
    "gains": "gains",
    "final_gain": "final_gain",
    "embedding": "embedding",
    "head": "lm_head",
    "linear": "latent",
}


class CollapseEvaluator:
    """The measurements of an "eval" line: see ``bitnet_ext.metrics`` for each one's definition.

    Args:
        heldout: token ids [n] that training never sees.
        unigram_log_probs: float64 [V] of the training text.
        seq_len: of the rows.
        max_tokens: predictions per evaluation.
        device: of the model.
        seen: bool [V], which ids the training text has; None for all.
        generation: whether the last evaluation also measures generated text, which takes seconds on a GPU and half a
            minute on a CPU.
    """

    def __init__(
        self,
        heldout: NDArray[Any],
        unigram_log_probs: NDArray[np.float64],
        *,
        seq_len: int,
        max_tokens: int,
        device: torch.device,
        seen: NDArray[np.bool_] | None = None,
        generation: bool = False,
    ) -> None:
        self.generation = generation
        self.heldout = heldout
        self.seq_len = seq_len
        self.max_tokens = max_tokens
        self.device = device
        self.unigram = torch.from_numpy(unigram_log_probs)
        self.row_bins = metrics.row_bins(self.unigram, None if seen is None else torch.from_numpy(seen)).to(
            device
        )
        self.prompts = metrics.fixed_prompts(len(unigram_log_probs), PROMPTS, seed=PROMPT_SEED).to(device)
        self._codes: list[metrics.PackedCodes] = []
        self._before: dict[str, Tensor] = {}

    def before_step(self, model: BitNetForCausalLM) -> None:
        self._codes = metrics.packed_codes(model)
        self._before = {name: p.detach().clone() for name, p in model.named_parameters()}

    def evaluate(self, model: BitNetForCausalLM, step: EvaluatedStep) -> dict[str, Any]:
        codes = metrics.packed_codes(model)
        result: dict[str, Any] = metrics.decay_shares(self._decay_terms(step))
        self._before = {}
        result |= metrics.evaluate_heldout(
            model,
            self.heldout,
            self.unigram,
            seq_len=self.seq_len,
            max_tokens=self.max_tokens,
            batch_rows=max(1, 4096 // self.seq_len),
            device=self.device,
        )
        result["unique_of_20"] = metrics.unique_predictions(model, self.prompts[:20])
        result["unique_20_random"] = metrics.expected_unique(model, self.prompts)
        result |= metrics.weight_norms(model)
        result |= metrics.row_norms(model, self.row_bins)
        result |= metrics.code_fractions(codes)
        result["flip_rate"] = metrics.flip_rate(self._codes, codes)
        result |= metrics.threshold_statistics(model)
        if step.last and self.generation and math.isfinite(result["heldout_cross_entropy"]):
            result |= self._generated(model)
        return result

    def _generated(self, model: BitNetForCausalLM) -> dict[str, Any]:
        """Measures of continuations of held-out text, by the likeliest token and by nucleus sampling."""
        result: dict[str, Any] = {}
        prompts = metrics.heldout_prompts(self.heldout).to(self.device)
        for name, temperature, top_p in (("greedy", 0.0, None), ("nucleus", 1.0, NUCLEUS)):
            tokens = generate(model, prompts, NEW_TOKENS, temperature=temperature, top_p=top_p, seed=0)
            measured = metrics.continuation_metrics(tokens[:, prompts.shape[1] :].cpu())
            result |= {f"{name}_{key}": value for key, value in measured.items()}
        return result

    def _decay_terms(self, step: EvaluatedStep) -> dict[str, list[metrics.DecayTerms]]:
        """What the step's decay competed with, by groups of parameters."""
        optimizer, config = step.optimizer, step.optimizer.config
        coupled = config.optimizer == "adam_l2"
        clip = 1.0 if config.grad_clip is None else min(1.0, config.grad_clip / (step.grad_norm + 1e-6))
        groups: dict[str, list[metrics.DecayTerms]] = {name: [] for name in _GROUPS.values()}
        for name, p in optimizer.named.items():
            if (
                name not in self._before or name not in optimizer.exp_avg
            ):  # of Muon: no Adam step to compare with
                continue
            if coupled:
                if p.grad is None:
                    continue
                rival = p.grad.detach() * clip
            else:
                m = optimizer.exp_avg[name] / (1 - config.beta1**step.step)
                v = optimizer.exp_avg_sq[name] / (1 - config.beta2**step.step)
                rival = m / (v.sqrt_() + config.eps)
            decay = step.weight_decay if optimizer.decays[name] else 0.0
            terms = metrics.DecayTerms(self._before[name], decay, rival)
            groups[_GROUPS[parameter_group(name, p)]].append(terms)
        return groups
