"""Skips tests marked `gpu` where there is none, and keeps torch from taking more threads than the machine has."""

from __future__ import annotations

import os

import pytest

import bitnet_ext  # noqa: F401 - before torch, whose idle threads then sleep instead of spinning

# isort: split
import torch


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="session", autouse=True)
def _threads() -> None:
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))
