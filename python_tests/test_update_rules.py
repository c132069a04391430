"""SGD with L2, and L2 that is clipped with the gradient: against torch.optim, and in the training loop."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_trainer import CONFIG, VOCAB, lines, model, stream

from bitnet_ext import ops
from bitnet_ext.collapse.evaluator import CollapseEvaluator
from bitnet_ext.models import BitNetForCausalLM
from bitnet_ext.training import (
    EvaluatedStep,
    FusedAdam,
    TrainConfig,
    Trainer,
    TrainingDivergedError,
    make_optimizer,
    read_checkpoint,
)
from bitnet_ext.training.distributed import World
from bitnet_ext.training.schedules import hyper_table
from bitnet_ext.training.sgd import MomentumSGD
from bitnet_ext.training.step import TrainStep

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SGD = {"optimizer": "sgd_l2", "lr": 0.3, "momentum": 0.8}
BEFORE = {"optimizer": "adam_l2", "decay_before_clip": True}
RULES: list[dict[str, Any]] = [SGD, BEFORE, {**SGD, "decay_before_clip": True}]
RULE_IDS = ["sgd", "before-clip", "sgd-before-clip"]


def _gradients(net: BitNetForCausalLM, step: int) -> None:
    """Gradients of the same numbers on every device; the third one's norm is below the clipping, the others' not."""
    generator = torch.Generator().manual_seed(step)
    for p in net.parameters():
        grad = torch.randn(p.shape, generator=generator) * (1e-4 if step == 3 else 0.1)
        p.grad = grad.to(p.device, p.dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("flags", [{}, {"decay_norms": True}, {"decay_only": "head,final_gain"}], ids=str)
@pytest.mark.parametrize("rule", RULES, ids=RULE_IDS)
def test_equals_torch_optim(device: str, rule: dict[str, Any], flags: dict[str, Any]) -> None:
    """Six steps of a schedule, in float64 there: parameters, moments, norm."""
    config = dataclasses.replace(CONFIG, steps=6, grad_clip=0.5, weight_decay=0.1, **rule, **flags)
    net, exact = model().to(device), model().to(device).double()
    optimizer = make_optimizer(net, config)
    named = dict(exact.named_parameters())
    decays = [[p for name, p in named.items() if optimizer.decays[name] == on] for on in (True, False)]
    groups = [
        {"params": part, "weight_decay": 0.0 if config.decay_before_clip else decay}
        for part, decay in zip(decays, (0.1, 0.0), strict=True)
        if part
    ]
    theirs: torch.optim.Optimizer
    if config.optimizer == "sgd_l2":
        theirs = torch.optim.SGD(groups, lr=1.0, momentum=config.momentum)
    else:
        theirs = torch.optim.Adam(groups, lr=1.0, betas=(config.beta1, config.beta2), eps=config.eps)
    table = torch.from_numpy(hyper_table(config)).to(device)
    table[:, 1] = 0.1
    for step in range(1, 7):
        _gradients(net, step)
        optimizer.add_decay(table[step - 1, 1])
        norm, scale = optimizer.grad_norm_and_scale()
        optimizer.step(table[step - 1], scale)
        _gradients(exact, step)
        if config.decay_before_clip:
            for p in decays[0]:
                assert p.grad is not None
                p.grad += 0.1 * p.detach()
        torch.testing.assert_close(
            norm.double(), torch.nn.utils.clip_grad_norm_(named.values(), 0.5), rtol=1e-6, atol=0
        )
        for group in theirs.param_groups:
            group["lr"] = float(table[step - 1, 0])
        theirs.step()
        optimizer.zero_grad()
    for name, p in net.named_parameters():
        torch.testing.assert_close(p.double(), named[name], rtol=1e-5, atol=1e-6)
    if isinstance(optimizer, MomentumSGD):
        for name, momentum in optimizer.momenta.items():
            expected = theirs.state[named[name]]["momentum_buffer"]
            torch.testing.assert_close(momentum.double(), expected, rtol=1e-5, atol=1e-7)


def test_a_weight_without_gradient_under_sgd() -> None:
    """It shrinks by lr weight_decay / (1 - momentum) of itself a step, not by lr as under Adam with L2."""
    net = torch.nn.Linear(1, 1, bias=False)
    config = TrainConfig(optimizer="sgd_l2", momentum=0.5, weight_decay=0.1)
    optimizer = make_optimizer(net, config)
    before = float(net.weight.detach())
    hyper, one = torch.tensor([1e-3, 0.1, 1.0, 1.0, 0.0]), torch.ones(())
    for _ in range(200):
        net.weight.grad = torch.zeros(1, 1)
        optimizer.step(hyper, one)
    assert float(net.weight.detach()) / before == pytest.approx(
        math.exp(-1e-3 * 0.1 / (1 - 0.5) * 200), rel=1e-3
    )


def test_order_does_not_matter_without_decay() -> None:
    """The same bits with the L2 term of 0 before and behind the clipping."""
    results = []
    for before in (False, True):
        net = model()
        config = dataclasses.replace(CONFIG, optimizer="adam_l2", grad_clip=0.5, decay_before_clip=before)
        optimizer = make_optimizer(net, config)
        hyper = torch.tensor([1e-2, 0.0, 0.1, 0.05, 0.0])
        _gradients(net, 0)
        optimizer.add_decay(hyper[1])
        optimizer.step(hyper, optimizer.grad_norm_and_scale()[1])
        results.append(list(net.parameters()))
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rule", RULES, ids=RULE_IDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_gradient_changes_nothing(device: str, rule: dict[str, Any], bad: float) -> None:
    net = model().to(device)
    optimizer = make_optimizer(net, dataclasses.replace(CONFIG, **rule))
    hyper = torch.tensor([1e-2, 0.1, 0.1, 0.05, 0.0], device=device)
    number = torch.zeros(1, dtype=torch.int64, device=device)

    def update() -> None:
        optimizer.add_decay(hyper[1])
        optimizer.step(hyper, optimizer.grad_norm_and_scale(number)[1])
        number.add_(1)
        optimizer.zero_grad()

    _gradients(net, 0)
    update()
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    moments = {name: value.clone() for name, value in optimizer.state().items()}
    _gradients(net, 1)
    assert net.lm_head is not None and net.lm_head.weight.grad is not None
    net.lm_head.weight.grad[5, 7] = bad
    update()
    _gradients(net, 2)
    update()
    assert optimizer.first_bad_step() == (1, ["lm_head.weight"])
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())
    assert all(torch.equal(value, moments[name]) for name, value in optimizer.state().items())
    optimizer.forget_bad_step()
    _gradients(net, 3)
    update()
    assert not any(torch.equal(p, before[name]) for name, p in net.named_parameters())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rule", RULES, ids=RULE_IDS)
def test_a_step_held_still_changes_nothing(device: str, rule: dict[str, Any]) -> None:
    net = model().to(device)
    optimizer = make_optimizer(net, dataclasses.replace(CONFIG, **rule))
    hyper = torch.tensor([1e-2, 0.1, 0.1, 0.05, 0.0], device=device)

    def update(seed: int) -> float:
        _gradients(net, seed)
        optimizer.add_decay(hyper[1])
        norm, scale = optimizer.grad_norm_and_scale()
        optimizer.step(hyper, scale)
        optimizer.zero_grad()
        return norm.item()

    update(0)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    moments = {name: value.clone() for name, value in optimizer.state().items()}
    with optimizer.held_still():
        held = update(1)
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())
    assert all(torch.equal(value, moments[name]) for name, value in optimizer.state().items())
    assert optimizer.first_bad_step() is None
    assert update(1) == held > 0
    assert not any(torch.equal(p, before[name]) for name, p in net.named_parameters())


@pytest.mark.parametrize("rule", RULES, ids=RULE_IDS)
def test_resume_is_bit_exact(rule: dict[str, Any], tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, checkpoint_interval=5, **rule)
    Trainer(model(), config, stream(), run_dir=tmp_path / "whole", device="cpu").fit()
    trainer = Trainer(model(), config, stream(), run_dir=tmp_path / "cut", device="cpu")

    class Cut(Exception):
        pass

    def cut(step: int, record: object) -> None:
        if step == 8:
            raise Cut

    with pytest.raises(Cut):
        trainer.fit(on_progress=cut)
    other = dataclasses.replace(
        config, **{"momentum": 0.5} if "momentum" in rule else {"optimizer": "sgd_l2"}
    )
    with pytest.raises(ValueError, match="a run is resumed with its own settings"):
        Trainer(model(), other, stream(), run_dir=tmp_path / "cut", device="cpu").fit(resume=True)
    Trainer(model(), config, stream(), run_dir=tmp_path / "cut", device="cpu").fit(resume=True)
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")
    whole, resumed = (read_checkpoint(tmp_path / name / "checkpoint") for name in ("whole", "cut"))
    assert whole.optimizer
    for name, value in (whole.model | whole.optimizer).items():
        assert torch.equal(value, (resumed.model | resumed.optimizer)[name]), name


@pytest.mark.parametrize("rule", RULES, ids=RULE_IDS)
def test_accumulation_equals_the_whole_batch(rule: dict[str, Any], tmp_path: Path) -> None:
    for accumulation in (1, 4):
        config = dataclasses.replace(CONFIG, accumulation=accumulation, **{**rule, "lr": 3e-3})
        Trainer(model(), config, stream(), run_dir=tmp_path / str(accumulation), device="cpu").fit()
    whole, parts = (lines(tmp_path / name, "train") for name in ("1", "4"))
    for key in ("loss", "grad_norm"):
        np.testing.assert_allclose([r[key] for r in whole], [r[key] for r in parts], rtol=2e-3)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rule", RULES, ids=RULE_IDS)
def test_it_learns_in_bf16(device: str, rule: dict[str, Any], tmp_path: Path) -> None:
    settings = {**rule, "weight_decay": 1e-4, "precision": "bf16"}
    config = dataclasses.replace(CONFIG, steps=50, **settings)
    Trainer(model(), config, stream(), run_dir=tmp_path, device=device).fit()
    losses = [record["cross_entropy"] for record in lines(tmp_path, "train")]
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rule", RULES, ids=RULE_IDS)
def test_the_step_is_a_plain_one(device: str, rule: dict[str, Any]) -> None:
    """Dense gradients, nothing beside the chain, and codes that are current behind it."""
    config = dataclasses.replace(CONFIG, steps=64, **rule)
    net = model().to(device)
    step = TrainStep(net, make_optimizer(net, config), config, torch.device(device), World())
    rows = np.random.default_rng(0).integers(0, VOCAB, (4, config.batch_size, config.seq_len + 1))
    for start in range(0, 4, step.block_steps):
        step.run(start, rows[start : start + step.block_steps])
    grad = net.embed_tokens.weight.grad
    assert step._overlap is None and grad is not None and not grad.is_sparse
    assert step._kept
    for _, group, codes in step._kept:
        fresh = ops.quantize_weights(group)
        assert torch.equal(codes.packed, fresh.packed) and torch.equal(codes.weight_scale, fresh.weight_scale)


class Shares(CollapseEvaluator):
    """Also counts, by the definition, where the decay is the larger."""

    def evaluate(self, model: BitNetForCausalLM, step: EvaluatedStep) -> dict[str, Any]:
        values = super().evaluate(model, step)()
        config, dominated, size = step.optimizer.config, 0, 0
        clip = min(1.0, 0.5 / (step.grad_norm + 1e-6))
        for name, p in model.named_parameters():
            assert p.grad is not None
            decay = step.weight_decay * self._before[name].double() * step.optimizer.decays[name]
            grad = p.grad.to_dense().double() * (1.0 if config.decay_before_clip else clip)
            dominated += int((decay.abs() > grad.abs()).sum())
            size += p.numel()
        return values | {"expected": dominated / size}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rule", [*RULES, {"optimizer": "adam_l2"}], ids=[*RULE_IDS, "adam"])
def test_shares_of_the_decay(device: str, rule: dict[str, Any], tmp_path: Path) -> None:
    evaluator = Shares(
        stream(700).astype(np.int64),
        np.full(VOCAB, -math.log(VOCAB)),
        seq_len=15,
        max_tokens=600,
        device=torch.device(device),
    )
    # A gradient of norm 5 or so is clipped to a tenth, so that the two orders differ.
    config = dataclasses.replace(CONFIG, grad_clip=0.5, **rule)
    Trainer(
        model(), config, stream(), run_dir=tmp_path, device=device, evaluator=evaluator, eval_steps=(1, 2, 5)
    ).fit()
    rows = lines(tmp_path, "eval")
    assert len(rows) == 3
    for row in rows:
        assert row["decay_share"] == pytest.approx(row["expected"], abs=1e-4)
        assert 0.01 < float(str(row["decay_share"])) < 1


@pytest.mark.gpu
@pytest.mark.parametrize("terms", [{}, {"precision": "bf16"}, {"accumulation": 2}], ids=str)
@pytest.mark.parametrize("rule", RULES, ids=RULE_IDS)
def test_graph_equals_eager(rule: dict[str, Any], terms: dict[str, Any], tmp_path: Path) -> None:
    for graph in (True, False):
        config = dataclasses.replace(CONFIG, steps=80, cuda_graph=graph, **rule, **terms)
        Trainer(model(), config, stream(), run_dir=tmp_path / str(graph), device="cuda").fit()
    assert lines(tmp_path / "True") == lines(tmp_path / "False")
    graphed, eager = (read_checkpoint(tmp_path / name / "checkpoint") for name in ("True", "False"))
    for name, value in (graphed.model | graphed.optimizer).items():
        assert torch.equal(value, (eager.model | eager.optimizer)[name]), name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rule", RULES, ids=RULE_IDS)
def test_divergence_is_reported_with_the_step(device: str, rule: dict[str, Any], tmp_path: Path) -> None:
    settings = {**rule, "lr": 1e30, "grad_clip": None, "steps": 50, "warmup_steps": 0}
    with pytest.raises(TrainingDivergedError, match=r"diverged at step \d+"):
        Trainer(
            model(), dataclasses.replace(CONFIG, **settings), stream(), run_dir=tmp_path, device=device
        ).fit()


def test_bad_arguments() -> None:
    with pytest.raises(
        ValueError, match=r"decay_before_clip must be False unless .* \(it is 'adamw'\), got True"
    ):
        TrainConfig(optimizer="adamw", decay_before_clip=True)
    with pytest.raises(ValueError, match=r"momentum must be in \[0, 1\), got 1"):
        TrainConfig(momentum=1.0)
    with pytest.raises(ValueError, match="optimizer must be one of adam_l2, adamw, muon, got 'sgd_l2'"):
        FusedAdam(model(), TrainConfig(optimizer="sgd_l2"))
    with pytest.raises(ValueError, match="MomentumSGD: model must have parameters that require a gradient"):
        make_optimizer(torch.nn.ReLU(), TrainConfig(optimizer="sgd_l2"))
    net = model()
    _gradients(net, 0)
    with pytest.raises(RuntimeError, match="add_decay comes before clipping"):
        make_optimizer(net, TrainConfig(**BEFORE)).grad_norm_and_scale()
    net.embed_tokens.weight.grad = torch.zeros(VOCAB, 64).to_sparse(1)
    hyper = torch.ones(5)
    with pytest.raises(ValueError, match=r"gradients must be dense, that of embed_tokens\.weight is sparse"):
        make_optimizer(net, TrainConfig(**BEFORE)).add_decay(hyper[1])
    with pytest.raises(ValueError, match=r"gradients must be dense, that of embed_tokens\.weight is sparse"):
        make_optimizer(net, TrainConfig(**SGD)).step(hyper, torch.ones(()))
