"""Timing on machines that are noisy, shared or asynchronous.

What is compared is measured in turns (A B C A B C ...), so a machine that grows slower half-way through slows
all alike, and ratios are taken round by round. Each sample is a block of calls long enough for the clock;
results are medians with their spread. On a GPU a block is one or more replays of a CUDA graph between two
events, so the time is the device's own, without the host's cost of launching. Where an operand should
come from memory and not from a cache, a variant is given as several calls over copies of it: see
:func:`rotation_count`.

    fast, plain = [lambda: ops.int8xint2_mm(...)], [lambda: torch.nn.functional.linear(...)]
    timings = time_interleaved({"packed": fast, "fp32": plain}, "cpu")
    print(timings["packed"].median, paired_ratio(timings["fp32"], timings["packed"]))
"""

from __future__ import annotations

import contextlib
import gc
import json
import math
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from bitnet_ext import build_info

Call = Callable[[], object]

#: Size assumed of a CPU's last-level cache where the system does not tell.
DEFAULT_CACHE_BYTES = 32 << 20

#: Fewest calls in a captured graph: the gap between two replays, about 2 us, is shared by so many.
GRAPH_CALLS = 32

#: Most copies of a rotated operand. A weight so small that more were needed is never alone in a cache.
MAX_COPIES = 512


@dataclass(frozen=True)
class Timing:
    """Seconds a call, one sample a block, in the order of measuring.

    Attributes:
        samples: at least one.
        cpu_samples: CPU seconds a call of the whole process, all threads, in the same blocks.
        calls: calls in a block.
        graph: whether the blocks were CUDA graph replays.
    """

    samples: tuple[float, ...]
    cpu_samples: tuple[float, ...]
    calls: int
    graph: bool

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def min(self) -> float:
        return min(self.samples)

    @property
    def max(self) -> float:
        return max(self.samples)

    @property
    def p25(self) -> float:
        return _quantile(self.samples, 0.25)

    @property
    def p75(self) -> float:
        return _quantile(self.samples, 0.75)

    @property
    def cpu_median(self) -> float:
        return statistics.median(self.cpu_samples)

    def to_dict(self) -> dict[str, Any]:
        """Seconds: median, min, p25, p75, max, cpu_median; and blocks, calls (in a block), graph."""
        names = ("median", "min", "p25", "p75", "max", "cpu_median")
        seconds = {name: getattr(self, name) for name in names}
        return seconds | {"blocks": len(self.samples), "calls": self.calls, "graph": self.graph}


def _quantile(samples: Sequence[float], share: float) -> float:
    ordered = sorted(samples)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def paired_ratio(base: Timing, other: Timing) -> float:
    """How many times faster `other` is than `base`: the median of the ratios of each round's two blocks."""
    return statistics.median(b / o for b, o in zip(base.samples, other.samples, strict=True))


def time_interleaved(
    variants: Mapping[str, Sequence[Call]],
    device: torch.device | str,
    *,
    repeats: int = 15,
    min_block_seconds: float = 0.02,
    min_calls: int = 1,
    graph: bool = True,
    graph_calls: int = GRAPH_CALLS,
    settle_seconds: float = 0.0,
) -> dict[str, Timing]:
    """Times each variant's calls, in turns.

    Args:
        variants: by name, calls that are made one after the other, over and over: one call, or one for each
            copy of an operand that should not stay in a cache.
        device: that the calls run on.
        repeats: rounds, and so blocks of each variant.
        min_block_seconds: a block repeats the calls until it lasts at least so long.
        min_calls: and until it holds at least so many calls.
        graph: on CUDA, replay a graph of the calls where they can be captured (not on a CPU).
        graph_calls: fewest calls in such a graph.
        settle_seconds: rounds that are thrown away first, so that clocks and power find their level under
            this very mix of work.

    Returns:
        a :class:`Timing` by name, in seconds a call.
    """
    if repeats < 1:
        raise ValueError(f"time_interleaved: repeats must be >= 1, got {repeats}")
    for name, calls in variants.items():
        if not calls:
            raise ValueError(f"time_interleaved: variant {name!r} must have at least one call, got none")
    device = torch.device(device)
    on_device = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with on_device, _no_collection():
        runners = {
            name: _CudaRunner(list(calls), graph, graph_calls)
            if device.type == "cuda"
            else _CpuRunner(list(calls))
            for name, calls in variants.items()
        }
        for runner in runners.values():
            runner.calibrate(min_block_seconds, min_calls)
        settled = time.perf_counter() + settle_seconds
        while time.perf_counter() < settled:
            for runner in runners.values():
                runner.block()
        samples: dict[str, list[tuple[float, float]]] = {name: [] for name in runners}
        for _ in range(repeats):
            for name, runner in runners.items():
                samples[name].append(runner.block())
    return {
        name: Timing(
            tuple(wall for wall, _ in samples[name]),
            tuple(cpu for _, cpu in samples[name]),
            runner.rounds * runner.calls_a_round,
            runner.is_graph,
        )
        for name, runner in runners.items()
    }


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Keeps Python's garbage collector out of the blocks."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class _Runner:
    """Blocks of a variant: `rounds` times all its calls."""

    is_graph = False

    def __init__(self, calls: list[Call]) -> None:
        self.calls = calls
        self.calls_a_round = len(calls)
        self.rounds = 1

    def elapsed(self) -> float:
        """Seconds of `rounds` rounds."""
        raise RuntimeError("elapsed is defined by the runner of a device")

    def calibrate(self, min_seconds: float, min_calls: int) -> None:
        """Warms up and sets `rounds`."""
        self.elapsed()
        while True:
            seconds = self.elapsed()
            if seconds >= min_seconds and self.rounds * self.calls_a_round >= min_calls:
                return
            wanted = max(1.1 * min_seconds / max(seconds, 1e-7), min_calls / self.calls_a_round / self.rounds)
            self.rounds = max(self.rounds + 1, math.ceil(self.rounds * min(wanted, 100.0)))

    def block(self) -> tuple[float, float]:
        """Wall and CPU seconds a call."""
        cpu = time.process_time()
        seconds = self.elapsed()
        count = self.rounds * self.calls_a_round
        return seconds / count, (time.process_time() - cpu) / count


class _CpuRunner(_Runner):
    def elapsed(self) -> float:
        start = time.perf_counter()
        for _ in range(self.rounds):
            for call in self.calls:
                call()
        return time.perf_counter() - start


class _CudaRunner(_Runner):
    def __init__(self, calls: list[Call], graph: bool, graph_calls: int) -> None:
        copies = math.ceil(graph_calls / len(calls)) if graph else 1
        super().__init__(calls * copies)
        self._graph = _capture(self.calls) if graph else None
        self.is_graph = self._graph is not None
        self._start = torch.cuda.Event(enable_timing=True)
        self._end = torch.cuda.Event(enable_timing=True)

    def elapsed(self) -> float:
        torch.cuda.synchronize()
        self._start.record()
        for _ in range(self.rounds):
            if self._graph is not None:
                self._graph.replay()
            else:
                for call in self.calls:
                    call()
        self._end.record()
        self._end.synchronize()
        return self._start.elapsed_time(self._end) / 1e3


def _capture(calls: Sequence[Call]) -> torch.cuda.CUDAGraph | None:
    """A graph of the calls, or None when they cannot be captured (they wait for the device, say)."""
    outer = torch.cuda.current_stream()
    stream = torch.cuda.Stream()
    stream.wait_stream(outer)
    with torch.cuda.stream(stream):
        for call in dict.fromkeys(calls):
            call()
        # A call that waits is found out here, since a capture that breaks off leaves traces in PyTorch.
        mode = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for call in dict.fromkeys(calls):
                call()
        except RuntimeError:
            return None
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    outer.wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for call in calls:
                call()
    except RuntimeError:
        torch.cuda.set_stream(outer)  # a failed capture leaves its own stream behind
        torch.cuda.synchronize()
        return None
    return graph


# --- caches and ceilings ------------------------------------------------------------------------------------


def cache_bytes(device: torch.device | str) -> int:
    """Bytes of the last cache before memory: a GPU's L2, a CPU's last level."""
    device = torch.device(device)
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    sizes = [0]
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text().strip()
        if text[:-1].isdigit() and text[-1] in units:
            sizes.append(int(text[:-1]) * units[text[-1]])
    return max(sizes) or DEFAULT_CACHE_BYTES


def rotation_count(nbytes: int, device: torch.device | str, *, limit_bytes: int = 2 << 30) -> int:
    """Copies of an operand of `nbytes` that exceed three times the cache, so that each use reads memory.

    At least 2 (1 when two would exceed `limit_bytes`), at most 512 and no more than `limit_bytes` hold.
    """
    wanted = max(2, math.ceil(3 * cache_bytes(device) / max(nbytes, 1)) + 1)
    return max(1, min(wanted, MAX_COPIES, limit_bytes // max(nbytes, 1)))


def measure_ceiling(device: torch.device | str, *, quick: bool = False) -> dict[str, float]:
    """What this device reaches on plain work, in PyTorch's own kernels: the roof of what is measured beside it.

    Args:
        device: cpu or cuda.
        quick: small operands, for a test.

    Returns:
        ``read_gb_per_s`` (float32 sum of a tensor far beyond the caches), ``update_gb_per_s`` (in-place
        product: each byte read and written, both counted), ``copy_gb_per_s`` (from one tensor to another, both
        counted), ``fp32_gflop_per_s`` (square matrix product).
    """
    device = torch.device(device)
    if device.type == "cuda":
        free, _total = torch.cuda.mem_get_info(device)
        nbytes = 64 << 20 if quick else min(4 << 30, free // 4)
        side = 512 if quick else 4096
    else:
        nbytes = 16 << 20 if quick else min(512 << 20, max(256 << 20, 4 * cache_bytes(device)))
        side = 256 if quick else 1536
    data = torch.ones(nbytes // 4, device=device)
    target = torch.empty_like(data)
    left, right = (torch.randn(side, side).to(device) for _ in range(2))
    out = torch.empty_like(left)
    calls: dict[str, list[Call]] = {
        "read": [data.sum],
        "update": [lambda: data.mul_(1.0)],
        "copy": [lambda: target.copy_(data)],
        "product": [lambda: torch.mm(left, right, out=out)],
    }
    timings = time_interleaved(calls, device, repeats=3 if quick else 9, min_block_seconds=0.0, graph=False)
    moved = data.numel() * 4
    # The best block: a ceiling is what the machine can do, not what it does under load.
    return {
        "read_gb_per_s": moved / timings["read"].min / 1e9,
        "update_gb_per_s": 2 * moved / timings["update"].min / 1e9,
        "copy_gb_per_s": 2 * moved / timings["copy"].min / 1e9,
        "fp32_gflop_per_s": 2 * side**3 / timings["product"].min / 1e9,
    }


# --- facts and files ----------------------------------------------------------------------------------------


def environment(device: torch.device | str, root: Path | None = None) -> dict[str, Any]:
    """Everything a reader needs to judge or repeat a measurement.

    Args:
        device: that is measured.
        root: a folder of the checkout, for its git commit.

    Returns:
        time (UTC), command (absolute paths cut to file names), commit (None outside git;
        ends in "-dirty" when files differ), device, python,
        torch, cuda, bitnet_ext (see :func:`bitnet_ext.build_info`), cpu (model, logical CPUs, those this
        process may use, threads, cache bytes, load average) and, on CUDA, gpu (name, compute capability,
        SMs, L2 and memory bytes, driver, clocks).
    """
    device = torch.device(device)
    script = Path(sys.argv[0])
    arguments = [Path(a).name if os.path.isabs(a) else a for a in sys.argv[1:]]  # a file to share
    facts: dict[str, Any] = {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python", f"{script.resolve().parent.name}/{script.name}", *arguments]),
        "commit": _commit(root) if root else None,
        "device": device.type,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "bitnet_ext": build_info(),
        "cpu": {
            "model": _cpu_model(),
            "logical_cpus": os.cpu_count(),
            "usable_cpus": len(os.sched_getaffinity(0))
            if hasattr(os, "sched_getaffinity")
            else os.cpu_count(),
            "threads": torch.get_num_threads(),
            "cache_bytes": cache_bytes("cpu"),
            "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        },
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts["gpu"] = {
            "name": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "sms": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
            "memory_bytes": properties.total_memory,
        } | _nvidia_smi(str(getattr(properties, "uuid", "")))
    return facts


def device_name(facts: Mapping[str, Any]) -> str:
    """The measured device's model, from :func:`environment`."""
    return str(facts["gpu"]["name"] if "gpu" in facts else facts["cpu"]["model"])


def slug(text: str) -> str:
    """`text` as a part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "unknown"


def write_json(path: Path | str, value: Mapping[str, Any]) -> Path:
    """Writes `value` under a temporary name, then renames; NaN and Inf are refused (they are not JSON)."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def format_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A plain-text table: the first column flush left, the others flush right."""
    for row in rows:
        if len(row) != len(columns):
            raise ValueError(
                f"format_table: a row must have {len(columns)} cells, got {len(row)}: {list(row)}"
            )
    lines = [list(columns), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]

    def line(cells: Sequence[str]) -> str:
        first, *others = (
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return "  ".join([first, *others]).rstrip()

    return "\n".join([line(lines[0]), "  ".join("-" * width for width in widths), *map(line, lines[1:])])


def _run(*command: str) -> str | None:
    """Standard output of a command, None when it cannot be run or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _commit(root: Path) -> str | None:
    commit = _run("git", "-C", str(root), "rev-parse", "HEAD")
    if not commit:
        return None
    changed = _run("git", "-C", str(root), "status", "--porcelain", "--untracked-files=no")
    return f"{commit}-dirty" if changed else commit


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE)
        if found:
            return found[1].strip()
    return platform.processor() or platform.machine() or "unknown CPU"


def _nvidia_smi(uuid: str) -> dict[str, str | None]:
    """Driver version and clocks in MHz; None where nvidia-smi does not tell."""
    names = {
        "driver": "driver_version",
        "sm_clock_mhz": "clocks.sm",
        "max_sm_clock_mhz": "clocks.max.sm",
        "memory_clock_mhz": "clocks.mem",
    }
    which = ["-i", uuid if uuid.startswith("GPU-") else f"GPU-{uuid}"] if uuid else []
    query = [f"--query-gpu={','.join(names.values())}", "--format=csv,noheader,nounits"]
    answer = _run("nvidia-smi", *which, *query) or _run("nvidia-smi", *query)
    cells = answer.splitlines()[0].split(",") if answer else []
    if len(cells) != len(names):
        return dict.fromkeys(names)
    return {name: cell.strip() for name, cell in zip(names, cells, strict=True)}
