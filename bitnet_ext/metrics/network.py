"""Sizes of a model's parameters, over all and by the frequency of their token: what an L2 penalty drives to zero."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bitnet_ext.metrics.distribution import frequency_bins
from bitnet_ext.metrics.measurement import Measurement, Numbers, in_blocks, sum_of
from bitnet_ext.nn import BitLinear, RMSNorm


def weight_norms(model: nn.Module) -> dict[str, float | None]:
    """Mean absolute values of groups of parameters.

    Args:
        model: has ``final_norm``, ``embed_tokens`` and ``head_weight`` as
        :class:`bitnet_ext.models.BitNetForCausalLM`.

    Returns:
        gain_mean_abs: over the elements of all RMSNorm gains, those inside BitLinear included.
        final_gain_mean_abs: of the gain before the head; when it goes to 0, so do all logits.
        embedding_mean_abs, lm_head_mean_abs: equal when the head is tied to the embedding.
        latent_mean_abs: over the weights of all BitLinear modules, quantised or not.
        None where a model has no such parameter.
    """
    return measure_weight_norms(model).result()


@torch.no_grad()
def measure_weight_norms(model: nn.Module) -> Measurement:
    """:func:`weight_norms` without waiting for the device."""
    gains: list[Tensor] = []
    latents: list[Tensor] = []
    for module in model.modules():
        gain: Tensor | None
        if isinstance(module, RMSNorm):
            gain = module.weight
        elif isinstance(module, BitLinear):
            gain = module.norm_weight
            latents.append(module.weight)
        else:
            continue
        if gain is not None:
            gains.append(gain)
    final_gain = getattr(model.final_norm, "weight", None)
    groups: dict[str, list[Tensor]] = {
        "gain_mean_abs": gains,
        "final_gain_mean_abs": [] if final_gain is None else [final_gain],
        "embedding_mean_abs": [model.embed_tokens.weight],  # type: ignore[list-item, union-attr]
        "lm_head_mean_abs": [model.head_weight],  # type: ignore[list-item]
        "latent_mean_abs": latents,
    }
    tensors = [tensor.detach().float() for group in groups.values() for tensor in group]
    sizes = {name: [tensor.numel() for tensor in group] for name, group in groups.items()}

    def finish(arrays: Sequence[Numbers]) -> dict[str, Any]:
        totals = iter(arrays[0].tolist())
        sums = {name: sum(next(totals) for _ in numbers) for name, numbers in sizes.items()}
        return {name: sums[name] / sum(numbers) if numbers else None for name, numbers in sizes.items()}

    totals = [sum_of([part.abs().sum() for (part,) in in_blocks(tensor)]) for tensor in tensors]
    return Measurement((torch.stack(totals),), finish)


#: Names of the bins of :func:`row_norms`: those of :func:`frequency_bins`, and ids the training text does not have.
ROW_BINS = ("head", "torso", "tail", "unseen")


def row_bins(unigram_log_probs: Tensor | np.ndarray, seen: Tensor | None = None) -> Tensor:
    """Bin of each id for :func:`row_norms`: 0 head, 1 torso, 2 tail, 3 unseen, int64 [V].

    Args:
        unigram_log_probs: [V], see :func:`bitnet_ext.metrics.frequency_bins`.
        seen: bool [V], whether the training text has the id; None for all.
    """
    bins = frequency_bins(unigram_log_probs)
    return bins if seen is None else torch.where(seen.to(bins.device), bins, len(ROW_BINS) - 1)


def row_norms(model: nn.Module, bins: Tensor) -> dict[str, float | None]:
    """Mean Euclidean norm of the rows of embedding and head, by the frequency of their token.

    Args:
        model: has ``embed_tokens`` and ``head_weight``. bins: int64 [V] of :func:`row_bins`, on its device.

    Returns:
        embedding_norm_<bin> and lm_head_norm_<bin> for the bins of ``ROW_BINS``; None where no id is in a bin.
    """
    return measure_row_norms(model, bins).result()


@torch.no_grad()
def measure_row_norms(model: nn.Module, bins: Tensor) -> Measurement:
    """:func:`row_norms` without waiting for the device."""
    matrices: dict[str, Tensor] = {
        "embedding": model.embed_tokens.weight,  # type: ignore[dict-item, union-attr]
        "lm_head": model.head_weight,  # type: ignore[dict-item]
    }
    bin_of = torch.nn.functional.one_hot(bins, len(ROW_BINS)).double()
    sums = [bin_of.sum(0)]
    sums += [
        torch.linalg.vector_norm(matrix.detach().float(), dim=1).double() @ bin_of
        for matrix in matrices.values()
    ]

    def finish(arrays: Sequence[Numbers]) -> dict[str, Any]:
        counts, *table = arrays[0].tolist()
        return {
            f"{name}_norm_{bin_name}": total / count if count else None
            for name, totals in zip(matrices, table, strict=True)
            for bin_name, count, total in zip(ROW_BINS, counts, totals, strict=True)
        }

    return Measurement((torch.stack(sums),), finish)
