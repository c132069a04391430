"""The gradients of a ternary layer for few tokens: exact to fp32, odd shapes, special values, determinism."""

from __future__ import annotations

import cuda_tools as tools
import pytest
import torch
from torch import Tensor

from bitnet_ext import ops

pytestmark = pytest.mark.gpu
LAYERS = [(768, 256, [256, 256, 256]), (256, 256, []), (1024, 256, [512, 512]), (256, 512, [256])]


def layer(M: int, N: int, K: int, segments: list[int], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """(grad_y, x_i8, act_scale, codes, packed, weight_scale)"""
    grad_y = tools.normal(M, N, seed=1) * tools.normal(M, N, seed=2).exp()
    x_i8 = tools.integers(-128, 128, M, K, seed=3)
    act_scale = tools.normal(M, seed=4).exp() * 0.01
    codes = tools.integers(-1, 2, N, K, seed=5)
    weight_scale = tools.normal(max(1, len(segments)), seed=6).exp() * 0.1
    packed = ops.prepack_ternary(ops.pack_ternary(codes), K)
    return grad_y.to(dtype), x_i8, act_scale, codes, packed, weight_scale


def eager(
    grad_y: Tensor, x_i8: Tensor, act_scale: Tensor, codes: Tensor, weight_scale: Tensor, segments: list[int]
) -> tuple[Tensor, Tensor]:
    """Dequantise in grad_y's dtype and multiply, as plain PyTorch would."""
    sizes = torch.tensor(segments or [codes.shape[0]], device="cuda")
    weight = codes.float() * weight_scale.repeat_interleave(sizes).unsqueeze(1)
    x_q = x_i8.float() * act_scale.unsqueeze(1)
    return grad_y @ weight.to(grad_y.dtype), grad_y.t() @ x_q.to(grad_y.dtype)


def check(M: int, N: int, K: int, segments: list[int], dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    grad_y, x_i8, act_scale, codes, packed, weight_scale = layer(M, N, K, segments, dtype)
    args = (grad_y, x_i8, act_scale, packed, weight_scale, segments, True, True, weight_dtype)
    exact = ops.exact_grads_small_ref(
        grad_y.double(), x_i8, act_scale, packed, weight_scale, segments, True, True, torch.float64
    )
    plain = eager(grad_y, x_i8, act_scale, codes, weight_scale, segments)
    tools.poison(*plain)
    got = ops.exact_grads_small(*args)
    assert got[0].dtype == dtype and got[1].dtype == weight_dtype
    tools.assert_within_twice(got[0], plain[0], exact[0])
    tools.assert_within_twice(got[1], plain[1].to(weight_dtype), exact[1])
    tools.assert_same(got, ops.exact_grads_small(*args))


@pytest.mark.parametrize("layer_shape", LAYERS, ids=str)
@pytest.mark.parametrize("dtype", tools.DTYPES)
@pytest.mark.parametrize("M", [1, 3, 127, 128, 500])
def test_layers(M: int, dtype: torch.dtype, layer_shape: tuple[int, int, list[int]]) -> None:
    check(M, *layer_shape, dtype, torch.float32)


@pytest.mark.parametrize("dtype", tools.DTYPES)
@pytest.mark.parametrize("weight_dtype", tools.DTYPES)
@pytest.mark.parametrize(
    "shape", [(3, 1, 1), (17, 45, 131), (33, 100, 136), (129, 17, 129), (1, 1000, 24)], ids=str
)
def test_odd_shapes(shape: tuple[int, int, int], weight_dtype: torch.dtype, dtype: torch.dtype) -> None:
    check(*shape, [16, shape[1] - 16] if shape[1] > 16 else [], dtype, weight_dtype)


def test_unaligned_views() -> None:
    grad_y, x_i8, act_scale, _, packed, weight_scale = layer(40, 64, 128, [], torch.float32)
    rest = (act_scale, packed, weight_scale, [], True, True, torch.float32)
    views = ops.exact_grads_small(tools.shifted(grad_y), tools.shifted(x_i8), *rest)
    tools.assert_same(ops.exact_grads_small(grad_y, x_i8, *rest), views)


def test_only_one_of_the_two() -> None:
    grad_y, x_i8, act_scale, _, packed, weight_scale = layer(40, 64, 128, [], torch.float32)
    args = (grad_y, x_i8, act_scale, packed, weight_scale, [])
    both = ops.exact_grads_small(*args, True, True, torch.float32)
    grad_x, nothing = ops.exact_grads_small(*args, True, False, torch.float32)
    assert nothing.shape == (0,)
    tools.assert_same((both[0],), (grad_x,))
    nothing, grad_weight = ops.exact_grads_small(*args, False, True, torch.float32)
    assert nothing.shape == (0,)
    tools.assert_same((both[1],), (grad_weight,))


def test_leading_dimensions_and_no_tokens() -> None:
    grad_y, x_i8, act_scale, _, packed, weight_scale = layer(12, 32, 48, [], torch.float32)
    rest = (packed, weight_scale, [], True, True, torch.float32)
    flat = ops.exact_grads_small(grad_y, x_i8, act_scale, *rest)
    deep = ops.exact_grads_small(grad_y.view(3, 4, 32), x_i8.view(3, 4, 48), act_scale.view(3, 4), *rest)
    assert deep[0].shape == (3, 4, 48)
    tools.assert_same((flat[0].view(3, 4, 48), flat[1]), deep)
    grad_x, grad_weight = ops.exact_grads_small(grad_y[:0], x_i8[:0], act_scale[:0], *rest)
    assert grad_x.shape == (0, 48) and not grad_weight.any()


@pytest.mark.parametrize("dtype", tools.DTYPES)
@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
def test_special_values_spread_as_in_pytorch(value: float, dtype: torch.dtype) -> None:
    grad_y, x_i8, act_scale, codes, packed, weight_scale = layer(40, 64, 128, [], dtype)
    codes = codes.abs() * 2 - 1  # no zeros in some columns: Inf must stay Inf there
    codes[:, ::2] = 0
    packed = ops.prepack_ternary(ops.pack_ternary(codes), 128)
    grad_y[7, 11] = value
    plain = eager(grad_y, x_i8, act_scale, codes, weight_scale, [])
    got = ops.exact_grads_small(grad_y, x_i8, act_scale, packed, weight_scale, [], True, True, torch.float32)
    for mine, theirs in zip(got, plain, strict=True):
        assert torch.equal(mine.isnan(), theirs.isnan())
        infinite = theirs.isinf()
        assert torch.equal(mine.isinf(), infinite)
        assert torch.equal(mine[infinite].float(), theirs[infinite].float())


def test_in_a_cuda_graph() -> None:
    grad_y, x_i8, act_scale, _, packed, weight_scale = layer(40, 64, 128, [], torch.float32)
    args = (grad_y, x_i8, act_scale, packed, weight_scale, [], True, True, torch.float32)
    want = ops.exact_grads_small(*args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = ops.exact_grads_small(*args)
    got[0].zero_(), got[1].zero_()
    graph.replay()
    tools.assert_same(want, got)


def test_errors_name_the_argument() -> None:
    grad_y, x_i8, act_scale, _, packed, weight_scale = layer(8, 40, 16, [], torch.float32)
    rest = (True, True, torch.float32)
    with pytest.raises(RuntimeError, match="segments must be multiples of 16"):
        ops.exact_grads_small(grad_y, x_i8, act_scale, packed, weight_scale.repeat(2), [20, 20], *rest)
    with pytest.raises(RuntimeError, match="prepacked must have shape"):
        ops.exact_grads_small(grad_y, x_i8, act_scale, packed[:1], weight_scale, [], *rest)
    with pytest.raises(ValueError, match="grad_y must have shape"):
        ops.exact_grads_small(grad_y[:4], x_i8, act_scale, packed, weight_scale, [], *rest)
    with pytest.raises(ValueError, match="grad_y must be on a CUDA device"):
        ops.exact_grads_small(grad_y.cpu(), x_i8, act_scale, packed, weight_scale, [], *rest)
