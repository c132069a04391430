"""The 2-bit forms of a ternary matrix. See docs/packing.md for pictures.

Packed, the portable form: four codes a byte, row-major along K; a code t in {-1, 0, 1} is stored as t + 1; the
first weight of a byte is in its low bits. A row takes ceil(K / 4) bytes and its unused tail holds t = 0.

Prepacked, the form that the CUDA products read: blocks of 16 rows x 128 columns in the order of tensor-core
fragments, int32 [ceil(N / 16), ceil(K / 128), 32, 4] (block row, block column, lane of a warp, word). What lies
beyond N and K holds t = 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitnet_ext.ops import _checks

_ops = torch.ops.bitnet_ext


BLOCK_ROWS, BLOCK_COLS = 16, 128


def packed_width(K: int) -> int:
    """Bytes in a packed row of K codes."""
    return (K + 3) // 4


def prepacked_shape(N: int, K: int) -> tuple[int, int, int, int]:
    """Shape of the prepacked form of a ternary matrix [N, K]."""
    return -(-N // BLOCK_ROWS), -(-K // BLOCK_COLS), 32, 4


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
    _check_scale_and_dtype(op, weight_scale, "packed", packed, packed.shape[0], dtype)
    return _ops.dequantize_ternary(packed.contiguous(), weight_scale.contiguous(), K, dtype)


def dequantize_ternary_ref(
    packed: Tensor, weight_scale: Tensor, K: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """:func:`dequantize_ternary` in plain PyTorch."""
    return (unpack_ternary_ref(packed, K).float() * weight_scale.reshape(-1, 1)).to(dtype)


def prepack_ternary(packed: Tensor, K: int) -> Tensor:
    """The prepacked form of a packed matrix.

    With lane = 4 g + t of 32, word s of 4, register j of 4 and byte i of 4, the code of row ``g + 8 (j % 2)`` and
    column ``32 s + 16 (j // 2) + 4 t + i`` of a block is the two's complement pair (0, 1, -1 as 00, 01, 11) at
    the bits ``8 i + 7 - 2 j`` and ``8 i + 6 - 2 j``.

    Args:
        packed: uint8 [N, ceil(K / 4)], as from :func:`pack_ternary`.
        K: in_features.

    Returns:
        int32 [ceil(N / 16), ceil(K / 128), 32, 4].

    Raises:
        RuntimeError: on the CPU, when packed holds the invalid stored value 3. On CUDA it counts as +1.
    """
    _check_packed("prepack_ternary", packed, K)
    return _ops.prepack_ternary(packed.contiguous(), K)


def prepack_ternary_ref(packed: Tensor, K: int) -> Tensor:
    """:func:`prepack_ternary` in plain PyTorch; the invalid stored value 3 counts as +1."""
    N = packed.shape[0]
    pairs = _blocks(unpack_ternary_ref(packed, K).clamp(max=1)).to(torch.int32) & 3
    # [block row, r, g, block column, s, h, t, i] -> [.., g, t, s, (h, r, i)], and j = 2 h + r
    ordered = pairs.permute(0, 3, 2, 6, 4, 5, 1, 7).reshape(*prepacked_shape(N, K), 16)
    return (ordered << _pair_shifts(packed.device)).sum(-1, dtype=torch.int32)  # bits that do not overlap


def unprepack_ternary(prepacked: Tensor, N: int, K: int) -> Tensor:
    """Inverse of :func:`prepack_ternary`. The pair 10, which no code has, becomes the invalid stored value 3.

    Args:
        prepacked: int32 [ceil(N / 16), ceil(K / 128), 32, 4].
        N: out_features.
        K: in_features.

    Returns:
        uint8 [N, ceil(K / 4)].
    """
    op = "unprepack_ternary"
    _check_prepacked(op, prepacked, N, K)
    return _ops.unprepack_ternary(_aligned(prepacked), N, K)


def unprepack_ternary_ref(prepacked: Tensor, N: int, K: int) -> Tensor:
    """:func:`unprepack_ternary` in plain PyTorch."""
    return pack_ternary_ref(prepacked_codes_ref(prepacked, N, K))


def prepack_int8(codes: Tensor) -> Tensor:
    """The prepacked form of an int8 matrix: four vectors of 16 bytes a lane of each block.

    Byte i of register j of lane 4 g + t in vector s is the code of row ``g + 8 (j % 2)`` and column
    ``32 s + 16 (j // 2) + 4 t + i`` of the block. What lies beyond N and K is 0.

    Args:
        codes: int8 [N, K]; N and K >= 1.

    Returns:
        int32 [ceil(N / 16), ceil(K / 128), 4, 32, 4] (block row, block column, s, lane, j).
    """
    op = "prepack_int8"
    _checks.tensor(op, "codes", codes, dtypes=(torch.int8,), dim=2)
    _checks.at_least_one(op, "codes", codes.shape[0], "rows (N)")
    _checks.at_least_one(op, "codes", codes.shape[1], "columns (K)")
    return _ops.prepack_int8(codes.contiguous())


def prepack_int8_ref(codes: Tensor) -> Tensor:
    """:func:`prepack_int8` in plain PyTorch."""
    rows, cols = prepacked_shape(*codes.shape)[:2]
    # [block row, r, g, block column, s, h, t, i] -> [.., s, g, t, h, r, i]
    ordered = _blocks(codes).permute(0, 3, 4, 2, 6, 5, 1, 7).contiguous()
    return ordered.view(torch.int32).reshape(rows, cols, 4, 32, 4)


def dequantize_prepacked(
    prepacked: Tensor, weight_scale: Tensor, N: int, K: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """:func:`dequantize_ternary` of a prepacked matrix: ``codes * weight_scale`` in float32, then cast to `dtype`.

    Args:
        prepacked: int32 [ceil(N / 16), ceil(K / 128), 32, 4].
        weight_scale: float32 [] (per tensor) or [N] (per row).
        N: out_features.
        K: in_features.
        dtype: float32, bfloat16 or float16.

    Returns:
        [N, K] of `dtype`.
    """
    op = "dequantize_prepacked"
    _check_prepacked(op, prepacked, N, K)
    _check_scale_and_dtype(op, weight_scale, "prepacked", prepacked, N, dtype)
    return _ops.dequantize_prepacked(prepacked.contiguous(), weight_scale.contiguous(), N, K, dtype)


def dequantize_prepacked_ref(
    prepacked: Tensor, weight_scale: Tensor, N: int, K: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """:func:`dequantize_prepacked` in plain PyTorch."""
    return (prepacked_codes_ref(prepacked, N, K).float() * weight_scale.reshape(-1, 1)).to(dtype)


def prepacked_codes_ref(prepacked: Tensor, N: int, K: int) -> Tensor:
    """The codes int8 [N, K] of a prepacked ternary matrix, in plain PyTorch."""
    rows, cols = prepacked_shape(N, K)[:2]
    pairs = (prepacked.unsqueeze(-1) >> _pair_shifts(prepacked.device)) & 3
    codes = ((pairs ^ 2) - 2).to(torch.int8)
    # [block row, block column, g, t, s, h, r, i] -> [block row, r, g, block column, s, h, t, i]
    blocks = codes.reshape(rows, cols, 8, 4, 4, 2, 2, 4).permute(0, 6, 2, 1, 4, 5, 3, 7)
    return blocks.reshape(rows * BLOCK_ROWS, cols * BLOCK_COLS)[:N, :K].contiguous()


def _blocks(codes: Tensor) -> Tensor:
    """The codes with zeros up to whole blocks, as [block row, r, g, block column, s, h, t, i] in which the row of
    a block is 8 r + g and its column 32 s + 16 h + 4 t + i.
    """
    N, K = codes.shape
    padded = torch.nn.functional.pad(codes, (0, -K % BLOCK_COLS, 0, -N % BLOCK_ROWS))
    rows, cols = prepacked_shape(N, K)[:2]
    return padded.reshape(rows, 2, 8, cols, 4, 2, 4, 4)


def _pair_shifts(device: torch.device) -> Tensor:
    """The place in a word of the pairs (j, i), by 4 j + i."""
    index = torch.arange(16, dtype=torch.int32, device=device)
    return 8 * (index % 4) + 6 - 2 * (index // 4)


def _aligned(prepacked: Tensor) -> Tensor:
    """A contiguous tensor whose vectors of 16 bytes are aligned, as the kernels read them."""
    prepacked = prepacked.contiguous()
    return prepacked if prepacked.storage_offset() % 4 == 0 else prepacked.clone()


def _check_packed(op: str, packed: Tensor, K: int) -> None:
    _checks.tensor(op, "packed", packed, dtypes=(torch.uint8,), dim=2)
    _checks.at_least_one(op, "K", K, "in_features")
    _checks.at_least_one(op, "packed", packed.shape[0], "rows (N)")
    if packed.shape[1] != packed_width(K):
        raise ValueError(
            f"{op}: packed must have ceil(K / 4) = {packed_width(K)} columns for K = {K}, got {packed.shape[1]}"
        )


def _check_prepacked(op: str, prepacked: Tensor, N: int, K: int) -> None:
    _checks.tensor(op, "prepacked", prepacked, dtypes=(torch.int32,))
    _checks.at_least_one(op, "N", N, "out_features")
    _checks.at_least_one(op, "K", K, "in_features")
    _checks.shape(op, "prepacked", prepacked, prepacked_shape(N, K), f"N = {N}, K = {K}")


def _check_scale_and_dtype(
    op: str, weight_scale: Tensor, name: str, weight: Tensor, N: int, dtype: torch.dtype
) -> None:
    _checks.tensor(op, "weight_scale", weight_scale, dtypes=(torch.float32,))
    _checks.same_device(op, "weight_scale", weight_scale, name, weight)
    if weight_scale.numel() not in (1, N):
        raise ValueError(f"{op}: weight_scale must have 1 or N = {N} elements, got {weight_scale.numel()}")
    _checks.float_dtype(op, "dtype", dtype)
