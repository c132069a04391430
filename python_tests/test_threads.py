"""The bound on how long idle threads spin: when it is set, and that it is in the environment before torch loads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from bitnet_ext import _threads


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the load average is read on Linux")
@pytest.mark.parametrize(("load", "turns"), [(0.0, "100000"), (1.0, "10000")])
def test_the_bound_is_set_where_nobody_has_chosen(
    load: float, turns: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (load * (os.cpu_count() or 1), 0.0, 0.0))
    environment = {"OMP_NUM_THREADS": "4"}
    assert _threads.bound_spinning(environment, loaded=())
    assert environment == {"OMP_NUM_THREADS": "4", "GOMP_SPINCOUNT": turns, "KMP_BLOCKTIME": "1"}


@pytest.mark.parametrize("name", _threads.CHOSEN)
def test_a_choice_of_the_user_stays(name: str) -> None:
    environment = {name: "7"}
    assert not _threads.bound_spinning(environment, loaded=())
    assert environment == {name: "7"}


def test_nothing_is_set_where_torch_has_read_it_already(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_threads, "_came_too_late", False)
    environment: dict[str, str] = {}
    assert not _threads.bound_spinning(environment, loaded=("torch",))
    assert not environment


@pytest.mark.parametrize(("first", "expected"), [("bitnet_ext", ("10000", "100000")), ("torch", ("None",))])
def test_importing_the_package_sets_it(first: str, expected: tuple[str, ...]) -> None:
    """In a fresh process; torch itself must not have been loaded before the variable was there."""
    clean = {name: value for name, value in os.environ.items() if name not in _threads.CHOSEN}
    script = f"import {first}, bitnet_ext, os; print(os.environ.get('GOMP_SPINCOUNT'))"
    result = subprocess.run([sys.executable, "-c", script], env=clean, capture_output=True, text=True)
    assert result.stdout.strip() in expected, result.stderr


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="GNU OpenMP is Linux's")
def test_busy_cores_are_told_once_where_the_bound_came_too_late(monkeypatch: pytest.MonkeyPatch) -> None:
    load = float(os.cpu_count() or 1)
    monkeypatch.setattr(os, "getloadavg", lambda: (load, load, load))
    monkeypatch.setattr(_threads, "_came_too_late", False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _threads.warn_of_spinning(2)
        _threads.bound_spinning({"GOMP_SPINCOUNT": "7"}, loaded=("torch",))  # the user's choice
        _threads.warn_of_spinning(2)
        _threads.bound_spinning({}, loaded=("torch",))
        _threads.warn_of_spinning(1)
    with pytest.warns(UserWarning, match="import bitnet_ext before torch, or set GOMP_SPINCOUNT=10000"):
        _threads.warn_of_spinning(2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _threads.warn_of_spinning(2)
        _threads.bound_spinning({}, loaded=("torch",))
        load = 0.0  # idle cores
        _threads.warn_of_spinning(2)


def test_the_bench_runs(tmp_path: Path) -> None:
    script = Path(__file__).parent.parent / "bench" / "threads.py"
    file = tmp_path / "result.json"
    command = [sys.executable, str(script), "--quick", "--spins", "--json", str(file)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    rows = json.loads(file.read_text())["rows"]
    assert [row["way"] for row in rows] == ["unbound", "idle default", "busy default", "one thread"]
    assert rows[-1]["threads"] == 1 and all(len(row["seconds"]) == 1 for row in rows)
