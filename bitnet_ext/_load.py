"""Loads the compiled modules: ``_C`` (schemas and CPU kernels), ``_C_cuda`` (CUDA kernels), ``_native``.

Python run in the root of a source checkout imports the package from the checkout, where no compiled
module lies. The modules of the installed distribution are taken then, so tests and examples work from
the root too. All of them come from one folder, hence from one build.
"""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from bitnet_ext import __version__

_INSTALL = "install the package with `pip install .`"


def _find(folder: Path, name: str) -> Path | None:
    candidates = (folder / f"{name}{suffix}" for suffix in EXTENSION_SUFFIXES)
    return next((path for path in candidates if path.is_file()), None)


def _folder() -> Path:
    # The ordinary way first: it also lets an editable installation rebuild itself.
    spec = importlib.util.find_spec("bitnet_ext._native")
    if spec is not None and spec.origin is not None:
        return Path(spec.origin).parent
    for entry in sys.path:
        folder = Path(entry).resolve() / "bitnet_ext"
        if _find(folder, "_native") is not None:
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


def _check_version(built: str, folder: Path) -> None:
    if built != __version__:
        raise ImportError(
            f"bitnet_ext {__version__} ({Path(__file__).parent}) found compiled modules of version {built} "
            f"({folder}): {_INSTALL} again, so that both are of one version"
        )


_compiled = _folder()
_native: Any = _import(_compiled, "_native")
_check_version(_native.build_info()["version"], _compiled)
_import(_compiled, "_C")
# A CPU build of torch has none of the symbols that the CUDA operators need.
_C_cuda = _import(_compiled, "_C_cuda") if torch.version.cuda and _find(_compiled, "_C_cuda") else None


def build_info() -> dict[str, Any]:
    """Facts for a bug report.

    Returns a dict: ``version``, ``torch`` (running), ``torch_at_build``, ``compiler``, ``cuda_kernels``
    (whether the CUDA operators are loaded), ``cuda_archs`` (compiled architectures), ``cuda_at_build``,
    ``cpu_isa`` (in use), ``cpu_isas`` (this machine's, the best last), ``cpu_features``.
    """
    info = dict(_native.build_info())
    return {
        "version": info["version"],
        "torch": str(torch.__version__),
        "torch_at_build": info["torch"],
        "compiler": info["compiler"],
        "cuda_kernels": _C_cuda is not None,
        "cuda_archs": list(info["cuda_archs"]),
        "cuda_at_build": info["cuda_version"],
        "cpu_isa": torch.ops.bitnet_ext._cpu_isa(),
        "cpu_isas": list(_native.cpu_isas()),
        "cpu_features": dict(_native.cpu_features()),
    }
