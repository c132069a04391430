"""Choice of the device a run uses."""

from __future__ import annotations

import torch

from bitnet_ext import build_info
from bitnet_ext._load import built_for


def resolve_device(name: str | torch.device = "auto") -> torch.device:
    """ "auto" is the first usable GPU, else the CPU; "cpu", "cuda" and "cuda:1" are taken at their word.

    Raises:
        ValueError: when a GPU is asked for and there is none, it is too old (compute capability below 8.0),
            or the package was built without CUDA kernels, or without those for this GPU.
    """
    if isinstance(name, torch.device):
        name = str(name)
    if name == "cpu":
        return torch.device("cpu")
    if name != "auto" and name.split(":")[0] != "cuda":
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}")
    problem = _cuda_problem(name)
    if problem is None:
        index = torch.device("cuda" if name == "auto" else name).index
        return torch.device("cuda", torch.cuda.current_device() if index is None else index)
    if name == "auto":
        return torch.device("cpu")
    raise ValueError(f"device {name!r} cannot be used: {problem}")


def _cuda_problem(name: str) -> str | None:
    if not torch.cuda.is_available():
        return "torch sees no NVIDIA GPU"
    index = int(name.split(":")[1]) if ":" in name else torch.cuda.current_device()
    if index >= torch.cuda.device_count():
        return f"this machine has {torch.cuda.device_count()} GPU(s)"
    capability = torch.cuda.get_device_capability(index)
    if capability < (8, 0):
        return (
            f"{torch.cuda.get_device_name(index)} has compute capability {capability[0]}.{capability[1]}, "
            "the kernels need 8.0 or newer"
        )
    info = build_info()
    if not info["cuda_kernels"]:
        return f"{info['cuda_reason']}; install it again where nvcc and a torch with CUDA are found"
    if not built_for(capability):
        return (
            f"bitnet_ext was built for {', '.join(info['cuda_archs'])}, not for the "
            f"{capability[0]}.{capability[1]} of {torch.cuda.get_device_name(index)}; install it again on this "
            "machine, or with BITNET_EXT_CUDA_ARCHS=all"
        )
    return None
