"""What one optimiser step owes the rest: fresh ternary codes, and an honest end when a gradient is not finite."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_trainer import CONFIG, lines, model, stream, weights

from bitnet_ext import ops
from bitnet_ext.nn import BitLinear, WeightCache
from bitnet_ext.training import Trainer, TrainingDivergedError, make_optimizer, read_checkpoint
from bitnet_ext.training import trainer as trainer_module
from bitnet_ext.training.distributed import World
from bitnet_ext.training.step import NonFiniteGradientError, TrainStep

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
BAD = "layers.1.feed_forward.up_proj.weight"


class Poisoned(TrainStep):
    """Multiplies one gradient by NaN at one step, by its number on the device, so that a graph does it too."""

    bad_step = 13

    def __init__(self, model: Any, *arguments: Any) -> None:
        super().__init__(model, *arguments)
        table = torch.ones(1000, device=self.device)
        table[self.bad_step - 1] = float("nan")
        dict(model.named_parameters())[BAD].register_hook(lambda g: g * table.index_select(0, self._number))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("graph", [True, False])
@pytest.mark.parametrize("optimizer", ["adam_l2", "adamw", "muon", "sgd_l2"])
def test_a_bad_gradient_is_named_and_changes_nothing(
    device: str, graph: bool, optimizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(
        CONFIG,
        steps=40,
        schedule_steps=40,
        checkpoint_interval=10,
        cuda_graph=graph,
        log_interval=1,
        optimizer=optimizer,
    )
    good = Trainer(
        model(), dataclasses.replace(config, steps=12), stream(), run_dir=tmp_path / "good", device=device
    )
    good.fit()
    monkeypatch.setattr(trainer_module, "TrainStep", Poisoned)
    trainer = Trainer(model(), config, stream(), run_dir=tmp_path / "bad", device=device)
    reason = rf"diverged at step 13: the gradient of {re.escape(BAD)} holds NaN or Inf; .*step-00000010"
    with pytest.raises(TrainingDivergedError, match=reason):
        trainer.fit()
    assert read_checkpoint(tmp_path / "bad" / "checkpoint").step == 10
    assert lines(tmp_path / "bad", "train") == lines(tmp_path / "good", "train")
    last_good = weights(tmp_path / "good")
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value.cpu(), last_good[name]), name
    for name, value in trainer.optimizer.state().items():
        assert torch.equal(value, good.optimizer.state()[name]), name


def runner(device: str, **settings: Any) -> tuple[TrainStep, np.ndarray]:
    config = dataclasses.replace(CONFIG, **settings)
    net = model().to(device)
    step = TrainStep(net, make_optimizer(net, config), config, torch.device(device), World())
    rows = np.random.default_rng(0).integers(0, 101, (4, config.batch_size, config.seq_len + 1))
    return step, rows


def run(step: TrainStep, rows: np.ndarray, start: int) -> torch.Tensor:
    """The rows one after the other where a step takes one at a time."""
    parts = [rows[i : i + step.block_steps] for i in range(0, len(rows), step.block_steps)]
    return torch.cat([step.run(start + i * step.block_steps, part) for i, part in enumerate(parts)])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"accumulation": 2},
        {"cuda_graph": False},
        {"optimizer": "muon"},
        {"optimizer": "sgd_l2"},
        {"optimizer": "adam_l2", "decay_before_clip": True},
    ],
)
def test_kept_codes_change_no_bit(
    device: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same losses and weights as with a cache that always quantises."""
    step, rows = runner(device, **settings)
    kept = run(step, rows, 0)
    assert step._kept
    monkeypatch.setattr(WeightCache, "get", lambda self, weights: ops.quantize_weights(weights))
    other, _ = runner(device, **settings)
    assert torch.equal(kept, run(other, rows, 0))
    assert not other._kept
    for name, value in step.optimizer.named.items():
        assert torch.equal(value, other.optimizer.named[name]), name


@pytest.mark.parametrize("device", DEVICES)
def test_codes_are_current_after_a_step(device: str) -> None:
    step, rows = runner(device)
    run(step, rows, 0)
    assert step._kept
    for _, group, codes in step._kept:
        fresh = ops.quantize_weights(group)
        assert torch.equal(codes.packed, fresh.packed) and torch.equal(codes.weight_scale, fresh.weight_scale)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("graph", [True, False])
def test_a_change_from_outside_reaches_the_next_step(device: str, graph: bool) -> None:
    """By hand, and by load_state_dict."""
    step, rows = runner(device, cuda_graph=graph)
    other, _ = runner(device, cuda_graph=graph)
    run(step, rows, 0)
    run(other, rows, 0)
    state = {name: value.clone() for name, value in step._loss.state_dict().items()}
    with torch.no_grad():
        for p in step.optimizer.named.values():
            p.mul_(-0.5)
    other._loss.load_state_dict({name: value * -0.5 for name, value in state.items()})
    assert torch.equal(run(step, rows, 4), run(other, rows, 4))
    for _, group, codes in step._kept:
        assert torch.equal(codes.packed, ops.quantize_weights(group).packed)


def through_data(p: torch.Tensor) -> None:
    p.data.mul_(-0.5)


def through_numpy(p: torch.Tensor) -> None:
    p.detach().cpu().numpy()  # shares memory on a CPU only
    if p.device.type == "cpu":
        p.detach().numpy()[...] *= -0.5
    else:
        torch.from_dlpack(p.detach()).mul_(-0.5)


def other_storage(p: torch.Tensor) -> None:
    p.data = p.detach() * -0.5


def swapped(p: torch.Tensor) -> None:
    torch.utils.swap_tensors(p, torch.nn.Parameter(p.detach() * -0.5))


@pytest.mark.parametrize(
    ("device", "graph"),
    [("cpu", False), *(pytest.param("cuda", graph, marks=pytest.mark.gpu) for graph in (True, False))],
)
@pytest.mark.parametrize("write", [through_data, through_numpy, other_storage, swapped])
def test_a_write_that_leaves_no_trace_reaches_the_next_step(
    device: str, graph: bool, write: Callable[[torch.Tensor], None]
) -> None:
    """Also one by which parameters have other memory: a captured step is captured again."""
    step, rows = runner(device, cuda_graph=graph)
    other, _ = runner(device, cuda_graph=graph)
    run(step, rows, 0)
    run(other, rows, 0)
    for p in step.optimizer.named.values():
        p.grad = None  # a gradient's accumulator holds a parameter, which could not be swapped then
        write(p)
    with torch.no_grad():
        for p in other.optimizer.named.values():
            p.mul_(-0.5)
    assert torch.equal(run(step, rows, 4), run(other, rows, 4))
    assert torch.equal(run(step, rows, 8), run(other, rows, 8))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_step_quantises_each_weight_once_at_its_launch_and_once_in_the_update(
    device: str, accumulation: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, rows = runner(device, accumulation=accumulation, cuda_graph=False)
    single, grouped = counted(monkeypatch)
    run(step, rows[:1], 0)
    assert len(single) == len(step._kept) == 4 * len(step._model.layers)  # qkv, o, gate and up, down
    assert len(grouped) == 1  # in the update
    run(step, rows[1:2], 1)
    assert len(single) == len(step._kept) and len(grouped) == 3


def counted(monkeypatch: pytest.MonkeyPatch) -> tuple[list[int], list[int]]:
    """The calls of quantize_weights, and of quantize_weight_groups_."""
    single: list[int] = []
    grouped: list[int] = []
    one, many = ops.quantize_weights, ops.quantize_weight_groups_
    monkeypatch.setattr(ops, "quantize_weights", lambda *a: single.append(1) or one(*a))
    monkeypatch.setattr(ops, "quantize_weight_groups_", lambda *a: grouped.append(1) or many(*a))
    return single, grouped


@pytest.mark.parametrize("device", DEVICES)
def test_weights_that_are_not_trained_are_quantised_once_a_launch(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(CONFIG, accumulation=2)
    net = model().to(device)
    net.layers[0].requires_grad_(False)
    step = TrainStep(net, make_optimizer(net, config), config, torch.device(device), World())
    rows = np.random.default_rng(0).integers(0, 101, (4, config.batch_size, config.seq_len + 1))
    first = run(step, rows[:1], 0)
    assert len(step._fixed) == len(step._kept) == 4 and torch.isfinite(first).all()
    single, _ = counted(monkeypatch)
    before = run(step, rows[:1], 1)
    assert single == []
    for module in net.layers[0].modules():
        if isinstance(module, BitLinear):
            module.weight.data.mul_(-1)
    assert not torch.equal(run(step, rows[:1], 2), before)
    for _, group, codes in step._fixed:
        assert torch.equal(codes.packed, ops.quantize_weights(group).packed)


def clamp(layer: torch.nn.Module) -> None:
    layer.down_proj.weight.data.clamp_(-0.02, 0.02)


@pytest.mark.parametrize("device", DEVICES)
def test_hooks_may_write_weights_within_a_step(device: str) -> None:
    """Of the same values as a write between the steps, and then they are used in the same forward."""
    step, rows = runner(device, cuda_graph=False)
    other, _ = runner(device, cuda_graph=False)
    layer = step._model.layers[0].feed_forward
    layer.register_forward_pre_hook(lambda *_: clamp(layer))
    for start in range(3):
        run(step, rows[:1], start)
        clamp(other._model.layers[0].feed_forward)
        run(other, rows[:1], start)
    for name, value in step.optimizer.named.items():
        assert torch.equal(value, other.optimizer.named[name]), name


@pytest.mark.parametrize("device", DEVICES)
def test_a_parameter_that_the_optimizer_does_not_know_is_refused(device: str) -> None:
    step, rows = runner(device)
    run(step, rows, 0)
    layer = step._model.layers[0].attention.q_proj
    kept, layer.weight = layer.weight, torch.nn.Parameter(layer.weight.detach().clone())
    with pytest.raises(
        RuntimeError, match=r"parameter layers\.0\.attention\.q_proj\.weight .* another object"
    ):
        run(step, rows, 4)
    layer.weight = kept
    run(step, rows, 4)
    step._model.half()
    with pytest.raises(RuntimeError, match=r"must stay float32 on \w+, where .* got torch\.float16"):
        run(step, rows, 8)


def test_a_parametrised_weight_is_not_taken_for_what_it_was() -> None:
    step, rows = runner("cpu")
    other, _ = runner("cpu")
    run(step, rows, 0)
    run(other, rows, 0)
    layer = step._model.layers[0].attention.o_proj
    torch.nn.utils.parametrize.register_parametrization(layer, "weight", Negative())
    with torch.no_grad():
        other._model.layers[0].attention.o_proj.weight.neg_()
    assert torch.equal(run(step, rows[:1], 4), run(other, rows[:1], 4))


class Negative(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return -x


@pytest.mark.parametrize("device", DEVICES)
def test_a_forward_between_steps_uses_the_new_weights(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    step, rows = runner(device)
    run(step, rows, 0)
    single, _ = counted(monkeypatch)
    ids = torch.zeros(1, 3, dtype=torch.int64, device=device)
    with torch.no_grad():
        logits = step._model(ids)
        assert len(single) == len(step._kept)
        assert torch.equal(logits, copy.deepcopy(step._model)(ids))


@pytest.mark.gpu
def test_a_graph_has_the_memory_of_its_warm_up() -> None:
    step, rows = runner("cuda", batch_size=1024, seq_len=128, precision="bf16")
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    step.run(0, rows)
    needed = torch.cuda.max_memory_allocated() - allocated
    assert needed > 1 << 28
    assert torch.cuda.max_memory_reserved() - reserved < 1.3 * needed


@pytest.mark.gpu
def test_no_step_of_a_block_after_the_bad_one_counts() -> None:
    config = dataclasses.replace(CONFIG, steps=40)
    net = model().cuda()
    step = Poisoned(net, make_optimizer(net, config), config, torch.device("cuda"), World())
    rows = np.random.default_rng(0).integers(0, 101, (20, config.batch_size, config.seq_len + 1))
    with pytest.raises(NonFiniteGradientError) as caught:
        step.run(0, rows)
    assert caught.value.step == 13 and caught.value.records.shape == (12, 4)
    assert torch.isfinite(caught.value.records).all()
    assert step.optimizer.first_bad_step() == (12, [BAD])
    step.optimizer.forget_bad_step()
    assert step.optimizer.first_bad_step() is None
    assert torch.isfinite(step.run(20, rows[:3])).all()


@pytest.mark.gpu
@pytest.mark.parametrize("graph", [True, False])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_runs_that_share_a_gpu_are_those_that_have_it_to_themselves(graph: bool, precision: str) -> None:
    """Also with a library's products in the step, whose workspace must not be that of another run."""
    settings = {"cuda_graph": graph, "precision": precision, "steps": 80, "schedule_steps": 80}
    alone = [runner("cuda", seed=seed, **settings) for seed in (0, 1)]
    together = [(*runner("cuda", seed=seed, **settings), torch.cuda.Stream()) for seed in (0, 1)]
    torch.cuda.synchronize()
    for start in range(0, 80, 4):
        expected = [step.run(start, rows) for step, rows in alone]
        for step, rows, stream_ in together:
            with torch.cuda.stream(stream_):
                step.launch(start, rows)
        records = []
        for step, _, stream_ in together:
            with torch.cuda.stream(stream_):
                records.append(step.finish())
        assert all(torch.equal(a, b) for a, b in zip(records, expected, strict=True)), start
    for (a, _), (b, *_) in zip(alone, together, strict=True):
        for p, q in zip(a.optimizer.named.values(), b.optimizer.named.values(), strict=True):
            assert torch.equal(p, q)


@pytest.mark.gpu
def test_a_replayed_step_never_waits_for_the_device() -> None:
    step, rows = runner("cuda")
    step.run(0, rows)  # captures
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            step.launch(4, rows)
    finally:
        torch.cuda.set_sync_debug_mode(before)
    step.finish()
    names = {event.key for event in profile.key_averages()}
    assert "cudaGraphLaunch" in names or any("raph" in name for name in names)
    assert not {name for name in names if "Synchronize" in name}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("settings", [{}, {"accumulation": 2}, {"optimizer": "adam_l2"}])
def test_the_embedding_by_rows_equals_a_dense_gradient(
    device: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    step, rows = runner(device, **settings)
    assert step._embedding is not None
    by_rows = run(step, rows, 0)
    assert not step._loss.model.embed_tokens.sparse
    monkeypatch.setattr(TrainStep, "_takes_rows", lambda self, model: False)
    other, _ = runner(device, **settings)
    torch.testing.assert_close(by_rows, run(other, rows, 0), rtol=1e-4, atol=1e-5)
    for name, value in step.optimizer.named.items():
        torch.testing.assert_close(value, other.optimizer.named[name], rtol=1e-3, atol=1e-4)
