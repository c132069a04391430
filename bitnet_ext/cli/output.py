"""Standard output and error of a command, which may be closed, or lead to a full disk or a program that has ended."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from typing import Any, cast

from bitnet_ext._streams import LenientStream

EXIT_USAGE = 2
EXIT_PIPE = 1


def open_missing() -> None:
    """Gives the process a standard output and error where it was started without: else the next file that is opened
    would take their numbers, and what is printed would go into it.
    """
    for number, name in ((1, "stdout"), (2, "stderr")):
        if getattr(sys, name) is None:
            null = os.open(os.devnull, os.O_WRONLY)
            if null != number:
                os.dup2(null, number)
                os.close(null)
            setattr(sys, name, open(number, "w", closefd=False))  # noqa: SIM115  (for the life of the process)


@contextlib.contextmanager
def unbreakable() -> Iterator[None]:
    """Within it nothing that is printed can fail: a run matters more than the words about it."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (cast(Any, LenientStream(stream)) for stream in before)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        for stream in before:
            if not _flushes(stream):
                _discard(stream)
        sys.stdout, sys.stderr = before


def settle(status: int) -> int:
    """Writes out what was printed; the exit status, which says so when that failed."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError) as error:
        _discard(sys.stdout)
        broken = isinstance(error, OSError) and error.errno == errno.EPIPE
        if not broken:
            with contextlib.suppress(OSError, ValueError):
                print(f"error: could not write the output: {error}", file=sys.stderr)
        status = status or (EXIT_PIPE if broken else EXIT_USAGE)
    if not _flushes(sys.stderr):
        _discard(sys.stderr)
    return status


def _flushes(stream: Any) -> bool:
    try:
        stream.flush()
    except (OSError, ValueError):
        return False
    return True


def _discard(stream: Any) -> None:
    """Leads a stream that cannot be written to nowhere, so that the interpreter's own flush at its end succeeds."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
