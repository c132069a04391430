"""Sizes of the groups of a network's parameters: at its initialisation, and in a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bitnet_ext import metrics, ops
from bitnet_ext.collapse.results import Row
from bitnet_ext.models import BitNetConfig
from bitnet_ext.ops.quantize import SCALE_FLOOR
from bitnet_ext.training import TrainConfig
from bitnet_ext.training.schedules import learning_rates, weight_decays

#: Keys of the sizes of groups of parameters, and what to call the groups.
SIZES = {
    "final_gain_mean_abs": "gain before the head",
    "lm_head_mean_abs": "output head",
    "gain_mean_abs": "norm gains",
    "embedding_mean_abs": "embedding",
    "latent_mean_abs": "weights of the linear layers",
}
_FOLDED_NORMAL = math.sqrt(2 / math.pi)  # mean |x| of N(0, 1)
_DEAD_TENSOR = 0.99  # share of zeros at which a tensor's codes count as all zero


@dataclass(frozen=True)
class TensorFacts:
    """One parameter of a checkpoint: mean |w|, the share of zero codes (None where it is not ternary)."""

    name: str
    numel: int
    mean_abs: float
    zero_share: float | None
    nonfinite: int


def initial_sizes(config: BitNetConfig) -> dict[str, float]:
    """Expected mean |w| of each group at the initialisation that a configuration names (see BitNetConfig)."""
    H, F, kv = config.hidden_size, config.intermediate_size, config.num_kv_heads * config.head_dim
    # (inputs, outputs, whether it is an output product) of the seven linear layers of a block
    shapes = [
        (H, H, False), (H, kv, False), (H, kv, False), (H, H, True), (H, F, False), (H, F, False), (F, H, True)
    ]  # fmt: skip
    std = config.init_std * _FOLDED_NORMAL
    if config.init == "normal":
        embedding, head = std, std
        sizes = [std / math.sqrt(2 * config.num_layers) if out else std for _, _, out in shapes]
    else:
        embedding, head = _FOLDED_NORMAL, 0.5 / math.sqrt(H)
        sizes = [0.5 / math.sqrt(inputs) for inputs, _, _ in shapes]
    counts = [inputs * outputs for inputs, outputs, _ in shapes]
    latent = sum(n * size for n, size in zip(counts, sizes, strict=True)) / sum(counts)
    return {
        "final_gain_mean_abs": 1.0,
        "gain_mean_abs": 1.0,
        "embedding_mean_abs": embedding,
        "lm_head_mean_abs": embedding if config.tie_embeddings else head,
        "latent_mean_abs": latent,
    }


@torch.no_grad()
def tensor_facts(tensors: dict[str, Tensor], ternary: bool) -> list[TensorFacts]:
    """Facts of every parameter; codes are those of a forward pass (absmean), for ``*_proj.weight`` only."""
    facts = []
    for name, value in tensors.items():
        value = value.float()
        nonfinite = int((~torch.isfinite(value)).sum())
        share = None
        if ternary and name.endswith("_proj.weight") and not nonfinite:
            packed, _ = ops.quantize_pack_weight(value)
            share = metrics.code_fractions([metrics.PackedCodes(packed, value.numel())])["ternary_zero"]
        mean_abs = float(value.abs().double().mean()) if not nonfinite else math.nan
        facts.append(TensorFacts(name, value.numel(), mean_abs, share, nonfinite))
    return facts


def weights_row(tensors: Sequence[TensorFacts], settings: TrainConfig | None, step: int) -> Row:
    """An evaluation row of the sizes and codes of a checkpoint's parameters, with the rates at its step."""
    groups: dict[str, list[TensorFacts]] = {key: [] for key in SIZES}
    for fact in tensors:
        if fact.name.endswith("_proj.weight"):
            groups["latent_mean_abs"].append(fact)
        elif fact.name.endswith(("norm.weight", "norm_weight")):
            groups["gain_mean_abs"].append(fact)
        if fact.name == "final_norm.weight":
            groups["final_gain_mean_abs"].append(fact)
        elif fact.name == "embed_tokens.weight":
            groups["embedding_mean_abs"].append(fact)
        elif fact.name == "lm_head.weight":
            groups["lm_head_mean_abs"].append(fact)
    groups["lm_head_mean_abs"] = groups["lm_head_mean_abs"] or groups["embedding_mean_abs"]  # tied
    row: Row = {"kind": "eval", "step": step}
    for key, facts in groups.items():
        if facts:
            row[key] = sum(fact.mean_abs * fact.numel for fact in facts) / sum(fact.numel for fact in facts)
    coded = [fact for fact in tensors if fact.zero_share is not None]
    if coded:
        zeros = sum((fact.zero_share or 0.0) * fact.numel for fact in coded)
        row["ternary_zero"] = zeros / sum(fact.numel for fact in coded)
        row["absmean_mean"] = sum(fact.mean_abs for fact in coded) / len(coded)
        row["absmean_min"] = min(fact.mean_abs for fact in coded)
        row["absmean_clamped"] = sum(fact.mean_abs <= SCALE_FLOOR for fact in coded) / len(coded)
        row["dead_tensors"] = sum((fact.zero_share or 0.0) >= _DEAD_TENSOR for fact in coded) / len(coded)
    if settings is not None and 1 <= step <= settings.steps:
        rates, decays = learning_rates(settings), weight_decays(settings)
        row |= {
            "lr": float(rates[step - 1]),
            "weight_decay": float(decays[step - 1]),
            "cumulative_lr": float(rates[:step].sum()),
        }
    return row
