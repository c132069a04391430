"""Train, understand and run ternary (BitNet b1.58) language models in PyTorch.

Layers, each importing only from those after it: ``collapse`` (experiments), ``training`` and
``inference``, ``models``, ``metrics`` and ``data``, ``nn`` (modules), ``ops`` (functional operators).
"""

from __future__ import annotations

__version__ = "0.1.0"

from bitnet_ext import _threads

_threads.bound_spinning()  # before torch is imported

from bitnet_ext import _ops, ops  # noqa: E402
from bitnet_ext._load import build_info  # noqa: E402

__all__ = ["__version__", "build_info", "ops"]

_ops.register()
