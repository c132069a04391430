"""Hooks of the site: a line ``HELP: train`` becomes the --help text of that subcommand."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from typing import Any

_HELP = re.compile(r"^HELP:(.*)$", re.MULTILINE)


def on_page_markdown(markdown: str, **_: Any) -> str:
    return _HELP.sub(lambda match: _help(match[1].split()), markdown)


def _help(command: list[str]) -> str:
    code = f"import sys; sys.argv[0] = 'bitnet-ext'; from bitnet_ext_cli import main; sys.exit(main({[*command, '--help']}))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"COLUMNS": "100"},
    )
    return f"```text\n{done.stdout}```"
