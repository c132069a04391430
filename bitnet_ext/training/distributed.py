"""Data parallelism under torchrun: rank, world size and the process group."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable
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
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if not dist.is_initialized():
        if device_type == "cuda":
            device = torch.device("cuda", local_rank)
            torch.cuda.set_device(device)
            dist.init_process_group("nccl", device_id=device)
        else:
            dist.init_process_group("gloo")
        atexit.register(_leave_world)
    return World(dist.get_rank(), dist.get_world_size(), local_rank)


def _leave_world() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


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


def in_main_process(world: World, act: Callable[[], None]) -> None:
    """Calls `act` in the main process. Every process returns, or raises, once it has ended.

    Raises:
        Exception: of `act`; in the other processes an OSError with the same message.
    """
    if world.size == 1:
        act()
        return
    error: Exception | None = None
    message: list[str | None] = [None]
    if world.is_main:
        try:
            act()
        except Exception as problem:  # the others must not wait for ever
            error, message = problem, [str(problem)]
    dist.broadcast_object_list(message, src=0)
    if error is not None:
        raise error
    if message[0] is not None:
        raise OSError(message[0])
