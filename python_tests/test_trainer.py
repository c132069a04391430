"""The trainer: it learns, resumes exactly after kill -9, refuses what it cannot do, loses nothing."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bitnet_ext.models import BitNetForCausalLM, preset
from bitnet_ext.training import (
    CheckpointError,
    EvaluatedStep,
    TrainConfig,
    Trainer,
    TrainingDivergedError,
    TrainingInterrupted,
    load_model,
    read_checkpoint,
)
from bitnet_ext.training import checkpoint as checkpoint_module
from bitnet_ext.training import trainer as trainer_module
from bitnet_ext.training.signals import stop_on_signals

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
VOCAB = 101
CONFIG = TrainConfig(
    steps=12,
    batch_size=4,
    seq_len=15,
    lr=3e-3,
    warmup_steps=3,
    log_interval=1,
    checkpoint_seconds=None,
    seed=1,
)


def stream(n: int = 3000) -> np.ndarray:
    """Text with something to learn: each id is followed by its successor, mostly."""
    rng = np.random.default_rng(0)
    steps = np.where(rng.random(n) < 0.9, 1, rng.integers(0, VOCAB, n))
    return (np.cumsum(steps) % VOCAB).astype(np.uint16)


def model(seed: int = 0, **overrides: object) -> BitNetForCausalLM:
    return BitNetForCausalLM(preset("collapse-64", vocab_size=VOCAB, **overrides), seed=seed)


class CountingEvaluator:
    def __init__(self) -> None:
        self.before = 0

    def before_step(self, model: BitNetForCausalLM) -> None:
        self.before += 1

    def evaluate(self, model: BitNetForCausalLM, step: EvaluatedStep) -> dict[str, float]:
        return {"weight_sum": float(sum(p.detach().double().sum() for p in model.parameters()))}


def lines(run_dir: Path, *kinds: str) -> list[dict[str, object]]:
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["kind"] in (kinds or ("train", "eval"))]


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return read_checkpoint(run_dir / "checkpoint").model


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("quantization", ["b1.58", "none"])
def test_it_learns(device: str, precision: str, quantization: str, tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, steps=120, precision=precision, log_interval=1, batch_size=8)
    trainer = Trainer(model(quantization=quantization), config, stream(), run_dir=tmp_path, device=device)
    trainer.fit()
    losses = [record["cross_entropy"] for record in lines(tmp_path, "train")]
    assert len(losses) == 120
    assert losses[-1] < 0.75 * losses[0]


@pytest.mark.parametrize(
    "terms",
    [
        {"label_smoothing": 0.1},
        {"entropy_weight": 0.1},
        {"diversity_weight": 0.1},
        {"output_l2": 1e-3},
        {"z_loss": 1e-3},
        {"optimizer": "adam_l2", "decay_norms": True},
        {"optimizer": "adam_l2", "decay_before_clip": True},
        {"optimizer": "sgd_l2", "lr": 0.3},
        {"grad_clip": None, "decay_embeddings": False},
        {"sampling": "sequential"},
    ],
)
def test_every_objective_and_option_trains(terms: dict[str, object], tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, steps=40, **terms)
    trainer = Trainer(model(), config, stream(), run_dir=tmp_path, device="cpu")
    trainer.fit()
    records = lines(tmp_path, "train")
    assert records[-1]["cross_entropy"] < records[0]["cross_entropy"]
    if any(
        name in terms
        for name in ("label_smoothing", "entropy_weight", "diversity_weight", "output_l2", "z_loss")
    ):
        assert records[0]["loss"] != records[0]["cross_entropy"]


def test_accumulation_equals_the_whole_batch(tmp_path: Path) -> None:
    for accumulation in (1, 4):
        config = dataclasses.replace(CONFIG, accumulation=accumulation)
        Trainer(model(), config, stream(), run_dir=tmp_path / str(accumulation), device="cpu").fit()
    whole, parts = (lines(tmp_path / name, "train") for name in ("1", "4"))
    np.testing.assert_allclose([r["loss"] for r in whole], [r["loss"] for r in parts], rtol=2e-3)


def test_the_same_seed_gives_the_same_run(tmp_path: Path) -> None:
    for name in ("a", "b"):
        Trainer(model(), CONFIG, stream(), run_dir=tmp_path / name, device="cpu").fit()
    assert lines(tmp_path / "a") == lines(tmp_path / "b")
    assert all(torch.equal(v, weights(tmp_path / "b")[k]) for k, v in weights(tmp_path / "a").items())


def test_evaluation_and_its_sums(tmp_path: Path) -> None:
    evaluator = CountingEvaluator()
    trainer = Trainer(
        model(),
        CONFIG,
        stream(),
        run_dir=tmp_path,
        device="cpu",
        evaluator=evaluator,
        eval_steps=(1, 5, 12, 99),
    )
    seen: list[int] = []
    trainer.fit(on_progress=lambda step, record: seen.append(step))
    evals = lines(tmp_path, "eval")
    assert [record["step"] for record in evals] == [1, 5, 12] and evaluator.before == 3
    losses = [record["loss"] for record in lines(tmp_path, "train")]
    assert evals[1]["train_loss"] == pytest.approx(np.mean(losses[1:5]))
    assert evals[2]["cumulative_lr"] == pytest.approx(sum(r["lr"] for r in lines(tmp_path, "train")))
    assert seen[-1] == 12
    assert evals[0]["tokens_seen"] == 4 * 15


SCRIPT = """
import sys, dataclasses
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
import test_trainer as t
config = dataclasses.replace(t.CONFIG, steps=40, checkpoint_interval=7)
t.Trainer(t.model(), config, t.stream(), run_dir=sys.argv[1], device="cpu",
          evaluator=t.CountingEvaluator(), eval_steps=(1, 3, 10, 20, 30, 40)).fit(
    resume=len(sys.argv) > 2,
    on_progress=lambda step, record: (print(step, flush=True), t.time.sleep(0.02)))
"""


def _start(run_dir: Path, *arguments: str) -> subprocess.Popen[str]:
    script = SCRIPT.format(tests=str(Path(__file__).parent))
    return subprocess.Popen(
        [sys.executable, "-c", script, str(run_dir), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=run_dir.parent,
    )


def _stop_at(process: subprocess.Popen[str], step: int, number: signal.Signals) -> int:
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) >= step:
            process.send_signal(number)
            break
    process.communicate()
    return process.returncode


@pytest.mark.slow
def test_kill_and_resume_is_bit_exact(tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for folder in (whole, cut):
        folder.mkdir()
    assert _start(whole).wait() == 0
    assert _stop_at(_start(cut), 17, signal.SIGKILL) == -signal.SIGKILL
    assert len(lines(cut, "train")) < 40
    assert _stop_at(_start(cut, "resume"), 30, signal.SIGKILL) == -signal.SIGKILL
    last = _start(cut, "resume")
    _, errors = last.communicate()
    assert last.returncode == 0, errors
    assert lines(cut) == lines(whole)
    expected = weights(whole)
    for name, value in weights(cut).items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.slow
def test_interrupt_leaves_a_resumable_run(tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for folder in (whole, cut):
        folder.mkdir()
    assert _start(whole).wait() == 0
    assert _stop_at(_start(cut), 9, signal.SIGINT) != 0
    step = read_checkpoint(cut / "checkpoint").step
    assert 9 <= step < 40
    assert _start(cut, "resume").wait() == 0
    assert lines(cut) == lines(whole)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupt_in_process(number: signal.Signals, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    # Tests that were started in the background ignore some of them.
    request.addfinalizer(functools.partial(signal.signal, number, signal.signal(number, signal.SIG_DFL)))
    trainer = Trainer(model(), CONFIG, stream(), run_dir=tmp_path, device="cpu")
    before = signal.getsignal(number)

    def interrupt(step: int, record: object) -> None:
        if step == 4:
            os.kill(os.getpid(), number)
            time.sleep(0.01)

    with pytest.raises(TrainingInterrupted, match="can be resumed"):
        trainer.fit(on_progress=interrupt)
    assert signal.getsignal(number) is before
    assert read_checkpoint(tmp_path / "checkpoint").step in (4, 5)


def test_a_stop_in_a_step_at_which_a_checkpoint_is_due(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As relia-01: the step is saved once, and the folder that latest.json names is never removed."""
    written: list[int] = []
    real = trainer_module.write_checkpoint

    def counted(directory: Path, step: int, *args: object, **options: bool) -> Path:
        written.append(step)
        return real(directory, step, *args, **options)

    monkeypatch.setattr(trainer_module, "write_checkpoint", counted)
    config = dataclasses.replace(CONFIG, checkpoint_interval=3)
    trainer = Trainer(model(), config, stream(), run_dir=tmp_path, device="cpu")
    with pytest.raises(TrainingInterrupted, match="stopped after step 6"):
        trainer.fit(on_progress=lambda step, record: trainer.request_stop() if step == 6 else None)
    assert written == [3, 6]
    trainer.fit(resume=True)  # the same object goes on: its request was met
    assert written == [3, 6, 9, 12]
    assert [record["step"] for record in lines(tmp_path)] == list(range(1, 13))
    assert [path.name for path in (tmp_path / "checkpoint").glob("step-*")] == ["step-00000012"]


def test_a_resumed_run_rounds_at_random_as_the_whole_one(tmp_path: Path) -> None:
    """The int8 backward draws from torch's generator, whose state the checkpoint has."""
    config = dataclasses.replace(CONFIG, backward="int8")
    torch.manual_seed(0)
    Trainer(model(), config, stream(), run_dir=tmp_path / "whole", device="cpu").fit()
    torch.manual_seed(0)
    trainer = Trainer(model(), config, stream(), run_dir=tmp_path / "cut", device="cpu")
    with pytest.raises(TrainingInterrupted):
        trainer.fit(on_progress=lambda step, record: trainer.request_stop() if step == 6 else None)
    torch.manual_seed(9)
    Trainer(model(), config, stream(), run_dir=tmp_path / "cut", device="cpu").fit(resume=True)
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    """As under nohup, or in a shell's background job."""
    asked: list[int] = []
    target = SimpleNamespace(request_stop=lambda: asked.append(1))
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stop_on_signals(target):
            os.kill(os.getpid(), signal.SIGINT)
            assert asked == [] and signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_finished_run_is_not_repeated(tmp_path: Path) -> None:
    Trainer(model(), CONFIG, stream(), run_dir=tmp_path, device="cpu").fit()
    before = (tmp_path / "metrics.jsonl").read_bytes()
    again = Trainer(model(seed=5), CONFIG, stream(), run_dir=tmp_path, device="cpu")
    again.fit(resume=True)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    assert torch.equal(again.model.embed_tokens.weight, weights(tmp_path)["embed_tokens.weight"])


def test_an_existing_run_is_not_overwritten(tmp_path: Path) -> None:
    Trainer(model(), CONFIG, stream(), run_dir=tmp_path, device="cpu").fit()
    with pytest.raises(FileExistsError, match="already holds a run"):
        Trainer(model(), CONFIG, stream(), run_dir=tmp_path, device="cpu").fit()
    (tmp_path / "metrics.jsonl").unlink()  # its checkpoint is worth as much
    with pytest.raises(FileExistsError, match="already holds a run"):
        Trainer(model(), CONFIG, stream(), run_dir=tmp_path, device="cpu").fit()


def test_resume_with_other_settings_is_refused(tmp_path: Path) -> None:
    Trainer(model(), CONFIG, stream(), run_dir=tmp_path, device="cpu").fit()
    other = dataclasses.replace(CONFIG, lr=1e-3)
    with pytest.raises(ValueError, match=r"lr is 0\.001, but .* was written with 0\.003"):
        Trainer(model(), other, stream(), run_dir=tmp_path, device="cpu").fit(resume=True)


@pytest.mark.parametrize("damage", ["cut", "flip", "remove", "state"])
def test_a_damaged_checkpoint_is_named(damage: str, tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, checkpoint_interval=5)
    Trainer(model(), config, stream(), run_dir=tmp_path, device="cpu").fit()
    folder = next((tmp_path / "checkpoint").glob("step-*"))
    file = folder / ("state.json" if damage == "state" else "model.safetensors")
    data = bytearray(file.read_bytes())
    if damage == "cut" or damage == "state":
        file.write_bytes(data[: len(data) // 2])
    elif damage == "flip":
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    else:
        file.unlink()
    with pytest.raises(CheckpointError, match=file.name):
        Trainer(model(), config, stream(), run_dir=tmp_path, device="cpu").fit(resume=True)


def test_a_full_disk_keeps_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = checkpoint_module.write_file
    written: list[Path] = []

    def failing(path: Path, data: bytes) -> None:
        if path.name == "optimizer.safetensors" and any(p.name == path.name for p in written):
            raise OSError(28, "No space left on device")
        written.append(path)
        real(path, data)

    monkeypatch.setattr(checkpoint_module, "write_file", failing)
    config = dataclasses.replace(CONFIG, checkpoint_interval=5)
    with pytest.raises(OSError, match=r"No space left on device.*the one before is kept"):
        Trainer(model(), config, stream(), run_dir=tmp_path, device="cpu").fit()
    assert read_checkpoint(tmp_path / "checkpoint").step == 5
    assert [p.name for p in (tmp_path / "checkpoint").iterdir() if p.name.startswith(".")] == []
    monkeypatch.undo()
    Trainer(model(), config, stream(), run_dir=tmp_path, device="cpu").fit(resume=True)
    Trainer(model(), CONFIG, stream(), run_dir=tmp_path / "whole", device="cpu").fit()
    assert lines(tmp_path) == lines(tmp_path / "whole")


def test_a_full_disk_under_the_metrics_keeps_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = dataclasses.replace(CONFIG, checkpoint_interval=5)
    trainer = Trainer(model(), config, stream(), run_dir=tmp_path, device="cpu")

    def fill_the_disk(step: int, record: object) -> None:
        if step == 7:
            full = open("/dev/full", "w")  # noqa: SIM115  (closed by the log)
            monkeypatch.setattr(trainer._log, "_file", full)

    with pytest.raises(
        OSError, match=r"could not write metrics to .*metrics\.jsonl.*the last checkpoint is kept"
    ):
        trainer.fit(on_progress=fill_the_disk)
    assert read_checkpoint(tmp_path / "checkpoint").step == 5
    Trainer(model(), config, stream(), run_dir=tmp_path, device="cpu").fit(resume=True)
    Trainer(model(), CONFIG, stream(), run_dir=tmp_path / "whole", device="cpu").fit()
    assert lines(tmp_path) == lines(tmp_path / "whole")


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the extra `tensorboard` is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = dataclasses.replace(CONFIG, tensorboard=True)
    Trainer(model(), config, stream(), run_dir=tmp_path, device="cpu").fit()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("train/loss")] == list(range(1, 13))


@pytest.mark.parametrize("device", DEVICES)
def test_divergence_is_reported_with_the_step(device: str, tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, lr=1e30, grad_clip=None, steps=50, warmup_steps=0)
    with pytest.raises(TrainingDivergedError, match=r"diverged at step \d+"):
        Trainer(model(), config, stream(), run_dir=tmp_path, device=device).fit()


def test_load_model(tmp_path: Path) -> None:
    trainer = Trainer(model(), CONFIG, stream(), run_dir=tmp_path, device="cpu")
    trainer.fit()
    loaded = load_model(tmp_path / "checkpoint")
    tokens = torch.randint(0, VOCAB, (2, 7))
    assert torch.equal(loaded(tokens), trainer.model(tokens))
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        load_model(tmp_path / "nothing")


def test_bad_arguments(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tokens must be in 0\.\.100 .* got id 101"):
        Trainer(model(), CONFIG, np.full(999, 101, np.uint16), device="cpu")
    with pytest.raises(ValueError, match="flat array of integer ids"):
        Trainer(model(), CONFIG, np.zeros((3, 3)), device="cpu")
    with pytest.raises(ValueError, match="seq_len must be at most"):
        Trainer(model(), dataclasses.replace(CONFIG, seq_len=5000), stream(), device="cpu")
    with pytest.raises(ValueError, match="device must be auto"):
        Trainer(model(), CONFIG, stream(), device="tpu")
    with pytest.raises(ValueError, match="resume=True needs a run_dir"):
        Trainer(model(), CONFIG, stream(), device="cpu").fit(resume=True)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="cannot be used: torch sees no NVIDIA GPU"):
            Trainer(model(), CONFIG, stream(), device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("terms", [{}, {"diversity_weight": 0.1, "output_l2": 1e-4}, {"precision": "bf16"}])
def test_graph_equals_eager(terms: dict[str, object], tmp_path: Path) -> None:
    for graph in (True, False):
        config = dataclasses.replace(CONFIG, steps=100, cuda_graph=graph, **terms)
        Trainer(model(), config, stream(), run_dir=tmp_path / str(graph), device="cuda").fit()
    graphed, eager = (lines(tmp_path / name, "train") for name in ("True", "False"))
    assert graphed == eager


@pytest.mark.gpu
def test_gpu_resume_is_exact(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, steps=100, checkpoint_interval=50)
    Trainer(model(), config, stream(), run_dir=tmp_path / "whole", device="cuda").fit()
    trainer = Trainer(model(), config, stream(), run_dir=tmp_path / "cut", device="cuda")

    def interrupt(step: int, record: object) -> None:
        if step >= 50:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)

    with pytest.raises(TrainingInterrupted):
        trainer.fit(on_progress=interrupt)
    Trainer(model(), config, stream(), run_dir=tmp_path / "cut", device="cuda").fit(resume=True)
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")


@pytest.mark.gpu
def test_gpu_follows_cpu(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, steps=30)
    for device in ("cpu", "cuda"):
        Trainer(model(), config, stream(), run_dir=tmp_path / device, device=device).fit()
    cpu, cuda = ([r["loss"] for r in lines(tmp_path / name, "train")] for name in ("cpu", "cuda"))
    np.testing.assert_allclose(cpu, cuda, rtol=5e-3)
