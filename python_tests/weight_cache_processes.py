"""The processes of test_weight_cache: collectives and FSDP2 write weights. A spawned process imports this module."""

from __future__ import annotations

import copy

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bitnet_ext.nn import BitLinear, frozen_weights


def everywhere(value: Tensor) -> list[Tensor]:
    parts = [torch.empty_like(value) for _ in range(2)]
    dist.all_gather(parts, value.contiguous())
    return parts


def collectives_into_parameters(rank: int) -> None:
    x = torch.ones(1, 64)
    for name in ("broadcast", "broadcast_data", "all_reduce", "coalesced"):
        torch.manual_seed(rank)
        layer = BitLinear(64, 8)
        layer(x)
        with torch.no_grad():
            if name == "broadcast":
                dist.broadcast(layer.weight, 0)
            elif name == "broadcast_data":
                dist.broadcast(layer.weight.data, 0)
            elif name == "all_reduce":
                dist.all_reduce(layer.weight)
            else:
                dist._broadcast_coalesced(dist.group.WORLD, [layer.weight.data], 1 << 20, 0)
        assert torch.equal(*everywhere(layer.weight.detach())), name
        assert torch.equal(*everywhere(layer(x).detach())), name


def sharded_with_own_updates(rank: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = nn.Sequential(BitLinear(64, 64, norm=True), nn.GELU(), BitLinear(64, 32, norm=True))
    twin = copy.deepcopy(model)  # the same in one process
    mesh = init_device_mesh("cpu", (2,))
    for part in (model[0], model[2], model):
        fully_shard(part, mesh=mesh)
    x = torch.randn(4, 64)
    for step in range(4):
        for net in (model, twin):
            net.zero_grad()
            with frozen_weights(
                net
            ):  # FSDP2 frees the weights between the two and refills them with the same values
                for half in x.chunk(2):
                    net(half).square().mean().backward()
            with torch.no_grad():
                for p in net.parameters():
                    p.sub_(p.grad)  # an update of one's own
        with torch.no_grad():
            torch.testing.assert_close(model(x), twin(x), rtol=0, atol=1e-4, msg=f"step {step}")


def worker(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    try:
        collectives_into_parameters(rank)
        sharded_with_own_updates(rank)
        dist.barrier()
    finally:
        dist.destroy_process_group()
