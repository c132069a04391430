"""Capture of CUDA graphs beside other work on the same device."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

#: Priorities of the kernels of a training step, and of those that run beside them.
STEP_PRIORITY, SIDE_PRIORITY = -2, -1

_streams: dict[tuple[int, int], torch.cuda.Stream] = {}


def capture_stream(device: torch.device, priority: int = 0) -> torch.cuda.Stream:
    """A stream to warm up and capture on: one that belongs to the current stream.

    cuBLAS has a workspace a stream. Graphs captured on one stream write to the same one, so those that may be replayed
    side by side must come from different streams, while those replayed one after the other may share one. Runs that
    share a device have a stream each (:func:`bitnet_ext.training.advance_together`), on which one run follows the
    other; new streams for every run would come around to one in use, since torch hands out 32 of a priority in turn.

    Args:
        priority: of the stream, 0 to -3, which the kernels of a graph keep. With 0, the current stream itself unless it
            is the default stream.
    """
    current = torch.cuda.current_stream(device)
    if current == torch.cuda.default_stream(device):
        return torch.cuda.Stream(device, priority=priority)
    if priority == 0:
        return current
    key = (current.cuda_stream, priority)
    if key not in _streams:
        _streams[key] = torch.cuda.Stream(device, priority=priority)
    return _streams[key]


_pools: dict[int, torch.cuda.CUDAGraph] = {}


def _pool_of(stream: torch.cuda.Stream) -> Any:
    """The memory of the graphs of the runs that follow each other on a stream.

    Memory of a graph's own is given back by the allocator only when the device has none left, which then stops
    everything for seconds; here the next run takes over what the last one had. The pool lives as long as a graph that
    nobody replays.
    """
    if stream.cuda_stream not in _pools:
        anchor = torch.cuda.CUDAGraph()
        with _capturing(anchor, capture_stream(stream.device, priority=-3), None):
            torch.zeros(1, device=stream.device)
        _pools[stream.cuda_stream] = anchor
    return _pools[stream.cuda_stream].pool()


def places_of(tensors: Iterable[Tensor]) -> list[object]:
    """Where tensors lie and how. A graph reads the addresses of its capture: it may be replayed while this is equal.

    Values may differ, a replay reads them. The host does not wait for the device.
    """
    return [(t.data_ptr(), t.shape, t.stride(), t.dtype, t.device) for t in tensors]


@contextmanager
def capture(graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream, pool: Any = None) -> Iterator[None]:
    """Captures what is launched within it, on `stream`, into `graph`. It is to be replayed on the current stream.

    Unlike :class:`torch.cuda.graph` it neither waits for the device nor empties the allocator's cache, either of which
    stops all other runs on the device.

    Args:
        pool: of an earlier graph whose memory this one may use where that has left it; by default that of the graphs
            captured before for the current stream, or for the default stream none.
    """
    current = torch.cuda.current_stream(stream.device)
    if pool is None and current != torch.cuda.default_stream(stream.device):
        pool = _pool_of(current)
    stream.wait_stream(current)
    with _capturing(graph, stream, pool):
        yield


@contextmanager
def _capturing(graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream, pool: Any) -> Iterator[None]:
    collecting = gc.isenabled()
    gc.disable()  # it might end a graph or an event of somebody else, which a capture forbids
    try:
        with torch.cuda.stream(stream):
            if pool is None:
                graph.capture_begin(capture_error_mode="thread_local")
            else:
                graph.capture_begin(pool, capture_error_mode="thread_local")
            try:
                yield
            finally:
                graph.capture_end()
    finally:
        if collecting:
            gc.enable()
