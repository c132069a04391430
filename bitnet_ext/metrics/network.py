"""Sizes of a model's parameters: the quantities that a coupled L2 penalty drives to zero."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bitnet_ext.nn import BitLinear, RMSNorm


@torch.no_grad()
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
    tensors = [tensor for group in groups.values() for tensor in group]
    # One transfer for all sums: on a GPU every read of a number waits for the stream.
    totals = iter(torch.stack([tensor.detach().float().abs().sum().double() for tensor in tensors]).tolist())
    result: dict[str, float | None] = {}
    for name, group in groups.items():
        total = sum(next(totals) for _ in group)
        result[name] = total / sum(tensor.numel() for tensor in group) if group else None
    return result
