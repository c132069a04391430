"""Reads what a study wrote: OUT/study.json and OUT/<arm>/seed<k>/{config.json, metrics.jsonl}.

A study that is still going, or was cut, reads as far as it got. The last line of a metrics file may be torn
(the process was killed while writing it) and is then left out; damage anywhere else is an error that names
file and line.
"""

from __future__ import annotations

import csv
import io
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from bitnet_ext._files import parse_json, read_json
from bitnet_ext.collapse.results.records import (
    MAX_SEEDS,
    Row,
    Run,
    Study,
    arm_settings,
    configured_steps,
    number,
    planned_steps,
)
from bitnet_ext.training.trainer import ENDED

#: Columns of summary.csv after arm and seed, in this order; other keys follow alphabetically.
EVAL_KEYS = (
    "step",
    "tokens_seen",
    "lr",
    "weight_decay",
    "cumulative_lr",
    "train_loss",
    "train_cross_entropy",
    "grad_norm",
    "clip_rate",
    "heldout_cross_entropy",
    "unigram_cross_entropy",
    "excess_over_unigram",
    "unique_of_20",
    "unique_20_random",
    "unique_20_real",
    "argmax_vocabulary",
    "effective_argmax_vocabulary",
    "predictive_entropy",
    "marginal_entropy",
    "mutual_information",
    "kl_to_unigram",
    "logit_std",
    "accuracy",
    "top1_probability",
    "head_accuracy",
    "torso_accuracy",
    "tail_accuracy",
    "gain_mean_abs",
    "final_gain_mean_abs",
    "embedding_mean_abs",
    "lm_head_mean_abs",
    "latent_mean_abs",
    "ternary_negative",
    "ternary_zero",
    "ternary_positive",
    "flip_rate",
)


def read_metrics(path: Path) -> list[Row]:
    """The rows of a metrics.jsonl, in file order. An incomplete last line is left out.

    Raises:
        ValueError: for any other line that is not a JSON object with "kind" and "step".
    """
    lines = path.read_bytes().split(b"\n")
    while lines and not lines[-1].strip():
        lines.pop()
    rows: list[Row] = []
    for index, line in enumerate(lines, start=1):
        try:
            row = parse_json(line, path, "a metrics row")
            step = number(row.get("step"))
            if not isinstance(row.get("kind"), str) or step is None or not math.isfinite(step):
                raise ValueError("not a metrics row")
        except ValueError as error:
            if index == len(lines):
                break
            raise ValueError(
                f'{path}, line {index}: expected one JSON object with "kind" and "step", got '
                f"{_excerpt(line)}; remove the line, or run this arm again"
            ) from error
        rows.append(row)
    return rows


def _excerpt(line: bytes) -> str:
    text = line.decode("utf-8", errors="replace")
    return repr(text if len(text) <= 60 else text[:57] + "...")


def _by_step(rows: Iterable[Row], kind: str) -> list[Row]:
    last = {row["step"]: row for row in rows if row["kind"] == kind}
    return [last[step] for step in sorted(last)]


def _read_object(path: Path) -> dict[str, Any]:
    return read_json(path, "settings or results of a study")


def read_run(directory: Path, arm: str, seed: int, default_steps: int | None = None) -> Run:
    """One run directory. Files that do not exist yet read as empty."""
    config_path, metrics_path = directory / "config.json", directory / "metrics.jsonl"
    config = _read_object(config_path) if config_path.is_file() else {}
    rows = read_metrics(metrics_path) if metrics_path.is_file() else []
    steps = configured_steps(config) if default_steps is None else default_steps
    ended = str(_read_object(directory / ENDED).get("reason", "")) if (directory / ENDED).is_file() else None
    return Run(
        arm,
        seed,
        directory,
        steps,
        config,
        ended,
        _by_step(rows, "train"),
        _by_step(rows, "eval"),
        _by_step(rows, "time"),
    )


def read_study(directory: Path | str) -> Study:
    """Reads a study directory, however far its runs got.

    Arms and seeds come from study.json; run directories that it does not name are added behind them.

    Raises:
        ValueError: when the directory holds no study, or a file is damaged (see :func:`read_metrics`).
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise ValueError(f"study directory {str(directory)!r} does not exist")
    settings_path = directory / "study.json"
    settings = _read_object(settings_path) if settings_path.is_file() else {}
    found: dict[str, list[tuple[int, Path]]] = {}
    for path in sorted(directory.glob("*/seed*")):
        match = re.fullmatch(r"seed(\d+)", path.name)
        if match and path.is_dir():
            found.setdefault(path.parent.name, []).append((int(match.group(1)), path))
    if not settings and not found:
        raise ValueError(
            f"study directory {str(directory)!r} holds no study: expected study.json and "
            "<arm>/seed<k>/metrics.jsonl"
        )
    named = list(arm_settings(settings))
    arms = named + [arm for arm in found if arm not in named]
    runs = [
        read_run(path, arm, seed, planned_steps(settings, arm))
        for arm in arms
        for seed, path in sorted(found.get(arm, []))
    ]
    seeds = settings.get("seeds")
    if isinstance(seeds, int) and not isinstance(seeds, bool) and seeds <= MAX_SEEDS:
        seeds = list(range(seeds))
    if not isinstance(seeds, list) or not all(isinstance(seed, int) for seed in seeds):
        seeds = []
    seeds = seeds + sorted({run.seed for run in runs} - set(seeds))
    return Study(directory, settings, arms, seeds, runs)


def write_summary_csv(study: Study, path: Path | str | None = None) -> Path:
    """Writes a tidy table: one line for each arm, seed and evaluated step, one column for each metric.

    Empty cells are metrics that do not exist (null), nan is a metric that is not a number.

    Args:
        path: default is summary.csv in the study directory.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for cells in summary_rows(study, str):
        writer.writerow(cells)
    return write_atomic(Path(path) if path else study.directory / "summary.csv", text.getvalue().encode())


def summary_rows(study: Study, form: Callable[[Any], str]) -> Iterator[list[str]]:
    """The rows of summary.csv, the heading first; `form` writes a value that is there."""
    present = {key for run in study.runs for row in run.evals for key in row} - {"kind"}
    keys = [key for key in EVAL_KEYS if key in present] + sorted(present - set(EVAL_KEYS))
    yield ["arm", "seed", *keys]
    for run in study.runs:
        for row in run.evals:
            yield [run.arm, str(run.seed), *("" if row.get(key) is None else form(row[key]) for key in keys)]


def write_atomic(path: Path, data: bytes) -> Path:
    """Writes a file under a temporary name beside it and renames it: readers see the old file or the new
    one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path
