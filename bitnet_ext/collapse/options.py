"""The options of ``bitnet-ext collapse`` and of its subcommands. Imports no torch: ``--help`` is answered at once."""

from __future__ import annotations

import argparse
from pathlib import Path

from bitnet_ext.collapse.blocks import BLOCKS

DIAGNOSE_ACCEPTS = (
    "a run folder, its metrics.jsonl, or a checkpoint of bitnet_ext (its folder, or its model.safetensors)"
)
#: Held-out predictions, where none are asked for.
DIAGNOSE_EVAL_TOKENS, INSTRUMENT_EVAL_TOKENS = 8192, 4096


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
    parser.add_argument(
        "--blocks",
        nargs="+",
        metavar="BLOCK",
        help=f"blocks of the factorial study instead of arms: {', '.join(BLOCKS)} (see --list-blocks)",
    )
    parser.add_argument(
        "--generation",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="measure generated text at the end of each run (default: on a GPU)",
    )
    parser.add_argument(
        "--keep-weights",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="keep the final weights of each run, for `generate` and `diagnose --data` (default: no)",
    )
    parser.add_argument("--books", metavar="NAME|PATH", help="the larger text that block F reads")
    parser.add_argument(
        "--scale",
        type=float,
        help="share of its steps that each run of a block takes, to try a study out (default 1)",
    )
    parser.add_argument(
        "--device", default="auto", help="auto (default), cpu, cuda, cuda:N, or several GPUs: cuda:0,cuda:1"
    )
    parser.add_argument(
        "--processes",
        type=int,
        default=0,
        help="processes a device that share the runs (default 0: this one)",
    )
    parser.add_argument(
        "--together",
        type=int,
        default=1,
        help="runs at a time in each process, on a GPU at most 16 (default 1)",
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder of the study (default runs/collapse-<time>)"
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue the study in --out (default: the newest runs/collapse-*); --arms and --seeds may add to it",
    )
    parser.add_argument(
        "--report",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="write table, figures and report at the end (default); `bitnet-ext collapse report DIR` does it later",
    )
    parser.add_argument("--list-arms", action="store_true", help="print the arms and stop")
    parser.add_argument(
        "--list-blocks", action="store_true", help="print the blocks of the factorial study and stop"
    )


def add_subcommands(parser: argparse.ArgumentParser) -> None:
    """Adds ``report``, ``diagnose`` and ``instrument`` to the parser of the experiments, as ``args.action``."""
    commands = parser.add_subparsers(dest="action", metavar="report|diagnose|instrument")
    report = commands.add_parser(
        "report", help="write the report of a study from its runs, however far they got"
    )
    report.add_argument("folder", type=Path, metavar="DIR", help="folder of the study")
    diagnose = commands.add_parser("diagnose", help="say which kind of trouble a run of one's own shows")
    add_diagnose_arguments(diagnose)
    check = commands.add_parser("instrument", help="check every metric on predictors of known health")
    add_instrument_arguments(check)


def add_diagnose_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``diagnose``."""
    parser.description = (
        "Says which kind of trouble a run shows, by which numbers and which rule, and what to change. "
        "Exit status: 0 when nothing is the matter, 1 when something is (or too little is known), 2 for bad input."
    )
    parser.add_argument("path", metavar="PATH", help=DIAGNOSE_ACCEPTS)
    parser.add_argument(
        "--data",
        metavar="NAME|PATH",
        help="corpus on whose held-out part the checkpoint is evaluated as well, by its own tokenizer; the one it was "
        "trained on",
    )
    parser.add_argument(
        "--eval-tokens",
        type=int,
        default=DIAGNOSE_EVAL_TOKENS,
        metavar="N",
        help=f"held-out predictions with --data (default {DIAGNOSE_EVAL_TOKENS})",
    )
    parser.add_argument(
        "--device", default="auto", help="of the evaluation: auto (default), cpu, cuda or cuda:N"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def add_instrument_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the check."""
    parser.add_argument(
        "--data",
        default="wiki-leads",
        metavar="NAME|PATH",
        help="text: wiki-leads (default), wikitext-2, a path",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the results")
    parser.add_argument(
        "--model", default="collapse-256", metavar="PRESET", help="network (default collapse-256)"
    )
    parser.add_argument(
        "--checkpoint", type=Path, metavar="PATH", help="of a healthy network, to compare with"
    )
    parser.add_argument(
        "--eval-tokens",
        type=int,
        default=INSTRUMENT_EVAL_TOKENS,
        metavar="N",
        help=f"held-out positions (default {INSTRUMENT_EVAL_TOKENS:,})",
    )
    parser.add_argument(
        "--generation",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="measure generated text, too (default)",
    )
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda or cuda:N")
