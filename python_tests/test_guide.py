"""The guide: every block of its pages runs as it is printed, in the order of the pages, in one folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

GUIDE = Path(__file__).parents[1] / "docs" / "guide"
PAGES = re.findall(r"\]\(([a-z-]+\.md)\)", (GUIDE / "index.md").read_text(encoding="utf-8"))
_BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: str) -> list[tuple[str, str]]:
    """(language, text) of the blocks of a page."""
    return _BLOCK.findall((GUIDE / page).read_text(encoding="utf-8"))


def test_every_page_is_listed() -> None:
    assert len(PAGES) >= 10
    assert {path.name for path in GUIDE.glob("*.md")} == {"index.md", *PAGES}
    assert all(map(blocks, PAGES))


@pytest.mark.slow
def test_pages(tmp_path: Path) -> None:
    """One test, since a page goes on with what the pages before it have made."""
    pytest.importorskip("tokenizers")
    folders = [sysconfig.get_path("scripts"), str(Path(sys.executable).parent), os.environ["PATH"]]
    environment = os.environ | {"PATH": os.pathsep.join(folders), "OMP_NUM_THREADS": "1"}
    for page in PAGES:
        for language, text in blocks(page):
            shell = ["bash", "-euo", "pipefail", "-c", text]
            done = subprocess.run(
                shell if language == "bash" else [sys.executable, "-c", text],
                cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300,
            )  # fmt: skip
            assert done.returncode == 0, f"{page}:\n{text}\n{done.stdout}\n{done.stderr}"
