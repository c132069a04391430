"""Measures of the ternary codes of a model: how many are -1, 0 and +1, and how many change.

Only modules that quantise count: :class:`bitnet_ext.nn.BitLinear` with ``quantization == "b1.58"``. A
full-precision twin has none, and every measure of it is None.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bitnet_ext import ops
from bitnet_ext.metrics.measurement import Measurement, Numbers, constant
from bitnet_ext.nn import BitLinear

_TERNARY = "b1.58"
#: The quantiser's lower bound of absmean (b1.58 paper, eq. 3): below it every code is 0.
ABSMEAN_CLAMP = 1e-5
#: |w| / absmean at which a code changes between 0 and 1.
THRESHOLD = 0.5
#: Distance from the threshold at which a weight counts as near it.
NEAR = 0.05


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


def _field_counts(packed: Sequence[Tensor]) -> Tensor:
    """How often each 2-bit value 0..3 occurs in all of the tensors, int64 [4]."""
    bytes_ = torch.cat([tensor.reshape(-1) for tensor in packed])
    if bytes_.device.type == "cpu":
        of_byte = torch.bincount(bytes_, minlength=256).view(4, 4, 4, 4)
        return torch.stack([of_byte.sum([d for d in range(4) if d != field]) for field in range(4)]).sum(0)
    # By comparisons: torch.bincount would ask the device how long its answer must be.
    fields = torch.stack([bytes_ >> shift & 3 for shift in (0, 2, 4, 6)])
    return torch.stack([(fields == value).sum() for value in range(4)])


def code_fractions(codes: Sequence[PackedCodes]) -> dict[str, float | None]:
    """:func:`ternary_fractions` of a snapshot that is there already."""
    return measure_code_fractions(codes).result()


def measure_code_fractions(codes: Sequence[PackedCodes]) -> Measurement:
    """:func:`code_fractions` without waiting for the device."""
    names = ("ternary_negative", "ternary_zero", "ternary_positive")
    if not codes:
        return constant(dict.fromkeys(names))
    total = sum(layer.numel for layer in codes)
    padding = sum(4 * layer.packed.numel() - layer.numel for layer in codes)  # filled with code 0

    def finish(arrays: Sequence[Numbers]) -> dict[str, Any]:
        minus, null, plus, _ = arrays[0].tolist()
        return dict(zip(names, (minus / total, (null - padding) / total, plus / total), strict=True))

    return Measurement((_field_counts([layer.packed for layer in codes]),), finish)


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
    return measure_flip_rate(before, after).result()["flip_rate"]


def measure_flip_rate(before: Sequence[PackedCodes], after: Sequence[PackedCodes]) -> Measurement:
    """:func:`flip_rate` without waiting for the device."""
    if not after:
        return constant({"flip_rate": None})
    changed = [old.packed.to(new.packed.device) ^ new.packed for old, new in zip(before, after, strict=True)]
    total = sum(layer.numel for layer in after)
    # A field of the exclusive or is 0 where the code is the same.
    return Measurement(
        (_field_counts(changed),), lambda arrays: {"flip_rate": float(arrays[0][1:].sum()) / total}
    )


def threshold_statistics(model: nn.Module) -> dict[str, float | None]:
    """Where the latent weights lie between the points at which their codes change.

    With s = mean |w| of a tensor, the code of w is 0 below |w| / s = 0.5 and 1 above (-1 for negative w).

    Returns:
        absmean_mean, absmean_min: of s over the ternary tensors. absmean_clamped: share of the tensors with s at or
            below the quantiser's clamp of 1e-5, under which all codes are 0. threshold_distance: mean of
            ||w| / s - 0.5|; near_threshold: share of weights for which it is below 0.05, the ones that a small step
            can flip (Nagel et al. 2022, arXiv:2203.11086, on oscillations). None when nothing is ternary.
    """
    return measure_thresholds(model).result()


@torch.no_grad()
def measure_thresholds(model: nn.Module) -> Measurement:
    """:func:`threshold_statistics` without waiting for the device."""
    weights = [
        module.weight.detach().float().abs()
        for module in model.modules()
        if isinstance(module, BitLinear) and module.quantization == _TERNARY
    ]
    names = ("absmean_mean", "absmean_min", "absmean_clamped", "threshold_distance", "near_threshold")
    if not weights:
        return constant(dict.fromkeys(names))
    rows = []
    for magnitude in weights:
        scale = magnitude.mean()
        distance = (magnitude / scale.clamp(min=ABSMEAN_CLAMP) - THRESHOLD).abs_()
        rows.append(torch.stack([scale.double(), distance.double().sum(), (distance < NEAR).sum().double()]))
    total = sum(magnitude.numel() for magnitude in weights)

    def finish(arrays: Sequence[Numbers]) -> dict[str, Any]:
        scales, distances, near = arrays[0].T.tolist()
        return {
            "absmean_mean": sum(scales) / len(scales),
            "absmean_min": min(scales),
            "absmean_clamped": sum(scale <= ABSMEAN_CLAMP for scale in scales) / len(scales),
            "threshold_distance": sum(distances) / total,
            "near_threshold": sum(near) / total,
        }

    return Measurement((torch.stack(rows),), finish)
