"""Loads the compiled modules: ``_C`` (schemas and CPU kernels), ``_C_cuda`` (CUDA kernels), ``_native``.

Python run in the root of a source checkout imports the package from the checkout, where no compiled
module lies. The modules of the installed distribution are taken then, so tests and examples work from
the root too.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType
from typing import Any

import torch


def _folders() -> list[Path]:
    here = Path(__file__).resolve().parent
    folders = [here]
    try:
        distribution = importlib.metadata.distribution("bitnet_ext")
        folders.append(Path(str(distribution.locate_file("bitnet_ext"))).resolve())
    except importlib.metadata.PackageNotFoundError:
        pass
    # A source checkout in front of the installed package on sys.path hides it from metadata's first hit.
    folders += [Path(entry) / "bitnet_ext" for entry in sys.path if entry.endswith("site-packages")]
    return list(dict.fromkeys(folders))


def _find(name: str) -> Path | None:
    for folder in _folders():
        for suffix in EXTENSION_SUFFIXES:
            path = folder / f"{name}{suffix}"
            if path.is_file():
                return path
    return None


def _import(name: str, path: Path) -> ModuleType:
    qualified = f"bitnet_ext.{name}"
    if qualified in sys.modules:
        return sys.modules[qualified]
    spec = importlib.util.spec_from_file_location(qualified, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[qualified] = module
    spec.loader.exec_module(module)
    return module


def _load(name: str, required: bool) -> ModuleType | None:
    path = _find(name)
    if path is None:
        if required:
            raise ImportError(
                f"bitnet_ext has no compiled module {name} for Python "
                f"{sys.version_info.major}.{sys.version_info.minor}: install the package with `pip install .`"
            )
        return None
    return _import(name, path)


_load("_C", required=True)
_native: Any = _load("_native", required=True)
# A CPU build of torch has none of the symbols that the CUDA operators need.
_C_cuda = _load("_C_cuda", required=False) if torch.version.cuda else None


def build_info() -> dict[str, Any]:
    """Facts for a bug report.

    Returns a dict: ``version``, ``torch`` (running), ``torch_at_build``, ``compiler``, ``cuda_kernels``
    (whether the CUDA operators are loaded), ``cuda_archs`` (compiled architectures), ``cuda_at_build``,
    ``cpu_isa`` (in use), ``cpu_isas`` (this machine's, the best last), ``cpu_features``.
    """
    info = dict(_native.build_info())
    return {
        "version": info["version"],
        "torch": torch.__version__,
        "torch_at_build": info["torch"],
        "compiler": info["compiler"],
        "cuda_kernels": _C_cuda is not None,
        "cuda_archs": list(info["cuda_archs"]),
        "cuda_at_build": info["cuda_version"],
        "cpu_isa": torch.ops.bitnet_ext._cpu_isa(),
        "cpu_isas": list(_native.cpu_isas()),
        "cpu_features": dict(_native.cpu_features()),
    }
