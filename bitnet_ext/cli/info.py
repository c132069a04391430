"""``bitnet-ext info``: versions, devices and kernels of this installation."""

from __future__ import annotations

import argparse
import json
import platform
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Tells versions, devices and kernels of this installation: what a bug report needs."
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    from bitnet_ext import build_info

    facts = build_info()
    if args.json:
        print(json.dumps(facts, indent=1))
        return 0
    width = 14
    for title, words in in_words(facts):
        print(f"{title:{width}} {words}")
    return 0


def in_words(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """The facts of :func:`bitnet_ext.build_info` as lines: a title and a sentence."""
    from bitnet_ext.training.device import resolve_device
    from bitnet_ext.training.progress import device_words

    built = facts["torch_at_build"]
    torch_words = facts["torch"] + (f" (compiled with {built})" if built != facts["torch"] else "")
    lines = [
        ("bitnet_ext", facts["version"]),
        ("torch", torch_words),
        ("Python", f"{platform.python_version()}, {platform.platform()}"),
        ("compiler", facts["compiler"]),
        ("CPU kernels", f"{facts['cpu_isa']} (this CPU can use {', '.join(facts['cpu_isas'])})"),
        ("CUDA kernels", cuda_words(facts)),
        ("device", f"{device_words(resolve_device('auto'))}: where --device auto runs"),
    ]
    return lines


def cuda_words(facts: dict[str, Any]) -> str:
    """Whether the CUDA kernels can be used, and why not."""
    import torch

    from bitnet_ext import _load

    status = getattr(_load, "cuda_status", None)
    if status is not None:
        return str(status())
    archs = ", ".join(facts["cuda_archs"])
    if torch.version.cuda is None:
        compiled = f"; kernels for {archs} are compiled, this torch cannot load them" if archs else ""
        return f"off: torch {facts['torch']} has no CUDA{compiled}"
    if not facts["cuda_kernels"]:
        return "off: they were not compiled (no nvcc was found when bitnet_ext was installed)"
    if not torch.cuda.is_available():
        return f"loaded, compiled for {archs}; torch sees no NVIDIA GPU"
    return f"on, compiled for {archs} with CUDA {facts['cuda_at_build']}"
