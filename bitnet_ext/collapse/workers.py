"""Processes that share the runs of a study: one or more a GPU, where several hide what a run does on the host."""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from bitnet_ext.collapse.runs import Task
from bitnet_ext.collapse.schedule import Answer, Place, Progress, Schedule
from bitnet_ext.training import TrainingInterrupted
from bitnet_ext.training.signals import stop_on_signals


class StudyWorkerError(RuntimeError):
    """A process that ran part of a study ended with an error; its runs can be resumed."""


class _Reporter:
    """The progress of a process, sent to the one that started it."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe

    def study_started(self, runs: int, finished: int, steps: int) -> None:
        pass

    def run_started(self, task: Task, step: int) -> None:
        self._pipe.send(("started", task, step))

    def run_advanced(self, task: Task, step: int, record: dict[str, Any]) -> None:
        self._pipe.send(("advanced", task, step, record))

    def run_finished(self, task: Task) -> None:
        self._pipe.send(("finished", task))


def _work(pipe: Connection, out: Path, device: str, together: int, threads: int) -> None:
    """Body of a process: asks for tasks until there are none."""
    torch.set_num_threads(threads)

    def take() -> Answer:
        pipe.send(("take",))
        answer: Answer = pipe.recv()
        return answer

    place = Place(out, torch.device(device), together, take, _Reporter(pipe))
    try:
        place.work()
        pipe.send(("ended",))
    except TrainingInterrupted:
        pipe.send(("interrupted",))
    except (EOFError, BrokenPipeError):
        pass  # whoever started this process is gone: so are its questions
    except Exception as error:
        pipe.send(("failed", f"{type(error).__name__}: {error}"))


class _Pool:
    """The processes of a study, as seen by the one that started them."""

    def __init__(self, schedule: Schedule, progress: Progress) -> None:
        self._schedule, self._progress = schedule, progress
        self._processes: dict[Connection, Any] = {}
        self._stop = False
        self._failures: list[str] = []

    def start(self, out: Path, devices: Sequence[str], together: int, threads: int) -> None:
        context = multiprocessing.get_context("spawn")  # a process with CUDA cannot be forked
        for device in devices:
            mine, theirs = context.Pipe()
            process = context.Process(
                target=_work, args=(theirs, out, device, together, threads), daemon=True
            )
            process.start()
            theirs.close()
            self._processes[mine] = process

    def request_stop(self) -> None:
        self._stop = True
        for process in self._processes.values():
            process.terminate()  # SIGTERM: a checkpoint of every run, then the end

    def serve(self) -> None:
        while self._processes:
            for pipe in wait(list(self._processes)):
                assert isinstance(pipe, Connection)
                try:
                    message = pipe.recv()
                except EOFError:
                    process = self._processes.pop(pipe)
                    process.join()
                    if not self._stop:
                        self._failures.append(f"a process ended with exit status {process.exitcode}")
                    continue
                self._handle(pipe, *message)

    def _handle(self, pipe: Connection, kind: str, *content: Any) -> None:
        if kind == "take":
            pipe.send(None if self._stop or self._failures else self._schedule.take())
        elif kind == "started":
            self._progress.run_started(*content)
        elif kind == "advanced":
            self._progress.run_advanced(*content)
        elif kind == "finished":
            self._schedule.done(content[0])
            self._progress.run_finished(content[0])
        else:
            if kind == "failed":
                self._failures.append(content[0])
            elif kind == "interrupted":
                self._stop = True
            self._processes.pop(pipe).join()

    def result(self) -> None:
        if self._failures:
            raise StudyWorkerError(
                f"{'; '.join(self._failures)}. What was finished is kept; start the study again with --resume"
            )
        if self._stop:
            raise TrainingInterrupted("stopped; every run that was under way can be resumed")


class _Counting:
    """Tells the schedule of finished tasks beside the front end."""

    def __init__(self, schedule: Schedule, progress: Progress) -> None:
        self._schedule = schedule
        self.study_started = progress.study_started
        self.run_started = progress.run_started
        self.run_advanced = progress.run_advanced
        self._finished = progress.run_finished

    def run_finished(self, task: Task) -> None:
        self._schedule.done(task)
        self._finished(task)


def run_schedule(
    schedule: Schedule,
    out: Path,
    *,
    devices: Sequence[torch.device],
    together: int,
    processes: int,
    progress: Progress,
) -> None:
    """Runs everything that a schedule holds.

    Args:
        devices: GPUs, or one CPU.
        together: runs at a time in each process.
        processes: for each device; 0 runs everything in this process, on the first device.
        progress: hears of it.

    Raises:
        TrainingInterrupted: Ctrl-C or SIGTERM, after checkpoints.
        StudyWorkerError: a process ended with an error; the others have finished the runs they had.
    """
    if processes == 0:
        Place(out, devices[0], together, schedule.take, _Counting(schedule, progress)).work()
        return
    number = processes * len(devices)
    pool = _Pool(schedule, progress)
    pool.start(
        out, [str(d) for d in devices] * processes, together, max(1, torch.get_num_threads() // number)
    )
    with stop_on_signals(pool):
        pool.serve()
    pool.result()
