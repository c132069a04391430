"""Formulas of the operators for ``torch.utils.flop_counter.FlopCounterMode``.

A product of [M, K] with [N, K] counts 2 M N K, as it does for ``torch.nn.Linear``; attention counts as PyTorch counts
``scaled_dot_product_attention``. The counter's module imports triton where that is installed, so the formulas are
registered when somebody imports it, not before.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from math import prod
from types import ModuleType
from typing import Any

import torch

_MODULE = "torch.utils.flop_counter"

Shape = Sequence[int]


def register_when_imported() -> None:
    """Registers the formulas now if the counter's module is imported already, else with its import."""
    if _MODULE in sys.modules:
        _register(sys.modules[_MODULE])
    else:
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    """Finds the counter's module, once, as Python finds it without this class."""

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != _MODULE:
            return None
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    """The loader of the counter's module, which registers the formulas after it."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        _register(module)


# --- formulas: shapes for tensors, all else as it is ---------------------------------------------------------


def _product(x: Shape, *_args: Any, out_shape: Any, **_kwargs: Any) -> int:
    """[.., K] x [N, K]^T; the result, or the first of several, is [.., N]."""
    y = out_shape if isinstance(out_shape, torch.Size) else out_shape[0]
    return 2 * prod(y) * x[-1]


def _glu_product(gate_up: Shape, weight: Shape, *_args: Any, out_shape: Any = None, **_kwargs: Any) -> int:
    return 2 * prod(gate_up[:-1]) * prod(weight)


def _grad(
    grad_y: Shape,
    x_i8: Shape,
    act_scale: Shape,
    prepacked: Shape,
    weight_scale: Shape,
    segments: Sequence[int],
    need_input: bool,
    need_weight: bool,
    *_args: Any,
    out_shape: Any = None,
    **_kwargs: Any,
) -> int:
    return 2 * prod(grad_y) * x_i8[-1] * (int(need_input) + int(need_weight))


def _weight_grad(g_column: Shape, x_column: Shape, *_args: Any, out_shape: Any = None, **_kwargs: Any) -> int:
    """All tokens that the kernel takes: M rounded up to a multiple of 128."""
    return 2 * g_column[0] * g_column[1] * x_column[0]


def _loss(hidden: Shape, weight: Shape, *args: Any, out_shape: Any = None, **_kwargs: Any) -> int:
    """Logits, and the gradients that are computed with them; logits that are computed again count once."""
    return 2 * hidden[0] * prod(weight) * (1 + sum(map(int, args[-2:])))


def _skinny_nt(out: Shape, hidden: Shape, weight: Shape, *_args: Any, **_kwargs: Any) -> int:
    return 2 * hidden[0] * prod(weight)


def _skinny_nn(out: Shape, grad: Shape, weight: Shape, *_args: Any, **_kwargs: Any) -> int:
    return 2 * grad[0] * prod(weight)


def _skinny_tn(out: Shape, grad: Shape, hidden: Shape, *_args: Any, **_kwargs: Any) -> int:
    return 2 * prod(grad) * hidden[1]


def _int_mm(a: Shape, b: Shape, *_args: Any, out_shape: Any = None, **_kwargs: Any) -> int:
    return 2 * prod(a) * b[1]


def _attention_products(qkv: Shape, num_heads: int, num_kv_heads: int) -> int:
    """Operations of one product of [B, num_heads, T, D] with a [T, D] of each head."""
    B, T, width = qkv
    return 2 * B * num_heads * T * T * (width // (num_heads + 2 * num_kv_heads))


def _attention(
    qkv: Shape, cos: Shape, sin: Shape, num_heads: int, num_kv_heads: int, out_shape: Any = None, **_kw: Any
) -> int:
    return 2 * _attention_products(qkv, num_heads, num_kv_heads)


def _attention_backward(
    grad_out: Shape, qkv: Shape, *args: Any, out_shape: Any = None, **_kwargs: Any
) -> int:
    return 5 * _attention_products(qkv, *args[-2:])


_FORMULAS = {
    "bit_linear": _product,
    "int8xint2_mm": _product,
    "int8xint2_mm_int32": _product,
    "prepacked_mm": _product,
    "prepacked_mm_int32": _product,
    "glu_bit_linear": _glu_product,
    "bit_linear_grad": _grad,
    "int8_weight_grad": _weight_grad,
    "linear_cross_entropy": _loss,
    "skinny_mm_nt_": _skinny_nt,
    "skinny_mm_nn_": _skinny_nn,
    "skinny_mm_tn_": _skinny_tn,
    "short_attention": _attention,
    "short_attention_backward": _attention_backward,
}


def _register(module: ModuleType) -> None:
    for name, formula in _FORMULAS.items():
        packet = getattr(torch.ops.bitnet_ext, name)
        if packet not in module.flop_registry:
            module.register_flop_formula(packet)(formula)
    # The int8 products of the CPU.
    if torch.ops.aten._int_mm not in module.flop_registry:
        module.register_flop_formula(torch.ops.aten._int_mm)(_int_mm)
