"""Hooks of a run, held-out loss at intervals, and a loss of one's own."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from bitnet_ext import metrics
from bitnet_ext.models import BitNetForCausalLM, preset
from bitnet_ext.training import Callback, TrainConfig, Trainer, TrainingDivergedError, TrainingInterrupted

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
VOCAB = 101
CONFIG = TrainConfig(
    steps=6, batch_size=2, seq_len=15, lr=3e-3, warmup_steps=2, log_interval=1, checkpoint_seconds=None
)
TOKENS = np.random.default_rng(0).integers(0, VOCAB, 800).astype(np.uint16)


def model() -> BitNetForCausalLM:
    return BitNetForCausalLM(preset("collapse-64", vocab_size=VOCAB), seed=0)


def lines(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    records = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [record for record in records if record["kind"] == kind]


class Diary(Callback):
    def __init__(self) -> None:
        self.entries: list[Any] = []

    def on_start(self, trainer: Trainer) -> None:
        self.entries.append(("start", trainer.step))

    def on_step(self, trainer: Trainer, record: dict[str, Any]) -> None:
        self.entries.append(("step", record["step"], record["loss"]))

    def on_eval(self, trainer: Trainer, results: dict[str, Any]) -> None:
        self.entries.append(("eval", results["step"]))

    def on_checkpoint(self, trainer: Trainer, path: Path) -> None:
        self.entries.append(("checkpoint", path.name))

    def on_end(self, trainer: Trainer, error: BaseException | None) -> None:
        self.entries.append(("end", None if error is None else type(error).__name__))


@pytest.mark.parametrize("device", DEVICES)
def test_every_hook_in_order(device: str, tmp_path: Path) -> None:
    diary = Diary()
    config = dataclasses.replace(CONFIG, checkpoint_interval=4, eval_interval=3)
    trainer = Trainer(
        model(), config, TOKENS, run_dir=tmp_path, device=device, callbacks=[diary], heldout=TOKENS[:200]
    )
    trainer.fit(progress=False)
    logged = {record["step"]: record["loss"] for record in lines(tmp_path, "train")}
    steps = [entry for entry in diary.entries if entry[0] == "step"]
    assert steps == [("step", step, loss) for step, loss in logged.items()] and len(steps) == 6
    names = [entry[:2] for entry in diary.entries]
    assert names == [
        ("start", 0), ("step", 1), ("step", 2), ("step", 3), ("eval", 3), ("step", 4),
        ("checkpoint", "step-00000004"), ("step", 5), ("step", 6), ("eval", 6), ("checkpoint", "step-00000006"),
        ("end", None),
    ]  # fmt: skip


def test_a_callback_stops_the_run(tmp_path: Path) -> None:
    class Stop(Callback):
        def on_step(self, trainer: Trainer, record: dict[str, Any]) -> None:
            if record["step"] == 2:
                trainer.request_stop()

    diary = Diary()
    trainer = Trainer(model(), CONFIG, TOKENS, run_dir=tmp_path, device="cpu", callbacks=[Stop(), diary])
    with pytest.raises(TrainingInterrupted):
        trainer.fit(progress=False)
    assert diary.entries[-2:] == [("checkpoint", "step-00000002"), ("end", "TrainingInterrupted")]
    more = Diary()
    again = Trainer(model(), CONFIG, TOKENS, run_dir=tmp_path, device="cpu", callbacks=[more])
    again.fit(resume=True, progress=False)
    assert more.entries[0] == ("start", 2) and more.entries[1][:2] == ("step", 3)


def test_an_error_in_a_callback_ends_the_run_and_is_told(tmp_path: Path) -> None:
    class Broken(Callback):
        def on_step(self, trainer: Trainer, record: dict[str, Any]) -> None:
            raise KeyError("no such panel")

    diary = Diary()
    with pytest.raises(KeyError, match="no such panel"):
        Trainer(model(), CONFIG, TOKENS, device="cpu", callbacks=[diary, Broken()]).fit(progress=False)
    assert diary.entries[-1] == ("end", "KeyError")
    with pytest.raises(ValueError, match=r"callbacks must be instances of .*Callback, got str"):
        Trainer(model(), CONFIG, TOKENS, device="cpu", callbacks=["wandb"])  # type: ignore[list-item]


def test_held_out_loss_at_intervals(tmp_path: Path) -> None:
    class Words:
        def decode(self, ids: list[int]) -> str:
            return "ab" * len(ids)

    config = dataclasses.replace(CONFIG, eval_interval=4, eval_tokens=60)
    trainer = Trainer(
        model(), config, TOKENS, run_dir=tmp_path, device="cpu", heldout=TOKENS[:200], tokenizer=Words()
    )
    trainer.fit(progress=False)
    evals = lines(tmp_path, "eval")
    assert [record["step"] for record in evals] == [4, 6]  # every four steps, and at the end
    found = metrics.evaluate(trainer.model, TOKENS[:200], seq_len=15, max_tokens=60)
    last = evals[-1]
    assert last["heldout_cross_entropy"] == pytest.approx(found["cross_entropy"], rel=1e-6)
    assert last["heldout_perplexity"] == pytest.approx(math.exp(found["cross_entropy"]), rel=1e-5)
    assert last["heldout_bits_per_byte"] == pytest.approx(found["cross_entropy"] / math.log(2) / 2, rel=1e-6)
    # Looking does not change the run.
    Trainer(model(), CONFIG, TOKENS, run_dir=tmp_path / "plain", device="cpu").fit(progress=False)
    assert lines(tmp_path / "plain", "train") == lines(tmp_path, "train")


def test_an_eval_interval_needs_a_text() -> None:
    config = dataclasses.replace(CONFIG, eval_interval=4)
    with pytest.raises(ValueError, match="eval_interval needs a text"):
        Trainer(model(), config, TOKENS, device="cpu")
    with pytest.raises(ValueError, match="the model's vocab_size is 101"):
        Trainer(model(), config, TOKENS, device="cpu", heldout=np.array([5, 101]))


def cross_entropy(network: torch.nn.Module, ids: torch.Tensor, targets: torch.Tensor) -> Any:
    logits = network(ids)
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    return loss, {"cross_entropy": loss, "largest": logits.max()}


@pytest.mark.parametrize("device", DEVICES)
def test_a_loss_of_ones_own(device: str, tmp_path: Path) -> None:
    """Cross-entropy written by hand trains as the built-in one does; its parts are in the metrics."""
    for name, function in (("own", cross_entropy), ("built-in", None)):
        config = dataclasses.replace(CONFIG, optimizer="sgd_l2", lr=0.1)
        Trainer(model(), config, TOKENS, run_dir=tmp_path / name, device=device, loss_fn=function).fit(
            progress=False
        )
    own, builtin = lines(tmp_path / "own", "train"), lines(tmp_path / "built-in", "train")
    assert set(own[0]) == {
        "kind", "step", "lr", "weight_decay", "cumulative_lr", "loss", "cross_entropy", "largest", "grad_norm"
    }  # fmt: skip
    for mine, theirs in zip(own, builtin, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=2e-3)
        assert mine["cross_entropy"] == mine["loss"]
    assert own[0]["loss"] == pytest.approx(builtin[0]["loss"], rel=1e-5)


def test_a_loss_alone_and_with_accumulation(tmp_path: Path) -> None:
    losses = []
    for accumulation in (1, 2):
        out = tmp_path / str(accumulation)
        config = dataclasses.replace(CONFIG, accumulation=accumulation, eval_interval=6)
        Trainer(
            model(), config, TOKENS, run_dir=out, device="cpu", heldout=TOKENS[:100],
            loss_fn=lambda network, ids, targets: cross_entropy(network, ids, targets)[0] * 2,
        ).fit(progress=False)  # fmt: skip
        losses.append([record["loss"] for record in lines(out, "train")])
        assert "train_cross_entropy" not in lines(out, "eval")[0]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            lambda network, ids, targets: network(ids),
            "one number, alone or with a dict of parts; got a tensor",
        ),
        (lambda network, ids, targets: 3.0, "got float"),
        (lambda network, ids, targets: network(ids).sum().detach(), "a loss with a gradient"),
        (lambda network, ids, targets: (network(ids).sum(), {"loss": 1.0}), "none named loss"),
    ],
)
def test_what_is_no_loss(function: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Trainer(model(), CONFIG, TOKENS, device="cpu", loss_fn=function).fit(progress=False)


def test_a_loss_that_becomes_nan_is_told(tmp_path: Path) -> None:
    def bad(network: torch.nn.Module, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return network(ids).sum() * math.nan

    with pytest.raises(TrainingDivergedError, match="diverged at step 1"):
        Trainer(model(), CONFIG, TOKENS, run_dir=tmp_path, device="cpu", loss_fn=bad).fit(progress=False)


def test_warmup_is_a_tenth_unless_it_is_said() -> None:
    assert TrainConfig(steps=100).warmup == 10
    assert TrainConfig(steps=101).warmup == 11
    assert TrainConfig(steps=10_000).warmup == 375
    assert TrainConfig(steps=100, schedule_steps=1000).warmup == 100
    assert TrainConfig(steps=100, warmup_steps=0).warmup == 0
    with pytest.warns(UserWarning, match="never reaches its peak: warmup_steps is 375, the run has 6 steps"):
        Trainer(model(), dataclasses.replace(CONFIG, warmup_steps=375), TOKENS, device="cpu")
