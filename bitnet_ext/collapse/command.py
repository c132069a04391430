"""The command line of the collapse experiments, shared by the example and by ``bitnet-ext collapse``."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from pathlib import Path

import torch

from bitnet_ext.collapse.arms import ARMS
from bitnet_ext.collapse.blocks import BLOCKS, FACTORIAL
from bitnet_ext.collapse.pages import write_pages
from bitnet_ext.collapse.pages.comparison_table import comparison_table
from bitnet_ext.collapse.progress import ProgressBars
from bitnet_ext.collapse.results import Study, read_study
from bitnet_ext.collapse.study import StudyConfig, default_config, read_config, run_study
from bitnet_ext.collapse.verdicts import verdicts
from bitnet_ext.collapse.workers import StudyWorkerError
from bitnet_ext.models import BitNetForCausalLM, preset
from bitnet_ext.training import TrainingInterrupted
from bitnet_ext.training.device import resolve_device

RUNS = Path("runs")
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130


def run(args: argparse.Namespace) -> int:
    """Runs the study that `args` describe, prints the table; returns the exit status."""
    if args.list_arms or args.list_blocks:
        _list(args)
        return 0
    try:
        out = _folder(args)
        config = _config(args, out)
        print(f"{_plan(config)}, data {config.data}, into {out}")
        print(_about_weights(config))
        places = max(1, args.processes) * args.together
        report = run_study(
            config,
            out,
            device=args.device,
            resume=args.resume,
            progress=ProgressBars(keep=places == 1),
            processes=args.processes,
            together=args.together,
            report=args.report,
        )
    except TrainingInterrupted as stop:
        print(f"\n{stop}. Continue with --resume --out {out}", file=sys.stderr)
        return EXIT_INTERRUPTED
    except (ValueError, OSError, ImportError, StudyWorkerError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USAGE
    except RuntimeError as error:
        return report_operator_error(error)
    if not args.report:
        print(out)
        return 0
    study = read_study(out)
    if study.is_factorial:
        _print_verdicts(study)
    else:
        print(comparison_table(study).text())
        for name in ("summary.csv", "table.md", "figures"):
            print(out / name)
    print(f"report: {report}")
    return 0


def run_report(args: argparse.Namespace) -> int:
    """Writes the pages of a study; returns the exit status."""
    try:
        pages = write_pages(args.folder)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USAGE
    study = read_study(args.folder)
    if study.is_factorial:
        _print_verdicts(study)
    for path in pages.values():
        print(path)
    return 0


def _print_verdicts(study: Study) -> None:
    judged = verdicts(study)
    width = max(len(verdict.title) for verdict in judged)
    for verdict in judged:
        print(f"{verdict.key:14} {verdict.title:{width}}  {verdict.answer}")


def _list(args: argparse.Namespace) -> None:
    if args.list_arms:
        width = max(map(len, ARMS))
        for arm in ARMS.values():
            print(f"{arm.name:{width}}  {arm.source:8}  {arm.summary}")
    if args.list_blocks:
        width = max(map(len, FACTORIAL))
        for block in BLOCKS.values():
            print(f"{block.key}  {block.title}: {block.question}")
            for name in block.arms:
                arm = FACTORIAL[name]
                print(f"    {name:{width}}  {arm.steps:6,} steps  {arm.summary}")


def _plan(config: StudyConfig) -> str:
    if not config.blocks:
        return f"{len(config.arms)} arms x {config.seeds} seed(s) x {config.steps} steps of {config.model}"
    tasks = [task for task in config.tasks() if not task.is_stem]
    steps = sum(task.steps - task.first_step for task in tasks)
    return (
        f"blocks {', '.join(config.blocks)}: {len(config.all_arms())} arms, {len(tasks)} runs, {steps:,} steps "
        f"of {config.model} and its other widths"
    )


def _about_weights(config: StudyConfig) -> str:
    """The disk space that the final weights take, or would take."""
    sizes = []
    for name in {task.model for task in config.tasks() if not task.is_stem}:
        with torch.device("meta"):
            sizes.append(4e-6 * BitNetForCausalLM(preset(name)).num_parameters()["total"])
    size = f"{min(sizes):.0f}" if len(sizes) == 1 else f"{min(sizes):.0f} to {max(sizes):.0f}"
    if config.keep_weights:
        return f"weights: {size} MB a run, in ARM/seedN/checkpoint"
    return f"weights: not kept; --keep-weights keeps those of each run, {size} MB"


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
    base = default_config(resolve_device(args.device.split(",")[0]))
    settings = out / "study.json"
    if args.resume and settings.is_file():  # what is not said again is as it was
        base = read_config(settings)
    given = {
        "arms": None if args.arms is None else tuple(args.arms),
        "steps": args.steps,
        "seeds": args.seeds,
        "data": args.data,
        "model": args.model,
        "eval_tokens": args.eval_tokens,
        "blocks": None if args.blocks is None else tuple(args.blocks),
        "scale": args.scale,
        "books": args.books,
        "generation": args.generation,
        "keep_weights": args.keep_weights,
    }
    if args.blocks is not None and args.arms is None and not base.blocks:
        given["arms"] = ()  # blocks instead of the arms that run when nothing is said
    return dataclasses.replace(base, **{name: value for name, value in given.items() if value is not None})
