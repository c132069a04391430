"""Ternary codes of latent weights: made in every forward, unless someone vouches for the weights.

A forward of a ternary layer quantises its weights, so it computes from the values that they have at that moment. No
rule decides whether weights "have changed": nothing that the host can read is reliable. Collectives, FSDP2,
``weight.data.copy_``, fused optimisers, NumPy and DLPack views and replayed CUDA graphs write without a trace.

Whoever knows that the weights do not change saves the work:

* :func:`frozen_weights` is the public way. Each weight is quantised once, at its first forward within the block.
  ``generate`` and the measures of ``bitnet_ext.metrics`` use it for the duration of one call.
* :func:`resident_weights` is for code that changes the weights itself and keeps the codes up to date itself, as the
  training step does.

A :class:`WeightCache` is the name under which both find the codes of one layer, or of layers that share an input.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from bitnet_ext import ops
from bitnet_ext.ops import QuantizedWeight


class WeightCache:
    """Hands out the ternary codes of a layer's weight, or of weights that share an input, stacked.

    It is a key and holds nothing: codes live in a block of :func:`frozen_weights` or :func:`resident_weights`. A
    module keeps it as a plain attribute, so it is not in the state_dict. Copies and pickles of it are other keys.
    """

    def get(self, weights: Sequence[Tensor]) -> QuantizedWeight:
        """:func:`bitnet_ext.ops.quantize_weights` of `weights`, or the codes that a block of this thread keeps."""
        if torch.compiler.is_compiling():
            return ops.quantize_weights(weights)
        resident = _local.resident.get(self)
        if resident is not None:
            return resident
        slot = _local.frozen.get(self)
        return ops.quantize_weights(weights) if slot is None else slot.get(weights)

    def clear(self) -> None:
        """Within :func:`frozen_weights`: forgets the codes, so that the next forward quantises again."""
        slot = _local.frozen.get(self)
        if slot is not None:
            slot.kept = None

    def __deepcopy__(self, memo: dict[int, Any]) -> WeightCache:
        return WeightCache()

    def __copy__(self) -> WeightCache:
        return WeightCache()

    def __reduce__(self) -> tuple[type[WeightCache], tuple[()]]:
        return WeightCache, ()


class _Kept:
    """Codes, the weights that they are of, and what shows most breaches of a caller's word."""

    def __init__(self, weights: Sequence[Tensor]) -> None:
        self.weights = list(weights)
        # Tensors made in inference mode could not be saved for a backward pass later.
        with torch.inference_mode(False):
            self.codes = ops.quantize_weights(weights)
        self.stream = _stream_of(weights[0])
        self.state = _visible_state(weights)
        self.stepped = False  # whether an optimiser has made a step with one of the weights

    def is_of(self, weights: Sequence[Tensor]) -> bool:
        """Whether these are the same tensor objects; they are held, so that no other object can have their identity."""
        return len(weights) == len(self.weights) and all(map(_is, weights, self.weights))


class _Slot:
    """Where a block of :func:`frozen_weights` keeps the codes of one cache."""

    def __init__(self) -> None:
        self.kept: _Kept | None = None

    def get(self, weights: Sequence[Tensor]) -> QuantizedWeight:
        plain = all(type(w) in (Tensor, nn.Parameter) for w in weights)  # no fake and no wrapped tensor
        captured = weights[0].is_cuda and torch.cuda.is_current_stream_capturing()
        if not plain or captured or torch._C._functorch.peek_interpreter_stack() is not None:
            return ops.quantize_weights(weights)
        kept = self.kept
        if kept is None:
            kept = self.kept = _Kept(weights)
        elif not kept.is_of(weights) or kept.stream != _stream_of(weights[0]):
            return ops.quantize_weights(
                weights
            )  # of a functional call, or on a stream that nothing orders with this
        elif kept.stepped or kept.state != _visible_state(weights):
            shapes = ", ".join(str(tuple(w.shape)) for w in weights)
            raise RuntimeError(
                f"frozen_weights: a weight of shape {shapes} was changed within the block after a forward had "
                "quantised it; change weights outside of the block, or call WeightCache.clear() after the change"
            )
        return kept.codes


class _Blocks(threading.local):
    """The blocks that this thread is in."""

    def __init__(self) -> None:
        self.resident: Mapping[WeightCache, QuantizedWeight] = {}
        self.frozen: Mapping[WeightCache, _Slot] = {}


_local = _Blocks()


class FrozenWeights:
    """The codes that were made within a block of :func:`frozen_weights` so far."""

    def __init__(self, slots: Mapping[WeightCache, _Slot]) -> None:
        self._slots = slots

    def made(self) -> list[tuple[WeightCache, list[Tensor], QuantizedWeight]]:
        """Each cache with its weights [N_i, K] and their codes."""
        kept = [(cache, slot.kept) for cache, slot in self._slots.items()]
        return [(cache, k.weights, k.codes) for cache, k in kept if k is not None]


@contextlib.contextmanager
def frozen_weights(module: nn.Module) -> Iterator[FrozenWeights]:
    """Within the block the weights of `module` do not change; each is quantised once, at its first forward within.

    Outside of such a block every forward quantises. Use it around forwards between two updates: the micro-batches of
    a step, the batches of an evaluation, the tokens of a decoding loop::

        with frozen_weights(model):
            for rows in micro_batches:
                loss_of(model, rows).backward()
        optimizer.step()

    The caller vouches for the weights. A change within the block is a breach: later forwards may use the old codes.
    Most breaches raise an error at the next forward, namely operations in place that PyTorch counts and steps of a
    ``torch.optim.Optimizer``. Writes that leave no trace (``weight.data.copy_``, collectives, NumPy views, replayed
    CUDA graphs) cannot be noticed. After a deliberate change leave the block and enter again, or call
    :meth:`WeightCache.clear` of each of :func:`weight_caches`.

    * The block is of this thread; other threads quantise in every forward.
    * Blocks nest. An inner block of the same module uses the codes of the outer one.
    * Other tensors in place of the parameters (``torch.func.functional_call``, parametrisations), transforms of
      ``torch.func`` and forwards on another CUDA stream than the first one are quantised in every forward.
    * Under ``torch.compile`` every forward quantises: a traced program cannot see the block.
    * While a CUDA graph is captured every forward quantises, so a replay computes from the weights of its own time.
    * Caches that the module gets within the block are not part of it.

    Raises:
        RuntimeError: from a forward, when a weight was changed within the block.
    """
    _watch_optimizers()
    before = _local.frozen
    slots = {cache: before.get(cache) or _Slot() for cache in weight_caches(module)}
    _local.frozen = {**before, **slots}
    try:
        yield FrozenWeights(slots)
    finally:
        _local.frozen = before


@contextlib.contextmanager
def resident_weights(codes: Mapping[WeightCache, QuantizedWeight]) -> Iterator[None]:
    """Within it, on this thread, the lookups of these caches return these codes unchecked.

    For a step that is captured and replayed: it keeps the codes up to date itself, by quantising into them
    (:func:`bitnet_ext.ops.quantize_weight_groups_`) whenever it has changed the weights.
    """
    before = _local.resident
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


def _is(a: object, b: object) -> bool:
    return a is b


def _stream_of(weight: Tensor) -> int:
    return torch.cuda.current_stream(weight.device).cuda_stream if weight.is_cuda else 0


def _visible_state(weights: Sequence[Tensor]) -> list[tuple[Any, ...]]:
    """Facts that a change of a weight often changes too. The address is none: FSDP2 refills unchanged weights."""
    return [(None if w.is_inference() else w._version, w.shape, w.dtype, w.device) for w in weights]


_watching = False


def _watch_optimizers() -> None:
    """From the first block on: fused optimisers write without counting a version."""
    global _watching
    if not _watching:
        _watching = True
        register_optimizer_step_post_hook(_mark_stepped)


def _mark_stepped(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    if torch.compiler.is_compiling() or not _local.frozen:
        return
    updated = {id(p) for group in optimizer.param_groups for p in group["params"] if p.grad is not None}
    for slot in _local.frozen.values():
        if slot.kept is not None and not updated.isdisjoint(map(id, slot.kept.weights)):
            slot.kept.stepped = True
