"""PEP 517 backend: scikit-build-core, with torch as a build requirement only where there is none.

pip's isolated build runs the interpreter of the target environment, and that interpreter still sees
its own site-packages in isolated mode (``python -I``). So a torch that the user already has serves
the build; asking for one in ``build-system.requires`` would download a second copy (gigabytes for a
CUDA build). Any torch >= 2.10 will do: the operators use the stable ABI.
"""

from __future__ import annotations

import os
import subprocess
import sys

from scikit_build_core import build as _backend
from scikit_build_core.build import *  # noqa: F403  (the hooks that need no change)

MINIMUM_TORCH = (2, 11)
_PROBE = "import torch; print(torch.__version__)"


def _environment() -> dict[str, str]:
    # pip puts a sitecustomize.py on PYTHONPATH that hides site-packages; -I ignores it as well.
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def _torch_requirement() -> list[str]:
    probe = subprocess.run(
        [sys.executable, "-I", "-c", _PROBE], capture_output=True, text=True, env=_environment(), check=False
    )
    if probe.returncode == 0:
        version = probe.stdout.strip()
        found = tuple(int(part) for part in version.split("+")[0].split(".")[:2])
        if found >= MINIMUM_TORCH:
            return []
    return ["torch>={}.{}".format(*MINIMUM_TORCH)]


def get_requires_for_build_wheel(config_settings: dict[str, str] | None = None) -> list[str]:
    return _backend.get_requires_for_build_wheel(config_settings) + _torch_requirement()


def get_requires_for_build_editable(config_settings: dict[str, str] | None = None) -> list[str]:
    return _backend.get_requires_for_build_editable(config_settings) + _torch_requirement()
