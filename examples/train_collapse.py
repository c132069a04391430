"""Runs the collapse experiments: why a small ternary model's predictions fall to two or three tokens while
its loss falls, and what cures it.

    python examples/train_collapse.py                 # CPU: a comparison in minutes; GPU: 10,000 steps an arm
    python examples/train_collapse.py --list-arms
    python examples/train_collapse.py --arms standard-lr adamw --steps 2000 --seeds 3 --data my_text.txt

Ctrl-C leaves a run that continues with --resume. Table, CSV, figures and report.html are in the folder that
is printed at the end.
"""

from __future__ import annotations

import argparse
import sys

from bitnet_ext.collapse import command, options


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_arguments(parser)
    return command.run(parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
