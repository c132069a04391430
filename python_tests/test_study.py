"""The factorial study: its blocks as data, runs side by side, resuming, recovery from checkpoints, what is measured."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bitnet_ext import metrics
from bitnet_ext.collapse import evaluator as evaluator_module
from bitnet_ext.collapse import study as study_module
from bitnet_ext.collapse.arms import config_of
from bitnet_ext.collapse.blocks import BLOCKS, FACTORIAL, HEADLINE, RECOVERY_STARTS, arms_of
from bitnet_ext.collapse.results import read_study
from bitnet_ext.collapse.runs import STEMS, text_of_seed
from bitnet_ext.collapse.schedule import LATER, Schedule
from bitnet_ext.collapse.study import StudyConfig, log_spaced_steps, run_study
from bitnet_ext.models import PRESETS, BitNetForCausalLM, preset
from bitnet_ext.training import FusedAdam, RunInUseError, TrainConfig, Trainer, advance_together
from bitnet_ext.training import metrics_log as metrics_log_module
from bitnet_ext.training.run_lock import RunLock
from bitnet_ext.training.trainer import ENDED

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(autouse=True)
def small_networks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every width of the study becomes the smallest network, so that a block takes seconds on a CPU."""
    monkeypatch.setenv("BITNET_EXT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(evaluator_module, "PROMPTS", 20)
    for name in ("collapse-128", "collapse-256", "collapse-512", "collapse-768"):
        monkeypatch.setitem(PRESETS, name, PRESETS["collapse-64"])


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(
        "\n\n".join(f"Line {n} of a text about hills and the town of number {n % 17}." for n in range(400))
    )
    return path


def config(text: Path, *blocks: str, **changes: Any) -> StudyConfig:
    settings = dict(
        arms=(), steps=1, seeds=1, data=str(text), books=str(text), eval_tokens=62, generation=False
    )
    return StudyConfig(**{**settings, "blocks": blocks, "scale": 0.0012, **changes})  # type: ignore[arg-type]


def only(monkeypatch: pytest.MonkeyPatch, *arms: str) -> None:
    """Blocks shall have these arms."""
    monkeypatch.setattr(study_module, "arms_of", lambda blocks: arms)


def evals(out: Path) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """The "eval" lines of every run."""
    found = {}
    for path in sorted(out.glob("*/seed*/metrics.jsonl")):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        found[path.parent.parent.name, path.parent.name] = [row for row in rows if row["kind"] == "eval"]
    return found


# --- the plan --------------------------------------------------------------------------------------------------------


def test_every_arm_is_a_change_of_one_recipe() -> None:
    """Each arm differs from all others, its settings are accepted, and what it goes on from exists."""
    seen: dict[str, str] = {}
    for name, arm in FACTORIAL.items():
        assert arm.name == name and arm.steps is not None
        settings = {**config_of(arm, 100, 0).to_dict(), "net": (arm.model, arm.quantization, arm.start)}
        text = json.dumps([settings, arm.reset_moments, arm.books], sort_keys=True)
        assert text not in seen or {name, seen[text]} == {"label-smoothing", "smoothing-0.1-l2"}, (
            name,
            seen[text],
        )
        seen[text] = name
        if arm.model is not None:
            preset(arm.model)
        if arm.start is not None:
            stem, step = arm.start
            assert step < arm.steps and FACTORIAL[stem].start is None
    assert {arm for block in BLOCKS.values() for arm in block.arms} == set(FACTORIAL)
    assert set(HEADLINE) < set(FACTORIAL)


def test_seeds_and_order_of_the_tasks() -> None:
    plan = StudyConfig(arms=(), steps=1, seeds=2, blocks=("A", "D"), books="x")
    tasks = list(plan.tasks())
    assert [task.seed for task in tasks] == sorted(task.seed for task in tasks)
    runs = [task for task in tasks if not task.is_stem]
    assert sum(task.arm.name == "standard-lr" for task in runs) == 6  # two and four more
    assert sum(task.arm.name == "grad-clip" for task in runs) == 2
    stems = [task for task in tasks if task.is_stem]
    assert [(task.seed, task.snapshot_steps) for task in stems] == [(s, RECOVERY_STARTS) for s in (0, 1)]
    branch = next(task for task in runs if task.arm.name == "from-350-continue")
    assert branch.eval_steps[0] == 351 and branch.eval_steps[-1] == branch.steps == 1350


def test_bad_plans_get_one_sentence() -> None:
    with pytest.raises(ValueError, match="block 'Z' is unknown; accepted are A, B, B1"):
        arms_of(("Z",))
    with pytest.raises(ValueError, match="books must name a corpus"):
        StudyConfig(arms=(), steps=1, blocks=("F",))
    with pytest.raises(ValueError, match="scale must be > 0"):
        StudyConfig(arms=(), steps=1, blocks=("A",), scale=0.0)
    with pytest.raises(ValueError, match="arm 'nonsense' is unknown"):
        StudyConfig(arms=("nonsense",), steps=1, blocks=("A",))


def test_evaluations_are_dense_where_the_report_did_not_look() -> None:
    marks = log_spaced_steps(13_000)
    assert marks[:8] == (1, 2, 5, 10, 20, 50, 100, 150) and marks[-1] == 13_000
    assert sum(mark <= 400 for mark in marks) >= 10 and {1000, 4000} <= set(marks)


def test_seeds_read_the_text_from_different_places() -> None:
    tokens = np.arange(1000, dtype=np.uint16)
    assert text_of_seed(tokens, 0) is tokens
    starts = [int(text_of_seed(tokens, seed)[0]) for seed in range(10)]
    assert len(set(starts)) == 10 and min(np.diff(sorted(starts))) > 50
    assert sorted(text_of_seed(tokens, 3).tolist()) == tokens.tolist()


# --- running ---------------------------------------------------------------------------------------------------------


def test_runs_side_by_side_are_those_one_by_one(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Recovery runs included."""
    only(
        monkeypatch, "l2-only-head", "fp-twin", "from-350-continue", "from-4000-adamw", "from-4000-smoothing"
    )
    plan = config(text, "B1", "D", scale=0.0012)
    run_study(plan, tmp_path / "one", device="cpu", report=False)
    run_study(plan, tmp_path / "two", device="cpu", report=False, together=3)
    one, two = evals(tmp_path / "one"), evals(tmp_path / "two")
    assert one == two and ("from-4000-adamw", "seed0") in one
    assert not list((tmp_path / "one").rglob("checkpoint")) and not list(
        (tmp_path / "one" / STEMS).glob("*/seed*")
    )
    study = read_study(tmp_path / "one")
    assert not study.unfinished and study.settings["blocks"]["D"]["title"] == "Recovery"


def test_a_recovery_run_goes_on_where_its_stem_was(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unchanged settings give the stem's own continuation, bit for bit; a third of the rate starts from its clock."""
    branches = ("continue", "third-lr", "no-decay", "no-decay-reset")
    only(monkeypatch, "standard-lr", *(f"from-350-{name}" for name in branches))
    plan = config(text, "A", "D", scale=0.01, eval_steps=tuple(range(1, 20)))
    arms = {arm.name: arm for arm in plan.all_arms()}
    start = arms["from-350-continue"].start
    assert start is not None
    run_study(plan, tmp_path / "out", device="cpu", report=False, together=4)
    rows = evals(tmp_path / "out")
    whole = {row["step"]: row for row in rows["standard-lr", "seed0"]}
    branch = {row["step"]: row for row in rows["from-350-continue", "seed0"]}
    common = [step for step in branch if step in whole]
    assert common and min(branch) == start[1] + 1
    for step in common:
        same = ("heldout_cross_entropy", "cumulative_lr", "lr", "decay_share")
        assert [whole[step][key] for key in same] == [branch[step][key] for key in same]
    slow, first = rows["from-350-third-lr", "seed0"][0], rows["from-350-continue", "seed0"][0]
    before = first["cumulative_lr"] - first["lr"]
    assert (
        slow["cumulative_lr"] == pytest.approx(before + slow["lr"], rel=1e-9)
        and slow["lr"] < 0.5 * first["lr"]
    )
    free = rows["from-350-no-decay", "seed0"][0]
    assert free["decay_share"] == 0 and first["decay_share"] > 0
    reset = rows["from-350-no-decay-reset", "seed0"][0]
    assert reset["heldout_cross_entropy"] != free["heldout_cross_entropy"]


_KILLED = """
import sys
from pathlib import Path
from bitnet_ext.models import PRESETS
for name in ("collapse-128", "collapse-256", "collapse-512", "collapse-768"):
    PRESETS[name] = PRESETS["collapse-64"]
from bitnet_ext.collapse import evaluator, study
from bitnet_ext.collapse.study import StudyConfig, run_study
evaluator.PROMPTS = 20
study.arms_of = lambda blocks: ("l2-only-head", "l2-not-head", "l2-only-gains", "l2-not-gains", "l2-only-ternary")
if __name__ == "__main__":
    plan = StudyConfig(arms=(), steps=1, seeds=1, data=sys.argv[1], eval_tokens=62, blocks=("B1",), scale=0.002,
                       generation=False)
    run_study(plan, Path(sys.argv[2]), device="cpu", report=False, resume=True, processes=int(sys.argv[3]))
"""


@pytest.mark.parametrize("processes", [0, 2])
def test_a_killed_study_resumes_and_repeats_nothing(processes: int, text: Path, tmp_path: Path) -> None:
    script, out = tmp_path / "killed.py", tmp_path / "killed"
    script.write_text(_KILLED)
    command = [sys.executable, str(script), str(text), str(out), str(processes)]
    with subprocess.Popen(command, start_new_session=True) as process:
        deadline = time.monotonic() + 120
        while _runs_of_the_session(out) < 2:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
    done = {path: path.stat().st_mtime_ns for path in out.glob("*/seed*/metrics.jsonl") if _complete(path)}
    assert len(done) >= 2
    subprocess.run(command, check=True, timeout=300)
    assert not read_study(out).unfinished
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in done.items())
    whole = tmp_path / "whole"  # by the same command: on a CPU the number of threads shows in last bits
    subprocess.run([*command[:3], str(whole), command[4]], check=True, timeout=300)
    assert evals(whole) == evals(out)


def _runs_of_the_session(out: Path) -> int:
    """How many runs the study's own record says have ended, which a kill does not take back."""
    path = out / "sessions.jsonl"
    return json.loads(path.read_text())["runs"] if path.is_file() else 0


def _complete(path: Path) -> bool:
    arm = json.loads((path.parent / "config.json").read_text())
    return any(row["kind"] == "eval" and row["step"] == arm["steps"] for row in map(json.loads, path.open()))


def test_a_full_disk_stops_the_study_and_loses_no_run(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only(monkeypatch, "l2-only-head", "l2-not-head", "l2-only-gains", "l2-not-gains", "l2-only-embedding")
    plan, out = config(text, "B1"), tmp_path / "out"
    write, written = metrics_log_module.MetricsLog.write, 0

    def full(self: Any, kind: str, record: dict[str, Any]) -> None:
        nonlocal written
        written += 1
        if written > 20:
            raise OSError("could not write metrics (No space left on device)")
        write(self, kind, record)

    with monkeypatch.context() as patch:
        patch.setattr(metrics_log_module.MetricsLog, "write", full)
        with pytest.raises(OSError, match="No space left"):
            run_study(plan, out, device="cpu", report=False)
    before = evals(out)
    run_study(plan, out, device="cpu", report=False, resume=True)
    after = evals(out)
    assert not read_study(out).unfinished and 0 < len(before) < len(after)
    finished = [key for key, rows in before.items() if rows == after[key]]
    assert finished


def test_a_diverged_run_ends_and_the_others_go_on(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = dataclasses.replace(FACTORIAL["lr-3e-3"], train={"lr": 1e30, "warmup_steps": 0})
    monkeypatch.setitem(study_module.FACTORIAL, "lr-3e-3", broken)
    plan = config(text, "B", scale=0.004)
    only(monkeypatch, "lr-3e-3", "adamw")
    run_study(plan, tmp_path / "out", device="cpu", report=False)
    reason = json.loads((tmp_path / "out" / "lr-3e-3" / "seed0" / ENDED).read_text())
    assert "diverged" in reason["reason"]
    study = read_study(tmp_path / "out")
    assert not study.unfinished and study.of("adamw")[0].last_step == 16


def test_settings_cannot_change_on_resume(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only(monkeypatch, "l2-only-head")
    plan = config(text, "B1", scale=0.0005)
    run_study(plan, tmp_path / "out", device="cpu", report=False)
    with pytest.raises(FileExistsError, match="already holds a study"):
        run_study(plan, tmp_path / "out", device="cpu", report=False)
    with pytest.raises(ValueError, match=r"scale is 0\.5, but the study"):
        run_study(dataclasses.replace(plan, scale=0.5), tmp_path / "out", device="cpu", resume=True)
    only(monkeypatch, "l2-only-head", "adamw-gains-free")
    run_study(
        dataclasses.replace(plan, blocks=("B2",)), tmp_path / "out", device="cpu", resume=True, report=False
    )
    assert {"adamw-gains-free", "l2-only-head"} <= set(read_study(tmp_path / "out").measured_arms)


def test_the_schedule_hands_out_each_task_once(tmp_path: Path, text: Path) -> None:
    plan = config(text, "D")
    schedule = Schedule(plan.tasks(), tmp_path)
    stem = schedule.take()
    assert stem is not None and stem != LATER and stem.is_stem
    assert schedule.take() == LATER  # nothing to go on from yet
    for step in stem.snapshot_steps:
        (stem.folder(tmp_path) / "snapshots" / f"step-{step:08d}").mkdir(parents=True)
    schedule.done(stem)
    taken = []
    while (task := schedule.take()) is not None:
        assert task != LATER
        taken.append(task)
    assert len(taken) == 21 and stem.folder(tmp_path).is_dir()
    for task in taken:
        schedule.done(task)
    assert not stem.folder(tmp_path).exists()


@pytest.mark.parametrize("device", DEVICES)
def test_jobs_are_interleaved(device: str) -> None:
    log: list[str] = []

    def job(name: str, pieces: int) -> Iterator[None]:
        for piece in range(pieces):
            log.append(f"{name}{piece}")
            yield

    names = [("a", 3), ("b", 1), ("c", 2)]
    jobs = iter([lambda n=n, p=p: job(n, p) for n, p in names])  # type: ignore[misc]
    ended = list(advance_together(jobs, together=2, device=torch.device(device)))
    assert log == ["a0", "b0", "a1", "a2", "c0", "c1"] and sorted(ended) == [0, 1, 1]


@pytest.mark.parametrize("keep", [False, True])
def test_weights_are_kept_on_request(text: Path, tmp_path: Path, keep: bool) -> None:
    settings = {"steps": 2, "data": str(text), "model": "collapse-64", "eval_tokens": 62, "generation": False}
    plan = StudyConfig(arms=("adamw",), **settings, keep_weights=keep)  # type: ignore[arg-type]
    run_study(plan, tmp_path / "out", device="cpu", report=False)
    run = tmp_path / "out" / "adamw" / "seed0"
    assert [path.name for path in run.rglob("*.safetensors")] == ["model.safetensors"] * keep
    assert not read_study(tmp_path / "out").unfinished
    # What is kept may be changed on resume; the finished run stays as it is.
    other = dataclasses.replace(plan, keep_weights=not keep)
    run_study(other, tmp_path / "out", device="cpu", report=False, resume=True)
    assert len(list(run.rglob("*.safetensors"))) == keep


# --- what is measured ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
def test_share_of_coordinates_that_the_decay_dominates(device: str) -> None:
    weight = torch.tensor([[1.0, -2.0], [0.0, 3.0], [4.0, -5.0]], device=device)
    gradient = torch.tensor([[0.05, 0.5], [0.0, -0.1], [0.0, 0.0]], device=device)
    terms = metrics.DecayTerms(weight, 0.1, gradient)
    expected = 1 + 1 + 2  # 0.1 > 0.05; 0.3 > 0.1; 0.4 and 0.5 > 0; not 0.2 > 0.5, nor 0 > 0
    assert int(metrics.decay_dominates(terms)) == expected
    rows = torch.sparse_coo_tensor(
        torch.tensor([[1, 0, 1]], device=device),
        gradient[[1, 0, 1]] / torch.tensor([[2.0], [1.0], [2.0]], device=device),
        (3, 2),
    )
    assert int(metrics.decay_dominates(metrics.DecayTerms(weight, 0.1, rows))) == expected
    assert int(metrics.decay_dominates(metrics.DecayTerms(weight, 0.0, rows))) == 0
    # A direction that is the gradient: (m / 0.5) / (sqrt(v / 0.25) + eps) with v = 0.25 and m = g / 2.
    adam = metrics.AdamDirection(gradient / 2, torch.full_like(gradient, 0.25), 0.5, 0.25, 1e-12)
    assert int(metrics.decay_dominates(metrics.DecayTerms(weight, 0.1, adam))) == expected
    shares = metrics.decay_shares({"a": [terms], "b": [metrics.DecayTerms(weight, 0.0, rows)], "none": []})
    assert shares == {
        "decay_share": 4 / 12,
        "decay_share_a": 4 / 6,
        "decay_share_b": 0.0,
        "decay_share_none": None,
    }


@pytest.mark.parametrize("optimizer", ["adam_l2", "adamw"])
def test_decay_as_the_optimisers_apply_it(optimizer: str) -> None:
    """The two update rules where there is no gradient: -lr sign(w), whatever the L2 term's size, and -lr wd w."""
    net = torch.nn.ParameterDict({"w": torch.nn.Parameter(torch.tensor([[0.5, -2.0, 0.1]]))})
    for decay in (0.1, 0.01):
        step = FusedAdam(net, TrainConfig(optimizer=optimizer, weight_decay=decay, grad_clip=1.0))
        before = net["w"].detach().clone()
        net["w"].grad = torch.zeros_like(before)
        _, scale = step.grad_norm_and_scale()
        lr, beta1, beta2 = 0.04, step.config.beta1, step.config.beta2
        step.step(torch.tensor([lr, decay, 1 - beta1, 1 - beta2]), scale)
        moved = net["w"].detach() - before
        expected = -lr * before.sign() if optimizer == "adam_l2" else -lr * decay * before
        torch.testing.assert_close(moved, expected, rtol=1e-3, atol=1e-6)


def test_groups_that_decay_reaches() -> None:
    net = BitNetForCausalLM(preset("collapse-64", vocab_size=50), seed=0)
    reached = {}
    for only in (None, "gains", "final_gain", "head", "embedding", "linear", "head,linear"):
        optimizer = FusedAdam(net, TrainConfig(decay_only=only, decay_norms=True))
        reached[only] = {name for name, decays in optimizer.decays.items() if decays}
    assert reached[None] == set(dict(net.named_parameters()))
    single = [reached[only] for only in ("gains", "final_gain", "head", "embedding", "linear")]
    assert sum(map(len, single)) == len(reached[None]) and set().union(*single) == reached[None]
    assert reached["head,linear"] == reached["head"] | reached["linear"]
    assert reached["final_gain"] == {"final_norm.weight"} and reached["head"] == {"lm_head.weight"}
    with pytest.raises(ValueError, match="decay_only must be None or different names of gains, final_gain"):
        TrainConfig(decay_only="gains,heads")


def test_norms_by_frequency_and_thresholds() -> None:
    net = BitNetForCausalLM(preset("collapse-64", vocab_size=6), seed=0)
    with torch.no_grad():
        net.embed_tokens.weight.copy_(torch.arange(1.0, 7.0)[:, None] * torch.ones(6, 64) / 8)
    unigram = torch.tensor([0.5, 0.3, 0.1, 0.05, 0.04, 0.01]).double().log()
    bins = metrics.row_bins(unigram, torch.tensor([True, True, True, True, True, False]))
    assert bins.tolist() == [0, 1, 1, 2, 2, 3]
    norms = metrics.row_norms(net, bins)
    assert [norms[f"embedding_norm_{name}"] for name in metrics.ROW_BINS] == pytest.approx([1, 2.5, 4.5, 6])
    layer = next(m for m in net.modules() if getattr(m, "quantization", None) == "b1.58")
    measured = metrics.threshold_statistics(net)
    distances = []
    for module in net.modules():
        if getattr(module, "quantization", None) == "b1.58":
            w = module.weight.detach().abs()  # type: ignore[union-attr, operator]
            distances.append((w / w.mean() - 0.5).abs().flatten())
    everything = torch.cat(distances)
    assert measured["threshold_distance"] == pytest.approx(everything.mean().item(), rel=1e-5)
    assert measured["near_threshold"] == pytest.approx((everything < 0.05).float().mean().item(), rel=1e-5)
    assert measured["absmean_clamped"] == 0
    with torch.no_grad():
        layer.weight.zero_()  # type: ignore[union-attr, operator]
    assert (metrics.threshold_statistics(net)["absmean_clamped"] or 0) > 0
    twin = BitNetForCausalLM(preset("collapse-64", vocab_size=6, quantization="none"), seed=0)
    assert set(metrics.threshold_statistics(twin).values()) == {None}


def test_measures_of_generated_text() -> None:
    ranks = np.arange(1, 200)
    assert metrics.zipf_exponent(np.round(1e6 / ranks**1.3)) == pytest.approx(1.3, abs=0.01)
    assert metrics.zipf_exponent([5, 1, 1, 1]) is None
    loop = torch.tensor([[1, 2] * 8, [3, 4] * 8])
    measured = metrics.continuation_metrics(loop)
    assert measured["distinct_1"] == 4 / 32 and measured["seq_rep_4"] == pytest.approx(1 - 2 / 13)
    prompts = metrics.heldout_prompts(np.arange(5000), count=10, length=16)
    assert prompts.shape == (10, 16) and (prompts[:, 1:] == prompts[:, :-1] + 1).all()


def test_expected_count_agrees_with_drawn_counts() -> None:
    net = BitNetForCausalLM(preset("collapse-64", vocab_size=300), seed=0)
    prompts = metrics.fixed_prompts(300, 256, seed=20)
    assert torch.equal(prompts[:20], metrics.fixed_prompts(300, seed=20))
    expected = metrics.expected_unique(net, prompts)
    generator = torch.Generator().manual_seed(0)
    drawn = [
        metrics.unique_predictions(net, prompts[torch.randperm(256, generator=generator)[:20]]) or 0
        for _ in range(200)
    ]
    assert expected == pytest.approx(np.mean(drawn), abs=4 * np.std(drawn) / 200**0.5)


def test_facts_of_an_evaluated_step(text: Path, tmp_path: Path) -> None:
    """The trainer tells an evaluator what the step was taken with; the share of clipped steps is counted."""
    seen = []

    class Listener:
        def before_step(self, model: BitNetForCausalLM) -> None: ...

        def evaluate(self, model: BitNetForCausalLM, step: Any) -> dict[str, Any]:
            seen.append(step)
            return {}

    settings = TrainConfig(
        steps=6, batch_size=2, seq_len=15, warmup_steps=0, grad_clip=1e-3, lr_schedule="constant"
    )
    net = BitNetForCausalLM(preset("collapse-64", vocab_size=101), seed=0)
    tokens = np.random.default_rng(0).integers(0, 101, 500)
    run = tmp_path / "run"
    Trainer(net, settings, tokens, run_dir=run, device="cpu", evaluator=Listener(), eval_steps=(2, 6)).fit()
    assert [(s.step, s.last, s.lr, s.weight_decay) for s in seen] == [
        (2, False, 1.5e-3, 0.1),
        (6, True, 1.5e-3, 0.0),
    ]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    assert [row["clip_rate"] for row in rows if row["kind"] == "eval"] == [1.0, 1.0]


@pytest.mark.parametrize(
    "content",
    [
        b'{"config": "."}',
        b'{"config": {"arms": 3}}',
        b'{"config": {"steps": "x", "arms": ["adamw"]}}',
        b'{"config": {"unknown": 1}}',
        b'{"config": {}}',
        b"[]",
        b"\xff\xfe",
        b'{"config":' * 100_000,
    ],
)
def test_damaged_settings_are_told(content: bytes, text: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "study.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"study\.json is damaged: it must hold the study's config") as error:
        run_study(config(text, "A"), tmp_path / "out", device="cpu", resume=True)
    assert "\n" not in str(error.value)


def test_a_study_is_run_by_one_process(text: Path, tmp_path: Path) -> None:
    lock = RunLock(tmp_path / "out")
    lock.acquire()
    with pytest.raises(RunInUseError, match=f"is being trained by process {os.getpid()} on "):
        run_study(config(text, "A"), tmp_path / "out", device="cpu", resume=True)
    lock.release()
    assert not (tmp_path / "out").exists()
