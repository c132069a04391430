"""Initial parameters from a generator of their own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

#: The functions with which modules draw their initial parameters; each takes a generator.
_DRAWS = frozenset(
    (
        nn.init.kaiming_normal_,
        nn.init.kaiming_uniform_,
        nn.init.normal_,
        nn.init.trunc_normal_,
        nn.init.uniform_,
        nn.init.xavier_normal_,
        nn.init.xavier_uniform_,
        Tensor.bernoulli_,
        Tensor.exponential_,
        Tensor.normal_,
        Tensor.random_,
        Tensor.uniform_,
    )
)


@contextlib.contextmanager
def drawing_from(seed: int | None) -> Iterator[None]:
    """Within it initial parameters are drawn from generators that begin with `seed`; None for torch's global ones.

    There is a generator for each device. Their numbers are those of ``torch.manual_seed(seed)`` followed by the same
    draws, but the global generators, and what other threads draw, are left alone.
    """
    if seed is None:
        yield
        return
    with _OwnGenerators(seed):
        yield


class _OwnGenerators(TorchFunctionMode):
    """Hands a generator to each call that draws; active in the thread that entered it."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._seed = seed
        self._generators: dict[torch.device, torch.Generator] = {}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in _DRAWS and kwargs.get("generator") is None:
            tensor = kwargs["tensor"] if "tensor" in kwargs else args[0]
            if not tensor.is_meta:  # nothing is drawn there
                kwargs["generator"] = self._generator(tensor.device)
        return func(*args, **kwargs)

    def _generator(self, device: torch.device) -> torch.Generator:
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self._seed)
        return self._generators[device]
