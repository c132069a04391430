"""``bitnet-ext collapse``: the collapse experiments, their report, a diagnosis."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from bitnet_ext.collapse import command

    command.add_arguments(parser)
    command.add_subcommands(parser)


def run(args: argparse.Namespace) -> int:
    from bitnet_ext.collapse import command

    return command.run_command(args)
