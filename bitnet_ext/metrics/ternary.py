"""Measures of the ternary codes of a model: how many are -1, 0 and +1, and how many change.

Only modules that quantise count: :class:`bitnet_ext.nn.BitLinear` with ``quantization == "b1.58"``. A
full-precision twin has none, and every measure of it is None.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bitnet_ext import ops
from bitnet_ext.nn import BitLinear

_TERNARY = "b1.58"
#: The quantiser's lower bound of absmean (b1.58 paper, eq. 3): below it every code is 0.
ABSMEAN_CLAMP = 1e-5
#: |w| / absmean at which a code changes between 0 and 1.
THRESHOLD = 0.5
#: Distance from the threshold at which a weight counts as near it.
NEAR = 0.05

# How often each 2-bit value occurs in each byte, int64 [256, 4].
_FIELDS_OF_BYTE = torch.tensor(
    [
        [sum((byte >> shift) & 3 == value for shift in (0, 2, 4, 6)) for value in range(4)]
        for byte in range(256)
    ]
)


class PackedCodes(NamedTuple):
    """The codes of one layer in the canonical packed form, and their number without the padding of the
    rows.
    """

    packed: Tensor  # uint8 [N, ceil(K / 4)]
    numel: int  # N * K


@torch.no_grad()
def packed_codes(model: nn.Module) -> list[PackedCodes]:
    """A snapshot of all ternary codes, quantised from the latent weights as a forward pass would; in module
    order.

    Two bits a weight, so a snapshot of a model is a sixteenth of its fp32 latent weights.
    """
    snapshot = []
    for module in model.modules():
        if isinstance(module, BitLinear) and module.quantization == _TERNARY:
            packed, _ = ops.quantize_pack_weight(module.weight.detach())
            snapshot.append(PackedCodes(packed, module.weight.numel()))
    return snapshot


def _field_histograms(packed: Sequence[Tensor]) -> list[list[int]]:
    """How often each 2-bit value 0..3 occurs in each tensor: histograms of the bytes, then four fields a byte."""
    by_byte = torch.stack([torch.bincount(p.reshape(-1), minlength=256) for p in packed])
    histograms: list[list[int]] = (by_byte.cpu() @ _FIELDS_OF_BYTE).tolist()
    return histograms


def code_fractions(codes: Sequence[PackedCodes]) -> dict[str, float | None]:
    """:func:`ternary_fractions` of a snapshot that is there already."""
    if not codes:
        return {"ternary_negative": None, "ternary_zero": None, "ternary_positive": None}
    negative = zero = positive = total = 0
    for layer, (minus, null, plus, _) in zip(
        codes, _field_histograms([c.packed for c in codes]), strict=True
    ):
        padding = 4 * layer.packed.numel() - layer.numel  # filled with code 0
        negative, zero, positive = negative + minus, zero + null - padding, positive + plus
        total += layer.numel
    return {
        "ternary_negative": negative / total,
        "ternary_zero": zero / total,
        "ternary_positive": positive / total,
    }


def ternary_fractions(model: nn.Module) -> dict[str, float | None]:
    """Shares of the codes -1, 0 and +1 over all ternary weights of a model.

    Returns:
        ternary_negative, ternary_zero, ternary_positive; they sum to 1, or are None when nothing is ternary.
    """
    return code_fractions(packed_codes(model))


def flip_rate(before: Sequence[PackedCodes], after: Sequence[PackedCodes]) -> float | None:
    """Share of the ternary codes that differ between two snapshots of one model (Helwegen et al. 2019,
    arXiv:1906.02107).

    It counts every change (-1 to 0, 0 to +1, -1 to +1) once, and what changed and changed back in between
    not at all.

    Returns:
        In [0, 1], or None when nothing is ternary.

    Raises:
        ValueError: when the snapshots are not of the same layers.
    """
    if [layer.packed.shape for layer in before] != [layer.packed.shape for layer in after]:
        raise ValueError(
            "before and after must be snapshots of the same layers; got different numbers or shapes"
        )
    if not after:
        return None
    changed = [old.packed.to(new.packed.device) ^ new.packed for old, new in zip(before, after, strict=True)]
    # A field of the exclusive or is 0 where the code is the same.
    flipped = sum(sum(fields[1:]) for fields in _field_histograms(changed))
    return flipped / sum(layer.numel for layer in after)


@torch.no_grad()
def threshold_statistics(model: nn.Module) -> dict[str, float | None]:
    """Where the latent weights lie between the points at which their codes change.

    With s = mean |w| of a tensor, the code of w is 0 below |w| / s = 0.5 and 1 above (-1 for negative w).

    Returns:
        absmean_mean, absmean_min: of s over the ternary tensors. absmean_clamped: share of the tensors with s at or
            below the quantiser's clamp of 1e-5, under which all codes are 0. threshold_distance: mean of
            ||w| / s - 0.5|; near_threshold: share of weights for which it is below 0.05, the ones that a small step
            can flip (Nagel et al. 2022, arXiv:2203.11086, on oscillations). None when nothing is ternary.
    """
    weights = [
        module.weight.detach().float().abs()
        for module in model.modules()
        if isinstance(module, BitLinear) and module.quantization == _TERNARY
    ]
    names = ("absmean_mean", "absmean_min", "absmean_clamped", "threshold_distance", "near_threshold")
    if not weights:
        return dict.fromkeys(names)
    rows = []
    for magnitude in weights:
        scale = magnitude.mean()
        distance = (magnitude / scale.clamp(min=ABSMEAN_CLAMP) - THRESHOLD).abs_()
        rows.append(torch.stack([scale.double(), distance.double().sum(), (distance < NEAR).sum().double()]))
    table = torch.stack(rows).tolist()
    total = sum(magnitude.numel() for magnitude in weights)
    scales = [row[0] for row in table]
    return {
        "absmean_mean": sum(scales) / len(scales),
        "absmean_min": min(scales),
        "absmean_clamped": sum(scale <= ABSMEAN_CLAMP for scale in scales) / len(scales),
        "threshold_distance": sum(row[1] for row in table) / total,
        "near_threshold": sum(row[2] for row in table) / total,
    }
