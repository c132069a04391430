"""Shows a line to whoever builds, although pip keeps a successful build to itself: on the controlling terminal.

Shows nothing where there is no terminal, as in most containers and in continuous integration.
"""

from __future__ import annotations

import contextlib
import sys
import textwrap

if __name__ == "__main__":
    text = textwrap.fill(" ".join(sys.argv[1:]), 100, initial_indent="  ", subsequent_indent="    ")
    with contextlib.suppress(OSError), open("/dev/tty", "w") as terminal:
        terminal.write(f"\n{text}\n")
