"""Several training runs on one device at a time."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator

import torch

_ENDED = object()
#: Seconds between two questions for a job when nothing else is to be done.
_PATIENCE = 0.05


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
        together: places, at most 32 on a GPU (the streams that torch has).

    Yields:
        the place whose job has just ended.
    """
    waiting = iter(jobs)
    on_gpu = device.type == "cuda"
    streams = [torch.cuda.Stream(device) if on_gpu else None for _ in range(together)]
    running: dict[int, Iterator[None]] = {}
    exhausted = False
    while running or not exhausted:
        for place, stream in enumerate(streams):
            with torch.cuda.stream(stream) if stream is not None else contextlib.nullcontext():
                if place not in running and not exhausted:
                    try:
                        job = next(waiting)
                    except StopIteration:
                        exhausted = True
                        continue
                    if job is None:
                        if not running:
                            time.sleep(_PATIENCE)
                        continue
                    running[place] = job()
                if place in running and next(running[place], _ENDED) is _ENDED:
                    del running[place]
                    yield place
