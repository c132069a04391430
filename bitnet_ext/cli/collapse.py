"""``bitnet-ext collapse``: the collapse experiments, their report, a diagnosis."""

from __future__ import annotations

import argparse

from bitnet_ext.collapse import options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_arguments(parser)
    options.add_subcommands(parser)


def run(args: argparse.Namespace) -> int:
    """A subcommand, or the experiments when none is named."""
    if args.action == "diagnose":
        from bitnet_ext.collapse.diagnose import command as diagnose

        return diagnose.run(args)
    if args.action == "instrument":
        from bitnet_ext.collapse.instrument import command as instrument

        return instrument.run(args)
    from bitnet_ext.collapse import command

    return command.run_report(args) if args.action == "report" else command.run(args)
