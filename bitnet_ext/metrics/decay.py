"""How far weight decay, not the gradient, decides where a parameter goes: a decay-driven death, measured directly.

Coupled decay (L2 in the gradient, ``torch.optim.Adam(weight_decay=...)``) adds wd * w to the clipped gradient before
Adam divides by its running size, so where |wd * w| is the larger, the parameter moves by about -lr * sign(w) whatever
wd is; under SGD by -lr * wd * w. Clipped with the gradient, it is scaled as the gradient is. Decoupled decay (AdamW,
Loshchilov & Hutter 2019, arXiv:1711.05101) moves it by -lr * wd * w beside Adam's own step -lr * m / (sqrt(v) + eps).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bitnet_ext import ops
from bitnet_ext.metrics.measurement import Measurement, Numbers, in_blocks, sum_of


@dataclass(frozen=True)
class AdamDirection:
    """Adam's own step by its learning rate, (m / correction1) / (sqrt(v / correction2) + eps).

    Attributes:
        m, v: exp_avg and exp_avg_sq after the step.
        correction1, correction2: 1 - beta^t of each, numbers or tensors [].
        eps: of the optimiser.
    """

    m: Tensor
    v: Tensor
    correction1: float | Tensor
    correction2: float | Tensor
    eps: float

    def of(self, m: Tensor, v: Tensor) -> Tensor:
        """The direction of a part of the parameter."""
        return (m / self.correction1).div_((v / self.correction2).sqrt_().add_(self.eps))


@dataclass(frozen=True)
class DecayTerms:
    """One parameter at one step.

    Attributes:
        weight: before the step.
        weight_decay: a number, or a tensor [] on the weight's device; 0 where the decay does not reach the parameter.
        rival: what the decay competes with: of coupled decay, the gradient, of the weight's shape or sparse in its
            rows; of decoupled decay, the optimiser's own step.
        rival_scale: factor of the rival, a tensor [] on its device; of a gradient, what clips it.
    """

    weight: Tensor
    weight_decay: float | Tensor
    rival: Tensor | AdamDirection
    rival_scale: Tensor | None = None


@torch.no_grad()
def decay_dominates(terms: DecayTerms) -> Tensor:
    """How many coordinates have |weight_decay * weight| > |rival|, int64 [] on the weight's device."""
    weight, rival = terms.weight.detach(), terms.rival
    if not isinstance(terms.weight_decay, Tensor) and terms.weight_decay == 0.0:
        return torch.zeros((), dtype=torch.int64, device=weight.device)

    def dominates(weight: Tensor, rival: Tensor) -> Tensor:
        scaled = rival if terms.rival_scale is None else rival * terms.rival_scale
        return weight.abs() * terms.weight_decay > scaled.abs()

    if isinstance(rival, AdamDirection):
        blocks = in_blocks(weight, rival.m, rival.v)
        return sum_of([dominates(part, rival.of(m, v)).sum() for part, m, v in blocks])
    rival = rival.detach()
    if not rival.is_sparse:
        return sum_of([dominates(*parts).sum() for parts in in_blocks(weight, rival)])
    # Rows without a gradient: the decay is alone wherever the weight is not 0. Each row that has one is looked at where
    # its id occurs first.
    ids, values = rival._indices()[0], rival._values()
    slots = ops.row_slots(ids[None], weight.shape[0])[0]
    sums = ops.sum_rows(ids, values, slots)
    first = slots[ids] == torch.arange(len(ids), device=ids.device)
    rows = weight[ids]
    alone = torch.count_nonzero(weight) - (first[:, None] & (rows != 0)).sum()
    alone = alone * (torch.as_tensor(terms.weight_decay, device=weight.device) != 0)
    return alone + (first[:, None] & dominates(rows, sums)).sum()


def decay_shares(groups: dict[str, list[DecayTerms]]) -> dict[str, float | None]:
    """Share of the coordinates of each group of parameters that the decay dominates (:func:`decay_dominates`).

    Returns:
        decay_share_<group> in [0, 1] for each group, None for an empty one; decay_share over all of them.
    """
    return measure_decay_shares(groups).result()


def measure_decay_shares(groups: dict[str, list[DecayTerms]]) -> Measurement:
    """:func:`decay_shares` without waiting for the device."""
    sizes = {name: [t.weight.numel() for t in terms] for name, terms in groups.items()}
    everything = [terms for group in groups.values() for terms in group]

    def finish(arrays: Sequence[Numbers]) -> dict[str, Any]:
        counts = iter(arrays[0].tolist() if arrays else [])
        totals = {name: sum(next(counts) for _ in numbers) for name, numbers in sizes.items()}
        size = sum(map(sum, sizes.values()))
        return {"decay_share": sum(totals.values()) / size if size else None} | {
            f"decay_share_{name}": totals[name] / sum(numbers) if numbers else None
            for name, numbers in sizes.items()
        }

    counted = (torch.stack([decay_dominates(t) for t in everything]),) if everything else ()
    return Measurement(counted, finish)
