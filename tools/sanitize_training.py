"""Training steps with every kernel that they launch, small enough for compute-sanitizer.

    compute-sanitizer --tool memcheck --kernel-regex kns=bitnet_ext python tools/sanitize_training.py step
    compute-sanitizer --tool racecheck --kernel-regex kns=bitnet_ext python tools/sanitize_training.py int8
    compute-sanitizer --tool initcheck python tools/sanitize_training.py step --fill

step: collapse-256 with 1,000 tokens of vocabulary, a graph of several overlapped steps and one of a single step.
int8: forward and backward of a layer with gradients in 8 bits, an aligned shape and one that is not.
The filter leaves out PyTorch's own kernels, which take most of the time; initcheck must see them, or it reports what
they have filled. Nor does it follow what the copy engine stores, so with it every new tensor is filled first: with NaN,
which reaches the printed numbers if anything is read before it is written. Apart from that results are not looked at:
python_tests does that.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch

from bitnet_ext.collapse.arms import arm_config
from bitnet_ext.models import BitNetForCausalLM, preset
from bitnet_ext.nn import BitLinear
from bitnet_ext.training import FusedAdam
from bitnet_ext.training.distributed import World
from bitnet_ext.training.step import UNROLLED_STEPS, TrainStep

VOCABULARY = 1000
#: M, N, K
LAYERS = ((300, 384, 256), (1000, 513, 260))


def step() -> None:
    device = torch.device("cuda")
    config = arm_config("standard-lr", 1000, seed=0)
    model = BitNetForCausalLM(preset("collapse-256", vocab_size=VOCABULARY), seed=0).to(device).train()
    shape = (UNROLLED_STEPS + 1, config.batch_size, config.seq_len + 1)
    rows = np.random.default_rng(0).integers(0, VOCABULARY, shape)
    records = TrainStep(model, FusedAdam(model, config), config, device, World()).run(0, rows)
    print("losses:", [round(loss, 4) for loss in records[:, 0].tolist()])


def int8() -> None:
    means = []
    for M, N, K in LAYERS:
        layer = BitLinear(K, N, backward="int8", device="cuda", dtype=torch.bfloat16)
        x = torch.randn(M, K, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        grads = torch.autograd.grad(layer(x).square().mean(), (x, layer.weight))
        means.append([round(grad.float().abs().mean().item(), 8) for grad in grads])
    print("mean magnitudes of the gradients of x and weight:", means)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("step", "int8"))
    parser.add_argument("--fill", action="store_true", help="fill new tensors with NaN first")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("an NVIDIA GPU is needed, none is available")
    if arguments.fill:
        torch.use_deterministic_algorithms(True, warn_only=True)  # the fill is part of that mode
        torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    {"step": step, "int8": int8}[arguments.what]()


if __name__ == "__main__":
    main()
