"""Capture of CUDA graphs beside other work on the same device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def capture_stream(device: torch.device) -> torch.cuda.Stream:
    """A stream to warm up and capture on: the current one, or a new one where that is the default stream.

    cuBLAS has a workspace a stream. Graphs captured on one stream write to the same one, so those that may be replayed
    side by side must come from different streams: runs that share a device have one each
    (:func:`bitnet_ext.training.advance_together`), and each captures on its own.
    """
    current = torch.cuda.current_stream(device)
    return torch.cuda.Stream(device) if current == torch.cuda.default_stream(device) else current


@contextmanager
def capture(graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream) -> Iterator[None]:
    """Captures what is launched within it, on `stream`, into `graph`.

    Unlike :class:`torch.cuda.graph` it neither waits for the device nor empties the allocator's cache, either of which
    stops all other runs on the device.
    """
    stream.wait_stream(torch.cuda.current_stream(stream.device))
    with torch.cuda.stream(stream):
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            yield
        finally:
            graph.capture_end()
