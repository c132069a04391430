"""PEP 517 backend: scikit-build-core, with torch as a build requirement only where there is none.

pip's isolated build runs the interpreter of the target environment and hides that environment's
packages with a ``sitecustomize.py`` that it puts on ``PYTHONPATH``. Without that variable the same
interpreter sees them again, so a torch that the user already has serves the build (cmake/torch_stable.cmake
looks for it in the same way). Naming torch in ``build-system.requires`` would download a second copy,
gigabytes for a CUDA build. Any torch that is new enough will do, because the operators use the stable ABI.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from scikit_build_core import build as _backend
from scikit_build_core.build import *  # noqa: F403  (the hooks that need no change)

MINIMUM_TORCH = (2, 11)
_FACTS = Path(__file__).with_name("torch_facts.py")
_HIDING = ("PYTHONPATH", "PYTHONNOUSERSITE")  # what pip sets for an isolated build


def _installed_torch() -> str | None:
    """The version of the torch that the target environment has, or None."""
    environment = {name: value for name, value in os.environ.items() if name not in _HIDING}
    probe = subprocess.run(
        [sys.executable, str(_FACTS)], capture_output=True, text=True, env=environment, check=False
    )
    return probe.stdout.splitlines()[1] if probe.returncode == 0 else None


def _torch_requirement() -> list[str]:
    version = _installed_torch()
    if version is not None:
        major, minor = version.split(".")[:2]
        if (int(major), int(minor)) >= MINIMUM_TORCH:
            return []
    return ["torch>={}.{}".format(*MINIMUM_TORCH)]


def get_requires_for_build_wheel(config_settings: dict[str, str] | None = None) -> list[str]:
    return _backend.get_requires_for_build_wheel(config_settings) + _torch_requirement()


def get_requires_for_build_editable(config_settings: dict[str, str] | None = None) -> list[str]:
    return _backend.get_requires_for_build_editable(config_settings) + _torch_requirement()
