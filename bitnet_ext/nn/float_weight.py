"""An answer for code that reads the float weight of a layer that has none."""

from __future__ import annotations

from typing import Any, NoReturn

import torch


class NoFloatWeight:
    """Stands for the ``weight`` of a packed layer: it has shape, dtype and device, but no values.

    Code around a layer may ask for ``layer.weight.dtype`` or ``layer.weight.device``. Code that computes with
    ``layer.weight`` goes past the layer's own product, and gets an error in one sentence.

    Args:
        layer: class name of the layer, for the message.
        shape: [N, K] of the weight that the layer stands for.
        dtype: of the float model around the layer.
        device: of the layer.
    """

    requires_grad = False
    grad = None
    is_leaf = True
    is_nested = False
    ndim = 2

    def __init__(self, layer: str, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
        self._layer = layer
        self.shape = torch.Size(shape)
        self.dtype = dtype
        self.device = device

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def is_meta(self) -> bool:
        return self.device.type == "meta"

    def dim(self) -> int:
        return 2

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def numel(self) -> int:
        return self.shape.numel()

    def is_floating_point(self) -> bool:
        return True

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"{name}: " + _message(self.__dict__.get("_layer", "a packed layer")))

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        layers = [a._layer for a in _flat((args, kwargs or {})) if isinstance(a, NoFloatWeight)]
        raise TypeError(f"{getattr(func, '__name__', func)}: " + _message(*layers[:1]))

    def __repr__(self) -> str:
        return f"NoFloatWeight({self._layer}, shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"


def _message(layer: str = "a packed layer") -> str:
    return (
        f"the weight of a {layer} is packed and has no float values; call the layer itself, read its codes from "
        "state_dict(), or name it in skip= of convert_linear so that it stays a float layer"
    )


def _flat(values: Any) -> list[Any]:
    if isinstance(values, dict):
        values = list(values.values())
    if isinstance(values, (list, tuple)):
        return [leaf for value in values for leaf in _flat(value)]
    return [values]
