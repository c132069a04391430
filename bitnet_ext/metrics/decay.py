"""How far weight decay, not the gradient, decides where a parameter goes: a decay-driven death, measured directly.

Coupled decay (L2 in the gradient, ``torch.optim.Adam(weight_decay=...)``) adds wd * w to the clipped gradient before
Adam divides by its running size, so where |wd * w| is the larger, the parameter moves by about -lr * sign(w) whatever
wd is. Decoupled decay (AdamW, Loshchilov & Hutter 2019, arXiv:1711.05101) moves it by -lr * wd * w beside Adam's own
step -lr * m / (sqrt(v) + eps).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class DecayTerms:
    """One parameter at one step.

    Attributes:
        weight: before the step.
        weight_decay: 0 where the decay does not reach the parameter.
        rival: what the decay competes with, of the weight's shape or sparse in its rows: coupled decay, the clipped
            gradient; decoupled decay, m / (sqrt(v) + eps) with the bias-corrected moments after the step.
    """

    weight: Tensor
    weight_decay: float
    rival: Tensor


@torch.no_grad()
def decay_dominates(terms: DecayTerms) -> Tensor:
    """How many coordinates have |weight_decay * weight| > |rival|, int64 [] on the weight's device."""
    weight, rival = terms.weight.detach(), terms.rival.detach()
    if terms.weight_decay == 0.0:
        return torch.zeros((), dtype=torch.int64, device=weight.device)
    if rival.is_sparse:
        # Rows without a gradient: the decay is alone wherever the weight is not 0.
        rival = rival.coalesce()
        ids = rival.indices()[0]
        rows = weight[ids]
        absent = torch.count_nonzero(weight) - torch.count_nonzero(rows)
        return absent + (rows.abs() * terms.weight_decay > rival.values().abs()).sum()
    return (weight.abs() * terms.weight_decay > rival.abs()).sum()


def decay_shares(groups: dict[str, list[DecayTerms]]) -> dict[str, float | None]:
    """Share of the coordinates of each group of parameters that the decay dominates (:func:`decay_dominates`).

    Returns:
        decay_share_<group> in [0, 1] for each group, None for an empty one; decay_share over all of them.
    """
    sizes = {name: sum(t.weight.numel() for t in terms) for name, terms in groups.items()}
    everything = [terms for group in groups.values() for terms in group]
    counts = iter(torch.stack([decay_dominates(t) for t in everything]).tolist() if everything else [])
    totals = {name: sum(next(counts) for _ in terms) for name, terms in groups.items()}
    result: dict[str, float | None] = {
        f"decay_share_{name}": totals[name] / size if size else None for name, size in sizes.items()
    }
    size = sum(sizes.values())
    return {"decay_share": sum(totals.values()) / size if size else None} | result
