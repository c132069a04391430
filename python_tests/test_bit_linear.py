"""The training product: forward equal to packed inference, gradients of the straight-through reference."""

from __future__ import annotations

import pytest
import torch

from bitnet_ext import ops
from bitnet_ext.nn import BitLinear, PackedBitLinear

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def inputs(M: int, N: int, K: int, device: str, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    make = lambda *shape: torch.randn(*shape, generator=generator).to(device)  # noqa: E731
    return {"x": make(M, K), "weight": make(N, K) * 0.05, "bias": make(N), "norm_weight": make(K)}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("M", "N", "K"), [(1, 5, 3), (17, 33, 257), (124, 256, 256), (0, 4, 8)])
def test_forward_and_gradients(device: str, normalize: bool, M: int, N: int, K: int) -> None:
    tensors = inputs(M, N, K, device)
    if not normalize:
        del tensors["norm_weight"]
    grad = torch.randn(M, N, generator=torch.Generator().manual_seed(9)).to(device)
    results = []
    for function in (ops.bit_linear, ops.bit_linear_ref):
        leaves = {name: t.clone().requires_grad_() for name, t in tensors.items()}
        x, weight = leaves.pop("x"), leaves.pop("weight")
        y = function(x, weight, **leaves, norm_eps=1e-5 if normalize else None)
        y.backward(grad)
        results.append(
            (y.detach(), {"x": x.grad, "weight": weight.grad} | {n: t.grad for n, t in leaves.items()})
        )
    (y, gradients), (y_ref, gradients_ref) = results
    assert torch.equal(y, y_ref)
    for name, value in gradients.items():
        torch.testing.assert_close(
            value, gradients_ref[name], rtol=2e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm", [True, False])
def test_packed_layer_equals_training_forward(device: str, dtype: torch.dtype, norm: bool) -> None:
    torch.manual_seed(0)
    layer = BitLinear(257, 65, bias=True, norm=norm).to(device)
    x = torch.randn(3, 5, 257, device=device, dtype=dtype)
    assert torch.equal(layer(x), PackedBitLinear.from_bit_linear(layer)(x))


@pytest.mark.parametrize("device", DEVICES)
def test_autocast(device: str) -> None:
    torch.manual_seed(0)
    layer = BitLinear(64, 32, norm=True).to(device)
    x = torch.randn(8, 64, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, layer(x).bfloat16())  # the same integers, rounded once
    y.float().sum().backward()
    assert layer.weight.grad is not None and layer.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("device", DEVICES)
def test_compile_fullgraph_equals_eager(device: str) -> None:
    torch.manual_seed(0)

    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = BitLinear(48, 96)
            self.down = BitLinear(96, 48, norm=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.down(torch.relu(self.up(x)).square())

    block = Block().to(device)
    x = torch.randn(5, 48, device=device)
    # aot_eager traces forward and backward whole without needing a compiler on the machine.
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    expected = block(x)
    expected.square().sum().backward()
    gradients = [p.grad.clone() for p in block.parameters()]
    block.zero_grad()
    got = compiled(x)
    got.square().sum().backward()
    assert torch.equal(got, expected)
    for p, gradient in zip(block.parameters(), gradients, strict=True):
        torch.testing.assert_close(p.grad, gradient)


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
def test_inductor_equals_eager(device: str) -> None:
    torch.manual_seed(0)
    layer = torch.nn.Sequential(BitLinear(48, 96), torch.nn.ReLU(), BitLinear(96, 48, norm=True)).to(device)
    x = torch.randn(5, 48, device=device)
    compiled = torch.compile(layer, fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))


def test_frozen_parts_get_no_gradient() -> None:
    tensors = inputs(4, 6, 8, "cpu")
    weight = tensors["weight"].requires_grad_()
    ops.bit_linear(tensors["x"], weight).sum().backward()
    assert tensors["x"].grad is None and weight.grad is not None


def test_bad_arguments() -> None:
    x, w = torch.ones(2, 8), torch.ones(4, 8)
    with pytest.raises(ValueError, match="x must have K = 8 as its last dimension"):
        ops.bit_linear(torch.ones(2, 7), w)
    with pytest.raises(ValueError, match="norm_weight needs norm_eps"):
        ops.bit_linear(x, w, norm_weight=torch.ones(8))
    with pytest.raises(ValueError, match="bias must have shape"):
        ops.bit_linear(x, w, bias=torch.ones(5))
    with pytest.raises(ValueError, match=r"weight\[1\] must have K = 8 like weight\[0\]"):
        ops.bit_linear(x, [w, torch.ones(4, 7)])
    with pytest.raises(ValueError, match="backward must be exact"):
        ops.bit_linear(x, w, backward="fp4")
    with pytest.raises(RuntimeError, match="holds NaN or Inf"):
        ops.bit_linear(x * float("nan"), w)
    with pytest.raises(ValueError, match="quantization must be one of"):
        BitLinear(4, 4, quantization="int4")
    with pytest.raises(ValueError, match="must be >= 1"):
        BitLinear(0, 4)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("sizes", [(32, 16, 5), (5, 3)], ids=["stacked", "apart on cuda"])
def test_several_weights_are_those_side_by_side(device: str, normalize: bool, sizes: tuple[int, ...]) -> None:
    M, K = 7, 37
    t = inputs(M, sum(sizes), K, device)
    norm = {"norm_weight": t["norm_weight"], "norm_eps": 1e-5} if normalize else {}
    grad = torch.randn(M, sum(sizes), generator=torch.Generator().manual_seed(9)).to(device)
    # Scales that differ, so that a mix-up shows.
    parts = [w * (i + 1) for i, w in enumerate(t["weight"].split(sizes))]
    results = []
    for function in (ops.bit_linear, ops.bit_linear_ref):
        leaves = [t["x"].clone(), t["bias"].clone(), *(p.clone() for p in parts)]
        gain = {k: v.clone().requires_grad_() if isinstance(v, torch.Tensor) else v for k, v in norm.items()}
        x, bias, *weights = (leaf.requires_grad_() for leaf in leaves)
        y = function(x, weights, bias=bias, **gain)
        y.backward(grad)
        tensors = [x, bias, *weights, *(v for v in gain.values() if isinstance(v, torch.Tensor))]
        results.append((y.detach(), [v.grad for v in tensors]))
    (y, gradients), (y_ref, gradients_ref) = results
    assert torch.equal(y, y_ref)
    for value, expected in zip(gradients, gradients_ref, strict=True):
        torch.testing.assert_close(value, expected, rtol=2e-4, atol=2e-5)
    separate = [
        ops.bit_linear(t["x"], w, bias=b, **norm) for w, b in zip(parts, t["bias"].split(sizes), strict=True)
    ]
    assert torch.equal(y, torch.cat(separate, dim=-1))


def test_only_the_weights_that_train_get_gradients() -> None:
    t = inputs(3, 8, 5, "cpu")
    frozen, trained = t["weight"].split((3, 5))
    trained = trained.clone().requires_grad_()
    ops.bit_linear(t["x"], [frozen, trained]).square().sum().backward()
    assert frozen.grad is None and trained.grad is not None and t["x"].grad is None


def test_codes_of_the_caller_are_used() -> None:
    t = inputs(3, 8, 5, "cpu")
    other = ops.quantize_weights([t["weight"].flip(0)])
    assert torch.equal(
        ops.bit_linear(t["x"], t["weight"], quantized=other), ops.bit_linear(t["x"], t["weight"].flip(0))
    )
