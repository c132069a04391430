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


def product_operands(
    op: str,
    x_i8: Tensor,
    x_scale: Tensor | None,
    weight_scale: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    N: int,
) -> bool:
    """Checks what the products have in common beside the weight; False when the bare int32 sums are asked for."""
    if out_dtype == torch.int32:
        if bias is not None or x_scale is not None or weight_scale is not None:
            raise ValueError(f"{op}: out_dtype=int32 returns the bare sums; scales and bias must be None")
        return False
    if out_dtype not in FLOATS:
        raise TypeError(f"{op}: out_dtype must be float32, bfloat16, float16 or int32, got {out_dtype}")
    if x_scale is None or weight_scale is None:
        raise ValueError(f"{op}: x_scale and weight_scale are needed unless out_dtype is int32")
    tensor(op, "x_scale", x_scale, dtypes=(torch.float32,))
    shape(op, "x_scale", x_scale, x_i8.shape[:-1], "one scale a token of x_i8")
    same_device(op, "x_scale", x_scale, "x_i8", x_i8)
    tensor(op, "weight_scale", weight_scale, dtypes=(torch.float32,))
    same_device(op, "weight_scale", weight_scale, "x_i8", x_i8)
    if bias is not None:
        tensor(op, "bias", bias, dtypes=(torch.float32,), dim=1)
        shape(op, "bias", bias, (N,), "one a row of weight")
        same_device(op, "bias", bias, "x_i8", x_i8)
    return True
