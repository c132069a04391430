"""What the tests of the CUDA kernels share: inputs of every kind, poisoned memory, comparisons bit by bit."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KS = [1, 3, 16, 17, 63, 64, 255, 257, 1000, 2560, 6912]


def generator(seed: int) -> torch.Generator:
    return torch.Generator(device="cuda").manual_seed(seed)


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), device="cuda").to(dtype)


def integers(low: int, high: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(low, high, shape, generator=generator(seed), device="cuda", dtype=torch.int8)


def shifted(t: Tensor, elements: int = 1) -> Tensor:
    """A contiguous copy of `t` that starts `elements` elements into its storage: aligned to nothing else."""
    storage = torch.empty(t.numel() + elements, dtype=t.dtype, device=t.device)
    view = storage[elements:].view(t.shape)
    view.copy_(t)
    assert view.is_contiguous()
    return view


def exact_ref(reference: Callable[..., tuple[Tensor, ...]], *args: object) -> tuple[Tensor, ...]:
    """A `*_ref` twin computed on the CPU: on CUDA, PyTorch divides by a Python number by multiplying with its
    reciprocal, which rounds twice."""
    on_cpu = [a.cpu() if isinstance(a, Tensor) else a for a in args]
    return tuple(t.cuda() for t in reference(*on_cpu))


def poison(*tensors: Tensor) -> None:
    """Fills memory and frees it, so that the next results of these sizes start as garbage, not as zeros or
    as the right values of a run before."""
    sizes = [max(t.numel() * t.element_size(), 1) for t in tensors]
    blocks = [torch.full((size,), 0xC5, dtype=torch.uint8, device="cuda") for size in sizes]
    del blocks


def assert_within_twice(got: Tensor, eager: Tensor, exact: Tensor) -> None:
    """No further from float64 than twice plain PyTorch in the same dtype, and a floor of one rounding."""
    assert got.shape == exact.shape
    if exact.numel() == 0:
        return
    limit = 2 * (eager.double() - exact).abs().max() + torch.finfo(got.dtype).eps * exact.abs().max()
    assert (got.double() - exact).abs().max() <= limit


def assert_same(first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> None:
    """Equal bits, NaN included."""
    for a, b in zip(first, second, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert torch.equal(
            a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8)
        )


def exact_product(x: Tensor, codes: Tensor) -> Tensor:
    return (x.double() @ codes.double().t()).to(torch.int32)
