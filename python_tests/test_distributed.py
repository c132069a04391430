"""Two gloo processes under torchrun follow the loss curve of one process with the same global batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

#: Relative difference allowed between the curves. The two runs add the same gradients in another order; an
#: int8 or ternary code near a rounding threshold may then fall on its other side.
TOLERANCE = 5e-3

SCRIPT = """
import sys, dataclasses
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
import test_trainer as t
config = dataclasses.replace(t.CONFIG, steps=30, batch_size=8, accumulation=2)
t.Trainer(t.model(), config, t.stream(), run_dir=sys.argv[1], device="cpu",
          evaluator=t.CountingEvaluator(), eval_steps=(10, 30)).fit()
"""


def _losses(run_dir: Path) -> list[float]:
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if record["kind"] == "train"]


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent)))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    one = [sys.executable, str(script), str(tmp_path / "one")]
    two = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
        str(script), str(tmp_path / "two"),
    ]  # fmt: skip
    for command in (one, two):
        result = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )
        assert result.returncode == 0, result.stderr[-3000:]
    single, double = _losses(tmp_path / "one"), _losses(tmp_path / "two")
    assert len(single) == len(double) == 30
    np.testing.assert_allclose(double, single, rtol=TOLERANCE)
    assert double[-1] < double[0]
