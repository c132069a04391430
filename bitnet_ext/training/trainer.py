"""The training loop: data, steps, evaluation, metrics, checkpoints, resume."""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray

from bitnet_ext._threads import warn_of_spinning
from bitnet_ext.data.sampling import Order, RowSampler
from bitnet_ext.metrics.perplexity import Decoder
from bitnet_ext.models import BitNetForCausalLM
from bitnet_ext.training.callbacks import Callback, Callbacks
from bitnet_ext.training.checkpoint import (
    Checkpoint,
    CheckpointError,
    latest_checkpoint,
    load_weights,
    read_checkpoint,
    remove_leftovers,
    write_checkpoint,
    write_text_atomic,
)
from bitnet_ext.training.config import TrainConfig
from bitnet_ext.training.device import resolve_device
from bitnet_ext.training.distributed import join_world, wait_for_all
from bitnet_ext.training.heldout import HeldOutLoss, heldout_text
from bitnet_ext.training.metrics_log import MetricsLog
from bitnet_ext.training.objective import PARTS, LossFunction
from bitnet_ext.training.optimizer import Optimizer
from bitnet_ext.training.progress import Progress
from bitnet_ext.training.provenance import (
    TokenSource,
    check_same_run,
    model_to_train,
    provenance,
    token_stream,
)
from bitnet_ext.training.random_state import random_state, restore_random_state
from bitnet_ext.training.run_lock import locked_run
from bitnet_ext.training.schedules import learning_rates, weight_decays
from bitnet_ext.training.signals import stop_on_signals
from bitnet_ext.training.step import NonFiniteGradientError, TrainStep
from bitnet_ext.training.tensors import plain_name
from bitnet_ext.training.update_rules import make_optimizer

#: Fields that may differ between a run and its resumption: they do not change what is computed.
FREE_ON_RESUME = frozenset(
    (
        "cuda_graph",
        "eval_interval",
        "eval_tokens",
        "checkpoint_interval",
        "checkpoint_seconds",
        "final_checkpoint",
        "tensorboard",
    )
)


#: File of a run that ended before its last step because a number was not finite: its step and the reason.
ENDED = "ended.json"
_T = TypeVar("_T")
_NO_SUMS: dict[str, float] = {"steps": 0, "clipped": 0, "loss": 0.0, "cross_entropy": 0.0}


class TrainingDivergedError(RuntimeError):
    """The loss or a gradient became NaN or Inf; the last good checkpoint is kept."""


class TrainingInterrupted(KeyboardInterrupt):
    """Ctrl-C, SIGTERM or SIGHUP: the step in progress was finished and a checkpoint written."""


@dataclass(frozen=True)
class EvaluatedStep:
    """What an evaluator may want to know of the step that was just taken, besides the model.

    Attributes:
        step: its number, counted from 1; last: whether the run ends with it.
        lr, weight_decay: that it was taken with. grad_norm: before clipping, with the L2 term in it where
            decay_before_clip adds that first.
        optimizer: with the moments after the step. The parameters' ``grad`` are those of the step (of its last
            micro-batch and earlier ones added up, not clipped).
    """

    step: int
    last: bool
    lr: float
    weight_decay: float
    grad_norm: float
    optimizer: Optimizer


class Evaluator(Protocol):
    """Measures a model during training; its results join the "eval" line of the step."""

    def before_step(self, model: BitNetForCausalLM) -> None:
        """Called just before the step after which :meth:`evaluate` is called."""

    def evaluate(
        self, model: BitNetForCausalLM, step: EvaluatedStep
    ) -> dict[str, Any] | Callable[[], dict[str, Any]]:
        """Named measurements, JSON values; or, where the device is still at them, a function that waits for them. It
        is called before the model is trained on.
        """


class Trainer:
    """Trains a model on a stream of token ids.

    Args:
        model: a BitNetForCausalLM, moved to the device. Of a ``torch.compile(model)`` the module inside is
            trained and saved.
        config: of the run.
        tokens: training stream, integer ids [n]: a numpy array or memory map, a torch tensor, a list; or a
            :class:`bitnet_ext.data.Corpus`, whose training part is used and whose text and tokenizer the
            checkpoints then name.
        run_dir: for metrics.jsonl and checkpoints; None writes nothing. One process at a time trains into it.
        device: "auto", "cpu", "cuda", "cuda:N".
        evaluator: called at `eval_steps` and every config.eval_interval steps; without one, an eval_interval asks for
            loss, perplexity and (with a tokenizer) bits per byte of `heldout`.
        eval_steps: steps, counted from 1.
        heldout, tokenizer: held-out ids [n] for an eval_interval, in the forms of `tokens`, and what decodes them, for
            bits per byte; default those of a Corpus given as `tokens`.
        callbacks: hooks, see :class:`bitnet_ext.training.Callback`.
        loss_fn: ``loss_fn(model, ids, targets)`` of ids and targets int64 [B, seq_len] computes the loss, or a pair of
            it and a dict of named parts for metrics.jsonl, instead of the objective of `config`. The gradients, the
            optimiser and everything else stay; on a GPU it is captured in a CUDA graph (unless config.cuda_graph is
            False), so it must not read numbers on the host.
        start_from: a full checkpoint of another run to go on from: weights, moments, step and cumulative learning
            rate are taken over, settings are not compared.
        init_from: a checkpoint whose weights the run begins with, as in fine-tuning: at step 0, with moments of 0
            and the schedule of `config`. Names and shapes must agree. Its path as of
            :func:`bitnet_ext.training.resolve_checkpoint`, also for start_from. An exported model needs no
            init_from: give it as `model`.
        reset_moments: with start_from, begin with moments of 0 (bias corrections go on counting).
        snapshot_steps: steps after which a full checkpoint is kept in run_dir/snapshots.

    Under torchrun each process takes its share of every batch and the gradients are averaged (DDP); the
    marginal of the diversity term is then that of the process's own rows.
    """

    def __init__(
        self,
        model: BitNetForCausalLM,
        config: TrainConfig,
        tokens: TokenSource,
        *,
        run_dir: Path | str | None = None,
        device: str | torch.device = "auto",
        evaluator: Evaluator | None = None,
        eval_steps: Iterable[int] = (),
        start_from: Path | str | Checkpoint | None = None,
        init_from: Path | str | Checkpoint | None = None,
        reset_moments: bool = False,
        snapshot_steps: Iterable[int] = (),
        heldout: TokenSource | None = None,
        tokenizer: Decoder | None = None,
        callbacks: Sequence[Callback] = (),
        loss_fn: LossFunction | None = None,
    ) -> None:
        model, stream = model_to_train(model), token_stream(tokens)
        if start_from is not None and init_from is not None:
            raise ValueError("Trainer: start_from and init_from exclude each other, got both")
        self.config = config
        self.device = resolve_device(device)
        self.world = join_world(self.device.type)
        if self.world.size > 1 and self.device.type == "cuda":
            self.device = torch.device("cuda", self.world.local_rank)
        local_batch, rest = divmod(config.batch_size, self.world.size)
        if rest or local_batch % config.accumulation:
            raise ValueError(
                f"Trainer: batch_size must be a multiple of processes x accumulation = "
                f"{self.world.size} x {config.accumulation}, got {config.batch_size}"
            )
        if config.seq_len > model.config.max_seq_len:
            raise ValueError(
                f"Trainer: seq_len must be at most the model's max_seq_len = {model.config.max_seq_len}, "
                f"got {config.seq_len}"
            )
        check_vocabulary(stream.ids, model.config.vocab_size)
        self.model = model.to(self.device)
        self.sampler = RowSampler(
            stream.ids,
            batch_size=config.batch_size,
            seq_len=config.seq_len,
            order=cast(Order, config.sampling),
            seed=config.seed,
            rank=self.world.rank,
            world_size=self.world.size,
        )
        self.run_dir = None if run_dir is None else Path(run_dir)
        if config.eval_interval is not None:
            interval_steps = range(config.eval_interval, config.steps, config.eval_interval)
            eval_steps = {*eval_steps, *interval_steps, config.steps}
            if evaluator is None:
                ids, decoder = heldout_text(tokens, heldout, tokenizer)
                check_vocabulary(ids, model.config.vocab_size)
                evaluator = HeldOutLoss(ids, config, decoder)
        self.evaluator = evaluator
        self.eval_steps = sorted({int(s) for s in eval_steps if 1 <= s <= config.steps}) if evaluator else []
        self.callbacks = list(callbacks)
        Callbacks(self.callbacks)  # refuses what is none
        self.loss_fn = loss_fn
        _warn_of_warmup(config)
        self.optimizer = make_optimizer(model, config)
        self.step = 0
        self._learning_rates = learning_rates(config)
        self._weight_decays = weight_decays(config)
        self._cumulative_lr = np.cumsum(self._learning_rates)
        self._sums = dict(_NO_SUMS)  # since the last evaluation
        self.snapshot_steps = sorted({int(s) for s in snapshot_steps if 1 <= s <= config.steps})
        self.reset_moments = reset_moments
        self._provenance = provenance(stream, self.device)
        if start_from is not None:
            whole = start_from if isinstance(start_from, Checkpoint) else read_checkpoint(start_from)
            self._begin_at(whole)
        if init_from is not None:
            whole = init_from if isinstance(init_from, Checkpoint) else read_checkpoint(init_from)
            load_weights(self.model, whole)
            self._provenance["init_from"] = {"path": str(whole.path), "step": whole.step}
        self._log: MetricsLog | None = None
        self._calls = Callbacks(())
        self._display: list[Callback] = []
        self._stop_requested = False
        self._last_record: dict[str, Any] = {}
        self._last_checkpoint = (0, time.monotonic())
        self._full_step: int | None = None  # of the newest checkpoint that this trainer wrote in full

    # --- the loop -------------------------------------------------------------------------------------------

    def fit(
        self,
        *,
        resume: bool = False,
        progress: bool = True,
        on_progress: Callable[[int, dict[str, Any]], None] | None = None,
    ) -> None:
        """Trains to config.steps.

        Args:
            resume: continue from the newest checkpoint in run_dir, if there is one. Metrics written after
                it are cut off and written again: on a CPU the resumed run equals an uninterrupted one bit
                for bit.
            progress: show a header and a bar on a terminal, plain lines elsewhere, on stderr (of the main process).
            on_progress: called after each block of steps with the step and its record (and after each
                evaluation with its results).

        Raises:
            TrainingDivergedError: NaN or Inf in loss or gradient.
            TrainingInterrupted: Ctrl-C, SIGTERM or SIGHUP, after a checkpoint.
            FileExistsError: run_dir holds a run and resume is False.
            RunInUseError: another process trains into run_dir (an OSError).
            ValueError: on resume settings, model, text or tokenizer differ from the run's, or a checkpoint is damaged.
        """
        self._display = [Progress()] if progress else []
        try:
            with stop_on_signals(self):
                for _ in self.advance(resume=resume, on_progress=on_progress):
                    pass
        finally:
            self._display = []

    def advance(
        self,
        *,
        resume: bool = False,
        on_progress: Callable[[int, dict[str, Any]], None] | None = None,
    ) -> Iterator[None]:
        """:meth:`fit` in pieces: yields whenever steps were handed to the device and before it waits for them.

        Several trainers share a GPU when each is advanced in turn on a stream of its own, see
        :func:`bitnet_ext.training.advance_together`.
        Signals are left to the caller; a generator that is closed early leaves what the last checkpoint had.
        """
        with locked_run(self.run_dir, self.world):
            yield from self._advance(resume, on_progress)

    def _advance(
        self, resume: bool, on_progress: Callable[[int, dict[str, Any]], None] | None
    ) -> Iterator[None]:
        if self.device.type == "cpu":
            warn_of_spinning(torch.get_num_threads())
        keep_bytes = self._restore() if resume else self._refuse_existing()
        wait_for_all(self.world)  # everyone has looked before the first process writes
        if self.run_dir is not None and self.world.is_main:
            board = self.run_dir / "tensorboard" if self.config.tensorboard else None
            self._log = MetricsLog(self.run_dir / "metrics.jsonl", keep_bytes, board)
            (self.run_dir / ENDED).unlink(missing_ok=True)
            remove_leftovers(self.run_dir, sole_writer=True)
        self.model.train()
        runner = TrainStep(self.model, self.optimizer, self.config, self.device, self.world, self.loss_fn)
        self._last_checkpoint = (self.step, time.monotonic())
        started, first_step = time.monotonic(), self.step
        self._calls = Callbacks([*self.callbacks, *self._display] if self.world.is_main else ())
        error: BaseException | None = None
        try:
            self._calls.start(self)
            while self.step < self.config.steps:
                stop = self._next_stop(runner.block_steps)
                is_eval = stop in self.eval_steps and stop == self.step + 1
                if is_eval and self.evaluator is not None:
                    self.evaluator.before_step(self.model)
                runner_steps = self._run(runner, stop)
                next(runner_steps)
                yield
                record = next(runner_steps)
                if is_eval:
                    evaluation = self._evaluate(started, first_step)
                    yield
                    results = evaluation()
                    self._calls.eval(self, results)
                    record |= results
                if on_progress is not None:
                    on_progress(self.step, record)
                if self.step in self.snapshot_steps:
                    self._save(full=True, folder="snapshots")
                self._checkpoint_if_due()
                if self._stop_requested:
                    self._save(full=True)
                    self._stop_requested = False  # it is done: another fit goes on
                    raise TrainingInterrupted(f"stopped after step {self.step}; the run can be resumed")
            if self.config.final_checkpoint != "none" and self.step > first_step:
                self._save(full=self.config.final_checkpoint == "full")
        except BaseException as ended_by:
            error = ended_by
            raise
        finally:
            self._calls.end(self, error)
            if self._log is not None:
                self._log.close()
                self._log = None

    def request_stop(self) -> None:
        """Asks for an end after the steps under way: a checkpoint, then TrainingInterrupted."""
        self._stop_requested = True

    def _next_stop(self, block_steps: int) -> int:
        """The step after which the host has something to do; an evaluated step runs alone."""
        stop = min(self.step + block_steps, self.config.steps)
        upcoming = next((s for s in self.eval_steps if s > self.step), None)
        if upcoming is not None:
            stop = min(stop, upcoming if upcoming == self.step + 1 else upcoming - 1)
        stop = min([stop, *(s for s in self.snapshot_steps if s > self.step)])
        if self.config.checkpoint_interval:
            interval = self.config.checkpoint_interval
            stop = min(stop, (self.step // interval + 1) * interval)
        return stop

    def _run(self, runner: TrainStep, stop: int) -> Iterator[dict[str, Any]]:
        """Yields once when the steps up to `stop` are on their way, and then the last one's record."""
        start = self.step
        try:
            runner.launch(start, self.sampler.batches(start, stop - start))
            yield {}
            records = runner.finish().tolist()
        except NonFiniteGradientError as error:
            self._take(start, error.records.tolist(), runner.names)
            raise self._diverged(error.step, str(error)) from error
        except RuntimeError as error:
            self._raise_if_diverged(start + 1, error)
            raise
        record = self._take(start, records, runner.names)
        self.step = stop
        yield record

    def _take(self, start: int, records: list[list[float]], names: tuple[str, ...]) -> dict[str, Any]:
        """Adds the records of the steps after `start` to the sums and the log; returns the last one."""
        record: dict[str, Any] = {}
        for offset, values in enumerate(records):
            step = start + 1 + offset
            record = self._facts(step) | dict(zip(names, values, strict=True))
            # The parts of a loss of one's own are whatever it says they are.
            checked = values if self.loss_fn is None else [record["loss"], record["grad_norm"]]
            if not all(math.isfinite(value) for value in checked):
                raise self._diverged(step, "loss or gradient norm is NaN or Inf")
            self._sums["steps"] += 1
            clip = self.config.grad_clip
            self._sums["clipped"] += clip is not None and record["grad_norm"] > clip
            self._sums["loss"] += record["loss"]
            self._sums["cross_entropy"] += record.get("cross_entropy", 0.0)
            if self._log is not None and (step % self.config.log_interval == 0 or step == 1):
                self._log.write("train", record)
            self._last_record = record
            self._calls.step(self, record)
        return record

    def _raise_if_diverged(self, step: int, error: RuntimeError) -> None:
        """Operators refuse numbers that are not finite, which here means that the training has gone wrong."""
        if "holds NaN or Inf" in str(error):
            raise self._diverged(step, str(error)) from error

    def _diverged(self, step: int, reason: str) -> TrainingDivergedError:
        kept = latest_checkpoint(self.run_dir / "checkpoint") if self.run_dir is not None else None
        text = f"training diverged at step {step}: {reason}"
        if self.run_dir is not None and self.world.is_main:
            write_text_atomic(self.run_dir / ENDED, json.dumps({"step": step, "reason": text}))
        return TrainingDivergedError(
            f"{text}; " + (f"the last good checkpoint is {kept}" if kept else "there is no checkpoint yet")
        )

    def _facts(self, step: int) -> dict[str, Any]:
        return {
            "step": step,
            "lr": float(self._learning_rates[step - 1]),
            "weight_decay": float(self._weight_decays[step - 1]),
            "cumulative_lr": float(self._cumulative_lr[step - 1]),
        }

    def _evaluate(self, started: float, first_step: int) -> Callable[[], dict[str, Any]]:
        """Begins the evaluation of the step just taken; the function returned ends it."""
        assert self.evaluator is not None
        count = max(self._sums["steps"], 1)
        result = self._facts(self.step) | {
            "tokens_seen": self.step * self.config.tokens_per_step,
            "train_loss": self._sums["loss"] / count,
            "train_cross_entropy": self._sums["cross_entropy"] / count,
            "grad_norm": self._last_record["grad_norm"],
            "clip_rate": self._sums["clipped"] / count,
        }
        if PARTS[0] not in self._last_record:  # of a loss of one's own
            del result["train_cross_entropy"]
        facts = EvaluatedStep(
            self.step,
            self.step == self.config.steps,
            result["lr"],
            result["weight_decay"],
            result["grad_norm"],
            self.optimizer,
        )
        with self._divergence_is_told():
            measured = self.evaluator.evaluate(self.model, facts)

        def finish() -> dict[str, Any]:
            with self._divergence_is_told():
                values = result | (measured() if callable(measured) else measured)
            self.model.train()
            self._sums = dict(_NO_SUMS)
            if self._log is not None:
                seconds = time.monotonic() - started
                self._log.write("eval", values)
                # What differs from run to run has a line of its own, so that the others can be compared.
                rate = (self.step - first_step) / max(seconds, 1e-9)
                self._log.write("time", {"step": self.step, "seconds": seconds, "steps_per_second": rate})
            return values

        return finish

    @contextmanager
    def _divergence_is_told(self) -> Iterator[None]:
        """Operators refuse numbers that are not finite, which in an evaluation means that the training went wrong."""
        try:
            yield
        except RuntimeError as error:
            self._raise_if_diverged(self.step, error)
            raise

    # --- checkpoints ------------------------------------------------------------------------------------------

    def _checkpoint_if_due(self) -> None:
        if self.run_dir is None or self.step >= self.config.steps:
            return
        last_step, last_time = self._last_checkpoint
        interval, seconds = self.config.checkpoint_interval, self.config.checkpoint_seconds
        due = interval is not None and self.step - last_step >= interval
        if seconds is not None and self.world.size == 1:  # processes must agree, so by steps only
            due = due or time.monotonic() - last_time >= seconds
        if due:
            self._save(full=True)

    def _save(self, full: bool, folder: str = "checkpoint") -> None:
        if folder == "checkpoint" and self._full_step == self.step:
            return  # a stop in a step at which a checkpoint was due
        if self.run_dir is not None and self._log is not None:
            state = {
                **self._provenance,
                "model_config": self.model.config.to_dict(),
                "train_config": self.config.to_dict(),
                "metrics_bytes": self._log.position(),
                "sums": self._sums,
                "cumulative_lr": self._facts(self.step)["cumulative_lr"],
                "finished": self.step == self.config.steps,
            }
            written = write_checkpoint(
                self.run_dir / folder,
                self.step,
                self.model.state_dict(),
                self.optimizer.state() | random_state(self.config, self.device) if full else {},
                state,
                keep_older=folder == "snapshots",
                sole_writer=True,
            )
            if full and folder == "checkpoint":
                self._full_step = self.step
            self._calls.checkpoint(self, written)
        if folder == "checkpoint":
            self._last_checkpoint = (self.step, time.monotonic())

    def _begin_at(self, checkpoint: Checkpoint) -> None:
        """Takes over weights, moments, step and cumulative learning rate of another run's checkpoint."""
        if not 0 < checkpoint.step < self.config.steps:
            raise ValueError(
                f"Trainer: start_from must be a checkpoint of a step before steps = {self.config.steps}, "
                f"got step {checkpoint.step} ({checkpoint.path})"
            )
        load_weights(self.model, checkpoint)
        if not self.reset_moments:
            self._load_moments(checkpoint)
        self.step = checkpoint.step
        before = _recorded(checkpoint, "cumulative_lr", float)
        self._cumulative_lr = self._cumulative_lr + (before - self._cumulative_lr[checkpoint.step - 1])

    def _load_moments(self, checkpoint: Checkpoint) -> None:
        moments = self.optimizer.state()
        missing = sorted({plain_name(name) for name in moments} - set(checkpoint.optimizer))
        if missing:
            raise CheckpointError(
                f"checkpoint {checkpoint.path} has no optimiser state ({missing[0]}): it cannot be resumed"
            )
        found = {name: checkpoint.optimizer[plain_name(name)] for name in moments}
        for name, value in moments.items():
            if found[name].shape != value.shape:
                raise CheckpointError(
                    f"checkpoint {checkpoint.path}: the optimiser's {name} must have shape {tuple(value.shape)}, "
                    f"got {tuple(found[name].shape)}"
                )
        self.optimizer.load_state(found)

    def _refuse_existing(self) -> int:
        if self.run_dir is not None and any(
            (self.run_dir / name).exists() for name in ("metrics.jsonl", "checkpoint/latest.json")
        ):
            raise FileExistsError(
                f"{self.run_dir} already holds a run: pass resume=True to continue it, or choose another folder"
            )
        return 0

    def _restore(self) -> int:
        """Loads the newest checkpoint; returns how many bytes of the metrics file it had seen."""
        if self.run_dir is None:
            raise ValueError("Trainer: resume=True needs a run_dir")
        path = latest_checkpoint(self.run_dir / "checkpoint")
        if path is None:
            return 0
        checkpoint = read_checkpoint(path)
        # A checkpoint from before a field existed was written with its default.
        saved = TrainConfig().to_dict() | _recorded(checkpoint, "train_config", dict)
        for name, value in self.config.to_dict().items():
            if name not in FREE_ON_RESUME and saved.get(name) != value:
                raise ValueError(
                    f"Trainer: {name} is {value!r}, but {path} was written with {saved.get(name)!r}; "
                    "a run is resumed with its own settings"
                )
        check_same_run(checkpoint.state, path, self.model.config, self._provenance)
        sums, metrics_bytes = _recorded(checkpoint, "sums", dict), _recorded(checkpoint, "metrics_bytes", int)
        load_weights(self.model, checkpoint)
        if checkpoint.step < self.config.steps:
            self._load_moments(checkpoint)
            restore_random_state(checkpoint, self.config, self.device)
        self.step = checkpoint.step
        self._sums = _NO_SUMS | sums
        return metrics_bytes


def _recorded(checkpoint: Checkpoint, name: str, kind: type[_T]) -> _T:
    """A value of a checkpoint's state, by its type."""
    value = checkpoint.state.get(name)
    if not isinstance(value, kind):
        raise CheckpointError(
            f"checkpoint {checkpoint.path}: state.json is damaged: state must have {name} "
            f"({kind.__name__}), got {type(value).__name__}"
        )
    return value


def _warn_of_warmup(config: TrainConfig) -> None:
    if config.warmup_steps is not None and 0 < config.steps <= config.warmup_steps:
        warnings.warn(
            f"the learning rate never reaches its peak: warmup_steps is {config.warmup_steps}, "
            f"the run has {config.steps} steps (the default is a tenth of them)",
            stacklevel=3,
        )


def check_vocabulary(tokens: NDArray[Any], vocab_size: int) -> None:
    """Raises ValueError when an id of `tokens` does not fit a vocabulary."""
    if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(
            f"tokens must be a flat array of integer ids, got {tokens.dtype} of shape {tokens.shape}"
        )
    for start in range(0, len(tokens), 1 << 24):
        part = tokens[start : start + (1 << 24)]
        highest, lowest = int(part.max()), int(part.min())
        if highest >= vocab_size or lowest < 0:
            bad = highest if highest >= vocab_size else lowest
            raise ValueError(
                f"tokens must be in 0..{vocab_size - 1} (the model's vocab_size is {vocab_size}), got id {bad}"
            )
