"""Several weights quantised at once: the bits of each weight quantised alone."""

from __future__ import annotations

import pytest
import torch

from bitnet_ext import ops

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
#: N_i and K. The last N of a stack may be any; 1 x 1 and 3 x 5 are one block, mostly padding.
STACKS = [([1], 1), ([3], 5), ([16, 3], 129), ([32, 16, 16], 256), ([256, 128, 128], 96), ([48, 80, 7], 1000)]


def weights(rows: list[int], K: int, device: str, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(K)
    return [
        (torch.randn(N, K, generator=generator) * 0.1 * (i + 1)).to(device, dtype) for i, N in enumerate(rows)
    ]


def alone(group: list[torch.Tensor]) -> ops.QuantizedWeight:
    """The stack made of quantize_weight_ternary of each weight."""
    parts = [ops.quantize_weight_ternary(w) for w in group]
    packed = ops.pack_ternary(torch.cat([codes for codes, _ in parts]))
    if packed.is_cuda:
        packed = ops.prepack_ternary(packed, group[0].shape[1])
    return ops.QuantizedWeight(packed, torch.stack([scale for _, scale in parts]))


def check(got: ops.QuantizedWeight, want: ops.QuantizedWeight) -> None:
    assert torch.equal(got.packed, want.packed)
    assert torch.equal(got.weight_scale, want.weight_scale)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "K"), STACKS)
def test_a_stack_equals_its_weights(rows: list[int], K: int, dtype: torch.dtype, device: str) -> None:
    group = weights(rows, K, device, dtype)
    got = ops.quantize_weights(group)
    check(got, alone(group))
    check(got, ops.quantize_weights_ref(group))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(1536, 4096), (2560, 6912), (4099, 1030)])
def test_large_weights(shape: tuple[int, int]) -> None:
    """More than 4,096 x 1,024 elements, where a partial sum is of more than 4,096 of them."""
    group = weights([shape[0]], shape[1], "cuda")
    check(ops.quantize_weights(group), alone(group))


@pytest.mark.parametrize("device", DEVICES)
def test_a_weight_may_start_anywhere(device: str) -> None:
    """A view that is not 16-byte aligned."""
    flat = torch.randn(32 * 130 + 1, generator=torch.Generator().manual_seed(0)).to(device)
    group = [flat[1:].view(32, 130)]
    check(ops.quantize_weights(group), alone(group))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("count", [1, 5, 90])
def test_groups_in_place(count: int, device: str) -> None:
    """90 groups of up to 3 weights take more than one table."""
    groups = [weights(*STACKS[i % len(STACKS)], device) for i in range(count)]
    targets = [ops.quantize_weights([torch.zeros_like(w) for w in group]) for group in groups]
    versions = [target.packed._version for target in targets]
    ops.quantize_weight_groups_(groups, targets)
    for group, target, version in zip(groups, targets, versions, strict=True):
        check(target, alone(group))
        assert target.packed._version > version


@pytest.mark.gpu
def test_groups_in_a_graph_follow_the_weights() -> None:
    groups = [weights(*stack, "cuda") for stack in STACKS]
    targets = [ops.quantize_weights(group) for group in groups]
    ops.quantize_weight_groups_(groups, targets)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.quantize_weight_groups_(groups, targets)
    for seed in range(3):
        for group in groups:
            for w in group:
                w.normal_(0.0, 0.1 + seed)
        graph.replay()
        for group, target in zip(groups, targets, strict=True):
            check(target, alone(group))


def test_nan_is_an_error_on_the_cpu() -> None:
    group = weights([16, 3], 129, "cpu")
    group[1][2, 5] = float("nan")
    with pytest.raises(RuntimeError, match=r"weights\[1\] holds NaN or Inf"):
        ops.quantize_weights(group)


@pytest.mark.gpu
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_makes_the_scale_nan_on_cuda(bad: float) -> None:
    group = weights([16, 3], 129, "cuda")
    expected = ops.quantize_weights(group).weight_scale[0]
    group[1][2, 5] = bad
    scales = ops.quantize_weights(group).weight_scale
    assert torch.isnan(scales[1]) and torch.equal(scales[0], expected)


@pytest.mark.gpu
def test_rows_that_do_not_fill_a_block_are_refused_on_cuda() -> None:
    group = weights([8, 16], 64, "cuda")
    assert not ops.can_stack(group) and ops.can_stack(group[::-1])
    with pytest.raises(RuntimeError, match=r"weights\[0\] must have N, a multiple of 16"):
        ops.quantize_weights(group)


def test_bad_arguments() -> None:
    w = torch.ones(4, 8)
    with pytest.raises(ValueError, match="list of at least one tensor"):
        ops.quantize_weights([])
    with pytest.raises(ValueError, match=r"weights\[1\] must have K = 8 like weights\[0\], got 9"):
        ops.quantize_weights([w, torch.ones(4, 9)])
    with pytest.raises(TypeError, match=r"weights\[1\] must be of dtype float32"):
        ops.quantize_weights([w, w.half()])
    good = ops.quantize_weights([w])
    with pytest.raises(ValueError, match="targets must be a list of at least one QuantizedWeight"):
        ops.quantize_weight_groups_([[w]], [])
    with pytest.raises(RuntimeError, match=r"packed\[0\] must have shape \[8, 2\]; got \[4, 2\]"):
        ops.quantize_weight_groups_([[w, w]], [good])
    with pytest.raises(RuntimeError, match=r"abs_sums must have shape \[1\]; got \[2\]"):
        ops.quantize_weight_groups_([[w]], [good], torch.zeros(2, dtype=torch.float64))
    assert not ops.can_stack([w, torch.ones(4, 9)]) and not ops.can_stack([w, w.half()])
