"""How long idle threads of PyTorch's pool spin before they sleep. Imported before torch; imports nothing but Python.

A thread that has done its share of an operator spins, ready for the next one. GNU OpenMP, which comes with PyTorch's
wheels for Linux, lets it spin for milliseconds: as long as another program's time slice. Beside other programs the
spinning thread holds the core that the thread it waits for needs, and training falls to a quarter of its speed. With
the bound below a thread sleeps after 0.1 to 0.5 ms, which is longer than the gaps between the operators of a step and
shorter than a time slice.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Container, MutableMapping

#: Turns of GNU OpenMP's waiting loop (its default is 300,000) and milliseconds of LLVM's and Intel's (200).
SPIN_TURNS = 10_000
BLOCK_MILLISECONDS = 1
#: Variables with which a user has chosen how threads wait.
CHOSEN = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")


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
    if "torch" in loaded or any(name in environment for name in CHOSEN):
        return False
    environment["GOMP_SPINCOUNT"] = str(SPIN_TURNS)
    environment["KMP_BLOCKTIME"] = str(BLOCK_MILLISECONDS)
    return True
