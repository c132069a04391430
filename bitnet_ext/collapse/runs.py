"""One run of a study: what it consists of, where it is kept, and the training itself."""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bitnet_ext._files import write_text_atomic
from bitnet_ext.collapse.arms import Arm, config_of
from bitnet_ext.collapse.evaluator import CollapseEvaluator
from bitnet_ext.collapse.results import read_metrics
from bitnet_ext.data.corpora import Corpus, load_corpus
from bitnet_ext.data.statistics import token_counts, unigram_log_probs
from bitnet_ext.models import BitNetForCausalLM, preset
from bitnet_ext.training import Trainer, TrainingDivergedError
from bitnet_ext.training.checkpoint import Checkpoint, read_checkpoint
from bitnet_ext.training.trainer import ENDED

#: Folder, inside the study's, of runs that only lead to the checkpoints which other runs go on from.
STEMS = ".stems"
_GOLDEN_SECTION = (5**0.5 - 1) / 2


@dataclass(frozen=True)
class Task:
    """One run, or the training that leads to the checkpoints which runs go on from.

    Attributes:
        arm, seed: which.
        steps: optimiser steps, counted from the beginning of the run that it goes on from.
        model: preset of the network.
        data: corpus name or path.
        eval_tokens: held-out predictions of each evaluation.
        eval_steps: the evaluated steps; none for a stem.
        snapshot_steps: steps at which a stem keeps a checkpoint.
        keep_model: whether the weights are kept at the end.
        generation: whether text is generated and measured at the end.
    """

    arm: Arm
    seed: int
    steps: int
    model: str
    data: str
    eval_tokens: int
    eval_steps: tuple[int, ...] = ()
    snapshot_steps: tuple[int, ...] = ()
    keep_model: bool = False
    generation: bool = False

    @property
    def is_stem(self) -> bool:
        return bool(self.snapshot_steps)

    @property
    def first_step(self) -> int:
        """The step that it begins behind."""
        return 0 if self.arm.start is None else self.arm.start[1]

    @property
    def label(self) -> str:
        return f"{self.arm.name} seed {self.seed}" + (", stem" if self.is_stem else "")

    def folder(self, out: Path) -> Path:
        """Where its files are, below the study's folder."""
        return (out / STEMS if self.is_stem else out) / self.arm.name / f"seed{self.seed}"

    def start_checkpoint(self, out: Path) -> Path | None:
        """The checkpoint that it goes on from."""
        if self.arm.start is None:
            return None
        stem, step = self.arm.start
        return out / STEMS / stem / f"seed{self.seed}" / "snapshots" / f"step-{step:08d}"

    def is_ready(self, out: Path) -> bool:
        """Whether what it goes on from is there."""
        checkpoint = self.start_checkpoint(out)
        return checkpoint is None or checkpoint.is_dir()

    def is_finished(self, out: Path) -> bool:
        """Whether its last evaluation is written, or it diverged; of a stem, whether its checkpoints are there."""
        folder = self.folder(out)
        if self.is_stem:
            return all((folder / "snapshots" / f"step-{step:08d}").is_dir() for step in self.snapshot_steps)
        if (folder / ENDED).is_file():
            return True
        metrics = folder / "metrics.jsonl"
        if not metrics.is_file():
            return False
        return any(row["kind"] == "eval" and row["step"] == self.steps for row in read_metrics(metrics)[-4:])


@functools.lru_cache(maxsize=4)
def corpus_of(data: str) -> Corpus:
    """A corpus, loaded once a process."""
    return load_corpus(data, progress=False)


@functools.lru_cache(maxsize=4)
def _training_statistics(data: str, vocab_size: int) -> tuple[Any, Any]:
    """Unigram log-probabilities float64 [V] of a corpus's training text, and which ids it has, bool [V]."""
    train = corpus_of(data).train
    return unigram_log_probs(train, vocab_size), token_counts(train, vocab_size) > 0


def text_of_seed(tokens: NDArray[Any], seed: int) -> NDArray[Any]:
    """The training text as the runs of a seed read it: from another place for each seed, and round.

    Seed 0 begins at the beginning, as the report's runs did; the others at multiples of the golden section, which lie
    apart however many there are. With one order for all seeds, they would differ in their initial weights only, and
    intervals over seeds would leave out what the text contributes.
    """
    start = int(len(tokens) * (seed * _GOLDEN_SECTION % 1.0))
    return np.concatenate([tokens[start:], tokens[:start]]) if start else tokens


@functools.lru_cache(maxsize=2)
def _initial_model(name: str, quantization: str, seed: int, device: torch.device) -> BitNetForCausalLM:
    """The network that every run of a seed begins with."""
    return BitNetForCausalLM(preset(name, quantization=quantization), seed=seed).to(device)


@functools.lru_cache(maxsize=3)
def _start_of(path: Path) -> Checkpoint:
    """A checkpoint that several runs go on from, one after the other."""
    return read_checkpoint(path)


def advance_task(
    task: Task,
    out: Path,
    device: torch.device,
    *,
    on_trainer: Callable[[Trainer], None],
    on_progress: Callable[[int, dict[str, Any]], None],
) -> Iterator[None]:
    """Runs a task to its end, yielding when the device has work; goes on from what an earlier attempt left.

    A run whose loss or gradient becomes NaN or infinite ends there; ended.json in its folder says so.

    Args:
        out: folder of the study. on_trainer: hears of the trainer before it starts, to be able to stop it.
        on_progress: as of :meth:`bitnet_ext.training.Trainer.fit`.
    """
    folder = task.folder(out)
    config = config_of(
        task.arm,
        task.steps,
        task.seed,
        checkpoint_seconds=120.0,  # 340 MB with the moments: a run of the short comparison ends before
        final_checkpoint="model" if task.keep_model else "none",
        log_interval=10 if task.steps <= 1000 else 50,
    )
    # A copy: drawing 28 M random numbers again for every arm of a seed takes half as long as 1,000 steps on a GPU.
    model = copy.deepcopy(_initial_model(task.model, task.arm.quantization, task.seed, device))
    if device.type == "cuda":
        torch.cuda.current_stream(
            device
        ).synchronize()  # before another stream may take the original's memory
    corpus = corpus_of(task.data)
    corpus.check_vocab(model.config.vocab_size)
    evaluator = None
    if task.eval_steps:
        unigram, seen = _training_statistics(task.data, model.config.vocab_size)
        evaluator = CollapseEvaluator(
            corpus.heldout,
            unigram,
            seq_len=config.seq_len,
            max_tokens=task.eval_tokens,
            device=device,
            seen=np.asarray(seen),
            generation=task.generation,
        )
    start = task.start_checkpoint(out)
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "arm": task.arm.name,
        "seed": task.seed,
        "steps": task.steps,
        "first_step": task.first_step,
        "data": task.data,
        "model": model.config.to_dict(),
        "train": config.to_dict(),
    }
    write_text_atomic(folder / "config.json", json.dumps(content, indent=1))
    trainer = Trainer(
        model,
        config,
        text_of_seed(corpus.train, task.seed),
        run_dir=folder,
        device=device,
        evaluator=evaluator,
        eval_steps=task.eval_steps,
        start_from=None if start is None else _start_of(start),
        reset_moments=task.arm.reset_moments,
        snapshot_steps=task.snapshot_steps,
    )
    on_trainer(trainer)
    with contextlib.suppress(TrainingDivergedError):  # which the trainer has written into the folder
        yield from trainer.advance(resume=True, on_progress=on_progress)
    if not task.keep_model:
        shutil.rmtree(folder / "checkpoint", ignore_errors=True)
