"""The bound on how long idle threads spin: when it is set, and that it is in the environment before torch loads."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from bitnet_ext import _threads


def test_the_bound_is_set_where_nobody_has_chosen() -> None:
    environment = {"OMP_NUM_THREADS": "4"}
    assert _threads.bound_spinning(environment, loaded=())
    assert environment == {"OMP_NUM_THREADS": "4", "GOMP_SPINCOUNT": "10000", "KMP_BLOCKTIME": "1"}


@pytest.mark.parametrize("name", _threads.CHOSEN)
def test_a_choice_of_the_user_stays(name: str) -> None:
    environment = {name: "7"}
    assert not _threads.bound_spinning(environment, loaded=())
    assert environment == {name: "7"}


def test_nothing_is_set_where_torch_has_read_it_already() -> None:
    environment: dict[str, str] = {}
    assert not _threads.bound_spinning(environment, loaded=("torch",))
    assert not environment


@pytest.mark.parametrize(("first", "expected"), [("bitnet_ext", "10000"), ("torch", None)])
def test_importing_the_package_sets_it(first: str, expected: str | None) -> None:
    """In a fresh process; torch itself must not have been loaded before the variable was there."""
    clean = {name: value for name, value in os.environ.items() if name not in _threads.CHOSEN}
    script = f"import {first}, bitnet_ext, os; print(os.environ.get('GOMP_SPINCOUNT'))"
    result = subprocess.run([sys.executable, "-c", script], env=clean, capture_output=True, text=True)
    assert result.stdout.strip() == str(expected), result.stderr
