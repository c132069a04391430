"""The state of torch's generator in a checkpoint, where steps draw from it.

The "int8" backward rounds at random. On a CPU a resumed run equals an uninterrupted one only if it goes on with the
generator's state. On a GPU the capture of the step draws as well, and the state is not recorded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitnet_ext.training.checkpoint import Checkpoint, CheckpointError
from bitnet_ext.training.config import TrainConfig

_NAME = "random_state"


def random_state(config: TrainConfig, device: torch.device) -> dict[str, Tensor]:
    """The tensors to store with the moments: the state of the CPU's generator, or none."""
    return {_NAME: torch.get_rng_state()} if config.backward == "int8" and device.type == "cpu" else {}


def restore_random_state(checkpoint: Checkpoint, config: TrainConfig, device: torch.device) -> None:
    """Sets torch's generator as it was when the checkpoint was written, where a state was stored and is used.

    Raises:
        CheckpointError: the stored state is none.
    """
    state = checkpoint.optimizer.get(_NAME)
    if state is None or not random_state(config, device):
        return
    try:
        torch.set_rng_state(state)
    except (RuntimeError, TypeError) as error:
        raise CheckpointError(
            f"checkpoint {checkpoint.path}: {_NAME} is no state of a generator ({error})"
        ) from error
