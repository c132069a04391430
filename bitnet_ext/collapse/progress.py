"""The display of a study: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any, TextIO

from tqdm import tqdm

from bitnet_ext._streams import LenientStream
from bitnet_ext.collapse.runs import Task
from bitnet_ext.training.progress import LINE_SECONDS, duration

_STUDY_BAR = "{desc}{percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} steps, {remaining} left, {rate_fmt}"
_RUN_BAR = "{desc}{percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt}, {remaining} left"


class ProgressBars:
    """A bar for the study (steps, runs, time left) and one for each run under way (steps, loss, unique tokens).

    Where the stream is no terminal, each run has a line at its end, and the study one every few seconds.

    Args:
        keep: whether the bars of finished runs stay in view, which suits one run after the other.
        stream: where to; default sys.stderr. One that cannot be written to is given up in silence.
    """

    def __init__(self, keep: bool = True, stream: TextIO | None = None) -> None:
        self._keep = keep
        self._stream = LenientStream(sys.stderr if stream is None else stream)
        self._on_terminal = self._stream.isatty()
        self._study: Any = None
        self._bars: dict[str, Any] = {}
        self._seen: dict[
            str, tuple[int, str]
        ] = {}  # of each run under way: its step, its loss and unique tokens
        self._unique: dict[str, int] = {}
        self._runs = self._done = self._steps = self._total = 0
        self._started = self._last_line = 0.0

    def study_started(self, runs: int, finished: int, steps: int) -> None:
        self._runs, self._done, self._total = runs, finished, steps
        self._started = self._last_line = time.monotonic()
        if self._on_terminal:
            self._study = self._bar(steps, 0, self._counts(), _STUDY_BAR, leave=True)

    def run_started(self, task: Task, step: int) -> None:
        self._advance(step - task.first_step)
        self._seen[task.label] = (step, "")
        if self._on_terminal:
            self._bars[task.label] = self._bar(task.steps, step, f"{task.label} ", _RUN_BAR, leave=self._keep)

    def run_advanced(self, task: Task, step: int, record: dict[str, Any]) -> None:
        if record.get("unique_of_20") is not None:
            self._unique[task.label] = record["unique_of_20"]
        unique = f"{self._unique[task.label]}/20" if task.label in self._unique else "-"
        words = f"loss {record['loss']:.3f}, unique {unique}"
        self._advance(step - self._seen[task.label][0])
        self._seen[task.label] = (step, words)
        bar = self._bars.get(task.label)
        if bar is not None:
            # The numbers come first: tqdm cuts a line that is too long at its end.
            bar.set_description_str(f"{task.label} {words} ", refresh=False)
            bar.update(step - bar.n)
        elif time.monotonic() - self._last_line >= max(LINE_SECONDS, self._elapsed() / 20):
            self._line(f"{task.label} step {step}/{task.steps}: {words}")

    def run_finished(self, task: Task) -> None:
        step, words = self._seen.pop(task.label, (task.steps, ""))
        if not task.is_stem:
            self._done += 1
        bar = self._bars.pop(task.label, None)
        if bar is not None:
            bar.close()
        elif not self._on_terminal and words:
            self._line(f"{task.label} finished at step {step}: {words}")
        if self._study is not None:
            self._study.set_description_str(self._counts())
            if self._done == self._runs:
                self._study.close()

    def _bar(self, total: int, initial: int, description: str, form: str, leave: bool) -> Any:
        return tqdm(
            total=total, initial=initial, desc=description, unit="step", file=self._stream, leave=leave,
            dynamic_ncols=True, mininterval=0.5, smoothing=0.05, bar_format=form,
        )  # fmt: skip

    def _advance(self, steps: int) -> None:
        self._steps += steps
        if self._study is not None:
            self._study.update(steps)

    def _elapsed(self) -> float:
        return time.monotonic() - self._started

    def _line(self, words: str) -> None:
        self._last_line = time.monotonic()
        left = self._elapsed() * (self._total - self._steps) / max(self._steps, 1)
        counts = (
            f"{self._done} of {self._runs} runs, {self._steps}/{self._total} steps, {duration(left)} left"
        )
        self._stream.write(f"{words} ({counts})\n")
        self._stream.flush()

    def _counts(self) -> str:
        return f"{self._done} of {self._runs} runs "
