"""Which run comes next: tasks in order, those that go on from another run's checkpoints behind it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from bitnet_ext.collapse.runs import STEMS, Task, advance_task
from bitnet_ext.training import Trainer, TrainingInterrupted, advance_together
from bitnet_ext.training.signals import stop_on_signals

#: Answers to the question for a task beside a task itself: none is ready yet, or none is left.
LATER: Literal["later"] = "later"
Answer = Task | Literal["later"] | None


class Progress(Protocol):
    """What a front end hears of a study; several runs may be under way."""

    def study_started(self, runs: int, finished: int, steps: int) -> None:
        """`runs` in all, of which `finished` are done already; `steps` are left to do."""

    def run_started(self, task: Task, step: int) -> None:
        """Behind step `step`, which is not the task's first one when it is resumed."""

    def run_advanced(self, task: Task, step: int, record: dict[str, Any]) -> None: ...
    def run_finished(self, task: Task) -> None: ...


class Schedule:
    """Hands out the tasks that are not finished, each once, as soon as what it goes on from is there.

    Args:
        tasks: in the order of preference. Stems that no unfinished task needs are left out.
        out: folder of the study.
    """

    def __init__(self, tasks: Iterable[Task], out: Path) -> None:
        tasks = list(tasks)
        self._out = out
        runs = [task for task in tasks if not task.is_stem]
        self.finished = [task for task in runs if task.is_finished(out)]
        left = [task for task in runs if task not in self.finished]
        needed = {(task.arm.start[0], task.seed) for task in left if task.arm.start is not None}
        self.number_of_runs = len(runs)
        self.pending = [
            task
            for task in tasks
            if (
                (task.arm.name, task.seed) in needed and not task.is_finished(out)
                if task.is_stem
                else task in left
            )
        ]
        self._unfinished = list(left)

    @property
    def steps_left(self) -> int:
        return sum(task.steps - task.first_step for task in self.pending)

    def take(self) -> Answer:
        for task in self.pending:
            if task.is_ready(self._out):
                self.pending.remove(task)
                return task
        return LATER if self.pending else None

    def done(self, task: Task) -> None:
        """Counts a task as finished; a stem's checkpoints go when nothing needs them any more."""
        if task.is_stem:
            return
        self.finished.append(task)
        self._unfinished.remove(task)
        if task.arm.start is not None:
            stem = (task.arm.start[0], task.seed)
            if not any(
                t.arm.start is not None and (t.arm.start[0], t.seed) == stem for t in self._unfinished
            ):
                shutil.rmtree(self._out / STEMS / stem[0] / f"seed{stem[1]}", ignore_errors=True)


class Place:
    """Works on tasks, several at a time on one device, until there are none left.

    Args:
        out: folder of the study. device: where. together: how many runs at a time.
        take: the source of tasks. progress: hears of them.
    """

    def __init__(
        self, out: Path, device: torch.device, together: int, take: Callable[[], Answer], progress: Progress
    ) -> None:
        self._out, self._device, self._together = out, device, together
        self._take, self._progress = take, progress
        self._trainers: dict[str, Trainer] = {}
        self._stop = False

    def request_stop(self) -> None:
        """Asks every run under way to write a checkpoint and end."""
        self._stop = True
        for trainer in self._trainers.values():
            trainer.request_stop()

    def work(self) -> None:
        """Raises TrainingInterrupted when it was asked to stop."""
        with stop_on_signals(self):
            for _ in advance_together(self._jobs(), together=self._together, device=self._device):
                pass
        if self._stop:
            raise TrainingInterrupted("stopped; every run that was under way can be resumed")

    def _jobs(self) -> Iterator[Callable[[], Iterator[None]] | None]:
        while not self._stop:
            answer = self._take()
            if answer is None:
                return
            if answer == LATER:
                yield None
            else:
                yield lambda task=answer: self._advance(task)  # type: ignore[misc]

    def _advance(self, task: Task) -> Iterator[None]:
        def begun(trainer: Trainer) -> None:
            self._trainers[task.label] = trainer
            self._progress.run_started(task, trainer.step)

        def advanced(step: int, record: dict[str, Any]) -> None:
            self._progress.run_advanced(task, step, record)

        try:
            yield from advance_task(task, self._out, self._device, on_trainer=begun, on_progress=advanced)
        except TrainingInterrupted:
            self._stop = True
        else:
            self._progress.run_finished(task)
        finally:
            self._trainers.pop(task.label, None)
