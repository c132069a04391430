"""Hooks of the site: a line ``HELP: train`` becomes the --help text of that subcommand, a role a link."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from typing import Any

_HELP = re.compile(r"^HELP:(.*)$", re.MULTILINE)
_FIELDS = re.compile(r"^FIELDS: TrainConfig$", re.MULTILINE)


_ROLE = re.compile(r":(?:class|func|meth|mod|attr|data):<code>~?([\w.]+)(\(\))?</code>")


def on_page_content(html: str, **_: Any) -> str:
    """Turns the cross-references of docstrings, such as :class:`bitnet_ext.nn.BitLinear`, into links."""

    def link(match: re.Match[str]) -> str:
        name = match[1]
        return f'<autoref identifier="{name}" optional><code>{name.rsplit(".", 1)[-1]}</code></autoref>'

    return _ROLE.sub(link, html)


def on_page_markdown(markdown: str, **_: Any) -> str:
    markdown = _FIELDS.sub(lambda _: _fields(), markdown)
    return _HELP.sub(lambda match: _help(match[1].split()), markdown)


def _fields() -> str:
    """The docstring of TrainConfig, which is made from the words of its fields."""
    code = "import bitnet_ext_cli; from bitnet_ext.training.config import TrainConfig; print(TrainConfig.__doc__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return f"```text\n{done.stdout}```"


def _help(command: list[str]) -> str:
    code = f"import sys; sys.argv = {['bitnet-ext', *command, '--help']}; from bitnet_ext_cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"COLUMNS": "100"},
    )
    return f"```text\n{done.stdout}```"
