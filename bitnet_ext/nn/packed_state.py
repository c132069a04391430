"""Checks of the tensors of which a packed layer is made: when it is built, and when it is loaded.

Each returns None, or one sentence on what is wrong. Values are looked at only where there are any: not on the meta
device, nor in fake tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bitnet_ext.ops.packing import packed_width

#: Bytes of packed codes that are looked at in one pass, which bounds the memory of the check.
_CHUNK = 16 << 20


def check_codes(name: str, packed: Tensor, N: int, K: int, *, shapes: bool = True) -> str | None:
    """A fault of packed ternary codes, or None.

    Accepted: uint8 [N, ceil(K / 4)], no stored value of 3, and a tail of codes 0 in each row.

    Without `shapes` a tensor of another shape passes: whoever loads a state_dict reports it.
    """
    shape = (N, packed_width(K))
    fits = tuple(packed.shape) == shape
    if packed.dtype != torch.uint8 or (shapes and not fits):
        return f"{name} must be uint8 of shape {shape}, got {packed.dtype} of shape {tuple(packed.shape)}"
    if not fits or not has_values(packed):
        return None
    rows = max(1, _CHUNK // shape[1])
    for start in range(0, N, rows):
        part = packed[start : start + rows]
        if bool((part & (part >> 1) & 0x55).any()):
            return f"{name} must hold ternary codes stored as 0, 1 or 2, got a stored value of 3"
    used = K % 4
    if used and bool((packed[:, -1] >> 2 * used != 0x55 >> 2 * used).any()):
        return f"{name} must end each row with codes of 0 (stored as 1) beyond in_features = {K}, got others"
    return None


def check_scale(name: str, scale: Tensor, segments: int, N: int, *, shapes: bool = True) -> str | None:
    """A fault of weight scales, or None. Accepted: float, 1 or N or one per segment, finite, not negative."""
    accepted = (segments,) if segments else (1, N)
    if not scale.is_floating_point() or (shapes and scale.dtype != torch.float32):
        return f"{name} must be float32, got {scale.dtype}"
    if shapes and scale.numel() not in accepted:
        return f"{name} must have {' or '.join(map(str, accepted))} elements, got {scale.numel()}"
    if has_values(scale) and not bool((torch.isfinite(scale) & (scale >= 0)).all()):
        return f"{name} must be finite and >= 0, got a value that is negative, NaN or Inf"
    return None


def check_vector(name: str, vector: Tensor | None, size: int) -> str | None:
    """A fault of a bias or a gain, or None. Accepted: None, or float32 [size]."""
    if vector is not None and (vector.dtype != torch.float32 or tuple(vector.shape) != (size,)):
        return f"{name} must be float32 of shape {(size,)}, got {vector.dtype} of shape {tuple(vector.shape)}"
    return None


def has_values(tensor: Tensor) -> bool:
    """Whether the tensor's values can be looked at: fake tensors are a subclass, functorch's and dynamo's too."""
    return type(tensor) in (Tensor, nn.Parameter) and not tensor.is_meta and not torch.compiler.is_compiling()
