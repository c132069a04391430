"""Ctrl-C, SIGTERM and SIGHUP during training: a request to stop after the steps under way."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any, Protocol

#: Windows has no SIGHUP.
_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Stoppable(Protocol):
    """What can be asked to end, such as a Trainer."""

    def request_stop(self) -> None: ...


@contextlib.contextmanager
def stop_on_signals(target: Stoppable) -> Iterator[None]:
    """Within it the first Ctrl-C, SIGTERM or SIGHUP (a closed terminal) calls target.request_stop(); a second one acts
    at once.

    Outside the main thread, where Python has no signal handlers, it does nothing; nor does it for a signal that the
    process ignores or that a handler outside Python takes.
    """
    previous: dict[signal.Signals, Any] = {}

    def restore() -> None:
        while previous:
            number, handler = previous.popitem()
            signal.signal(number, handler)

    def handle(number: int, frame: FrameType | None) -> None:
        target.request_stop()
        restore()

    if threading.current_thread() is threading.main_thread():
        for number in _SIGNALS:
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                previous[number] = signal.signal(number, handle)
    try:
        yield
    finally:
        restore()
