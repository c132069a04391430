"""Several latent weights quantised at once: the layers that share an input, or all of a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bitnet_ext.ops import _checks
from bitnet_ext.ops.packing import BLOCK_ROWS, prepack_ternary_ref
from bitnet_ext.ops.quantize import quantize_pack_weight_ref

_ops = torch.ops.bitnet_ext


class QuantizedWeight(NamedTuple):
    """One or several ternary matrices [N_i, K], stacked along N.

    Attributes:
        packed: prepacked int32 [ceil(N / 16), ceil(K / 128), 32, 4] on CUDA, uint8 [N, ceil(K / 4)] on the CPU,
            where N is the sum of all N_i.
        weight_scale: float32 [S], one for each of the S matrices.
    """

    packed: Tensor
    weight_scale: Tensor


def can_stack(weights: Sequence[Tensor]) -> bool:
    """Whether :func:`quantize_weights` takes these matrices together."""
    _check_matrices("can_stack", weights)
    first = weights[0]
    alike = all(w.shape[1:] == first.shape[1:] and w.dtype == first.dtype for w in weights)
    here = all(w.device == first.device for w in weights)
    whole_blocks = first.device.type != "cuda" or all(w.shape[0] % BLOCK_ROWS == 0 for w in weights[:-1])
    return alike and here and whole_blocks


def quantize_weights(weights: Sequence[Tensor]) -> QuantizedWeight:
    """Quantises matrices to ternary codes, each with its own scale, and stacks the codes along N.

    Codes and scales are those of :func:`quantize_weight_ternary` of each matrix, bit for bit.

    Args:
        weights: matrices [N_i, K] of one K, dtype (float32, bfloat16 or float16) and device. On CUDA every
            N_i but the last is a multiple of 16 (see :func:`can_stack`).

    Raises:
        RuntimeError: on the CPU, when a matrix holds NaN or Inf. On CUDA its scale is NaN then.
    """
    _check_weights("quantize_weights", weights)
    return QuantizedWeight(*_ops.quantize_weights([w.detach().contiguous() for w in weights]))


def quantize_weights_ref(weights: Sequence[Tensor]) -> QuantizedWeight:
    """:func:`quantize_weights` in plain PyTorch."""
    parts = [quantize_pack_weight_ref(w) for w in weights]
    packed = torch.cat([codes for codes, _ in parts])
    if packed.device.type == "cuda":
        packed = prepack_ternary_ref(packed, weights[0].shape[1])
    return QuantizedWeight(packed, torch.stack([scale for _, scale in parts]))


def quantize_weight_groups_(
    groups: Sequence[Sequence[Tensor]],
    targets: Sequence[QuantizedWeight],
    abs_sums: Tensor | None = None,
) -> None:
    """:func:`quantize_weights` of many groups into existing tensors, on CUDA in two launches for up to 84 weights.

    Args:
        groups: lists of contiguous matrices, each as for :func:`quantize_weights`.
        targets: where each group goes; what :func:`quantize_weights` would return is overwritten.
        abs_sums: float64 [n], the sums of magnitudes that :func:`adam_step_` wrote for these matrices in this
            order; then the weights are read once, not twice. See :func:`abs_sums_like`.
    """
    op = "quantize_weight_groups_"
    _checks.sequence(op, "groups", groups, of="list of tensors")
    _checks.sequence(op, "targets", targets, of="QuantizedWeight")
    for target in targets:
        if not isinstance(target, QuantizedWeight):
            raise TypeError(f"{op}: targets must hold QuantizedWeight, got {_checks.describe(target)}")
        _checks.tensor(op, "targets", target.packed, dtypes=(torch.uint8, torch.int32))
        _checks.tensor(op, "targets", target.weight_scale, dtypes=(torch.float32,), dim=1)
    if abs_sums is not None:
        _checks.tensor(op, "abs_sums", abs_sums, dtypes=(torch.float64,), dim=1)
    if len(groups) != len(targets):
        raise ValueError(
            f"{op}: targets must have one entry for each of {len(groups)} groups, got {len(targets)}"
        )
    for group in groups:
        _check_weights(op, group)
    packed = [target.packed for target in targets]
    weight_scale = [target.weight_scale for target in targets]
    _ops.quantize_weight_groups_(
        [w.detach() for group in groups for w in group],
        [len(group) for group in groups],
        packed,
        weight_scale,
        abs_sums,
    )
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(packed + weight_scale)


def abs_sums_like(weights: Sequence[Tensor]) -> Tensor:
    """An empty tensor for the sums of magnitudes of these matrices: float64 [n], n depends on the device."""
    _check_matrices("abs_sums_like", weights)
    return torch.empty(sum(map(_num_abs_sums, weights)), dtype=torch.float64, device=weights[0].device)


def _num_abs_sums(weight: Tensor) -> int:
    """As absmean_partials of csrc/cuda/quantize_weight.h, abs_sums_of of csrc/cpu/operators.h."""
    blocks = -(-weight.numel() // 4096)
    return min(blocks, 1024) if weight.device.type == "cuda" else blocks


def _check_matrices(op: str, weights: Sequence[Tensor]) -> None:
    """Float matrices, not necessarily alike."""
    _checks.sequence(op, "weights", weights)
    for index, w in enumerate(weights):
        _checks.tensor(op, f"weights[{index}]", w, dtypes=_checks.FLOATS, dim=2)


def _check_weights(op: str, weights: Sequence[Tensor]) -> None:
    _checks.sequence(op, "weights", weights)
    for index, w in enumerate(weights):
        name = f"weights[{index}]"
        _checks.tensor(op, name, w, dtypes=(weights[0].dtype,) if index else _checks.FLOATS, dim=2)
        _checks.same_device(op, name, w, "weights[0]", weights[0])
        _checks.at_least_one(op, name, w.shape[0], "out_features (N)")
        _checks.at_least_one(op, name, w.shape[1], "in_features (K)")
        if w.shape[1] != weights[0].shape[1]:
            raise ValueError(
                f"{op}: {name} must have K = {weights[0].shape[1]} like weights[0], got {w.shape[1]}"
            )
