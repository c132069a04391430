"""What a diagnosis is made from: the metrics file, the settings and the weights of one run, as far as there are.

Everything ends up in rows with the keys of a metrics file: the weights of a checkpoint become one more evaluation
row, and the sizes that an initialisation has by its configuration become a row of step 0. Nothing is unpickled.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from bitnet_ext import metrics
from bitnet_ext._files import read_json
from bitnet_ext.collapse.diagnose.sizes import SIZES, TensorFacts, initial_sizes, tensor_facts, weights_row
from bitnet_ext.collapse.options import DIAGNOSE_ACCEPTS
from bitnet_ext.collapse.results import Row, number, read_metrics
from bitnet_ext.collapse.results.status import classify
from bitnet_ext.data.statistics import unigram_log_probs
from bitnet_ext.models import BitNetConfig
from bitnet_ext.training import TrainConfig, load_model, read_checkpoint
from bitnet_ext.training.checkpoint import CheckpointError, latest_checkpoint, read_state
from bitnet_ext.training.trainer import ENDED


@dataclass
class Case:
    """One run, as far as its files tell.

    Attributes:
        path: what was asked about. kind: "run folder", "metrics file" or "checkpoint".
        evals, train: rows in order of their step, one a step.
        model, settings: of the run; None when no file says.
        tensors: of the checkpoint; empty without one.
        checkpoint: its folder. ended: why the trainer stopped the run, when that was NaN or infinity.
        notes: sentences on what was left out, and why.
    """

    path: Path
    kind: str
    evals: list[Row] = field(default_factory=list)
    train: list[Row] = field(default_factory=list)
    model: BitNetConfig | None = None
    settings: TrainConfig | None = None
    tensors: list[TensorFacts] = field(default_factory=list)
    checkpoint: Path | None = None
    ended: str | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def ln_vocab(self) -> float | None:
        """Cross-entropy and entropy of the uniform distribution, nats."""
        return math.log(self.model.vocab_size) if self.model is not None else None

    @property
    def ternary(self) -> bool | None:
        """Whether the linear layers are ternary; None when nothing says."""
        if self.model is not None:
            return self.model.quantization != "none"
        return True if self.last("ternary_zero") is not None else None

    @property
    def last_step(self) -> int | None:
        """The last step of which anything is known."""
        steps = [int(rows[-1]["step"]) for rows in (self.evals, self.train) if rows]
        return max(steps, default=None)

    def points(self, key: str, kind: str = "eval") -> list[tuple[Row, float]]:
        """(row, value) of the rows of a kind that have a finite number under a key, by step."""
        found = [(row, number(row.get(key))) for row in (self.evals if kind == "eval" else self.train)]
        return [(row, value) for row, value in found if value is not None and math.isfinite(value)]

    def last(self, key: str, kind: str = "eval") -> tuple[int, float] | None:
        """Step and value of the last finite number under a key."""
        points = self.points(key, kind)
        return (int(points[-1][0]["step"]), points[-1][1]) if points else None

    def status(self) -> str | None:
        """How the run stands by the rules of a study's report; None without held-out evaluations."""
        rows = [row for row in self.evals if row.get("heldout_cross_entropy") is not None]
        warmup = 0 if self.settings is None else self.settings.warmup
        return classify(rows, self.ln_vocab, warmup) if rows else None

    def reach(self) -> tuple[int, float] | None:
        """Last step and sum of the learning rates up to it: about what Adam can have moved a weight by."""
        found = [last for kind in ("eval", "train") if (last := self.last("cumulative_lr", kind)) is not None]
        return max(found, default=None)

    def smallest_initial_size(self) -> float:
        """Initial mean |w| of the smallest group of matrices; 0 when none is known."""
        sizes = self.initial_sizes()
        keys = ("lm_head_mean_abs", "latent_mean_abs", "embedding_mean_abs")
        return min((sizes[key] for key in keys if key in sizes), default=0.0)

    def initial_sizes(self) -> dict[str, float]:
        """Sizes before the first step: by the configuration, else the first measured ones.

        Gains start at 1 in every network of this package.
        """
        sizes = {"final_gain_mean_abs": 1.0, "gain_mean_abs": 1.0}
        sizes |= {key: points[0][1] for key in SIZES if key not in sizes and (points := self.points(key))}
        return sizes | (initial_sizes(self.model) if self.model is not None else {})


# --- reading ------------------------------------------------------------------------------------------------------


def read_case(path: Path | str) -> Case:
    """Reads a run folder, a metrics file or a checkpoint.

    Raises:
        ValueError: one sentence on what is wrong with the path or the file.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"diagnose: PATH {str(path)!r} does not exist; accepted is {DIAGNOSE_ACCEPTS}")
    if path.is_dir():
        return _read_folder(path)
    if path.suffix == ".jsonl":
        case = Case(path, "metrics file")
        _add_metrics(case, path)
        _add_settings(case, path.parent)
        return case
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    raise ValueError(
        f"diagnose: PATH {str(path)!r} is a {path.suffix or 'nameless'} file; accepted is {DIAGNOSE_ACCEPTS} "
        "(pickled files are never opened)"
    )


def _read_folder(path: Path) -> Case:
    if (path / "study.json").is_file():
        raise ValueError(
            f"diagnose: PATH {str(path)!r} is a study of several runs; name one of them, such as "
            f"{path / '<arm>' / 'seed0'}"
        )
    if (path / "state.json").is_file() or (path / "latest.json").is_file():
        case = Case(path, "checkpoint")
        _add_checkpoint(case, path)
        return case
    has_checkpoint = (path / "checkpoint" / "latest.json").is_file()
    if not (path / "metrics.jsonl").is_file() and not has_checkpoint:
        raise ValueError(
            f"diagnose: PATH {str(path)!r} holds neither metrics.jsonl nor a checkpoint; accepted is {DIAGNOSE_ACCEPTS}"
        )
    case = Case(path, "run folder")
    if (path / "metrics.jsonl").is_file():
        _add_metrics(case, path / "metrics.jsonl")
    _add_settings(case, path)
    if has_checkpoint:
        try:
            _add_checkpoint(case, path / "checkpoint")
        except (CheckpointError, OSError) as error:
            # A run that is going on replaces its checkpoint; its metrics can be judged all the same.
            case.notes.append(f"the checkpoint was left out: {error}")
    return case


def note_early_end(case: Case) -> str | None:
    """A sentence when a run's metrics end before its planned steps: the trainer stops at a NaN without a line."""
    if case.kind == "checkpoint" or case.settings is None or case.last_step is None:
        return None
    if case.ended is not None:
        return None
    if case.last_step + case.settings.log_interval > case.settings.steps:
        return None
    return (
        f"the metrics end at step {case.last_step:,} of {case.settings.steps:,}: the run goes on, was interrupted, or "
        "was stopped by NaN or Inf, which the trainer reports on its error output"
    )


def _add_metrics(case: Case, path: Path) -> None:
    rows = read_metrics(path)
    for kind, into in (("eval", case.evals), ("train", case.train)):
        by_step = {row["step"]: row for row in rows if row["kind"] == kind}
        into.extend(by_step[step] for step in sorted(by_step))


def _add_settings(case: Case, folder: Path) -> None:
    """What lies beside a metrics file: config.json or a checkpoint's state, and the reason of an early end."""
    try:
        if (folder / ENDED).is_file():
            case.ended = str(
                read_json(folder / ENDED, "why the run ended").get("reason", "for no known reason")
            )
        if (folder / "config.json").is_file():
            content = read_json(folder / "config.json", "the run's settings")
            _take_settings(case, content.get("model"), content.get("train"))
        newest = latest_checkpoint(folder / "checkpoint")
        if newest is not None and (newest / "state.json").is_file():
            state = read_state(newest)["state"]
            _take_settings(case, state.get("model_config"), state.get("train_config"))
    except (OSError, ValueError) as error:
        case.notes.append(f"what lies beside the metrics file could not all be read: {error}")


def _take_settings(case: Case, model: object, settings: object) -> None:
    if case.model is None and isinstance(model, dict):
        try:
            case.model = BitNetConfig.from_dict(model)
        except (ValueError, TypeError) as error:
            case.notes.append(f"the model's settings were left out: {error}")
    if case.settings is None and isinstance(settings, dict):
        try:
            case.settings = TrainConfig.from_dict(settings)
        except (ValueError, TypeError) as error:
            case.notes.append(f"the training settings were left out: {error}")


def _add_checkpoint(case: Case, path: Path) -> None:
    checkpoint = read_checkpoint(path)
    _take_settings(case, checkpoint.state.get("model_config"), checkpoint.state.get("train_config"))
    case.checkpoint = checkpoint.path
    case.tensors = tensor_facts(checkpoint.model, case.ternary is True)
    _merge_row(case, weights_row(case.tensors, case.settings, checkpoint.step))


def _read_safetensors(path: Path) -> Case:
    if path.name == "optimizer.safetensors":
        raise ValueError(
            f"diagnose: PATH {str(path)!r} holds optimiser moments; give the checkpoint's folder"
        )
    case = Case(path, "checkpoint")
    if (path.parent / "state.json").is_file() and path.name == "model.safetensors":
        _add_checkpoint(case, path.parent)
        return case
    try:
        tensors = safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise ValueError(f"diagnose: PATH {str(path)!r} does not read as safetensors ({error})") from error
    if "final_norm.weight" not in tensors:
        raise ValueError(
            f"diagnose: PATH {str(path)!r} has no final_norm.weight: it is not a model of bitnet_ext; "
            f"accepted is {DIAGNOSE_ACCEPTS}"
        )
    case.notes.append(
        "no state.json beside the weights: their step, initialisation and quantisation are unknown"
    )
    case.tensors = tensor_facts(tensors, ternary=False)
    _merge_row(case, weights_row(case.tensors, case.settings, 0))
    return case


# --- weights ------------------------------------------------------------------------------------------------------


def _merge_row(case: Case, row: Row) -> None:
    """Adds an evaluation row; one that is there already keeps what it has."""
    same = next((index for index, old in enumerate(case.evals) if old["step"] == row["step"]), None)
    if same is not None:
        old = {key: value for key, value in case.evals[same].items() if value is not None or key not in row}
        case.evals[same] = row | old
    else:
        case.evals.append(row)
        case.evals.sort(key=lambda each: float(each["step"]))


# --- held-out text ------------------------------------------------------------------------------------------------


def add_heldout(
    case: Case,
    train_tokens: Any,
    heldout_tokens: Any,
    *,
    max_tokens: int,
    device: torch.device,
) -> None:
    """Evaluates the checkpoint of a case on held-out tokens, as the "eval" lines of a study do.

    Args:
        train_tokens, heldout_tokens: integer ids [n]; the first ones give the unigram.
        max_tokens: predictions of the evaluation.

    Raises:
        ValueError: the case has no checkpoint, or the tokens do not fit its vocabulary.
    """
    if case.checkpoint is None or case.model is None:
        raise ValueError(
            f"diagnose: --data needs a checkpoint with its state.json, and {str(case.path)!r} has none; "
            "give the run folder"
        )
    unigram = torch.from_numpy(unigram_log_probs(train_tokens, case.model.vocab_size))
    model = load_model(case.checkpoint, device)
    wanted = case.settings.seq_len if case.settings is not None else 128
    seq_len = min(wanted, case.model.max_seq_len, len(heldout_tokens) - 1)
    found = metrics.evaluate_heldout(
        model,
        heldout_tokens,
        unigram,
        seq_len=seq_len,
        max_tokens=max_tokens,
        batch_rows=max(1, 4096 // seq_len),
        device=device,
    )
    step = read_step(case.checkpoint)
    _merge_row(case, {"kind": "eval", "step": step, **found})


def read_step(checkpoint: Path) -> int:
    """The step that a checkpoint's state.json names."""
    return int(read_state(checkpoint)["step"])
