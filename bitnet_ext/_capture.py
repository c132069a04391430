"""Capture of CUDA graphs beside other work on the same device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

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


@contextmanager
def capture(graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream, pool: Any = None) -> Iterator[None]:
    """Captures what is launched within it, on `stream`, into `graph`, whose memory is its own or that of the graph of
    `pool`.

    Unlike :class:`torch.cuda.graph` it neither waits for the device nor empties the allocator's cache, either of which
    stops all other runs on the device.
    """
    stream.wait_stream(torch.cuda.current_stream(stream.device))
    with torch.cuda.stream(stream):
        if pool is None:
            graph.capture_begin(capture_error_mode="thread_local")
        else:
            graph.capture_begin(pool, capture_error_mode="thread_local")
        try:
            yield
        finally:
            graph.capture_end()
