"""The command line of the collapse experiments, shared by the example and by ``bitnet-ext collapse``."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bitnet_ext.collapse.arms import ARMS
from bitnet_ext.collapse.results import read_study
from bitnet_ext.collapse.study import StudyConfig, default_config, run_study
from bitnet_ext.collapse.table import comparison_table
from bitnet_ext.training import TrainingDivergedError, TrainingInterrupted
from bitnet_ext.training.device import resolve_device

RUNS = Path("runs")
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the collapse experiments."""
    parser.add_argument("--arms", nargs="+", metavar="ARM", help="arms to compare (see --list-arms)")
    parser.add_argument("--steps", type=int, help="optimiser steps of each run")
    parser.add_argument("--seeds", type=int, help="runs of each arm, with seeds 0, 1, ... (default 1)")
    parser.add_argument(
        "--data", metavar="NAME|PATH", help="wiki-leads (default), wikitext-2, or a text file or folder"
    )
    parser.add_argument("--model", metavar="PRESET", help="network (default collapse-256)")
    parser.add_argument(
        "--eval-tokens", type=int, metavar="N", help="held-out predictions of each evaluation"
    )
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda or cuda:N")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder of the study (default runs/collapse-<time>)"
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue the study in --out (default: the newest runs/collapse-*); --arms and --seeds may add to it",
    )
    parser.add_argument("--list-arms", action="store_true", help="print the arms and stop")


def run(args: argparse.Namespace) -> int:
    """Runs the study that `args` describe, prints the table; returns the exit status."""
    if args.list_arms:
        width = max(map(len, ARMS))
        for arm in ARMS.values():
            print(f"{arm.name:{width}}  {arm.source:8}  {arm.summary}")
        return 0
    try:
        out = _folder(args)
        config = _config(args, out)
        print(
            f"{len(config.arms)} arms x {config.seeds} seed(s) x {config.steps} steps of {config.model} "
            f"on {resolve_device(args.device)}, data {config.data}, into {out}"
        )
        report = run_study(config, out, device=args.device, resume=args.resume, progress=ProgressBars())
    except TrainingInterrupted as stop:
        print(f"\n{stop}. Continue with --resume --out {out}", file=sys.stderr)
        return EXIT_INTERRUPTED
    except (ValueError, OSError, ImportError, TrainingDivergedError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USAGE
    except RuntimeError as error:
        return report_operator_error(error)
    print(comparison_table(read_study(out)).text())
    for name in ("summary.csv", "table.md", "figures"):
        print(out / name)
    print(f"report: {report}")
    return 0


def report_operator_error(error: RuntimeError) -> int:
    """Prints what an operator refused, such as a forced instruction set; any other RuntimeError is a defect."""
    if not str(error).startswith("bitnet_ext"):
        raise error
    print(f"error: {str(error).strip()}", file=sys.stderr)
    return EXIT_USAGE


def _folder(args: argparse.Namespace) -> Path:
    if args.out is not None:
        return args.out
    if args.resume:
        studies = [path.parent for path in RUNS.glob("collapse-*/study.json")]
        if not studies:
            raise ValueError(f"--resume: there is no study under {RUNS}; name its folder with --out")
        return max(studies, key=lambda folder: folder.stat().st_mtime)
    return RUNS / time.strftime("collapse-%Y%m%d-%H%M%S")


def _config(args: argparse.Namespace, out: Path) -> StudyConfig:
    base = default_config(resolve_device(args.device))
    settings = out / "study.json"
    if args.resume and settings.is_file():  # what is not said again is as it was
        try:
            saved = json.loads(settings.read_text())["config"]
            lists = {name: tuple(saved[name]) for name in ("arms", "eval_steps")}
            base = StudyConfig(**{**saved, **lists})
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{settings} is damaged: it must hold the study's config") from error
    given = {
        "arms": None if args.arms is None else tuple(args.arms),
        "steps": args.steps,
        "seeds": args.seeds,
        "data": args.data,
        "model": args.model,
        "eval_tokens": args.eval_tokens,
    }
    return dataclasses.replace(base, **{name: value for name, value in given.items() if value is not None})


class ProgressBars:
    """One bar a run: steps done, loss, unique tokens, steps/s, time left."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._unique: int | None = None

    def run_started(self, arm: str, seed: int, step: int, steps: int) -> None:
        self._unique = None
        self._bar = tqdm(
            total=steps,
            initial=step,
            desc=f"{arm} seed {seed}",
            unit="step",
            dynamic_ncols=True,
            mininterval=0.5,
        )

    def run_advanced(self, step: int, record: dict[str, Any]) -> None:
        self._unique = record.get("unique_of_20", self._unique)
        unique = "-" if self._unique is None else f"{self._unique}/20"
        self._bar.set_postfix_str(f"loss {record['loss']:.3f}, unique {unique}", refresh=False)
        self._bar.update(step - self._bar.n)

    def run_finished(self) -> None:
        self._bar.close()
