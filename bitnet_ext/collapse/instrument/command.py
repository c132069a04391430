"""``bitnet-ext collapse instrument``: the check of the metrics, and the files that hold what it found."""

from __future__ import annotations

import argparse
import sys

from bitnet_ext.collapse.instrument.check import instrument_check
from bitnet_ext.collapse.instrument.page import instrument_table, write_instrument
from bitnet_ext.data.corpora import load_corpus
from bitnet_ext.models import preset
from bitnet_ext.training.device import resolve_device


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
