"""Muon against a plain implementation of its formulas, and in the training loop."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from test_trainer import lines, stream
from torch import Tensor

from bitnet_ext.models import BitNetForCausalLM, preset
from bitnet_ext.training import FusedAdam, TrainConfig, Trainer, read_checkpoint
from bitnet_ext.training.muon import Muon, newton_schulz

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
CONFIG = TrainConfig(
    steps=24,
    batch_size=4,
    seq_len=15,
    optimizer="muon",
    lr=3e-3,
    muon_lr=0.02,
    warmup_steps=3,
    lr_schedule="linear",
    log_interval=1,
    checkpoint_seconds=None,
)


def iterate(x: Tensor, steps: int = 5) -> Tensor:
    """The Newton-Schulz iteration for one matrix, as published, in float64."""
    a, b, c = 3.4445, -4.7750, 2.0315
    y = x.double()
    if x.shape[0] > x.shape[1]:
        y = y.T
    y = y / (y.norm() + 1e-7)
    for _ in range(steps):
        gram = y @ y.T
        y = a * y + (b * gram + c * gram @ gram) @ y
    return y.T if x.shape[0] > x.shape[1] else y


def matrices(shapes: list[tuple[int, int]], device: str, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(device) for shape in shapes]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (7, 3), (48, 48), (96, 33), (64, 256)])
def test_newton_schulz(device: str, shape: tuple[int, int]) -> None:
    stack = torch.stack(matrices([shape] * 3, device, 0))
    got = newton_schulz(stack)
    assert got.shape == stack.shape and got.dtype == torch.float32
    for matrix, result in zip(stack, got, strict=True):
        # bfloat16 keeps 8 bits through five steps that multiply a difference by up to 3.4.
        tolerance = 0.1 if device == "cuda" else 1e-3
        torch.testing.assert_close(result.double(), iterate(matrix), rtol=0, atol=tolerance)
        values = torch.linalg.svdvals(result)
        assert float(values.min()) > 0.6 and float(values.max()) < 1.3


@pytest.mark.parametrize("device", DEVICES)
def test_steps_equal_the_formulas(device: str) -> None:
    shapes = [(24, 40), (40, 24), (24, 40), (16, 16)]
    params = {f"p{i}": p for i, p in enumerate(matrices(shapes, device, 0))}
    expected = [p.double().clone() for p in params.values()]
    means = [torch.zeros_like(p) for p in expected]
    muon = Muon(params, 0.95)
    for step in range(4):
        lr, decay, scale = 0.02 / (step + 1), 0.1, 0.5
        for i, (p, g) in enumerate(zip(params.values(), matrices(shapes, device, 10 + step), strict=True)):
            p.grad = g
            means[i] = 0.95 * means[i] + 0.05 * g.double() * scale
            update = iterate(0.05 * g.double() * scale + 0.95 * means[i])
            N, K = p.shape
            expected[i] *= 1 - lr * decay
            expected[i] -= lr * math.sqrt(max(1, N / K)) * update
        numbers = (torch.tensor(x, device=device) for x in (lr, decay, scale))
        muon.step(*numbers)
    for (name, p), want, mean in zip(params.items(), expected, means, strict=True):
        torch.testing.assert_close(muon.momenta[name].double(), mean, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(p.double(), want, rtol=0, atol=0.1 * 0.05 if device == "cuda" else 2e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_a_bad_scale_changes_nothing(device: str) -> None:
    params = {"p": matrices([(8, 12)], device, 0)[0]}
    muon = Muon(params, 0.9)
    lr, decay = torch.tensor(0.1, device=device), torch.tensor(0.1, device=device)
    params["p"].grad = torch.ones(8, 12, device=device)
    muon.step(lr, decay, torch.tensor(1.0, device=device))
    before = params["p"].clone(), muon.momenta["p"].clone()
    params["p"].grad = torch.full((8, 12), float("nan"), device=device)
    muon.step(lr, decay, torch.tensor(float("nan"), device=device))
    assert torch.equal(params["p"], before[0]) and torch.equal(muon.momenta["p"], before[1])


def test_which_parameters_it_takes() -> None:
    optimizer = FusedAdam(BitNetForCausalLM(preset("collapse-64", vocab_size=97), seed=0), CONFIG)
    momenta = {name for name in optimizer.state() if name.startswith("momentum.")}
    assert "momentum.layers.0.attention.q_proj.weight" in momenta
    assert len(momenta) == 2 * 7  # layers x matrices
    assert {"exp_avg.embed_tokens.weight", "exp_avg.lm_head.weight", "exp_avg.final_norm.weight"} <= set(
        optimizer.state()
    )
    assert "exp_avg.layers.0.attention.q_proj.weight" not in optimizer.state()


def model() -> BitNetForCausalLM:
    return BitNetForCausalLM(preset("collapse-64", vocab_size=101), seed=0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_it_learns(device: str, precision: str, tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, steps=80, batch_size=8, precision=precision)
    Trainer(model(), config, stream(), run_dir=tmp_path, device=device).fit()
    losses = [record["cross_entropy"] for record in lines(tmp_path, "train")]
    assert losses[-1] < 0.75 * losses[0]


def test_resume_is_bit_exact(tmp_path: Path) -> None:
    Trainer(model(), CONFIG, stream(), run_dir=tmp_path / "whole", device="cpu").fit()
    config = dataclasses.replace(CONFIG, checkpoint_interval=10)
    trainer = Trainer(model(), config, stream(), run_dir=tmp_path / "cut", device="cpu")

    class Cut(Exception):
        pass

    def cut(step: int, record: object) -> None:
        if step == 17:
            raise Cut

    with pytest.raises(Cut):
        trainer.fit(on_progress=cut)
    Trainer(model(), config, stream(), run_dir=tmp_path / "cut", device="cpu").fit(resume=True)
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")
    whole, resumed = (read_checkpoint(tmp_path / name / "checkpoint") for name in ("whole", "cut"))
    for name, value in (whole.model | whole.optimizer).items():
        assert torch.equal(value, (resumed.model | resumed.optimizer)[name]), name


@pytest.mark.gpu
def test_graph_equals_eager(tmp_path: Path) -> None:
    for graph in (True, False):
        config = dataclasses.replace(CONFIG, steps=70, cuda_graph=graph)
        Trainer(model(), config, stream(), run_dir=tmp_path / str(graph), device="cuda").fit()
    assert lines(tmp_path / "True") == lines(tmp_path / "False")
