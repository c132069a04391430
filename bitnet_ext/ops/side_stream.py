"""A second CUDA stream for work that the first one does not wait for, and the loss's use of it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch
from torch import Tensor

_local = threading.local()


class SideStream:
    """Work beside the current stream, forked from it and joined to it, eagerly or in the capture of a graph.

    Memory belongs to the stream on which it was allocated, and what was freed is given out again in that stream's
    order. So a tensor of the current stream that the side still reads has to be kept until the two are joined;
    one that was allocated on the side may be freed at once when nothing else reads it.

    Args:
        stream: None for no concurrency at all (a CPU): everything then runs where it is written.
        max_blocks: multiprocessors that the gradient of an output layer may take here, 0 for all.
    """

    def __init__(self, stream: torch.cuda.Stream | None, max_blocks: int = 0) -> None:
        self.stream = stream
        self.max_blocks = max_blocks
        #: Whether a loss has left its weight gradient to this stream since the last :meth:`join`.
        self.has_gradient = False
        self._kept: list[Tensor] = []

    def keep(self, *tensors: Tensor) -> None:
        """Holds tensors of the current stream that the side reads, until :meth:`join`."""
        self._kept += tensors

    @contextlib.contextmanager
    def on(self) -> Iterator[None]:
        """Within it work goes to the side, behind what is there already."""
        with contextlib.nullcontext() if self.stream is None else torch.cuda.stream(self.stream):
            yield

    @contextlib.contextmanager
    def fork(self, *reads: Tensor) -> Iterator[None]:
        """As :meth:`on`, and behind all that the current stream has to do by now; `reads` are kept."""
        self.keep(*reads)
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        with self.on():
            yield

    def join(self) -> None:
        """The current stream waits for the side, and what was kept for it is let go."""
        if self.stream is not None:
            torch.cuda.current_stream(self.stream.device).wait_stream(self.stream)
        self._kept.clear()
        self.has_gradient = False


@contextlib.contextmanager
def weight_gradient_on(side: SideStream) -> Iterator[None]:
    """Within it, on this thread, :func:`bitnet_ext.ops.linear_cross_entropy` leaves the gradient of its weight to
    `side`, where it can: `side.has_gradient` says so, and the gradient is then read only there or after a join.
    """
    before = getattr(_local, "side", None)
    _local.side = side
    try:
        yield
    finally:
        _local.side = before


def weight_gradient_side() -> SideStream | None:
    """The stream of the innermost :func:`weight_gradient_on` of this thread."""
    side: SideStream | None = getattr(_local, "side", None)
    return side
