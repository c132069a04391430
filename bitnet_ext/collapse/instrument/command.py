"""``bitnet-ext collapse instrument``: the check of the metrics, and the files that hold what it found."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from bitnet_ext.collapse.instrument.check import EVAL_TOKENS, instrument_check
from bitnet_ext.collapse.instrument.page import instrument_table, write_instrument
from bitnet_ext.data.corpora import load_corpus
from bitnet_ext.models import preset
from bitnet_ext.training.device import resolve_device


def add_arguments(parser: argparse.ArgumentParser) -> None:
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
        default=EVAL_TOKENS,
        metavar="N",
        help=f"held-out positions (default {EVAL_TOKENS:,})",
    )
    parser.add_argument(
        "--generation",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="measure generated text, too (default)",
    )
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda or cuda:N")


def run(args: argparse.Namespace) -> int:
    """Runs the check that `args` describe, prints the table; returns the exit status: 2 for bad input."""
    try:
        report = instrument_check(
            load_corpus(args.data),
            preset(args.model),
            device=resolve_device(args.device),
            max_tokens=args.eval_tokens,
            checkpoint=args.checkpoint,
            generation=args.generation,
            progress=True,
        )
        paths = write_instrument(report, args.out)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(instrument_table(report).text())
    for path in paths:
        print(path)
    return 0
