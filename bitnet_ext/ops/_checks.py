"""Argument checks of the public operators: one sentence that names the argument, what came, what is accepted."""

from __future__ import annotations

from collections.abc import Sequence, Sized

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def describe(value: object) -> str:
    """A value in a few words, on one line."""
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of shape {tuple(value.shape)} on {value.device}".replace("torch.", "")
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype)):
        return f"{type(value).__name__} {value!r}"
    return f"a {type(value).__name__} of {len(value)}" if isinstance(value, Sized) else type(value).__name__


def _not_an_int(op: str, name: str, value: object) -> Exception:
    if torch.jit.is_tracing():  # sizes are tensors then
        return RuntimeError(
            f"{op}: torch.jit.trace and the ONNX exporter that uses it are not supported; use torch.export"
        )
    return TypeError(f"{op}: {name} must be an int, got {describe(value)}")


def integer(op: str, name: str, value: int, *, minimum: int | None = None) -> None:
    """Raises TypeError or ValueError unless `value` is an int of 64 bits, and at least `minimum`."""
    if not isinstance(value, (int, torch.SymInt)):
        raise _not_an_int(op, name, value)
    if (minimum is not None and value < minimum) or (isinstance(value, int) and abs(value) >= 1 << 63):
        accepted = "within 64 bits" if minimum is None else f">= {minimum}"
        raise ValueError(f"{op}: {name} must be {accepted}, got {value}")


def number(op: str, name: str, value: float, *, minimum: float | None = None) -> None:
    """Raises TypeError or ValueError unless `value` is a finite number, and at least `minimum`."""
    if not isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{op}: {name} must be a number, got {describe(value)}")
    if isinstance(value, (int, float)) and not -1e308 < value < 1e308:
        raise ValueError(f"{op}: {name} must be finite, got {value}")
    if minimum is not None and not value >= minimum:
        raise ValueError(f"{op}: {name} must be >= {minimum}, got {value}")


def boolean(op: str, name: str, value: bool) -> None:
    if not isinstance(value, (bool, int)):
        raise TypeError(f"{op}: {name} must be True or False, got {describe(value)}")


def one_of(op: str, name: str, value: str, accepted: Sequence[str]) -> None:
    if not isinstance(value, str) or value not in accepted:
        got = repr(value) if isinstance(value, str) else describe(value)
        raise ValueError(f"{op}: {name} must be {' or '.join(accepted)}, got {got}")


def float_dtype(op: str, name: str, value: torch.dtype) -> None:
    if value not in FLOATS:
        raise TypeError(f"{op}: {name} must be float32, bfloat16 or float16, got {describe(value)}")


def device(op: str, name: str, value: torch.device | str) -> None:
    """Raises TypeError or ValueError unless `value` is a torch.device or names one, as "cuda:0" does."""
    if not isinstance(value, (str, torch.device)):
        raise TypeError(f"{op}: {name} must be a torch.device or its name, got {describe(value)}")
    try:
        torch.device(value)
    except RuntimeError as error:
        raise ValueError(f"{op}: {name} must name a device, such as cpu or cuda:0, got {value!r}") from error


def sequence(op: str, name: str, value: Sequence[object], *, of: str = "tensor") -> None:
    """Raises ValueError unless `value` is a list or tuple of at least one element."""
    if not isinstance(value, (list, tuple)) or len(value) == 0:
        raise ValueError(f"{op}: {name} must be a list of at least one {of}, got {describe(value)}")


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
        raise TypeError(f"{op}: {name} must be a {names} tensor, got {describe(value)}")
    if value.dtype not in dtypes:
        raise TypeError(f"{op}: {name} must be of dtype {names}, got {describe(value)}")
    if value.is_nested:
        raise ValueError(
            f"{op}: {name} must be a plain tensor, got a nested one (nn.TransformerEncoder makes none with "
            "use_nested_tensor = False)"
        )
    if dim is not None and value.dim() != dim:
        raise ValueError(f"{op}: {name} must have {dim} dimensions, got {describe(value)}")
    if value.dim() < min_dim:
        raise ValueError(f"{op}: {name} must have at least {min_dim} dimensions, got {describe(value)}")
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
    if not isinstance(size, (int, torch.SymInt)):
        raise _not_an_int(op, name, size)
    if size < 1 or (isinstance(size, int) and size >= 1 << 63):
        raise ValueError(f"{op}: {name} must have {meaning} >= 1, got {size}")


def sizes(op: str, name: str, value: Sequence[int]) -> list[int]:
    """`value` as a list of ints, an empty one included."""
    if not isinstance(value, (list, tuple)) or not all(isinstance(v, (int, torch.SymInt)) for v in value):
        raise TypeError(f"{op}: {name} must be a list of ints, got {describe(value)}")
    return list(value)


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
        raise TypeError(
            f"{op}: out_dtype must be float32, bfloat16, float16 or int32, got {describe(out_dtype)}"
        )
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
