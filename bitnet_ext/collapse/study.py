"""Runs arms x seeds into one folder, resumably, and writes table, summary, figures and report.

Within a seed every arm starts from the same parameters and reads the same rows in the same order, so arms
are compared pair by pair.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from bitnet_ext import build_info
from bitnet_ext.collapse.arms import ARMS, arm_config, get_arm
from bitnet_ext.collapse.evaluator import CollapseEvaluator
from bitnet_ext.collapse.report import write_outputs
from bitnet_ext.data.corpora import Corpus, load_corpus
from bitnet_ext.data.statistics import unigram_log_probs
from bitnet_ext.models import BitNetForCausalLM, preset
from bitnet_ext.training import Trainer
from bitnet_ext.training.checkpoint import latest_checkpoint, read_checkpoint, write_text_atomic
from bitnet_ext.training.device import resolve_device

#: What a run without settings does on a CPU: the arms that tell the story, in under ten minutes on two cores.
CPU_ARMS = ("standard-lr", "label-smoothing", "adamw", "fp-twin")
CPU_STEPS = 400
CPU_EVAL_TOKENS = 2048
#: And on a GPU: every arm, as long as the report's runs.
GPU_STEPS = 10_000
GPU_EVAL_TOKENS = 16_384


@dataclass(frozen=True)
class StudyConfig:
    """What to run.

    Attributes:
        arms: names from ARMS.
        steps: of each run.
        seeds: number of seeds, 0 .. seeds - 1.
        data: corpus name or path.
        model: preset of the network.
        eval_tokens: held-out predictions of each evaluation.
        eval_steps: evaluated steps; empty for log-spaced ones.
    """

    arms: tuple[str, ...]
    steps: int
    seeds: int = 1
    data: str = "wiki-leads"
    model: str = "collapse-256"
    eval_tokens: int = GPU_EVAL_TOKENS
    eval_steps: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in self.arms:
            get_arm(name)
        if not self.arms or len(set(self.arms)) != len(self.arms):
            raise ValueError(f"arms must be one or more different names, got {list(self.arms)}")
        for name in ("steps", "seeds", "eval_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")


class StudyProgress(Protocol):
    """What a front end hears of a study."""

    def run_started(self, arm: str, seed: int, step: int, steps: int) -> None: ...
    def run_advanced(self, step: int, record: dict[str, Any]) -> None: ...
    def run_finished(self) -> None: ...


def default_config(device: torch.device) -> StudyConfig:
    """The comparison that runs when nothing is said."""
    if device.type == "cuda":
        return StudyConfig(arms=tuple(ARMS), steps=GPU_STEPS)
    return StudyConfig(arms=CPU_ARMS, steps=CPU_STEPS, eval_tokens=CPU_EVAL_TOKENS)


def log_spaced_steps(steps: int) -> tuple[int, ...]:
    """1, 2, 5, 10, 20, 50, 100, 150, 200, 300, ... 1000, then every 250, and the last."""
    marks = [1, 2, 5, 10, 20, 50, 100, 150, *range(200, 1000, 100), *range(1000, steps + 1, 250), steps]
    return tuple(sorted({mark for mark in marks if mark <= steps}))


def run_study(
    config: StudyConfig,
    out: Path,
    *,
    device: str = "auto",
    resume: bool = False,
    progress: StudyProgress | None = None,
    command: str | None = None,
) -> Path:
    """Runs what is not finished yet and returns the path of report.html.

    Args:
        config: of the study. On resume it may name more arms or seeds than before, nothing else.
        out: folder of the study.
        device: "auto", "cpu" or "cuda".
        resume: continue in a folder that holds a study.
        progress: hears of every block of steps.
        command: the command line, for the report.

    Raises:
        FileExistsError: out holds a study and resume is False.
        ValueError: bad settings; settings that differ from the study's on resume.
        TrainingInterrupted: Ctrl-C; the report of what was done is written first.
    """
    target = resolve_device(device)
    settings_path = out / "study.json"
    if settings_path.exists():
        if not resume:
            raise FileExistsError(
                f"{out} already holds a study: continue it with --resume, or choose another --out"
            )
        config = _merge(config, json.loads(settings_path.read_text()), settings_path)
    corpus = load_corpus(config.data)
    model_config = preset(config.model)
    corpus.check_vocab(model_config.vocab_size)
    out.mkdir(parents=True, exist_ok=True)
    write_text_atomic(settings_path, json.dumps(_settings(config, corpus, target, command), indent=1))
    unigram = unigram_log_probs(corpus.train, model_config.vocab_size)
    try:
        for arm, seed in _runs(config):
            _run(config, arm, seed, out, corpus, unigram, target, progress)
    except BaseException:
        if any(out.glob("*/seed*/metrics.jsonl")):
            _write_results_quietly(out)
        raise
    return write_outputs(out)["report"]


def _write_results_quietly(out: Path) -> None:
    """After an interruption: a run too short to report on must not hide the reason it ended."""
    try:
        write_outputs(out)
    except (ValueError, OSError) as error:
        print(f"no report yet: {error}", file=sys.stderr)


def _runs(config: StudyConfig) -> Iterator[tuple[str, int]]:
    """Seeds outermost: an interrupted study has whole comparisons."""
    for seed in range(config.seeds):
        for arm in config.arms:
            yield arm, seed


def _run(
    config: StudyConfig,
    arm: str,
    seed: int,
    out: Path,
    corpus: Corpus,
    unigram: np.ndarray,
    device: torch.device,
    progress: StudyProgress | None,
) -> None:
    run_dir = out / arm / f"seed{seed}"
    existing = latest_checkpoint(run_dir / "checkpoint")
    if existing is not None and read_checkpoint(existing).step >= config.steps:
        return
    train_config = arm_config(
        arm,
        config.steps,
        seed,
        checkpoint_seconds=60.0,
        final_checkpoint="model",  # a third of the disk space; the moments are of no use at the end
    )
    model = BitNetForCausalLM(preset(config.model, quantization=get_arm(arm).quantization), seed=seed)
    evaluator = CollapseEvaluator(
        corpus.heldout, unigram, seq_len=train_config.seq_len, max_tokens=config.eval_tokens, device=device
    )
    run_dir.mkdir(parents=True, exist_ok=True)
    content = {"arm": arm, "seed": seed, "model": model.config.to_dict(), "train": train_config.to_dict()}
    write_text_atomic(run_dir / "config.json", json.dumps(content, indent=1))
    trainer = Trainer(
        model,
        train_config,
        corpus.train,
        run_dir=run_dir,
        device=device,
        evaluator=evaluator,
        eval_steps=config.eval_steps or log_spaced_steps(config.steps),
    )
    start = 0 if existing is None else int(existing.name.split("-")[1])
    if progress is not None:
        progress.run_started(arm, seed, start, config.steps)
    on_progress: Callable[[int, dict[str, Any]], None] | None = progress.run_advanced if progress else None
    try:
        trainer.fit(resume=True, on_progress=on_progress)
    finally:
        if progress is not None:
            progress.run_finished()


def _settings(
    config: StudyConfig, corpus: Corpus, device: torch.device, command: str | None
) -> dict[str, Any]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU"
    info = build_info()
    return {
        "config": dataclasses.asdict(config),
        "arms": {
            arm: {"summary": get_arm(arm).summary, "source": get_arm(arm).source} for arm in config.arms
        },
        "seeds": list(range(config.seeds)),
        "steps": config.steps,
        "vocab_size": corpus.vocab_size,
        "data": {
            "name": corpus.name,
            "description": corpus.description,
            "source": corpus.source,
            "fingerprint": corpus.fingerprint,
            "train_tokens": len(corpus.train),
            "heldout_tokens": len(corpus.heldout),
        },
        "device": {"type": device.type, "name": name, "threads": torch.get_num_threads()},
        "versions": {
            "bitnet_ext": info["version"],
            "torch": info["torch"],
            "python": platform.python_version(),
            "cpu_isa": info["cpu_isa"],
        },
        "command": command or " ".join(sys.argv),
    }


def _merge(config: StudyConfig, saved: dict[str, Any], path: Path) -> StudyConfig:
    """The study in the folder, with the arms and seeds that `config` adds."""
    try:
        before = {**saved["config"], "eval_steps": tuple(saved["config"]["eval_steps"])}
        old_arms, old_seeds = tuple(before.pop("arms")), int(before.pop("seeds"))
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: it must hold the study's config") from error
    for name, value in before.items():
        if getattr(config, name) != value:
            raise ValueError(
                f"--resume: {name} is {getattr(config, name)!r}, but the study in {path.parent} has {value!r}; "
                "only arms and seeds can be added"
            )
    arms = old_arms + tuple(arm for arm in config.arms if arm not in old_arms)
    return dataclasses.replace(config, arms=arms, seeds=max(old_seeds, config.seeds))
