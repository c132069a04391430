"""The program ``bitnet-ext``: :func:`bitnet_ext.cli.main`, started so that ``--help`` and ``--version`` need no torch.

``import bitnet_ext`` imports torch, because it registers the operators ``torch.ops.bitnet_ext``. It leaves that to the
first module that needs them where this package was imported before.
"""

from __future__ import annotations

import sys


def main() -> int:
    """Runs the command line; returns the exit status."""
    from bitnet_ext.cli import main as run

    return run()


if __name__ == "__main__":
    sys.exit(main())
