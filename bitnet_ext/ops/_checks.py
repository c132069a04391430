"""Argument checks of the public operators: one sentence that names the argument, what came, what is accepted."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of shape {tuple(value.shape)} on {value.device}".replace("torch.", "")
    return f"{type(value).__name__} {value!r}"


def tensor(
    op: str,
    name: str,
    value: Tensor,
    *,
    dtypes: Sequence[torch.dtype],
    dim: int | None = None,
    min_dim: int = 0,
) -> None:
    """Raises TypeError or ValueError unless `value` is a tensor of one of `dtypes` with the dimensions asked for."""
    names = " or ".join(str(dtype).replace("torch.", "") for dtype in dtypes)
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a {names} tensor, got {_describe(value)}")
    if value.dtype not in dtypes:
        raise TypeError(f"{op}: {name} must be of dtype {names}, got {_describe(value)}")
    if dim is not None and value.dim() != dim:
        raise ValueError(f"{op}: {name} must have {dim} dimensions, got {_describe(value)}")
    if value.dim() < min_dim:
        raise ValueError(f"{op}: {name} must have at least {min_dim} dimensions, got {_describe(value)}")
    if value.layout != torch.strided:
        raise ValueError(f"{op}: {name} must be a dense (strided) tensor, got layout {value.layout}")


def same_device(op: str, name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.device != other.device:
        raise ValueError(
            f"{op}: {name} and {other_name} must be on one device, got {value.device} and {other.device}"
        )


def shape(op: str, name: str, value: Tensor, expected: Sequence[int], meaning: str) -> None:
    if tuple(value.shape) != tuple(expected):
        raise ValueError(
            f"{op}: {name} must have shape {tuple(expected)} ({meaning}), got {tuple(value.shape)}"
        )


def at_least_one(op: str, name: str, size: int, meaning: str) -> None:
    if size < 1:
        raise ValueError(f"{op}: {name} must have {meaning} >= 1, got {size}")
