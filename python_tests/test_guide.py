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


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all pages, as a reader has who follows them."""
    return tmp_path_factory.mktemp("guide")


def test_every_page_is_listed() -> None:
    assert len(PAGES) >= 10
    assert {path.name for path in GUIDE.glob("*.md")} == {"index.md", *PAGES}


@pytest.mark.slow
@pytest.mark.xdist_group("guide")
@pytest.mark.parametrize("page", PAGES)
def test_page(page: str, folder: Path) -> None:
    if page == "own-tokenizer.md":
        pytest.importorskip("tokenizers")
    scripts = sysconfig.get_path("scripts")
    environment = os.environ | {
        "PATH": f"{scripts}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "2",
    }
    found = blocks(page)
    assert found
    for language, text in found:
        command = (
            ["bash", "-euo", "pipefail", "-c", text] if language == "bash" else [sys.executable, "-c", text]
        )
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, f"{page}:\n{text}\n{done.stdout}\n{done.stderr}"
