#!/usr/bin/env python
"""The cost of a bound on how long idle threads spin, on idle cores and on cores that other programs use.

Training steps of one network, with PyTorch's pool of threads in each of several ways: as OpenMP leaves it ("unbound"),
as `import bitnet_ext` sets it on idle cores ("idle default") and on busy ones ("busy default"), with other bounds, and
with one thread. Each way is a process, since OpenMP reads its settings once. The processes train in turns, one at a
time, and ratios are taken turn by turn.

    python bench/threads.py                # on the cores as they are: idle ones, if nothing else runs
    python bench/threads.py --busy 2       # beside two programs that never stop
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from bitnet_ext import _threads
from bitnet_ext.testing.bench import device_name, environment, format_table, slug, write_json
from bitnet_ext.testing.script import exit_status, positive

HERE = Path(__file__).resolve().parent
UNBOUND, IDLE, BUSY, SINGLE = "unbound", "idle default", "busy default", "one thread"


def variables_of(way: str) -> dict[str, str]:
    """The environment variables of a way."""
    if way == UNBOUND:
        return {}
    if way == SINGLE:
        return {"OMP_NUM_THREADS": "1"}
    defaults = {IDLE: _threads.SPIN_TURNS, BUSY: _threads.BUSY_SPIN_TURNS}
    turns = defaults[way] if way in defaults else int(way)
    return {"GOMP_SPINCOUNT": str(turns), "KMP_BLOCKTIME": str(_threads.BLOCK_MILLISECONDS)}


def work(pipe: Connection, model: str, vocab_size: int | None) -> None:
    """Body of a process: makes as many steps as it is asked for and says how long they took."""
    import numpy as np
    import torch

    from bitnet_ext.collapse.arms import arm_config
    from bitnet_ext.models import BitNetForCausalLM, preset
    from bitnet_ext.training.distributed import World
    from bitnet_ext.training.step import TrainStep
    from bitnet_ext.training.update_rules import make_optimizer

    config = arm_config("adamw", 10_000, seed=0)
    network = BitNetForCausalLM(preset(model, **({"vocab_size": vocab_size} if vocab_size else {})), seed=0)
    step = TrainStep(network, make_optimizer(network, config), config, torch.device("cpu"), World())
    generator = np.random.default_rng(0)
    shape = (1, config.batch_size, config.seq_len + 1)
    done = 0
    pipe.send(torch.get_num_threads())
    while (count := pipe.recv()) is not None:
        started, started_cpu = time.perf_counter(), time.process_time()
        for _ in range(count):
            step.run(done, generator.integers(0, network.config.vocab_size, shape))
            done += 1
        pipe.send((time.perf_counter() - started, time.process_time() - started_cpu))


def busy() -> None:
    while True:
        pass


def start(way: str, model: str, vocab_size: int | None) -> tuple[Connection, Any, int]:
    """A process of one way; returns its pipe, the process and its number of threads."""
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe()
    kept = dict(os.environ)
    for name in (*_threads.CHOSEN, "OMP_NUM_THREADS"):
        os.environ.pop(name, None)
    os.environ |= variables_of(way) or {"GOMP_SPINCOUNT": "300000", "KMP_BLOCKTIME": "200"}
    try:
        process = context.Process(target=work, args=(theirs, model, vocab_size), daemon=True)
        process.start()
    finally:
        os.environ.clear()
        os.environ |= kept
    theirs.close()  # so that an end of the process is an error here instead of a wait without end
    return mine, process, mine.recv()


def run(args: argparse.Namespace) -> None:
    ways = [UNBOUND, IDLE, BUSY, *map(str, args.spins), SINGLE]
    started = {way: start(way, args.model, 512 if args.quick else None) for way in ways}
    context = multiprocessing.get_context("spawn")
    others = [context.Process(target=busy, daemon=True) for _ in range(args.busy)]
    for other in others:
        other.start()
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    cpu: dict[str, list[float]] = {way: [] for way in ways}
    loads = [os.getloadavg()[0]]
    try:
        for turn in range(args.repeats + 1):  # the first warms up
            for way in ways:
                pipe = started[way][0]
                pipe.send(args.steps)
                wall, used = pipe.recv()
                if turn:
                    seconds[way].append(wall / args.steps)
                    cpu[way].append(used / args.steps)
        loads.append(os.getloadavg()[0])
    finally:
        for process in [*others, *(process for _, process, _ in started.values())]:
            process.kill()
    rows, values = [], []
    for way in ways:
        ratio = statistics.median(u / s for u, s in zip(seconds[UNBOUND], seconds[way], strict=True))
        per_second = sorted(1 / s for s in seconds[way])
        row = {
            "way": way,
            "variables": variables_of(way),
            "threads": started[way][2],
            "seconds": seconds[way],
            "cpu_seconds": cpu[way],
            "speed_over_unbound": ratio,
        }
        values.append(row)
        rows.append(
            [
                f"{way} turns" if way.isdigit() else way,
                str(started[way][2]),
                f"{statistics.median(per_second):.2f}",
                f"{per_second[0]:.2f}..{per_second[-1]:.2f}",
                f"{1e3 * statistics.median(cpu[way]):.0f}",
                f"{ratio:.2f}x",
            ]
        )
    facts = environment("cpu", HERE)
    print(
        f"{args.model}, {args.steps} steps in turns, {args.repeats} turns, beside {args.busy} busy programs and what "
        f"else runs (load {loads[0]:.1f} before, {loads[-1]:.1f} after), {device_name(facts)}"
    )
    print(format_table(("threads wait", "threads", "steps/s", "min..max", "CPU ms/step", "vs unbound"), rows))
    name = f"threads-busy{args.busy}-{slug(device_name(facts))}{'-quick' if args.quick else ''}.json"
    settings = {key: value for key, value in vars(args).items() if key != "json"}
    path = args.json or HERE / "results" / name
    write_json(
        path,
        {
            "bench": "threads",
            "environment": facts,
            "settings": settings,
            "load_average": loads,
            "rows": values,
        },
    )
    print(f"written: {path}")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--busy", type=int, default=0, metavar="N", help="busy programs beside it (default 0)"
    )
    parser.add_argument(
        "--spins",
        type=positive,
        nargs="*",
        default=[1_000, 100_000],
        metavar="TURNS",
        help="other bounds to try (default 1000 100000)",
    )
    parser.add_argument("--model", default="collapse-256", help="preset (default collapse-256)")
    parser.add_argument("--steps", type=positive, default=10, help="in a turn (default 10)")
    parser.add_argument("--repeats", type=positive, default=7, help="turns (default 7)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="result file (default: bench/results/...)")
    parser.add_argument("--quick", action="store_true", help="a tiny model, to see that it runs")
    args = parser.parse_args()
    if args.quick:
        args.model, args.steps, args.repeats = "collapse-64", 2, 1
    return exit_status(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
