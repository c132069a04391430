"""One process trains into a folder at a time; a lock of a dead process locks nothing."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bitnet_ext.models import BitNetConfig, BitNetForCausalLM
from bitnet_ext.training import RunInUseError, TrainConfig, Trainer, run_lock
from bitnet_ext.training.run_lock import LOCK, OWNER, RunLock

SHAPE = BitNetConfig(
    vocab_size=97,
    hidden_size=32,
    num_layers=1,
    num_heads=1,
    num_kv_heads=1,
    intermediate_size=64,
    max_seq_len=64,
)
CONFIG = TrainConfig(steps=8, warmup_steps=1, batch_size=2, seq_len=16, log_interval=1, checkpoint_interval=2)


def trainer(run_dir: Path, steps: int = 8) -> Trainer:
    config = dataclasses.replace(CONFIG, steps=steps)
    tokens = np.random.default_rng(0).integers(0, 97, 2000).astype(np.uint16)
    return Trainer(BitNetForCausalLM(SHAPE, seed=0), config, tokens, run_dir=run_dir, device="cpu")


def steps_of(run_dir: Path) -> list[int]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row["step"] for row in rows if row["kind"] == "train"]


def test_a_second_trainer_is_refused(tmp_path: Path) -> None:
    first = trainer(tmp_path).advance()
    for _ in range(3):
        next(first)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    expected = rf"is being trained by process {os.getpid()} on {socket.gethostname()} since \d{{4}}-\d\d-\d\d .* UTC$"
    for resume in (False, True):
        with pytest.raises(RunInUseError, match=expected):
            trainer(tmp_path).fit(resume=resume)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    for _ in first:
        pass
    assert steps_of(tmp_path) == list(range(1, 9))
    assert not (tmp_path / LOCK).exists()
    trainer(tmp_path).fit(resume=True)


def test_a_trainer_that_fails_gives_the_folder_back(tmp_path: Path) -> None:
    run = trainer(tmp_path).advance()
    next(run)
    run.close()
    with pytest.raises(FileExistsError, match="already holds a run"):
        trainer(tmp_path).fit()
    trainer(tmp_path).fit(resume=True)
    assert steps_of(tmp_path) == list(range(1, 9))


def test_a_folder_made_for_nothing_goes(tmp_path: Path) -> None:
    lock = RunLock(tmp_path / "a" / "b")
    lock.acquire()
    lock.release()
    assert not (tmp_path / "a" / "b").exists()
    lock.release()  # twice is harmless


def test_a_folder_that_cannot_be_one(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OSError, match=r"file.* cannot be the folder of a run: ") as error:
            trainer(path).fit()
        assert not isinstance(error.value, FileExistsError)


HOLDER = """
import sys, time
from pathlib import Path
from bitnet_ext.training.run_lock import RunLock
RunLock(Path(sys.argv[1])).acquire()
print("locked", flush=True)
time.sleep(600)
"""


def start_holder(folder: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "locked\n"
    return process


def test_the_lock_of_a_killed_process_locks_nothing(tmp_path: Path) -> None:
    holder = start_holder(tmp_path)
    try:
        with pytest.raises(RunInUseError, match=f"by process {holder.pid} on "):
            RunLock(tmp_path).acquire()
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    assert (tmp_path / LOCK).exists()
    lock = RunLock(tmp_path)
    lock.acquire()
    assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    lock.release()


def test_a_forked_child_does_not_keep_the_lock(tmp_path: Path) -> None:
    lock = RunLock(tmp_path)
    lock.acquire()
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        lock.release()  # not the child's: nothing happens
        os.read(read_end, 1)
        os._exit(0)
    try:
        with pytest.raises(RunInUseError):
            RunLock(tmp_path).acquire()
        os.close(lock._handle)  # type: ignore[arg-type]  (as the kernel does when the process is killed)
        lock._handle = None
        RunLock(tmp_path).acquire()
    finally:
        os.write(write_end, b"x")
        os.waitpid(child, 0)
        os.close(read_end)
        os.close(write_end)


def test_a_nameless_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "_NAMING", 0.01)
    lock = RunLock(tmp_path)
    lock.acquire()
    (tmp_path / LOCK).write_bytes(b"[" * 100_000)
    with pytest.raises(RunInUseError, match=r"is being trained by another process$"):
        RunLock(tmp_path).acquire()
    lock.release()


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(handle: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(run_lock.fcntl, "flock", flock)


@pytest.mark.usefixtures("no_locks")
def test_a_filesystem_without_locks(tmp_path: Path) -> None:
    lock = RunLock(tmp_path)
    lock.acquire()
    with pytest.raises(
        RunInUseError, match=rf"process {os.getpid()} on .*; remove .*{OWNER} if that process"
    ):
        RunLock(tmp_path).acquire()
    lock.release()
    assert list(tmp_path.iterdir()) == []
    trainer(tmp_path / "run", steps=2).fit()
    assert steps_of(tmp_path / "run") == [1, 2]


@pytest.mark.usefixtures("no_locks")
@pytest.mark.parametrize(
    ("change", "free"),
    [
        ({"pid": 999_999_999}, True),
        ({"process_started": "1"}, True),  # the number is another process's by now
        ({"pid": 999_999_999, "host": "elsewhere"}, False),
        ({}, False),
    ],
)
def test_a_stale_owner(change: dict[str, object], free: bool, tmp_path: Path) -> None:
    holder = RunLock(tmp_path)
    holder.acquire()
    record = json.loads((tmp_path / OWNER).read_text()) | change
    (tmp_path / OWNER).write_text(json.dumps(record))
    lock = RunLock(tmp_path)
    if free:
        lock.acquire()
        assert json.loads((tmp_path / OWNER).read_text())["pid"] == os.getpid()
        lock.release()
    else:
        with pytest.raises(RunInUseError):
            lock.acquire()


SCRIPT = """
import sys, time
sys.path.insert(0, {tests!r})
from pathlib import Path
import torch
torch.set_num_threads(1)
import test_run_lock as t
t.trainer(Path(sys.argv[1]), 60).fit(resume=True, on_progress=lambda step, record: time.sleep(0.02))
"""


def script() -> str:
    return SCRIPT.format(tests=str(Path(__file__).parent))


@pytest.mark.slow
def test_two_processes_at_once(tmp_path: Path) -> None:
    """As 13 and relia-04."""
    command = [sys.executable, "-c", script(), str(tmp_path)]
    both = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    errors = [process.communicate()[1] for process in both]
    codes = [process.returncode for process in both]
    assert sorted(codes) == [0, 1], errors
    winner, loser = both[codes.index(0)], errors[codes.index(1)]
    assert f"is being trained by process {winner.pid} on " in loser
    assert steps_of(tmp_path) == list(range(1, 61))


@pytest.mark.slow
def test_every_process_of_a_run_is_refused(tmp_path: Path) -> None:
    """Under torchrun only the main process locks; the others are told and do not wait for ever."""
    path = tmp_path / "script.py"
    path.write_text(script())
    lock = RunLock(tmp_path / "run")
    lock.acquire()
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
        str(path), str(tmp_path / "run"),
    ]  # fmt: skip
    result = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300
    )
    assert result.returncode != 0
    assert result.stderr.count(f"is being trained by process {os.getpid()} on ") >= 2
    lock.release()
    result = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert steps_of(tmp_path / "run") == list(range(1, 61))
