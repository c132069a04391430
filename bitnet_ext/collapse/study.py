"""Runs arms x seeds into one folder, resumably, and writes table, summary, figures and report.

Within a seed every arm starts from the same parameters and reads the same rows in the same order, so arms
are compared pair by pair.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import platform
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bitnet_ext import build_info
from bitnet_ext._files import read_json, write_text_atomic
from bitnet_ext.collapse.arms import ARMS, Arm, get_arm
from bitnet_ext.collapse.blocks import BLOCKS, FACTORIAL, HEADLINE, HEADLINE_EXTRA, arms_of
from bitnet_ext.collapse.pages import write_pages
from bitnet_ext.collapse.runs import Task, corpus_of
from bitnet_ext.collapse.schedule import Progress, Schedule
from bitnet_ext.collapse.workers import run_schedule
from bitnet_ext.data.corpora import Corpus
from bitnet_ext.models import preset
from bitnet_ext.training.device import resolve_device
from bitnet_ext.training.distributed import World
from bitnet_ext.training.run_lock import locked_run
from bitnet_ext.training.together import MAX_SIDE_BY_SIDE

#: The default comparison on a CPU: the arms that tell the story, in about four minutes on two cores.
CPU_ARMS = ("standard-lr", "label-smoothing", "adamw", "fp-twin")
CPU_STEPS = 400
CPU_EVAL_TOKENS = 2048
#: And on a GPU: every arm, as long as the report's runs.
GPU_STEPS = 10_000
GPU_EVAL_TOKENS = 8_192


class Silent:
    """Hears of a study and says nothing."""

    def study_started(self, runs: int, finished: int, steps: int) -> None: ...
    def run_started(self, task: Task, step: int) -> None: ...
    def run_advanced(self, task: Task, step: int, record: dict[str, Any]) -> None: ...
    def run_finished(self, task: Task) -> None: ...


@dataclass(frozen=True)
class StudyConfig:
    """What to run: named arms for one number of steps, or blocks of the factorial study.

    Attributes:
        arms: names of arms; with blocks, arms of blocks beyond those of `blocks`.
        steps: of each run, where the arm has no length of its own.
        seeds: number of seeds, 0 .. seeds - 1; the headline arms of the factorial study have 4 more.
        data: corpus name or path.
        model: preset of the network.
        eval_tokens: held-out predictions of each evaluation.
        eval_steps: evaluated steps; empty for log-spaced ones.
        blocks: keys of ``bitnet_ext.collapse.blocks.BLOCKS``.
        scale: shortens (or lengthens) every run of the blocks, as a share of its steps: to try a study out.
        books: corpus name or path of the second, larger text, which block F needs.
        generation: whether text is generated and measured at the end of each run (half a minute a run on a CPU).
        keep_weights: whether the final weights of each run stay in its folder; the report needs none.
    """

    arms: tuple[str, ...]
    steps: int
    seeds: int = 1
    data: str = "wiki-leads"
    model: str = "collapse-256"
    eval_tokens: int = GPU_EVAL_TOKENS
    eval_steps: tuple[int, ...] = ()
    blocks: tuple[str, ...] = ()
    scale: float = 1.0
    books: str | None = None
    generation: bool = True
    keep_weights: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "seeds", "eval_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if not self.scale > 0:
            raise ValueError(f"scale must be > 0, got {self.scale}")
        if len(set(self.arms)) != len(self.arms) or not (self.arms or self.blocks):
            raise ValueError(f"arms must be one or more different names, got {list(self.arms)}")
        for arm in self.all_arms():
            if arm.books and self.books is None:
                raise ValueError(f"arm {arm.name} reads a second text: books must name a corpus or a file")

    def all_arms(self) -> list[Arm]:
        """The arms, with those of the blocks."""
        if not self.blocks:
            return [get_arm(name) for name in self.arms]
        names = dict.fromkeys([*arms_of(self.blocks), *self.arms])
        unknown = [name for name in names if name not in FACTORIAL]
        if unknown:
            raise ValueError(f"arm {unknown[0]!r} is unknown; accepted are {', '.join(FACTORIAL)}")
        return [self._scaled(FACTORIAL[name]) for name in names]

    def _scaled(self, arm: Arm) -> Arm:
        if self.scale == 1.0 or arm.steps is None:
            return arm
        first = None if arm.start is None else (arm.start[0], max(1, round(self.scale * arm.start[1])))
        steps = max(1 if first is None else first[1] + 1, round(self.scale * arm.steps))
        return dataclasses.replace(arm, steps=steps, start=first)

    def seeds_of(self, arm: str) -> int:
        """How many seeds an arm is run with."""
        return self.seeds + (HEADLINE_EXTRA if self.blocks and arm in HEADLINE else 0)

    def steps_of(self, arm: Arm) -> int:
        return self.steps if arm.steps is None else arm.steps

    def tasks(self) -> Iterator[Task]:
        """Every run, seeds outermost, so that an interrupted study has whole comparisons; stems before their runs."""
        arms = self.all_arms()
        for seed in range(max(self.seeds_of(arm.name) for arm in arms)):
            here = [arm for arm in arms if seed < self.seeds_of(arm.name)]
            starts: dict[str, set[int]] = {}
            for arm in here:
                if arm.start is not None:
                    starts.setdefault(arm.start[0], set()).add(arm.start[1])
            for name, steps in starts.items():
                stem = self._task(self._scaled(FACTORIAL[name]), seed)
                yield dataclasses.replace(
                    stem, steps=max(steps), eval_steps=(), snapshot_steps=tuple(sorted(steps))
                )
            for arm in here:
                yield self._task(arm, seed)

    def _task(self, arm: Arm, seed: int) -> Task:
        steps = self.steps_of(arm)
        first = 0 if arm.start is None else arm.start[1]
        marks = self.eval_steps or tuple(first + mark for mark in log_spaced_steps(steps - first))
        data = self.books if arm.books and self.books is not None else self.data
        return Task(
            arm,
            seed,
            steps,
            arm.model or self.model,
            data,
            self.eval_tokens,
            marks,
            generation=self.generation,
            keep_model=self.keep_weights,
        )


def default_config(device: torch.device) -> StudyConfig:
    """The comparison that runs when nothing is said."""
    if device.type == "cuda":
        return StudyConfig(arms=tuple(ARMS), steps=GPU_STEPS)
    return StudyConfig(arms=CPU_ARMS, steps=CPU_STEPS, eval_tokens=CPU_EVAL_TOKENS, generation=False)


def log_spaced_steps(steps: int) -> tuple[int, ...]:
    """1, 2, 5, 10, 20, 50, 100, 150, 200, 300, ... 1000, then every 500, from 5,000 on every 1,000, and the last."""
    marks = [1, 2, 5, 10, 20, 50, 100, 150, *range(200, 1000, 100), *range(1000, 5000, 500)]
    marks += [*range(5000, steps + 1, 1000), steps]
    return tuple(sorted({mark for mark in marks if mark <= steps}))


def run_study(
    config: StudyConfig,
    out: Path,
    *,
    device: str = "auto",
    resume: bool = False,
    progress: Progress | None = None,
    command: str | None = None,
    processes: int = 0,
    together: int = 1,
    report: bool = True,
) -> Path:
    """Runs what is not finished yet and returns the path of report.html.

    Args:
        config: of the study. On resume it may name more arms, blocks or seeds than before, nothing else.
        out: folder of the study.
        device: "auto", "cpu", "cuda", "cuda:N", or several of the latter, separated by commas.
        resume: continue in a folder that holds a study.
        progress: hears of every block of steps.
        command: the command line, for the report.
        processes: that share the runs, for each device; 0 for this one only.
        together: runs at a time in each process; on a GPU each has a stream. Neither number changes any result.
        report: whether table, figures and report are written; without, the study's folder is returned.

    Raises:
        FileExistsError: out holds a study and resume is False.
        RunInUseError: another process works on the study (an OSError).
        ValueError: bad settings; settings that differ from the study's on resume.
        TrainingInterrupted: Ctrl-C; the report of what was done is written first.
    """
    targets = _devices(device)
    if processes < 0 or together < 1:
        raise ValueError(f"processes must be >= 0 and together >= 1, got {processes} and {together}")
    if together > MAX_SIDE_BY_SIDE and any(target.type == "cuda" for target in targets):
        raise ValueError(f"together must be at most {MAX_SIDE_BY_SIDE} on a GPU, got {together}")
    if len(targets) > 1 and processes == 0:
        raise ValueError("several devices need processes >= 1: each device has processes of its own")
    with locked_run(out, World()):
        return _run_study(
            config, out, targets, resume, progress or Silent(), command, processes, together, report
        )


def _run_study(
    config: StudyConfig,
    out: Path,
    targets: list[torch.device],
    resume: bool,
    progress: Progress,
    command: str | None,
    processes: int,
    together: int,
    report: bool,
) -> Path:
    """:func:`run_study` of checked settings, in a folder that no other process works in."""
    settings_path = out / "study.json"
    if settings_path.exists():
        if not resume:
            raise FileExistsError(
                f"{out} already holds a study: continue it with --resume, or choose another --out"
            )
        config = _merge(config, read_config(settings_path), settings_path.parent)
    corpora = {
        task.data: corpus_of(task.data) for task in config.tasks()
    }  # tokenised before processes ask for them
    for task in config.tasks():
        corpora[task.data].check_vocab(preset(task.model).vocab_size)
    out.mkdir(parents=True, exist_ok=True)
    write_text_atomic(settings_path, json.dumps(_settings(config, corpora, targets[0], command), indent=1))
    schedule = Schedule(config.tasks(), out)
    session = _Session(out, schedule, [str(target) for target in targets], processes, together, progress)
    session.study_started(schedule.number_of_runs, len(schedule.finished), schedule.steps_left)
    try:
        run_schedule(schedule, out, devices=targets, together=together, processes=processes, progress=session)
    except BaseException:
        session.write()
        if report and any(out.glob("*/seed*/metrics.jsonl")):
            _write_results_quietly(out)
        raise
    session.write()
    return write_pages(out)["report"] if report else out


def _devices(device: str) -> list[torch.device]:
    """The devices that a comma-separated text names."""
    return [resolve_device(name) for name in device.split(",")]


class _Session:
    """How long one call worked on a study, where, with what: its line of sessions.jsonl, kept up to date.

    It hears of the progress and passes it on. A process that is killed leaves what was true when its last run ended.
    """

    def __init__(
        self,
        out: Path,
        schedule: Schedule,
        devices: list[str],
        processes: int,
        together: int,
        front: Progress,
    ) -> None:
        self._path = out / "sessions.jsonl"
        self._before = (
            self._path.read_text(encoding="utf-8", errors="replace") if self._path.is_file() else ""
        )
        self._schedule, self._started = schedule, time.time()
        self._finished = len(schedule.finished)
        name = (
            torch.cuda.get_device_name(devices[0]) if devices[0].startswith("cuda") else platform.processor()
        )
        self._facts = {"devices": devices, "name": name, "processes": processes, "together": together}
        self._front = front
        self.study_started = front.study_started
        self.run_started = front.run_started
        self.run_advanced = front.run_advanced

    def run_finished(self, task: Task) -> None:
        self.write()
        self._front.run_finished(task)

    def write(self) -> None:
        line = {
            "began": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self._started)),
            "seconds": round(time.time() - self._started, 1),
            "runs": len(self._schedule.finished) - self._finished,
            **self._facts,
            "bitnet_ext": build_info()["version"],
            "torch": torch.__version__,
        }
        with contextlib.suppress(OSError):  # a full disk is told by what cannot do without it
            write_text_atomic(self._path, self._before + json.dumps(line) + "\n")


def _write_results_quietly(out: Path) -> None:
    """After an interruption: a run too short to report on must not hide the reason it ended."""
    try:
        write_pages(out)
    except (ValueError, OSError) as error:
        print(f"no report yet: {error}", file=sys.stderr)


def _settings(
    config: StudyConfig, corpora: dict[str, Corpus], device: torch.device, command: str | None
) -> dict[str, Any]:
    corpus = corpora[config.data] if config.data in corpora else next(iter(corpora.values()))
    arms = config.all_arms()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU"
    info = build_info()
    return {
        "config": dataclasses.asdict(config),
        "arms": {arm.name: {"summary": arm.summary, "source": arm.source} for arm in arms},
        "blocks": {key: dataclasses.asdict(BLOCKS[key]) for key in config.blocks},
        "seeds": list(range(config.seeds)),
        "seeds_of": {arm.name: config.seeds_of(arm.name) for arm in arms},
        "steps": {arm.name: config.steps_of(arm) for arm in arms},
        "vocab_size": corpus.vocab_size,
        "data": _about(corpus),
        "books": _about(corpora[config.books]) if config.books in corpora else None,
        "device": {"type": device.type, "name": name, "threads": torch.get_num_threads()},
        "versions": {
            "bitnet_ext": info["version"],
            "torch": info["torch"],
            "python": platform.python_version(),
            "cpu_isa": info["cpu_isa"],
        },
        "command": command or " ".join(sys.argv),
    }


def _about(corpus: Corpus) -> dict[str, Any]:
    return {
        "name": corpus.name,
        "description": corpus.description,
        "source": corpus.origin,
        "fingerprint": corpus.fingerprint,
        "train_tokens": len(corpus.train),
        "heldout_tokens": len(corpus.heldout),
    }


def _merge(config: StudyConfig, before: StudyConfig, folder: Path) -> StudyConfig:
    """The study in the folder, with the arms, blocks and seeds that `config` adds."""
    for field in dataclasses.fields(StudyConfig):
        old, new = getattr(before, field.name), getattr(config, field.name)
        if field.name not in ("arms", "seeds", "blocks", "books", "keep_weights") and old != new:
            raise ValueError(
                f"--resume: {field.name} is {new!r}, but the study in {folder} has {old!r}; "
                "only arms, blocks and seeds can be added"
            )
    if bool(before.blocks) != bool(config.blocks):
        raise ValueError(f"--resume: the study in {folder} has {'' if before.blocks else 'no '}blocks")
    if before.books is not None and config.books not in (None, before.books):
        raise ValueError(f"--resume: books is {config.books!r}, but the study has {before.books!r}")
    return dataclasses.replace(
        before,
        arms=tuple(dict.fromkeys([*before.arms, *config.arms])),
        blocks=tuple(key for key in BLOCKS if key in {*before.blocks, *config.blocks}),
        seeds=max(before.seeds, config.seeds),
        books=before.books or config.books,
        keep_weights=config.keep_weights,
    )


def config_from_json(settings: dict[str, Any]) -> StudyConfig:
    """The StudyConfig that the content of a study.json holds.

    Raises:
        ValueError: it is damaged.
    """
    saved = settings.get("config")
    if not isinstance(saved, dict):
        raise ValueError(f"config must be a JSON object, got {type(saved).__name__}")
    lists = {name: saved.get(name, []) for name in ("arms", "eval_steps", "blocks")}
    for name, value in lists.items():
        if not isinstance(value, list):
            raise ValueError(f"config: {name} must be a list, got {type(value).__name__}")
    try:
        return StudyConfig(**{**saved, **{name: tuple(value) for name, value in lists.items()}})
    except (TypeError, AttributeError, KeyError) as error:  # another type, or an unknown field
        raise ValueError(f"config: {error}") from error


def read_config(path: Path) -> StudyConfig:
    """The StudyConfig that a study.json holds.

    Raises:
        ValueError: naming the file, when it is damaged.
    """
    settings = read_json(path, "the study's config")
    try:
        return config_from_json(settings)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: it must hold the study's config ({error})") from error
