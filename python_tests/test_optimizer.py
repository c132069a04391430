"""The fused update against torch.optim, and the two meanings of weight decay."""

from __future__ import annotations

import pytest
import torch

from bitnet_ext import ops
from bitnet_ext.models import BitNetForCausalLM, preset
from bitnet_ext.training import FusedAdam, TrainConfig

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_equals_torch_optim(device: str, decoupled: bool, decay: float) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(3,), (17, 5), (1,), (300, 129), (1, 40001)]
    start = [torch.randn(s, generator=generator).to(device) for s in shapes]
    exact = [p.double().requires_grad_() for p in start]
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    optimizer = kind(exact, lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=decay)
    params = [p.clone() for p in start]
    moments = [torch.zeros_like(p) for p in params], [torch.zeros_like(p) for p in params]
    for step in range(1, 6):
        grads = [torch.randn(s, generator=generator).to(device) for s in shapes]
        for p, g in zip(exact, grads, strict=True):
            p.grad = g.double() * 0.5
        optimizer.step()
        hyper = torch.tensor([1e-2, decay, 1 - 0.9**step, 1 - 0.95**step], device=device)
        half = torch.tensor(0.5, device=device)
        ops.adam_step_(params, grads, *moments, hyper, half, decoupled=decoupled)
    for p, q in zip(params, exact, strict=True):
        torch.testing.assert_close(p.double(), q.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
def test_reference_twin(device: str) -> None:
    p, g = torch.randn(1000, device=device), torch.randn(1000, device=device)
    m, v = torch.rand(1000, device=device) * 0.1, torch.rand(1000, device=device) * 0.1
    expected = ops.adam_step_ref(
        p, g, m, v, lr=1e-3, weight_decay=0.1, step=3, grad_scale=0.7, decoupled=False
    )
    hyper = torch.tensor([1e-3, 0.1, 1 - 0.9**3, 1 - 0.95**3], device=device)
    ops.adam_step_([p], [g], [m], [v], hyper, torch.tensor(0.7, device=device), decoupled=False)
    for got, want in zip((p, m, v), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)


def test_what_decay_does_to_a_weight_without_gradient() -> None:
    """Coupled L2 moves it by -lr sign(w) whatever the decay; decoupled by -lr wd w (arXiv 1711.05101)."""
    for decay in (0.1, 0.01):
        for decoupled in (False, True):
            p = torch.tensor([0.5, -0.02, 3.0])
            m, v = torch.zeros(3), torch.zeros(3)
            before = p.clone()
            hyper = torch.tensor([1e-3, decay, 1 - 0.9, 1 - 0.95])
            ops.adam_step_([p], [torch.zeros(3)], [m], [v], hyper, torch.ones(()), decoupled=decoupled)
            moved = -1e-3 * decay * before if decoupled else -1e-3 * before.sign()
            torch.testing.assert_close(p - before, moved, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("device", DEVICES)
def test_sum_of_squares(device: str) -> None:
    tensors = [torch.randn(n, device=device) for n in (1, 7, 70001)]
    got = ops.sum_of_squares(tensors)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, ops.sum_of_squares_ref(tensors), rtol=1e-12, atol=0)
    assert torch.equal(got, ops.sum_of_squares(tensors))


def test_clipping_equals_torch() -> None:
    model = BitNetForCausalLM(preset("collapse-64", vocab_size=97), seed=0)
    model(torch.randint(0, 97, (2, 9))).square().sum().backward()
    optimizer = FusedAdam(model, TrainConfig(grad_clip=0.3))
    norm, scale = optimizer.grad_norm_and_scale()
    clipped = {name: p.grad * scale for name, p in model.named_parameters()}
    expected = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.3)
    torch.testing.assert_close(norm, expected)
    for name, p in model.named_parameters():
        torch.testing.assert_close(clipped[name], p.grad)


@pytest.mark.parametrize(
    ("settings", "decayed"),
    [
        ({}, {"embed_tokens.weight", "lm_head.weight", "layers.0.attention.q_proj.weight"}),
        ({"decay_embeddings": False}, {"layers.0.attention.q_proj.weight"}),
        (
            {"decay_norms": True, "decay_embeddings": False},
            {"layers.0.attention.q_proj.weight", "final_norm.weight"},
        ),
    ],
)
def test_decay_groups(settings: dict[str, bool], decayed: set[str]) -> None:
    """With a zero gradient only decayed parameters move."""
    model = BitNetForCausalLM(preset("collapse-64", vocab_size=97), seed=0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer = FusedAdam(model, TrainConfig(**settings))
    optimizer.step(torch.tensor([1e-2, 0.1, 0.1, 0.05]), torch.ones(()))
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    for name in (
        "embed_tokens.weight",
        "lm_head.weight",
        "layers.0.attention.q_proj.weight",
        "final_norm.weight",
    ):
        assert (name in moved) == (name in decayed), name


def test_bad_arguments() -> None:
    p, hyper, one = torch.ones(3), torch.ones(4), torch.ones(())
    with pytest.raises(ValueError, match="grads must have as many tensors"):
        ops.adam_step_([p], [p, p], [p], [p], hyper, one, decoupled=True)
    with pytest.raises(ValueError, match=r"grads\[0\] must have the shape"):
        ops.adam_step_([p], [torch.ones(4)], [p.clone()], [p.clone()], hyper, one, decoupled=True)
    with pytest.raises(ValueError, match="hyper must have shape"):
        ops.adam_step_([p], [p.clone()], [p.clone()], [p.clone()], torch.ones(3), one, decoupled=True)
    with pytest.raises(TypeError, match=r"params\[0\] must be of dtype float32"):
        ops.adam_step_([p.half()], [p], [p], [p], hyper, one, decoupled=True)
    with pytest.raises(ValueError, match="at least one tensor"):
        ops.sum_of_squares([])
    with pytest.raises(ValueError, match="must be float32"):
        FusedAdam(torch.nn.Linear(2, 2).half(), TrainConfig())
