"""How long idle threads of PyTorch's pool spin before they sleep. Imported before torch; imports nothing but Python.

A thread that has done its share of an operator spins, ready for the next one. GNU OpenMP, which comes with PyTorch's
wheels for Linux, lets it spin for milliseconds: as long as another program's time slice. Beside other programs the
spinning thread holds the core that the thread it waits for needs, and training falls to a quarter of its speed.

Two bounds, because neither serves both cases (bench/threads.py, collapse-256, two cores of an AMD EPYC): on idle cores
10,000 turns cost 2 to 7 % in three runs and 100,000 turns 0 to 3 % in two; on busy cores 10,000 turns train 1.5 times
(load 5 to 7) to 4.2 times (load 11 to 22) as fast as the default, and 100,000 turns do not help. The load at the import
decides.

Fewer threads would help as well, but their number changes how PyTorch's products are summed up: the same run would
give other bits on a busy machine.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Container, MutableMapping

#: Turns of GNU OpenMP's waiting loop (its default is 300,000), on idle cores and on busy ones.
SPIN_TURNS = 100_000
BUSY_SPIN_TURNS = 10_000
#: Milliseconds for which threads of LLVM's and Intel's OpenMP spin (their default is 200).
BLOCK_MILLISECONDS = 1
#: Variables with which a user has chosen how threads wait.
CHOSEN = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")

_came_too_late = False


def bound_spinning(
    environment: MutableMapping[str, str] = os.environ, loaded: Container[str] = sys.modules
) -> bool:
    """Sets the bound, for this process and those that it starts, unless the user has chosen or it is too late.

    Args:
        environment: changed.
        loaded: names of loaded modules: the OpenMP library reads the variables once, when torch loads it.

    Returns:
        Whether it is set.
    """
    global _came_too_late
    if any(name in environment for name in CHOSEN):
        return False
    if "torch" in loaded:
        _came_too_late = True
        return False
    environment["GOMP_SPINCOUNT"] = str(BUSY_SPIN_TURNS if busy_load() is not None else SPIN_TURNS)
    environment["KMP_BLOCKTIME"] = str(BLOCK_MILLISECONDS)
    return True


def busy_load() -> float | None:
    """The load average of the last minute, where it is at least half of the cores of this process; else None."""
    if not sys.platform.startswith("linux"):
        return None
    load = os.getloadavg()[0]
    return load if load >= len(os.sched_getaffinity(0)) / 2 else None


def warn_of_spinning(threads: int) -> None:
    """Warns, once per process, if threads spin without a bound while other programs need the cores.

    Args:
        threads: of PyTorch's pool.
    """
    global _came_too_late
    if not _came_too_late or threads < 2 or not sys.platform.startswith("linux"):
        return
    load = busy_load()
    if load is None:
        return
    _came_too_late = False
    warnings.warn(
        f"the cores are busy (load average {load:.1f}), and torch was imported before bitnet_ext, so "
        "that idle threads spin and slow training down several times: import bitnet_ext before torch, or set "
        f"GOMP_SPINCOUNT={BUSY_SPIN_TURNS} before Python starts",
        stacklevel=3,
    )
