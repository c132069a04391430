"""The norm, alone, behind a sum, and behind a gated product: values, gradients, determinism, bad input."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bitnet_ext import ops

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = 1e-5
#: (M, K): every way of a row onto threads, rows that vectors cannot take, few rows and many.
SHAPES = [(1, 3), (5, 37), (0, 8), (128, 256), (9, 512), (6, 1000), (3, 1536), (530, 264), (17, 4096)]
#: Too much for a CPU in a test.
LARGE = [
    (5000, 1536),
    (2000, 2048),
    (600, 6912),
    (700, 8192),
    (515, 14336),
    (3, 14336),
    (520, 16400),
    (515, 2051),
]
CASES = [pytest.param("cpu", *s) for s in SHAPES] + [
    pytest.param("cuda", *s, marks=pytest.mark.gpu) for s in SHAPES + LARGE
]


def make(device: str, dtype: torch.dtype, *shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def gradients(function: Callable[..., Tensor], grad: Tensor, *leaves: Tensor) -> list[Tensor]:
    """The result and the gradients of all leaves."""
    leaves = tuple(leaf.detach().clone().requires_grad_() for leaf in leaves)
    result = function(*leaves)
    result.backward(grad.to(result.dtype))
    return [result.detach(), *(leaf.grad for leaf in leaves)]


def assert_no_worse(ours: list[Tensor], plain: list[Tensor], exact: list[Tensor]) -> None:
    """Errors against fp64 at most twice those of plain PyTorch, of each tensor by the root mean square."""
    for index, (a, b, c) in enumerate(zip(ours, plain, exact, strict=True)):
        assert a.dtype == b.dtype and a.shape == b.shape == c.shape
        if a.numel() == 0:
            continue
        error, allowed = ((t.double() - c).square().mean().sqrt().item() for t in (a, b))
        size = c.square().mean().sqrt().item()
        assert error <= 2 * allowed + 1e-6 * size, (
            f"tensor {index}: {error} against {allowed}, of size {size}"
        )


def plain_norm(x: Tensor, gain: Tensor) -> Tensor:
    wide = x if x.dtype == torch.float64 else x.float()
    return F.rms_norm(wide, (x.shape[-1],), gain.to(wide.dtype), EPS).to(x.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("device", "M", "K"), CASES)
def test_rms_norm(device: str, M: int, K: int, dtype: torch.dtype) -> None:
    x, gain, grad = (
        make(device, dtype, M, K),
        make(device, torch.float32, K, seed=1),
        make(device, dtype, M, K, seed=2),
    )
    ours = gradients(lambda x, gain: ops.rms_norm(x, gain, EPS), grad, x, gain)
    assert_no_worse(
        ours,
        gradients(plain_norm, grad, x, gain),
        gradients(plain_norm, grad, x.double(), gain.double()),
    )
    assert torch.equal(ours[0], ops.rms_norm_ref(x, gain, EPS))
    again = gradients(lambda x, gain: ops.rms_norm(x, gain, EPS), grad, x, gain)
    assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))


@pytest.mark.parametrize(
    ("dtype", "delta_dtype"), [(t, t) for t in DTYPES] + [(torch.float32, t) for t in DTYPES[1:]]
)
@pytest.mark.parametrize(("device", "M", "K"), CASES)
def test_add_rms_norm(device: str, M: int, K: int, dtype: torch.dtype, delta_dtype: torch.dtype) -> None:
    x, delta = make(device, dtype, M, K), make(device, delta_dtype, M, K, seed=3)
    gain, grad = make(device, torch.float32, K, seed=1), make(device, dtype, M, 2 * K, seed=2)

    def ours(x: Tensor, delta: Tensor, gain: Tensor) -> Tensor:
        return torch.cat(ops.add_rms_norm(x, delta, gain, EPS), dim=-1)

    def plain(x: Tensor, delta: Tensor, gain: Tensor) -> Tensor:
        total = x + delta
        return torch.cat((plain_norm(total, gain), total), dim=-1)

    got = gradients(ours, grad, x, delta, gain)
    assert torch.equal(got[0][..., K:], x + delta)
    assert torch.equal(got[0][..., :K], ops.rms_norm(x + delta, gain, EPS))
    exact = gradients(plain, grad, x.double(), delta.double(), gain.double())
    assert_no_worse(got[1:], gradients(plain, grad, x, delta, gain)[1:], exact[1:])


@pytest.mark.parametrize("device", DEVICES)
def test_a_result_of_the_sum_that_is_not_used(device: str) -> None:
    x, delta, gain = (make(device, torch.float32, *s) for s in ((4, 16), (4, 16), (16,)))
    for index in (0, 1):
        leaves = [t.clone().requires_grad_() for t in (x, delta.bfloat16(), gain)]
        ops.add_rms_norm(*leaves, EPS)[index].square().sum().backward()
        twins = [t.clone().requires_grad_() for t in (x, delta.bfloat16(), gain)]
        total = twins[0] + twins[1]
        (plain_norm(total, twins[2]) if index == 0 else total).square().sum().backward()
        for leaf, twin in zip(leaves, twins, strict=True):
            assert (leaf.grad is None) == (twin.grad is None)
            if twin.grad is not None:
                torch.testing.assert_close(
                    leaf.grad, twin.grad, rtol=2e-2 if twin.dtype != x.dtype else 1e-4, atol=1e-4
                )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16)])
def test_add_bit_linear(device: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    x, delta = make(device, dtypes[0], 7, 40), make(device, dtypes[1], 7, 40, seed=1)
    weights = [make(device, torch.float32, n, 40, seed=n) for n in (16, 5)]
    gain, grad = make(device, torch.float32, 40, seed=5), make(device, torch.float32, 7, 61, seed=6)

    def ours(x: Tensor, delta: Tensor, gain: Tensor, *weights: Tensor) -> Tensor:
        y, total = ops.add_bit_linear(
            x, delta, weights, norm_weight=gain, norm_eps=EPS, out_dtype=torch.float32
        )
        return torch.cat((y, total.float()), dim=-1)

    def apart(x: Tensor, delta: Tensor, gain: Tensor, *weights: Tensor) -> Tensor:
        total = x + delta
        y = ops.bit_linear(total, weights, norm_weight=gain, norm_eps=EPS, out_dtype=torch.float32)
        return torch.cat((y, total.float()), dim=-1)

    got, expected = (gradients(f, grad, x, delta, gain, *weights) for f in (ours, apart))
    for a, b in zip((got[0], *got[3:]), (expected[0], *expected[3:]), strict=True):
        assert torch.equal(a, b)
    reference = ops.add_bit_linear_ref(x, delta, weights, norm_weight=gain, norm_eps=EPS)
    assert torch.equal(got[0], torch.cat([part.float() for part in reference], dim=-1))
    for a, b in zip(got[1:3], expected[1:3], strict=True):  # summed in fp32 here, after a rounding there
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2 if a.dtype != torch.float32 else 1e-5)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("activation", ["relu2", "silu"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("device", "M", "K"), CASES)
def test_glu_backward(
    device: str, M: int, K: int, dtype: torch.dtype, activation: str, normalize: bool
) -> None:
    gate_up, grad = make(device, dtype, M, 2 * K), make(device, dtype, M, K, seed=2)
    gain = make(device, torch.float32, K, seed=1)

    def plain(gate_up: Tensor, gain: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        h = (F.relu(gate).square() if activation == "relu2" else F.silu(gate)) * up
        return plain_norm(h, gain) if normalize else h * 1.0

    gate, up = gate_up.chunk(2, dim=-1)
    h = (F.relu(gate).square() if activation == "relu2" else F.silu(gate)) * up
    rstd = (
        (h.double().square().mean(-1) + EPS).rsqrt().float()
        if normalize
        else h.new_empty(0, dtype=torch.float32)
    )
    call = torch.ops.bitnet_ext.glu_backward
    arguments = (grad, gate_up, activation, gain if normalize else None, rstd, normalize)
    ours = list(call(*arguments))
    leaves, wide = (gate_up, gain), (gate_up.double(), gain.double())
    if not normalize:
        assert ours.pop().numel() == 0
        cut = slice(1, 2)
        wanted = [
            gradients(lambda t, p=plain, g=gain: p(t, g), grad, t)[cut] for t in (gate_up, gate_up.double())
        ]
    else:
        wanted = [gradients(plain, grad, *t)[1:] for t in (leaves, wide)]
    assert_no_worse(ours, *wanted)
    reference = ops.glu_backward_ref(
        grad, gate_up, activation, *((gain, rstd) if normalize else (None, None))
    )
    for a, b in zip(ours, reference, strict=False):
        error = (a.double() - b.double()).abs().max().item() if a.numel() else 0.0
        scale = b.double().abs().max().item() if a.numel() else 1.0
        assert error <= (1e-5 if dtype == torch.float32 else 2e-2) * scale + 1e-6
    assert all(torch.equal(a, b) for a, b in zip(ours, call(*arguments), strict=False))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_glu_bit_linear(device: str, normalize: bool, dtype: torch.dtype) -> None:
    gate_up, weight = make(device, dtype, 2, 9, 80), make(device, torch.float32, 33, 40, seed=1)
    bias, gain = make(device, torch.float32, 33, seed=2), make(device, torch.float32, 40, seed=3)
    norm = {"norm_weight": gain, "norm_eps": EPS} if normalize else {}
    y = ops.glu_bit_linear(gate_up, weight, "relu2", bias=bias, **norm)
    assert y.dtype == dtype
    gate, up = gate_up.chunk(2, dim=-1)
    h = F.relu(gate).square() * up
    assert torch.equal(y, ops.bit_linear(h, weight, bias=bias, **norm))
    assert torch.equal(y, ops.glu_bit_linear_ref(gate_up, weight, "relu2", bias=bias, **norm).to(dtype))
    grad = make(device, torch.float32, 2, 9, 33, seed=4)
    leaves = (gate_up, weight, bias, gain) if normalize else (gate_up, weight, bias)

    def ours(gate_up: Tensor, weight: Tensor, bias: Tensor, gain: Tensor | None = None) -> Tensor:
        eps = None if gain is None else EPS
        return ops.glu_bit_linear(
            gate_up, weight, "relu2", bias=bias, norm_weight=gain, norm_eps=eps, out_dtype=torch.float32
        )

    def reference(gate_up: Tensor, weight: Tensor, bias: Tensor, gain: Tensor | None = None) -> Tensor:
        eps = None if gain is None else EPS
        return ops.glu_bit_linear_ref(gate_up, weight, "relu2", bias=bias, norm_weight=gain, norm_eps=eps)

    got, expected = (gradients(f, grad, *leaves) for f in (ours, reference))
    tolerance = 2e-5 if dtype == torch.float32 else 2e-2
    for a, b in zip(got, expected, strict=True):
        size = b.float().abs().max().item()
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * size)


def test_bad_arguments() -> None:
    x, gain = torch.ones(2, 8), torch.ones(8)
    with pytest.raises(ValueError, match="gain must have shape"):
        ops.rms_norm(x, torch.ones(7))
    with pytest.raises(ValueError, match="eps must be >= 0"):
        ops.rms_norm(x, gain, -1.0)
    with pytest.raises(TypeError, match="delta must be of dtype bfloat16"):
        ops.add_rms_norm(x.bfloat16(), x, gain)
    with pytest.raises(ValueError, match="delta must have shape"):
        ops.add_rms_norm(x, x[:1], gain)
    with pytest.raises(ValueError, match="gate_up must have 2 K = 16"):
        ops.glu_bit_linear(x, torch.ones(4, 8), "relu2")
    with pytest.raises(ValueError, match="activation must be relu2 or silu"):
        ops.glu_bit_linear(torch.ones(2, 16), torch.ones(4, 8), "gelu")
    with pytest.raises(ValueError, match="norm_weight needs norm_eps"):
        ops.glu_bit_linear(torch.ones(2, 16), torch.ones(4, 8), "relu2", norm_weight=gain)
    with pytest.raises(RuntimeError, match=r"act\(gate\) \* up holds NaN or Inf"):
        ops.glu_bit_linear(torch.full((2, 16), float("nan")), torch.ones(4, 8), "relu2")
