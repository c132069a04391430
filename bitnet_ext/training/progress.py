"""The display of a training run: a header and a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import torch
from tqdm import tqdm

from bitnet_ext._streams import LenientStream
from bitnet_ext.training.callbacks import Callback

if TYPE_CHECKING:
    from bitnet_ext.training.trainer import Trainer

#: Seconds between two plain lines at least. In a long run a line comes after each 20th of the time so far.
LINE_SECONDS = 10.0

_BAR = "{desc}{percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt}, {remaining} left{postfix}"

#: Columns of a terminal from which the bar shows speeds too.
_WIDE = 90


class Progress(Callback):
    """The default display of :meth:`Trainer.fit`.

    On a terminal: a header (network, device, text, steps, folder) and a bar with the loss and the time left.
    Elsewhere: the header and plain lines, the first one after the first step, without control characters.

    Args:
        stream: where to; default sys.stderr. One that cannot be written to is given up in silence.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = LenientStream(sys.stderr if stream is None else stream)
        self._bar: Any = None
        self._record: dict[str, Any] = {}
        self._heldout = ""
        self._started = self._last_line = 0.0
        self._first_step = 0

    def on_start(self, trainer: Trainer) -> None:
        self._started = self._last_line = time.monotonic()
        self._first_step = trainer.step
        for line in header(trainer):
            self._print(line)
        if self._stream.isatty():
            self._bar = tqdm(
                total=trainer.config.steps,
                initial=trainer.step,
                unit="step",
                file=self._stream,
                dynamic_ncols=True,
                mininterval=0.2,
                smoothing=0.05,
                bar_format=_BAR,
            )

    def on_step(self, trainer: Trainer, record: dict[str, Any]) -> None:
        self._record = record
        step = int(record["step"])
        if self._bar is not None:
            self._describe()
            # tqdm has no rate before it has drawn twice.
            average = (step - self._first_step) / max(time.monotonic() - self._started, 1e-9)
            rate = self._bar.format_dict["rate"] or average
            if (self._bar.ncols or 0) >= _WIDE:
                tokens = amount(rate * trainer.config.tokens_per_step)
                self._bar.set_postfix_str(f"{rate:.3g} steps/s, {tokens} tokens/s", refresh=False)
            self._bar.update(step - self._bar.n)
            return
        now = time.monotonic()
        wait = max(LINE_SECONDS, (now - self._started) / 20)
        if step == self._first_step + 1 or now - self._last_line >= wait:
            self._last_line = now
            self._print(self._line(trainer, record))

    def on_eval(self, trainer: Trainer, results: dict[str, Any]) -> None:
        heldout = results.get("heldout_cross_entropy")
        if heldout is None:
            return
        if self._bar is not None:
            self._heldout = f", held-out {heldout:.3f}"
            self._describe()
        line = f"step {results['step']}/{trainer.config.steps}: held-out loss {heldout:.4f}"
        if results.get("heldout_perplexity") is not None:
            line += f", perplexity {results['heldout_perplexity']:.4g}"
        if results.get("heldout_bits_per_byte") is not None:
            line += f", {results['heldout_bits_per_byte']:.3f} bits per byte"
        self._print(line)

    def on_end(self, trainer: Trainer, error: BaseException | None) -> None:
        if self._bar is not None:
            if error is not None:
                self._bar.leave = True
            self._bar.close()
            self._bar = None
        steps = trainer.step - self._first_step
        if error is None and steps:
            seconds = time.monotonic() - self._started
            rate = steps / max(seconds, 1e-9)
            tokens = amount(rate * trainer.config.tokens_per_step)
            loss = f", loss {self._record['loss']:.3f}" if self._record else ""
            self._print(f"{steps} steps in {duration(seconds)}: {rate:.3g} steps/s, {tokens} tokens/s{loss}")

    def _describe(self) -> None:
        # The loss comes first: tqdm cuts a line that is too long at its end.
        self._bar.set_description_str(f"loss {self._record['loss']:.3f}{self._heldout} ", refresh=False)

    def _line(self, trainer: Trainer, record: dict[str, Any]) -> str:
        step, total = int(record["step"]), trainer.config.steps
        line = f"step {step}/{total}: loss {record['loss']:.3f}, lr {record['lr']:.2e}"
        seconds, done = time.monotonic() - self._started, step - self._first_step
        if done > 1:
            rate = done / max(seconds, 1e-9)
            tokens = amount(rate * trainer.config.tokens_per_step)
            line += f", {rate:.3g} steps/s, {tokens} tokens/s, {duration((total - step) / rate)} left"
        return line

    def _print(self, line: str) -> None:
        if self._bar is not None:
            self._bar.write(line, file=self._stream)
        else:
            self._stream.write(line + "\n")
            self._stream.flush()


def header(trainer: Trainer) -> list[str]:
    """A summary of the run that begins, in a few lines."""
    config, model = trainer.config, trainer.model
    total = sum(p.numel() for p in model.parameters())
    counts = model.num_parameters()
    tokens = config.steps * config.tokens_per_step
    sampler = trainer.sampler
    length, epochs = sampler.num_rows * (sampler.seq_len + 1), config.steps / sampler.steps_per_epoch
    lines = [
        f"model     {amount(total)} parameters ({amount(counts['ternary'])} ternary), "
        f"vocabulary {model.config.vocab_size:,}",
        f"device    {device_words(trainer.device)}, {config.precision}"
        + (f", {trainer.world.size} processes" if trainer.world.size > 1 else ""),
        f"text      {amount(length)} tokens; {config.steps:,} steps x {config.tokens_per_step:,} tokens = "
        f"{amount(tokens)} ({epochs:.3g} epochs)",
    ]
    if trainer.step:
        lines.append(f"resumed   after step {trainer.step:,}")
    if trainer.run_dir is not None:
        lines += [f"output    {trainer.run_dir}", f"disk      {_disk(trainer)}"]
    return lines


def _disk(trainer: Trainer) -> str:
    """Disk space that the run needs. A new checkpoint is complete before the one before it goes."""
    config = trainer.config
    weights = sum(p.numel() * p.element_size() for p in trainer.model.state_dict().values())
    full = weights + sum(p.numel() * p.element_size() for p in trainer.optimizer.state().values())
    last = {"none": 0, "model": weights, "full": full}[config.final_checkpoint]
    times = [] if config.checkpoint_interval is None else [f"{config.checkpoint_interval:,} steps"]
    if config.checkpoint_seconds is not None and trainer.world.size == 1:
        times.append(f"{config.checkpoint_seconds:g} s")
    at_end = f"{amount(last, 'B')} at the end" if last else "nothing at the end"
    if not times:
        return f"{at_end}, no checkpoint before"
    return f"{amount(2 * full, 'B')} with a checkpoint every {' or '.join(times)}, {at_end}"


def device_words(device: torch.device) -> str:
    """A device as a user knows it: "cpu, 2 threads" or the name of the GPU."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    threads = torch.get_num_threads()
    return f"cpu, {threads} thread{'s' if threads > 1 else ''}"


def amount(value: float, unit: str = "") -> str:
    """A number with three digits and a prefix: 26.7 M, 435 MB."""
    gap = " "
    for limit, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit * 0.9995:
            return f"{_digits(value / limit)}{gap}{prefix}{unit}"
    return f"{_digits(value)}{gap if unit else ''}{unit}"


def _digits(value: float) -> str:
    if value <= 0:
        return "0"
    places = max(0, 2 - math.floor(math.log10(value) + 1e-9))
    return f"{value:.{min(places, 2)}f}".rstrip("0").rstrip(".") if places else f"{value:.0f}"


def duration(seconds: float) -> str:
    """A length of time in its two largest units: 3 h 20 min, 45 s."""
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    return f"{hours // 24} d {hours % 24} h"


def folder_words(path: Path) -> str:
    """A path as a command takes it."""
    text = str(path)
    return f"'{text}'" if " " in text else text
