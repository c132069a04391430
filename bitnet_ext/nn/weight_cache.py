"""Ternary codes of latent weights, kept for as long as the weights stay what they were.

A layer's weights change once an optimiser step, but the layer runs once a micro-batch, at every evaluation and
in between. A :class:`WeightCache` quantises when they have changed and only then.

What counts as a change: another tensor object, storage, device, dtype or shape, another value of the version
counter that PyTorch adds to at every operation in place (autograd relies on the same counter), or a step of any
``torch.optim.Optimizer``, because the fused ones of PyTorch write without counting. So load_state_dict, .to(),
optimisers, and arithmetic under torch.no_grad() are all seen. Not seen, as autograd does not see them either:
writes through ``weight.data`` in place, or into its memory from outside PyTorch (a replayed CUDA graph, another
process). Whoever does that calls :meth:`WeightCache.clear`, or
``torch.autograd.graph.increment_version(weight)``.

* While a CUDA graph is captured a lookup always quantises, so that a replay computes from the weights of its
  own time, except inside :func:`resident_weights`, whose caller vouches for the codes.
* Under torch.compile a lookup is quantize_weights, once a forward: the version counter is not visible to a
  traced program, and codes handed out by reference could be overwritten by a compiler that owns every buffer.
* A lookup on another stream than the one that quantised quantises anew, since nothing orders the two.
* Threads may share a cache: an entry is replaced as a whole; the worst of a race is to quantise twice.
* A process of DDP keeps its own codes, from weights that DDP keeps equal.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from bitnet_ext import ops
from bitnet_ext.ops import QuantizedWeight

_local = threading.local()


class _OptimizerSteps:
    """Counts the steps of all torch optimisers of the process, from the first cache on."""

    def __init__(self) -> None:
        self.count = 0
        self._registered = False

    def watch(self) -> None:
        if not self._registered:
            register_optimizer_step_post_hook(self._count)
            self._registered = True

    def _count(self, *_: Any) -> None:
        if not torch.compiler.is_compiling():  # a compiled step counts versions
            self.count += 1


_optimizer_steps = _OptimizerSteps()


def _state_of(weight: Tensor) -> tuple[Any, ...]:
    """All of a weight that decides whether its codes are still right, but the object itself."""
    return weight._version, weight.data_ptr(), weight.device, weight.dtype, weight.shape


def _stream_of(weight: Tensor) -> int:
    return torch.cuda.current_stream(weight.device).cuda_stream if weight.is_cuda else 0


class _Entry:
    """Codes and what they were made from."""

    def __init__(self, weights: Sequence[Tensor], quantized: QuantizedWeight) -> None:
        self.weights = [weakref.ref(w) for w in weights]
        self.states = [_state_of(w) for w in weights]
        self.stream = _stream_of(weights[0])
        self.optimizer_steps = _optimizer_steps.count
        self.quantized = quantized

    def is_current(self, weights: Sequence[Tensor]) -> bool:
        return (
            self.optimizer_steps == _optimizer_steps.count
            and len(weights) == len(self.weights)
            and all(
                ref() is w and state == _state_of(w)
                for ref, state, w in zip(self.weights, self.states, weights, strict=True)
            )
            and self.stream == _stream_of(weights[0])
        )


class WeightCache:
    """Hands out the ternary codes of a layer's weight, or of weights that share an input, stacked.

    Held as a plain attribute of the module, it stays out of state_dict; copies and pickles of it are empty.
    """

    def __init__(self) -> None:
        self._entry: _Entry | None = None
        _optimizer_steps.watch()

    def get(self, weights: Sequence[Tensor]) -> QuantizedWeight:
        """:func:`bitnet_ext.ops.quantize_weights` of `weights`, computed only when they have changed."""
        if torch.compiler.is_compiling():
            return ops.quantize_weights(weights)
        resident: Mapping[WeightCache, QuantizedWeight] = getattr(_local, "resident", {})
        if self in resident:
            return resident[self]
        # Fake and wrapped tensors have no storage to compare, tensors of inference mode no version.
        plain = all(type(w) in (Tensor, nn.Parameter) and not w.is_inference() for w in weights)
        captured = weights[0].is_cuda and torch.cuda.is_current_stream_capturing()
        if not plain or captured or torch._C._functorch.peek_interpreter_stack() is not None:
            return ops.quantize_weights(weights)
        entry = self._entry
        if entry is None or not entry.is_current(weights):
            # Tensors made in inference mode could not be saved for a backward pass later.
            with torch.inference_mode(False):
                entry = _Entry(weights, ops.quantize_weights(weights))
            self._entry = entry
        return entry.quantized

    def put(self, weights: Sequence[Tensor], quantized: QuantizedWeight) -> None:
        """Declares that `quantized` holds the codes of `weights` as they are now."""
        self._entry = _Entry(weights, quantized)

    def holds(self, weights: Sequence[Tensor], quantized: QuantizedWeight) -> bool:
        """Whether `quantized` is what :meth:`get` would return, without a launch."""
        entry = self._entry
        return entry is not None and entry.quantized is quantized and entry.is_current(weights)

    @property
    def weights(self) -> list[Tensor] | None:
        """The weights of the last lookup that was kept, or None."""
        if self._entry is None:
            return None
        weights = [ref() for ref in self._entry.weights]
        return None if any(w is None for w in weights) else [w for w in weights if w is not None]

    def clear(self) -> None:
        """Forgets the codes."""
        self._entry = None

    def __deepcopy__(self, memo: dict[int, Any]) -> WeightCache:
        return WeightCache()

    def __copy__(self) -> WeightCache:
        return WeightCache()

    def __reduce__(self) -> tuple[type[WeightCache], tuple[()]]:
        return WeightCache, ()


@contextlib.contextmanager
def resident_weights(codes: Mapping[WeightCache, QuantizedWeight]) -> Iterator[None]:
    """Within it, on this thread, the lookups of these caches return these codes unchecked.

    For a step that is captured and replayed: it keeps the codes up to date itself, by quantising into them
    (:func:`bitnet_ext.ops.quantize_weight_groups_`) whenever it has changed the weights.
    """
    before = getattr(_local, "resident", {})
    _local.resident = codes
    try:
        yield
    finally:
        _local.resident = before


def weight_caches(module: nn.Module) -> list[WeightCache]:
    """The caches that `module` and its submodules hold as attributes, each once, in order."""
    found: dict[WeightCache, None] = {}
    for part in module.modules():
        for value in vars(part).values():
            if isinstance(value, WeightCache):
                found[value] = None
    return list(found)
