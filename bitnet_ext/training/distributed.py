"""Data parallelism under torchrun: rank, world size and the process group."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class World:
    """This process's place among all of the run."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def join_world(device_type: str) -> World:
    """The world torchrun describes in the environment (its process group started), or a world of one."""
    if "WORLD_SIZE" not in os.environ or int(os.environ["WORLD_SIZE"]) == 1:
        return World()
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device_type == "cuda" else "gloo")
    return World(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", "0")))


def mean_over_ranks(values: torch.Tensor, world: World) -> torch.Tensor:
    """Average of `values` over all processes, on each of them."""
    if world.size > 1:
        dist.all_reduce(values)
        values /= world.size
    return values


def wait_for_all(world: World) -> None:
    """Returns once every process has called it."""
    if world.size > 1:
        dist.barrier()
