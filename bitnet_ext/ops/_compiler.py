"""Marks of :mod:`torch.compiler` that do not import the compiler."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

_Function = TypeVar("_Function", bound=Callable[..., object])


def assume_constant_result(function: _Function) -> _Function:
    """:func:`torch.compiler.assume_constant_result`, which imports ``torch._dynamo``: as long as all of torch."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
