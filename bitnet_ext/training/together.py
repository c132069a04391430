"""Several training runs on one device at a time."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from typing import cast

import torch

from bitnet_ext._capture import STEP_PRIORITY

#: Runs that may share a GPU in one process.
MAX_SIDE_BY_SIDE = 16
_ENDED = object()
#: Seconds between two questions for a job when nothing else is to be done.
_PATIENCE = 0.05
#: The same while a GPU has work: a small part of what it is given at once.
_POLL = 2e-4


def streams_side_by_side(number: int, device: torch.device) -> list[torch.cuda.Stream]:
    """Streams for runs that share a GPU, one each.

    They have the priority of a step's kernels: what stands before and behind a step must not wait for those of other
    runs.

    Raises:
        ValueError: for more than 16. torch has 32 streams of a priority, and each run captures on another one.
    """
    if not 1 <= number <= MAX_SIDE_BY_SIDE:
        raise ValueError(
            f"runs that share a GPU must be between 1 and {MAX_SIDE_BY_SIDE} in a process, got {number}"
        )
    return [torch.cuda.Stream(device, priority=STEP_PRIORITY) for _ in range(number)]


def advance_together(
    jobs: Iterable[Callable[[], Iterator[None]] | None],
    *,
    together: int,
    device: torch.device,
) -> Iterator[int]:
    """Runs jobs, several at a time, interleaved on one device: on a GPU each place has a stream of its own.

    A job is called when a place is free, on that place's stream, so that everything it allocates belongs there; it
    returns what :meth:`Trainer.advance` returns, or any iterator that yields when the device has work. The results of a
    run do not depend on what runs beside it.

    Args:
        jobs: taken one by one; None when there is none now but may be one later.
        together: places, at most 16 on a GPU (:func:`streams_side_by_side`).

    Yields:
        the place whose job has just ended.
    """
    waiting = iter(jobs)
    on_gpu = device.type == "cuda"
    streams = streams_side_by_side(together, device) if on_gpu else [None] * together
    handed_over = [torch.cuda.Event() if on_gpu else None for _ in range(together)]
    running: dict[int, Iterator[None]] = {}
    exhausted = False
    while running or not exhausted:
        advanced = False
        for place, (stream, event) in enumerate(zip(streams, handed_over, strict=True)):
            if place in running and event is not None and not event.query():
                continue  # the host would wait for it, while others have nothing to do
            with torch.cuda.stream(stream) if stream is not None else contextlib.nullcontext():
                if place not in running:
                    job = None if exhausted else next(waiting, _ENDED)
                    exhausted |= job is _ENDED
                    if job is None or job is _ENDED:
                        continue
                    running[place] = cast(Callable[[], Iterator[None]], job)()
                ended = next(running[place], _ENDED) is _ENDED
                if event is not None:
                    event.record()
                advanced = True
                if ended:
                    del running[place]
                    yield place
        if not advanced:
            time.sleep(_POLL if running else _PATIENCE)
