"""The display of a study: bars on terminals of any width, plain lines elsewhere."""

from __future__ import annotations

import io

import pytest
import tqdm.std

from bitnet_ext.collapse.arms import ARMS
from bitnet_ext.collapse.progress import ProgressBars
from bitnet_ext.collapse.runs import Task


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class FullTerminal(Terminal):
    def write(self, text: str) -> int:
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize("columns", [60, 120])
def test_bars(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tqdm.std, "_screen_shape_wrapper", lambda: lambda stream: (columns, 24))
    terminal = Terminal()
    _show(ProgressBars(stream=terminal))
    text = terminal.getvalue()
    assert "loss 9.500, unique 7/20" in text, "a narrow bar keeps the numbers"
    assert "0 of 2 runs" in text and "2 of 2 runs" in text
    assert "80/80" in text and ".0/" not in text, "whole steps"
    drawn = [line.split("\x1b")[0] for part in text.split("\n") for line in part.split("\r")]
    assert max(map(len, drawn)) <= columns


def test_lines_where_there_is_no_terminal() -> None:
    log = io.StringIO()
    _show(ProgressBars(stream=log))
    lines = log.getvalue().splitlines()
    assert lines[0].startswith(
        "adamw seed 0 finished at step 40: loss 9.500, unique 7/20 (1 of 2 runs, 40/80 steps"
    )
    assert len(lines) == 2 and "\r" not in log.getvalue() and "\x1b" not in log.getvalue()


def test_a_stream_that_cannot_be_written_to_ends_nothing() -> None:
    _show(ProgressBars(stream=FullTerminal()))
    closed = io.StringIO()
    closed.close()
    _show(ProgressBars(stream=closed))


def _show(bars: ProgressBars) -> None:
    bars.study_started(2, 0, 80)
    for arm in ("adamw", "no-decay"):
        task = Task(ARMS[arm], 0, 40, "collapse-64", "wiki-leads", 256)
        bars.run_started(task, 0)
        for step in range(1, 41):
            bars.run_advanced(task, step, {"loss": 9.5, **({"unique_of_20": 7} if step % 10 == 0 else {})})
        bars.run_finished(task)
