"""The portable 2-bit form of a ternary matrix: four codes a byte. See docs/packing.md for a picture.

Row-major along K; a code t in {-1, 0, 1} is stored as t + 1; the first weight of a byte is in its low
bits. A row takes ceil(K / 4) bytes and its unused tail holds t = 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitnet_ext.ops import _checks

_ops = torch.ops.bitnet_ext


def packed_width(K: int) -> int:
    """Bytes in a packed row of K codes."""
    return (K + 3) // 4


def pack_ternary(codes: Tensor) -> Tensor:
    """Packs ternary codes, four to a byte.

    Args:
        codes: int8 [N, K] with values -1, 0 and 1; N and K >= 1.

    Returns:
        uint8 [N, ceil(K / 4)].

    Raises:
        RuntimeError or ValueError: when a code is outside {-1, 0, 1}. On CUDA this check waits for the
            stream; it is left out under torch.compile and during graph capture, where such a code is
            clamped.
    """
    op = "pack_ternary"
    _checks.tensor(op, "codes", codes, dtypes=(torch.int8,), dim=2)
    _checks.at_least_one(op, "codes", codes.shape[0], "rows (N)")
    _checks.at_least_one(op, "codes", codes.shape[1], "columns (K)")
    if codes.is_cuda and not torch.compiler.is_compiling() and not torch.cuda.is_current_stream_capturing():
        worst = int(codes.clamp(min=-127).abs().max())
        if worst > 1:
            raise ValueError(f"{op}: codes must be -1, 0 or 1, got a value of magnitude {worst}")
    return _ops.pack_ternary(codes.contiguous())


def pack_ternary_ref(codes: Tensor) -> Tensor:
    """:func:`pack_ternary` in plain PyTorch."""
    N, K = codes.shape
    stored = torch.nn.functional.pad(codes.to(torch.int16) + 1, (0, 4 * packed_width(K) - K), value=1)
    planes = stored.view(N, packed_width(K), 4)
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.int16, device=codes.device)
    return (planes << shifts).sum(-1).to(torch.uint8)


def unpack_ternary(packed: Tensor, K: int) -> Tensor:
    """Inverse of :func:`pack_ternary`: codes int8 [N, K] from uint8 [N, ceil(K / 4)]."""
    _check_packed("unpack_ternary", packed, K)
    return _ops.unpack_ternary(packed.contiguous(), K)


def unpack_ternary_ref(packed: Tensor, K: int) -> Tensor:
    """:func:`unpack_ternary` in plain PyTorch."""
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.int16, device=packed.device)
    stored = (packed.to(torch.int16).unsqueeze(-1) >> shifts) & 3
    return (stored.reshape(packed.shape[0], -1)[:, :K] - 1).to(torch.int8)


def dequantize_ternary(
    packed: Tensor, weight_scale: Tensor, K: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """``codes * weight_scale`` in float32, then cast to `dtype`.

    Args:
        packed: uint8 [N, ceil(K / 4)].
        weight_scale: float32 [] (per tensor) or [N] (per row).
        K: in_features.
        dtype: float32, bfloat16 or float16.

    Returns:
        [N, K] of `dtype`.
    """
    op = "dequantize_ternary"
    _check_packed(op, packed, K)
    _checks.tensor(op, "weight_scale", weight_scale, dtypes=(torch.float32,))
    _checks.same_device(op, "weight_scale", weight_scale, "packed", packed)
    if weight_scale.numel() not in (1, packed.shape[0]):
        raise ValueError(
            f"{op}: weight_scale must have 1 or N = {packed.shape[0]} elements, got {weight_scale.numel()}"
        )
    if dtype not in _checks.FLOATS:
        raise TypeError(f"{op}: dtype must be float32, bfloat16 or float16, got {dtype}")
    return _ops.dequantize_ternary(packed.contiguous(), weight_scale.contiguous(), K, dtype)


def dequantize_ternary_ref(
    packed: Tensor, weight_scale: Tensor, K: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """:func:`dequantize_ternary` in plain PyTorch."""
    return (unpack_ternary_ref(packed, K).float() * weight_scale.reshape(-1, 1)).to(dtype)


def _check_packed(op: str, packed: Tensor, K: int) -> None:
    _checks.tensor(op, "packed", packed, dtypes=(torch.uint8,), dim=2)
    _checks.at_least_one(op, "K", K, "in_features")
    _checks.at_least_one(op, "packed", packed.shape[0], "rows (N)")
    if packed.shape[1] != packed_width(K):
        raise ValueError(
            f"{op}: packed must have ceil(K / 4) = {packed_width(K)} columns for K = {K}, got {packed.shape[1]}"
        )
