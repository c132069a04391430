"""Loads the compiled modules: ``_C`` (schemas and CPU kernels), ``_C_cuda`` (CUDA kernels), ``_native``.

Python run in the root of a source checkout imports the package from the checkout, where no compiled
module lies. The modules of the installed distribution are taken then, so tests and examples work from
the root too. All of them come from one folder, hence from one build. ``_native`` is for tests; a wheel holds
it for one version of Python only and serves the others without it.
"""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from bitnet_ext import __version__

_INSTALL = "install the package with `pip install .`"


def _find(folder: Path, name: str) -> Path | None:
    # A module for one Python is left over from an older build if there is also one for every Python.
    suffixes = sorted(EXTENSION_SUFFIXES, key=lambda suffix: suffix != ".abi3.so")
    candidates = (folder / f"{name}{suffix}" for suffix in suffixes)
    return next((path for path in candidates if path.is_file()), None)


def _folder() -> Path:
    # The ordinary way first: it also lets an editable installation rebuild itself.
    spec = importlib.util.find_spec("bitnet_ext._C")
    if spec is not None and spec.origin is not None:
        return Path(spec.origin).parent
    for entry in sys.path:
        folder = Path(entry).resolve() / "bitnet_ext"
        if _find(folder, "_C") is not None:
            return folder
    raise ImportError(
        "bitnet_ext has no compiled modules for Python "
        f"{sys.version_info.major}.{sys.version_info.minor} ({sys.executable}): {_INSTALL}"
    )


def _import(folder: Path, name: str) -> ModuleType:
    qualified = f"bitnet_ext.{name}"
    if qualified in sys.modules:
        return sys.modules[qualified]
    path = _find(folder, name)
    spec = None if path is None else importlib.util.spec_from_file_location(qualified, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"bitnet_ext has no compiled module {name} in {folder}: {_INSTALL}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[qualified] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[qualified]
        raise
    return module


def _facts(operator: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(getattr(torch.ops.bitnet_ext, operator)())
    return found


def _check_version(built: str, folder: Path) -> None:
    if built != __version__:
        raise ImportError(
            f"bitnet_ext {__version__} ({Path(__file__).parent}) found compiled modules of version {built} "
            f"({folder}): {_INSTALL} again, so that both are of one version"
        )


_compiled = _folder()
_import(_compiled, "_C")
_built = _facts("_build_info") if hasattr(torch.ops.bitnet_ext, "_build_info") else {"version": "unknown"}
_check_version(_built["version"], _compiled)
# A CPU build of torch has none of the symbols that the CUDA operators need.
_C_cuda = _import(_compiled, "_C_cuda") if torch.version.cuda and _find(_compiled, "_C_cuda") else None
_native: Any = _import(_compiled, "_native") if _find(_compiled, "_native") else None


def build_info() -> dict[str, Any]:
    """Facts for a bug report.

    Returns a dict: ``version``, ``torch`` (running), ``torch_at_build``, ``compiler``, ``cuda_kernels``
    (whether the CUDA operators are loaded), ``cuda_reason`` (why they are not, else empty), ``cuda_archs``
    (compiled architectures), ``cuda_at_build``, ``cpu_isa`` (in use), ``cpu_isas`` (this machine's, the best
    last), ``cpu_features``.
    """
    cpu = _facts("_cpu_info")
    return {
        "version": _built["version"],
        "torch": str(torch.__version__),
        "torch_at_build": _built["torch"],
        "compiler": _built["compiler"],
        "cuda_kernels": _C_cuda is not None,
        "cuda_reason": _cuda_reason(),
        "cuda_archs": _cuda_archs(),
        "cuda_at_build": _built["cuda_version"],
        "cpu_isa": torch.ops.bitnet_ext._cpu_isa(),
        "cpu_isas": cpu["isas"],
        "cpu_features": cpu["features"],
    }


def cuda_status() -> str:
    """Whether the CUDA kernels are on, and why, in one line. Asks no GPU."""
    if _C_cuda is None:
        return f"off: {_cuda_reason()}"
    return f"on: built by nvcc {_built['cuda_version']} for {', '.join(_cuda_archs())}"


def built_for(capability: tuple[int, int]) -> bool:
    """Whether the CUDA kernels were compiled for a GPU of this compute capability, such as (9, 0)."""
    return any(_serves(arch, capability) for arch in _cuda_archs())


def _cuda_archs() -> list[str]:
    return [arch for arch in _built["cuda_archs"].split(",") if arch]


def _cuda_reason() -> str:
    if _C_cuda is not None:
        return ""
    if not _cuda_archs():
        return f"bitnet_ext was built without CUDA kernels, because {_built['cuda_reason']}"
    if not torch.version.cuda:
        return f"the CUDA kernels are built, but this torch ({torch.__version__}) has no CUDA"
    return f"the build made CUDA kernels, but there is no module _C_cuda in {_compiled}"


def _serves(arch: str, capability: tuple[int, int]) -> bool:
    """`arch` in CMake's form. Machine code serves later GPUs of its generation, PTX all later ones."""
    match = re.fullmatch(r"(\d+)(\d)([af]?)(-real|-virtual)?", arch)
    if match is None:
        return False
    compiled = int(match[1]), int(match[2])
    if match[3] == "a":
        return capability == compiled
    if match[4] == "-real" or match[3] == "f":
        return capability[0] == compiled[0] and capability >= compiled
    return capability >= compiled
