"""Train, understand and run ternary (BitNet b1.58) language models in PyTorch.

Packages, each imported when it is first used and importing only from those after it: ``collapse`` (experiments),
``formats`` (models on disk), ``training`` and ``inference``, ``models``, ``metrics`` and ``data``, ``nn`` (modules),
``ops`` (functional operators).
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from bitnet_ext import _threads
from bitnet_ext._lazy import lazy_names

__version__ = "0.1.0"

_threads.bound_spinning()  # before torch is imported

__all__ = [
    "__version__",
    "build_info",
    "collapse",
    "data",
    "formats",
    "inference",
    "metrics",
    "models",
    "nn",
    "ops",
    "testing",
    "training",
]

__getattr__ = lazy_names(
    __name__,
    {"_load": ("build_info",), **{name: () for name in __all__ if name not in ("__version__", "build_info")}},
)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if TYPE_CHECKING:
    from bitnet_ext import collapse, data, formats, inference, metrics, models, nn, testing, training

if TYPE_CHECKING or "bitnet_ext_cli" not in sys.modules:
    # Registers torch.ops.bitnet_ext. The program `bitnet-ext` does so when it needs them: it answers --help first.
    from bitnet_ext import ops
    from bitnet_ext._load import build_info
