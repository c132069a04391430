"""Prints facts about the torch of this interpreter, one per line: its folder, its version, its CUDA ("none").

With --gpus: the compute capabilities of the GPUs that it sees instead, such as 9.0. Only this imports torch,
which takes seconds. Exits with a message where there is no torch.
"""

from __future__ import annotations

import importlib.util
import runpy
import sys
from pathlib import Path


def main(arguments: list[str]) -> int:
    spec = importlib.util.find_spec("torch")
    version = None if spec is None or spec.origin is None else Path(spec.origin).parent / "version.py"
    if version is None or not version.is_file():
        print(f"{sys.executable} finds no torch", file=sys.stderr)
        return 1
    if "--gpus" in arguments:
        import torch

        for device in range(torch.cuda.device_count()):
            print("{}.{}".format(*torch.cuda.get_device_capability(device)))
    else:
        facts = runpy.run_path(str(version))
        print(version.parent, facts["__version__"], facts.get("cuda") or "none", sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
