"""Everything that is measured of a model at an evaluated step of a collapse experiment."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bitnet_ext import metrics
from bitnet_ext._capture import places_of
from bitnet_ext.inference import generate
from bitnet_ext.metrics.generation import NEW_TOKENS
from bitnet_ext.models import BitNetForCausalLM
from bitnet_ext.training import EvaluatedStep, FusedAdam, Optimizer
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


def _place(model: BitNetForCausalLM, optimizer: Optimizer) -> object:
    """Where all is that a captured measurement reads again: parameters, gradients, buffers and moments."""
    tensors = [*model.parameters(), *model.buffers(), *optimizer.state().values()]
    for p in model.parameters():
        if p.grad is not None:
            tensors += [p.grad._indices(), p.grad._values()] if p.grad.is_sparse else [p.grad]
    return id(model), id(optimizer), places_of(tensors)


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
        self.device = device
        unigram = torch.from_numpy(unigram_log_probs)
        self._text = metrics.HeldOut(
            heldout,
            unigram,
            seq_len=seq_len,
            max_tokens=max_tokens,
            batch_rows=max(1, 4096 // seq_len),
            device=device,
        )
        seen_ids = None if seen is None else torch.from_numpy(seen)
        self._row_bins = metrics.row_bins(unigram, seen_ids).to(device)
        self._prompts = metrics.fixed_prompts(len(unigram_log_probs), PROMPTS, seed=PROMPT_SEED).to(device)
        self._texts = metrics.heldout_prompts(heldout).to(device)
        self._codes: list[metrics.PackedCodes] = []
        self._before: dict[str, Tensor] = {}
        # Of the step: the factor that clipped its gradient, weight decay, 1 - beta1^t, 1 - beta2^t.
        self._facts = torch.zeros(4, device=device)
        self._measured: tuple[object, metrics.Repeated] | None = None

    @torch.no_grad()
    def before_step(self, model: BitNetForCausalLM) -> None:
        """Keeps parameters and codes, in the same memory each time."""
        parameters = {name: p.detach() for name, p in model.named_parameters()}
        codes = metrics.packed_codes(model)
        if self._before.keys() != parameters.keys():
            self._before = {name: p.clone() for name, p in parameters.items()}
            self._codes = codes
            return
        new = [*parameters.values(), *(layer.packed for layer in codes)]
        kept = [*self._before.values(), *(layer.packed for layer in self._codes)]
        for mine, theirs in zip(kept, new, strict=True):
            mine.copy_(theirs)

    def evaluate(self, model: BitNetForCausalLM, step: EvaluatedStep) -> Callable[[], dict[str, Any]]:
        config = step.optimizer.config
        clip = 1.0 if config.grad_clip is None else min(1.0, config.grad_clip / (step.grad_norm + 1e-6))
        facts = [clip, step.weight_decay, 1 - config.beta1**step.step, 1 - config.beta2**step.step]
        self._facts.copy_(torch.tensor(facts))
        place = _place(model, step.optimizer)
        if self._measured is None or self._measured[0] != place:
            self._measured = (place, metrics.Repeated(self.device))
        measured = self._measured[1].launch(lambda: self._measure(model, step.optimizer))
        texts = self._generate(model) if step.last and self.generation else {}

        def result() -> dict[str, Any]:
            values = measured()
            if math.isfinite(values["heldout_cross_entropy"]):
                for name, tokens in texts.items():
                    found = metrics.continuation_metrics(tokens.cpu())
                    values |= {f"{name}_{key}": value for key, value in found.items()}
            return values

        return result

    @torch.no_grad()
    def _measure(self, model: BitNetForCausalLM, optimizer: Optimizer) -> metrics.Measurement:
        codes = metrics.packed_codes(model)
        return metrics.combine(
            [
                metrics.measure_decay_shares(self._decay_terms(optimizer)),
                self._text.measure(model),
                metrics.measure_unique(model, self._prompts, 20),
                metrics.measure_weight_norms(model),
                metrics.measure_row_norms(model, self._row_bins),
                metrics.measure_code_fractions(codes),
                metrics.measure_flip_rate(self._codes, codes),
                metrics.measure_thresholds(model),
            ]
        )

    def _generate(self, model: BitNetForCausalLM) -> dict[str, Tensor]:
        """Continuations of held-out text, by the likeliest token and by nucleus sampling, int64 [B, NEW_TOKENS]."""
        return {
            name: generate(model, self._texts, NEW_TOKENS, temperature=temperature, top_p=top_p, seed=0)[
                :, self._texts.shape[1] :
            ]
            for name, temperature, top_p in (("greedy", 0.0, None), ("nucleus", 1.0, NUCLEUS))
        }

    def _decay_terms(self, optimizer: Optimizer) -> dict[str, list[metrics.DecayTerms]]:
        """What the step's decay competed with, by groups of parameters."""
        clip, decay, correction1, correction2 = self._facts.unbind()
        config = optimizer.config
        groups: dict[str, list[metrics.DecayTerms]] = {name: [] for name in _GROUPS.values()}
        for name, p in optimizer.named.items():
            if name not in self._before:
                continue
            scale: Tensor | None = None
            rival: Tensor | metrics.AdamDirection
            if config.decay_is_coupled:
                if p.grad is None:
                    continue
                # Clipped with the decay in it, the gradient is scaled as the decay is.
                rival, scale = p.grad, None if config.decay_before_clip else clip
            else:
                if not isinstance(optimizer, FusedAdam) or name not in optimizer.exp_avg:
                    continue  # of Muon: no Adam step to compare with
                m, v = optimizer.exp_avg[name], optimizer.exp_avg_sq[name]
                rival = metrics.AdamDirection(m, v, correction1, correction2, config.eps)
            wd = decay if optimizer.decays[name] else 0.0
            terms = metrics.DecayTerms(self._before[name], wd, rival, scale)
            groups[_GROUPS[parameter_group(name, p)]].append(terms)
        return groups
