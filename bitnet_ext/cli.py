"""The ``bitnet-ext`` command."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from bitnet_ext import __version__, build_info
from bitnet_ext.collapse import command as collapse_command


def main(argv: Sequence[str] | None = None) -> int:
    """Parses the command line and runs one subcommand; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="bitnet-ext", description="Train, understand and run ternary language models."
    )
    parser.add_argument("--version", action="version", version=f"bitnet_ext {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="print facts about this installation as JSON")
    collapse = commands.add_parser("collapse", help="run the collapse experiments and write their report")
    collapse_command.add_arguments(collapse)
    args = parser.parse_args(argv)
    if args.command == "info":
        print(json.dumps(build_info(), indent=1))
        return 0
    return collapse_command.run(args)


if __name__ == "__main__":
    sys.exit(main())
