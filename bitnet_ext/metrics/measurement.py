"""Measurements that are handed to a device first and waited for later, all of them at once.

A measure of a model is a few reductions on the device and then arithmetic on a handful of numbers. Read one by one,
the numbers of an evaluation stop the host some thirty times; so a measure first makes a :class:`Measurement`, whose
making never waits for the device and can be captured in a CUDA graph, and :meth:`Measurement.result` fetches
everything in one transfer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bitnet_ext._capture import capture, capture_stream

Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Measurement:
    """Numbers on their way.

    Attributes:
        tensors: on one device; integers below 2^53 and floating-point numbers.
        finish: makes named values of their contents, float64 arrays of the tensors' shapes. It can be called
            again and again, with other contents.
    """

    tensors: tuple[Tensor, ...]
    finish: Callable[[Sequence[Numbers]], dict[str, Any]]

    def packed(self) -> Tensor:
        """All contents one behind the other, float64 [n]."""
        if not self.tensors:
            return torch.zeros(0, dtype=torch.float64)
        return torch.cat([tensor.detach().reshape(-1).double() for tensor in self.tensors])

    def unpack(self, packed: Tensor) -> dict[str, Any]:
        """The named values from what :meth:`packed` holds; waits for the device."""
        values = packed.cpu().numpy()
        arrays, start = [], 0
        for tensor in self.tensors:
            arrays.append(values[start : start + tensor.numel()].reshape(tuple(tensor.shape)))
            start += tensor.numel()
        return self.finish(arrays)

    def result(self) -> dict[str, Any]:
        """The named values; waits for the device."""
        return self.unpack(self.packed())


def combine(measurements: Sequence[Measurement]) -> Measurement:
    """Several measurements as one, whose values are those of all."""
    sizes = [len(m.tensors) for m in measurements]

    def finish(arrays: Sequence[Numbers]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        start = 0
        for measurement, size in zip(measurements, sizes, strict=True):
            values |= measurement.finish(arrays[start : start + size])
            start += size
        return values

    return Measurement(tuple(tensor for m in measurements for tensor in m.tensors), finish)


def constant(values: dict[str, Any]) -> Measurement:
    """Values that need no device."""
    return Measurement((), lambda _: dict(values))


def in_blocks(*tensors: Tensor, elements: int = 1 << 18) -> Iterator[tuple[Tensor, ...]]:
    """Contiguous tensors of one shape, piece by piece.

    On a GPU they come whole, which is the fewest launches. On a CPU a piece has at most `elements` elements, so that
    intermediate results stay in the cache, in memory that is used again: whole ones of 50 MB take eight times as long,
    most of it for new pages.
    """
    if tensors[0].device.type != "cpu":
        yield tensors
        return
    yield from zip(*(tensor.reshape(-1).split(elements) for tensor in tensors), strict=True)


def sum_of(parts: list[Tensor]) -> Tensor:
    """The sum of scalars, what :func:`in_blocks` gave; of one, itself."""
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum()


class Repeated:
    """One measurement, made again and again; on a GPU a CUDA graph from the second time on.

    An evaluation of a small network is some thousand launches of a few microseconds: replayed, they cost the host one.

    Args:
        device: cpu or cuda.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._graph: torch.cuda.CUDAGraph | None = None
        self._captured: tuple[Measurement, Tensor] | None = None
        self._warm = False

    def launch(self, make: Callable[[], Measurement]) -> Callable[[], dict[str, Any]]:
        """Hands it to the device; the function returned waits for the values. Call that before the next launch.

        Args:
            make: makes the measurement, from what is in the same tensors each time. Once captured it is not called.
                A replay reads the addresses of the capture: whoever puts a tensor elsewhere begins with a new Repeated
                (``_capture.places_of`` tells).
        """
        if self._device.type != "cuda" or not self._warm:
            self._warm = True  # libraries have made their workspaces
            measurement = make()
            packed = measurement.packed()
            return lambda: measurement.unpack(packed)
        if self._captured is None:
            graph = torch.cuda.CUDAGraph()
            with capture(graph, capture_stream(self._device)):
                made = make()
                self._captured = (made, made.packed())
            self._graph = graph
        assert self._graph is not None
        self._graph.replay()
        measurement, packed = self._captured
        return lambda: measurement.unpack(packed)
