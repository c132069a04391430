"""Steps whose parts run beside each other: the same bits as one thing after the other."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from test_train_step import BAD, Poisoned
from test_trainer import CONFIG, VOCAB, model

from bitnet_ext.training import step as step_module
from bitnet_ext.training.adam import FusedAdam
from bitnet_ext.training.distributed import World
from bitnet_ext.training.overlap import MAX_STEPS
from bitnet_ext.training.step import UNROLLED_STEPS, NonFiniteGradientError, TrainStep

STEPS = 4 * UNROLLED_STEPS
SETTINGS = [
    {"optimizer": "adam_l2"},
    {"optimizer": "adamw"},
    {"optimizer": "adamw", "grad_clip": None, "decay_embeddings": False},
    {"optimizer": "muon"},
    {"optimizer": "adam_l2", "precision": "bf16"},
    {"optimizer": "adam_l2", "diversity_weight": 0.1, "label_smoothing": 0.1},
    {"optimizer": "adam_l2", "output_l2": 1e-3},
]


def runner(device: str, kind: type[TrainStep] = TrainStep, **settings: Any) -> TrainStep:
    config = dataclasses.replace(CONFIG, steps=STEPS, schedule_steps=STEPS, **settings)
    net = model(seed=config.seed).to(device)
    return kind(net, FusedAdam(net, config), config, torch.device(device), World())


def rows_of(count: int, seed: int = 0) -> np.ndarray:
    """Few ids, so that steps share some with the one before, and some ids come only in one of two."""
    config = CONFIG
    rng = np.random.default_rng(seed)
    shape = (count, config.batch_size, config.seq_len + 1)
    rows = np.minimum(rng.geometric(0.03, shape) - 1, VOCAB - 1)
    rows[1::3] += (VOCAB - rows[1::3]) // 2
    return rows.astype(np.int64)


def assert_same_state(step: TrainStep, other: TrainStep) -> None:
    for name, value in step.optimizer.named.items():
        assert torch.equal(value, other.optimizer.named[name]), name
    for name, value in step.optimizer.state().items():
        assert torch.equal(value, other.optimizer.state()[name]), name
    for (_, _, codes), (_, _, expected) in zip(step._kept, other._kept, strict=True):
        assert torch.equal(codes.packed, expected.packed)
        assert torch.equal(codes.weight_scale, expected.weight_scale)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("kind", [TrainStep, Poisoned])
def test_deferred_updates_change_no_bit(settings: dict[str, Any], kind: type[TrainStep]) -> None:
    """On the CPU, where nothing runs beside anything, but in the same order as on a GPU."""
    rows = rows_of(22)
    deferred, plain = runner("cpu", kind, **settings), runner("cpu", kind, **settings)
    deferred._allocate(len(rows))
    deferred._make(1)  # finds the codes to keep, as before a capture
    plain._make(1)
    for step in (deferred, plain):
        for value, before in zip(
            step.optimizer.named.values(), model(seed=CONFIG.seed).parameters(), strict=True
        ):
            value.detach().copy_(before)
        for value in step.optimizer.state().values():
            value.zero_()
        step._position.zero_()
        step._step.zero_()
        step.optimizer.refresh_codes()
    deferred._start_overlap(None)
    assert deferred._overlap is not None
    deferred._rows[:, 0].copy_(torch.from_numpy(rows[..., :-1]))
    deferred._rows[:, 1].copy_(torch.from_numpy(rows[..., 1:]))
    for count in (5, 1, MAX_STEPS):
        deferred._make(count)
    records = []
    for start in range(len(rows)):
        try:
            records.append(plain.run(start, rows[start : start + 1]))
        except NonFiniteGradientError:
            records.append(plain._record.clone())
    torch.testing.assert_close(deferred._record, torch.cat(records), rtol=0, atol=0, equal_nan=True)
    assert (deferred.optimizer.first_bad_step() is None) == (kind is TrainStep)
    assert deferred.optimizer.first_bad_step() == plain.optimizer.first_bad_step()
    assert_same_state(deferred, plain)


@pytest.mark.gpu
@pytest.mark.parametrize("settings", SETTINGS)
def test_the_overlapped_graph_equals_the_eager_step(settings: dict[str, Any]) -> None:
    """More than three graphs in a row and a remainder, then single steps and a graph again."""
    captured, eager = runner("cuda", **settings), runner("cuda", cuda_graph=False, **settings)
    rows = rows_of(STEPS)
    start = 0
    for count in (3 * UNROLLED_STEPS + 5, 1, UNROLLED_STEPS - 6):
        part = rows[start : start + count]
        records, expected = captured.run(start, part), eager.run(start, part)
        assert torch.equal(records, expected), (start, (records != expected).nonzero()[:5])
        assert_same_state(captured, eager)
        start += count
    assert captured._overlap is not None and eager._overlap is None
    assert [steps for steps, _ in captured._graphs] == [UNROLLED_STEPS, 1]
    for name, p in captured.optimizer.named.items():  # of the last step, which was made alone or in a graph
        assert p.grad is not None, name


def test_more_steps_together_than_can_wait() -> None:
    step = runner("cpu")
    step._allocate(MAX_STEPS + 1)
    step._start_overlap(None)
    with pytest.raises(AssertionError, match="at most 16 steps can be made together, got 17"):
        step._make(MAX_STEPS + 1)


@pytest.mark.gpu
@pytest.mark.parametrize("unrolled", [2, MAX_STEPS])
def test_graphs_of_any_length_equal_the_eager_step(unrolled: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also two of them in a row: the second finds every row up to date."""
    monkeypatch.setattr(step_module, "UNROLLED_STEPS", unrolled)
    captured, eager = runner("cuda"), runner("cuda", cuda_graph=False)
    rows = rows_of(2 * unrolled)
    assert torch.equal(captured.run(0, rows), eager.run(0, rows))
    assert captured._graphs[0][0] == unrolled
    assert_same_state(captured, eager)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "settings", [{"accumulation": 2}, {"steps": UNROLLED_STEPS - 1}, {"batch_size": 8, "seq_len": 40}]
)
def test_other_steps_are_captured_as_they_were(settings: dict[str, Any]) -> None:
    """Accumulation, a run too short for a graph, more tokens than the vocabulary has rows."""
    config = dataclasses.replace(CONFIG, **{"steps": STEPS, **settings})
    rows = np.random.default_rng(0).integers(0, VOCAB, (6, config.batch_size, config.seq_len + 1))
    runs = []
    for graph in (True, False):
        settled = dataclasses.replace(config, cuda_graph=graph)
        net = model().cuda()
        step = TrainStep(net, FusedAdam(net, settled), settled, torch.device("cuda"), World())
        runs.append((step, step.run(0, rows)))
    (captured, records), (eager, expected) = runs
    assert captured._overlap is None and [steps for steps, _ in captured._graphs] == [1]
    assert torch.equal(records, expected)
    assert_same_state(captured, eager)


@pytest.mark.gpu
def test_a_tied_head_is_captured_as_it_was() -> None:
    config = dataclasses.replace(CONFIG, steps=STEPS)
    rows = rows_of(6)
    records = []
    for graph in (True, False):
        settled = dataclasses.replace(config, cuda_graph=graph)
        net = model(tie_embeddings=True).cuda()
        step = TrainStep(net, FusedAdam(net, settled), settled, torch.device("cuda"), World())
        records.append(step.run(0, rows))
        assert step._overlap is None
    assert torch.equal(*records)


@pytest.mark.gpu
@pytest.mark.parametrize("bad_step", [1, 13, UNROLLED_STEPS, UNROLLED_STEPS + 1, 2 * UNROLLED_STEPS + 3])
def test_a_bad_gradient_inside_a_graph(bad_step: int) -> None:
    """The step is named rightly, and all that was pending is that of the last good step."""
    kind = type("PoisonedAt", (Poisoned,), {"bad_step": bad_step})
    captured, eager = runner("cuda", kind), runner("cuda", cuda_graph=False)
    rows = rows_of(2 * UNROLLED_STEPS + 5)
    with pytest.raises(NonFiniteGradientError) as caught:
        captured.run(0, rows)
    assert caught.value.step == bad_step
    assert captured.optimizer.first_bad_step() == (bad_step - 1, [BAD])
    if bad_step > 1:
        assert torch.equal(caught.value.records, eager.run(0, rows[: bad_step - 1]))
    for name, value in captured.optimizer.named.items():
        expected = eager.optimizer.named[name]
        assert torch.equal(value, expected), name


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_overlapped_runs_on_streams_of_their_own(precision: str) -> None:
    rows = [rows_of(STEPS, seed) for seed in (0, 1, 2)]
    alone = [runner("cuda", seed=seed, precision=precision) for seed in (0, 1, 2)]
    together = [(runner("cuda", seed=seed, precision=precision), torch.cuda.Stream()) for seed in (0, 1, 2)]
    torch.cuda.synchronize()
    for start, count in ((0, UNROLLED_STEPS + 3), (UNROLLED_STEPS + 3, 2 * UNROLLED_STEPS)):
        stop = start + count
        expected = [step.run(start, part[start:stop]) for step, part in zip(alone, rows, strict=True)]
        for (step, stream), part in zip(together, rows, strict=True):
            with torch.cuda.stream(stream):
                step.launch(start, part[start:stop])
        for (step, stream), want in zip(together, expected, strict=True):
            with torch.cuda.stream(stream):
                assert torch.equal(step.finish(), want)
    for (step, _), other in zip(together, alone, strict=True):
        assert_same_state(step, other)
