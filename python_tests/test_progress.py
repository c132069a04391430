"""What a run shows: a bar on terminals of any width, plain lines elsewhere, nothing where nobody can read it."""

from __future__ import annotations

import dataclasses
import fcntl
import io
import os
import pty
import re
import struct
import sys
import termios
import threading
from pathlib import Path
from typing import TextIO

import numpy as np
import pytest

from bitnet_ext.models import BitNetForCausalLM, preset
from bitnet_ext.training import TrainConfig, Trainer, TrainingInterrupted
from bitnet_ext.training import progress as progress_module
from bitnet_ext.training.progress import Progress, amount, duration

VOCAB = 101
CONFIG = TrainConfig(steps=8, batch_size=2, seq_len=15, log_interval=1, eval_interval=4)
TOKENS = np.random.default_rng(0).integers(0, VOCAB, 800).astype(np.uint16)


def trainer(run_dir: Path | None = None, **overrides: object) -> Trainer:
    network = BitNetForCausalLM(preset("collapse-64", vocab_size=VOCAB), seed=0)
    config = dataclasses.replace(CONFIG, **overrides)
    return Trainer(network, config, TOKENS, run_dir=run_dir, device="cpu", heldout=TOKENS[:100])


def test_plain_lines_where_there_is_no_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer(tmp_path).fit()
    text = capsys.readouterr().err
    assert "\r" not in text and "\x1b" not in text
    lines = text.splitlines()
    assert lines[0].startswith("model ") and "ternary" in lines[0] and "vocabulary 101" in lines[0]
    assert lines[1].startswith("device    cpu, ") and "fp32" in lines[1]
    assert "8 steps x 30 tokens = 240" in lines[2]
    assert lines[3] == f"output    {tmp_path}"
    size = sum(file.stat().st_size for file in (tmp_path / "checkpoint").rglob("*.safetensors"))
    said = re.match(r"disk      (.*) MB with a checkpoint every 120 s, (.*) MB at the end", lines[4])
    assert said and float(said[1]) == pytest.approx(2 * size / 1e6, rel=0.02)
    assert float(said[2]) == pytest.approx(size / 1e6, rel=0.02)
    assert re.match(r"step 1/8: loss \d+\.\d+, lr ", lines[5])
    assert re.match(r"step 4/8: held-out loss \d\.\d{4}, perplexity \d+", lines[6])
    assert re.match(r"8 steps in [\d.]+ s: [\d.]+ steps/s, [\d.]+( k)? tokens/s, loss ", lines[-1])
    assert len(lines) == 9  # one line per interval of time, not per step
    monkeypatch.setattr(progress_module, "LINE_SECONDS", 0.0)
    trainer().fit()
    lines = capsys.readouterr().err.splitlines()
    steps = [line for line in lines if re.match(r"step \d/8: loss", line)]
    assert len(steps) >= 3  # not after each step once the run is slow
    assert re.search(r"steps/s, .* tokens/s, .* left$", steps[1])


def test_progress_can_be_switched_off(capsys: pytest.CaptureFixture[str]) -> None:
    trainer().fit(progress=False)
    for _ in trainer().advance():
        pass
    found = capsys.readouterr()
    assert found.out == found.err == ""


def show_on_terminal(columns: int, run_dir: Path | None = None) -> str:
    """The bytes that a run sends to a terminal of this width."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    parts: list[bytes] = []

    def read() -> None:
        while True:
            try:
                data = os.read(leader, 65536)
            except OSError:  # the other side was closed
                return
            parts.append(data)
            if not data:
                return

    reader = threading.Thread(target=read)
    reader.start()
    with open(follower, "w") as terminal:
        run = trainer(run_dir)
        run._display = [Progress(terminal)]
        for _ in run.advance():
            pass
    reader.join(10)
    os.close(leader)
    return b"".join(parts).decode()


@pytest.mark.parametrize("columns", [40, 60, 120])
def test_the_loss_stays_in_view_on_every_terminal(columns: int, tmp_path: Path) -> None:
    text = show_on_terminal(columns, tmp_path)
    bars = [part for part in re.split(r"[\r\n]", text) if "%" in part and "/8" in part]
    assert bars
    for bar in bars[1:]:
        assert len(bar) <= columns and re.match(r"(\x1b\[A)?loss \d+\.\d{3}", bar), bar
    assert "held-out" in bars[-1] and "100%" in bars[-1]
    assert ("left" in bars[-1]) == (columns >= 60) and ("tokens/s" in bars[-1]) == (columns >= 90)
    last = re.findall(r"step 8/8: held-out loss ([\d.]+)", text)[0]
    assert f"held-out {float(last):.3f}" in bars[-1]
    assert "step 4/8: held-out loss" in text and "8 steps in " in text


class Full(io.StringIO):
    """A stream on a full disk that says it is a terminal."""

    def __init__(self, tty: bool) -> None:
        super().__init__()
        self.tty = tty

    def write(self, text: str) -> int:
        raise OSError(28, "No space left on device")

    def isatty(self) -> bool:
        return self.tty


@pytest.mark.parametrize("stream", ["full", "full terminal", "closed", "none", "gone"])
def test_an_unwritable_stream_ends_no_run(
    stream: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target: TextIO | None
    if stream == "closed":
        target = io.StringIO()
        target.close()
    elif stream == "gone":
        read, write = os.pipe()
        os.close(read)
        target = open(write, "w", buffering=1)  # noqa: SIM115
    else:
        target = None if stream == "none" else Full("terminal" in stream)
    monkeypatch.setattr(sys, "stderr", target)
    run = trainer(tmp_path)
    run.fit()
    assert run.step == 8 and (tmp_path / "checkpoint" / "latest.json").exists()


def test_an_interrupted_bar_is_closed(capsys: pytest.CaptureFixture[str]) -> None:
    run = trainer()
    with pytest.raises(TrainingInterrupted):
        run.fit(on_progress=lambda step, record: run.request_stop())
    assert "steps in" not in capsys.readouterr().err  # that line is of a run that ended


def test_numbers_in_words() -> None:
    assert [amount(n) for n in (0, 7, 950, 999.9, 1000, 26_700_000, 1.5e9)] == [
        "0", "7", "950", "1 k", "1 k", "26.7 M", "1.5 G",
    ]  # fmt: skip
    assert amount(435_000_000, "B") == "435 MB" and amount(12, "B") == "12 B"
    assert [duration(s) for s in (0.25, 45, 61, 3600 * 3 + 1200, 3600 * 75)] == [
        "0.2 s", "45 s", "1 min 1 s", "3 h 20 min", "3 d 3 h",
    ]  # fmt: skip
