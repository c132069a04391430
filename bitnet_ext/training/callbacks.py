"""Hooks into a training run: what a progress display, an experiment tracker or an early stop needs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bitnet_ext.training.trainer import Trainer


class Callback:
    """Base class of ``Trainer(callbacks=[...])``: override the methods that are needed.

    Under torchrun only the main process calls them, so they must not start a collective operation. An exception from
    one ends the run. ``trainer.request_stop()`` ends it after a checkpoint.

    >>> class Tracker(Callback):
    ...     def on_start(self, trainer):
    ...         self.run = wandb.init(project="ternary", config=trainer.config.to_dict())
    ...     def on_step(self, trainer, record):
    ...         self.run.log(record, step=record["step"])
    ...     def on_eval(self, trainer, results):
    ...         self.run.log(results, step=results["step"])
    ...     def on_end(self, trainer, error):
    ...         self.run.finish(exit_code=0 if error is None else 1)
    """

    def on_start(self, trainer: Trainer) -> None:
        """Before the first step; ``trainer.step`` is above 0 in a resumed run."""

    def on_step(self, trainer: Trainer, record: dict[str, Any]) -> None:
        """After each step, in order. A GPU takes up to 64 steps at once, after which their records come together.

        Args:
            record: step, lr, weight_decay, cumulative_lr, loss, cross_entropy, entropy, grad_norm (before clipping);
                with a loss_fn its parts in place of cross_entropy and entropy.
        """

    def on_eval(self, trainer: Trainer, results: dict[str, Any]) -> None:
        """After each evaluation, with the "eval" line of metrics.jsonl."""

    def on_checkpoint(self, trainer: Trainer, path: Path) -> None:
        """After a checkpoint was written to the folder `path`."""

    def on_end(self, trainer: Trainer, error: BaseException | None) -> None:
        """At the end of the run; `error` is what ended it early, such as TrainingInterrupted, or None."""


class Callbacks:
    """Calls every method on each of a list of callbacks, in order."""

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        for callback in callbacks:
            if not isinstance(callback, Callback):
                raise ValueError(
                    "Trainer: callbacks must be instances of bitnet_ext.training.Callback, "
                    f"got {type(callback).__name__}"
                )
        self.all = list(callbacks)

    def start(self, trainer: Trainer) -> None:
        for callback in self.all:
            callback.on_start(trainer)

    def step(self, trainer: Trainer, record: dict[str, Any]) -> None:
        for callback in self.all:
            callback.on_step(trainer, record)

    def eval(self, trainer: Trainer, results: dict[str, Any]) -> None:
        for callback in self.all:
            callback.on_eval(trainer, results)

    def checkpoint(self, trainer: Trainer, path: Path) -> None:
        for callback in self.all:
            callback.on_checkpoint(trainer, path)

    def end(self, trainer: Trainer, error: BaseException | None) -> None:
        for callback in self.all:
            callback.on_end(trainer, error)
