"""The fused objective against plain PyTorch: values, parts, gradients, chunks, ignored tokens."""

from __future__ import annotations

import math

import pytest
import torch

from bitnet_ext import ops

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
TERMS = [
    {},
    {"label_smoothing": 0.1},
    {"z_loss": 1e-2},
    {"entropy_weight": 0.3},
    {"diversity_weight": 0.3},
    {"label_smoothing": 0.05, "z_loss": 1e-3, "entropy_weight": 0.1, "diversity_weight": 0.2},
]


def problem(T: int, V: int, H: int, device: str, scale: float = 1.0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(T + V)
    hidden = (torch.randn(T, H, generator=generator) * scale).to(device)
    weight = torch.randn(V, H, generator=generator).to(device)
    target = torch.randint(0, V, (T,), generator=generator).to(device)
    return hidden, weight, target


def gradients(function, hidden, weight, target, dtype=torch.float32, **terms):  # type: ignore[no-untyped-def]
    hidden, weight = (t.detach().to(dtype, copy=True).requires_grad_() for t in (hidden, weight))
    out = function(hidden, weight, target, **terms)
    out.loss.backward()
    return out, hidden.grad, weight.grad


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("terms", TERMS, ids=lambda t: "+".join(t) or "plain")
@pytest.mark.parametrize(("T", "V", "H"), [(1, 3, 8), (13, 101, 16), (40, 5003, 24)])
@pytest.mark.parametrize("chunked", [False, True])
def test_against_the_reference(
    device: str, terms: dict[str, float], T: int, V: int, H: int, chunked: bool
) -> None:
    hidden, weight, target = problem(T, V, H, device, scale=0.7)
    # Halves: with a few rows the library itself sums thousands of products one after another.
    extra = {"chunk_bytes": 4 * V * max(1, T // 2)} if chunked else {}
    out, grad_hidden, grad_weight = gradients(
        ops.linear_cross_entropy, hidden, weight, target, **terms, **extra
    )
    ref, ref_hidden, ref_weight = gradients(
        ops.linear_cross_entropy_ref, hidden, weight, target, torch.float64, **terms
    )
    _, eager_hidden, eager_weight = gradients(ops.linear_cross_entropy_ref, hidden, weight, target, **terms)
    for name in ("loss", "cross_entropy", "entropy", "z_loss"):
        torch.testing.assert_close(
            getattr(out, name).double(), getattr(ref, name).double(), rtol=2e-6, atol=2e-6
        )
    if "diversity_weight" in terms:
        torch.testing.assert_close(out.marginal_entropy.double(), ref.marginal_entropy, rtol=2e-6, atol=2e-6)
    else:
        assert out.marginal_entropy is None
    # No further from float64 than twice plain PyTorch in float32, and a floor of rounding.
    for got, eager, exact in (
        (grad_hidden, eager_hidden, ref_hidden),
        (grad_weight, eager_weight, ref_weight),
    ):
        limit = 2 * (eager.double() - exact).norm() + 1e-7 * exact.norm()
        assert (got.double() - exact).norm() <= limit


@pytest.mark.parametrize("terms", TERMS, ids=lambda t: "+".join(t) or "plain")
def test_the_reference_by_gradcheck(terms: dict[str, float]) -> None:
    hidden, weight, target = problem(4, 7, 3, "cpu")
    function = lambda h, w: ops.linear_cross_entropy_ref(h, w, target, **terms).loss  # noqa: E731
    torch.autograd.gradcheck(function, (hidden.double().requires_grad_(), weight.double().requires_grad_()))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("terms", [TERMS[0], TERMS[-1]], ids=["plain", "all"])
def test_ignored_tokens(device: str, terms: dict[str, float]) -> None:
    hidden, weight, target = problem(11, 53, 8, device)
    target[[0, 4, 10]] = -100
    out, grad_hidden, grad_weight = gradients(ops.linear_cross_entropy, hidden, weight, target, **terms)
    ref, ref_hidden, ref_weight = gradients(ops.linear_cross_entropy_ref, hidden, weight, target, **terms)
    torch.testing.assert_close(out.loss, ref.loss)
    torch.testing.assert_close(grad_hidden, ref_hidden, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(grad_weight, ref_weight, rtol=1e-4, atol=1e-6)
    assert grad_hidden[[0, 4, 10]].abs().sum() == 0


@pytest.mark.parametrize("device", DEVICES)
def test_uniform_and_confident_logits(device: str) -> None:
    V, H = 1009, 4
    target = torch.arange(6, device=device)
    uniform = ops.linear_cross_entropy(
        torch.zeros(6, H, device=device), torch.ones(V, H, device=device), target
    )
    assert float(uniform.loss) == pytest.approx(math.log(V), abs=1e-5)
    assert float(uniform.entropy) == pytest.approx(math.log(V), abs=1e-5)
    weight = torch.zeros(V, H, device=device)
    weight[:6] = 1.0
    confident = ops.linear_cross_entropy(torch.full((6, H), 500.0, device=device), weight, target)
    assert float(confident.entropy) == pytest.approx(math.log(6), abs=1e-3)
    assert torch.isfinite(confident.loss)


@pytest.mark.parametrize("device", DEVICES)
def test_a_second_backward_is_right(device: str) -> None:
    """The kept logits are overwritten by the first backward; the second computes them again."""
    hidden, weight, target = problem(9, 41, 8, device)
    hidden.requires_grad_()
    loss = ops.linear_cross_entropy(hidden, weight, target).loss
    (first,) = torch.autograd.grad(loss, hidden, retain_graph=True)
    (second,) = torch.autograd.grad(loss, hidden)
    assert torch.equal(first, second)


@pytest.mark.parametrize("device", DEVICES)
def test_softmax_stats(device: str) -> None:
    logits = torch.randn(6, 50257, generator=torch.Generator().manual_seed(0)).to(device) * 4
    logits[2] = 3.0  # all equal: the lowest index wins
    logits[3, [7, 100]] = 50.0
    target = torch.tensor([0, 50256, -100, 7, 5, 5], device=device)
    got, exact = ops.softmax_stats(logits, target), ops.softmax_stats_ref(logits, target)
    assert got.argmax.tolist() == exact.argmax.tolist()
    assert got.argmax[2] == 0 and got.argmax[3] == 7
    for name in ("lse", "target_logit", "mean_logit", "expected_logit"):
        torch.testing.assert_close(getattr(got, name), getattr(exact, name), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_nan_stays_visible(device: str) -> None:
    hidden, weight, target = problem(4, 19, 8, device)
    hidden[1, 2] = float("nan")
    assert torch.isnan(ops.linear_cross_entropy(hidden, weight, target).loss)


@pytest.mark.gpu
def test_bf16_hidden() -> None:
    hidden, weight, target = problem(64, 5003, 32, "cuda")
    out, grad_hidden, _ = gradients(ops.linear_cross_entropy, hidden, weight, target, torch.bfloat16)
    ref, ref_hidden, _ = gradients(
        ops.linear_cross_entropy_ref, hidden.bfloat16(), weight.bfloat16(), target, torch.float64
    )
    assert grad_hidden.dtype == torch.bfloat16
    torch.testing.assert_close(out.loss.double(), ref.loss, rtol=1e-4, atol=1e-4)
    assert (
        torch.nn.functional.cosine_similarity(grad_hidden.double().flatten(), ref_hidden.flatten(), dim=0)
        > 0.999
    )


def test_bad_arguments() -> None:
    hidden, weight, target = problem(4, 19, 8, "cpu")
    with pytest.raises(ValueError, match="label_smoothing must be in"):
        ops.linear_cross_entropy(hidden, weight, target, label_smoothing=1.0)
    with pytest.raises(ValueError, match="weight must have H = 8 columns"):
        ops.linear_cross_entropy(hidden, weight[:, :7], target)
    with pytest.raises(TypeError, match="target must be of dtype int64"):
        ops.linear_cross_entropy(hidden, weight, target.int())
    with pytest.raises(ValueError, match="ignore_index must be negative"):
        ops.linear_cross_entropy(hidden, weight, target, ignore_index=0)
    with pytest.raises(RuntimeError, match="target"):
        ops.linear_cross_entropy(hidden, weight, target + 19)
