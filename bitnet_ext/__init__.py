"""Train, understand and run ternary (BitNet b1.58) language models in PyTorch.

Layers, each importing only from those after it: ``collapse`` (experiments), ``formats`` (models on disk),
``training`` and ``inference``, ``models``, ``metrics`` and ``data``, ``nn`` (modules), ``ops`` (functional operators).
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from bitnet_ext import _threads
from bitnet_ext._lazy import lazy_names

__version__ = "0.1.0"

_threads.bound_spinning()  # before torch is imported

__all__ = ["__version__", "build_info", "ops"]

__getattr__ = lazy_names(__name__, {"ops": (), "_load": ("build_info",)})

if TYPE_CHECKING or "bitnet_ext_cli" not in sys.modules:
    # Registers torch.ops.bitnet_ext. The program `bitnet-ext` does so when it needs them: it answers --help first.
    from bitnet_ext import ops
    from bitnet_ext._load import build_info
