"""The packages of bitnet_ext.collapse: their imports point one way, and each says what its modules are for."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import bitnet_ext.collapse

ROOT = Path(bitnet_ext.collapse.__file__).parent
PREFIX = "bitnet_ext.collapse."
#: Package -> what it may import of the others; the modules beside them may import all.
BELOW = {
    "results": set(),
    "diagnose": {"options", "results"},
    "verdicts": {"results"},
    "pages": {"results", "verdicts"},
    "instrument": {"options", "results", "pages", "evaluator"},
}


def imported(path: Path) -> Iterator[tuple[str, bool]]:
    """(part of the laboratory, whether at the top of the module) of everything that a module imports of it."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(PREFIX):
            yield node.module.removeprefix(PREFIX).split(".")[0], node in tree.body


@pytest.mark.parametrize("package", BELOW)
def test_imports_point_one_way(package: str) -> None:
    for path in (ROOT / package).rglob("*.py"):
        for part, at_the_top in imported(path):
            assert part in BELOW[package] | {package} and at_the_top, f"{path} imports {part}"


def test_a_package_names_its_modules() -> None:
    for path in ROOT.rglob("__init__.py"):
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        inside = {p.stem for p in path.parent.iterdir() if p.suffix == ".py" or (p / "__init__.py").is_file()}
        assert set(re.findall(r"``(\w+)``", docstring)) == inside - {"__init__"}, path
