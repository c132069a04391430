"""Packed products at many tokens, as in prefill: bound by the tensor cores.

    python bench/prefill.py                              # the table, on the current GPU
    python bench/prefill.py --cases 4096x14336x4096 --seconds 4
    python bench/prefill.py --kernel NAME                # that kernel in place of the library's choice

One product a call, y [M, N] in bfloat16 from int8 x [M, K] and prepacked ternary weights [N, K]; Gaussian weights
and activations, quantised as in a model. Peers see the same values in their own formats: F.linear in bfloat16,
torch._int_mm (int32 result, no scales), torch._scaled_mm in fp8 with fast accumulation. Every result is checked
whole against the exact integers before it is timed.

Large products are bound by the power limit, so a time depends on what ran just before. Each is therefore timed
twice: in turns of some 14 ms with the peers, at the clock that all of them bring about, and by itself, at its own
clock, which it has reached before timing starts. The second is what a prefill or a training step sees.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bitnet_ext.testing import (
    environment,
    format_table,
    measure_ceiling,
    paired_ratio,
    time_interleaved,
    write_json,
)
from bitnet_ext.testing.bench import Call, Timing, device_name
from bitnet_ext.testing.products import BF16, FP8, GEMLITE, INT8, Ours, Peers, Problem
from bitnet_ext.testing.script import (
    add_common_options,
    kernel_variable,
    library_variables,
    positive_number,
    result_path,
    run_on_cuda,
    sizes,
)

HERE = Path(__file__).resolve().parent
CASES = (
    *("512x4096x4096", "2048x13824x2560", "2048x2560x6912", "4096x4096x4096"),
    *("4096x14336x4096", "4096x4096x14336", "16384x14336x4096"),
)
#: Dense int8 TOP/s of the data sheets, by a part of the device's name; the first that fits.
PEAK_TOPS = {"H200": 1979.0, "H100 PCIe": 1513.0, "H100": 1979.0, "A100": 624.0}
#: Fewest calls in a graph: at 50 us and more a call, the gap between replays counts for little.
GRAPH_CALLS = 8

OURS = "bitnet_ext"


def peak_of(name: str) -> float | None:
    return next((peak for part, peak in PEAK_TOPS.items() if part in name), None)


def row_of(
    M: int, N: int, K: int, timings: dict[str, Timing], skipped: dict[str, str], peak_tops: float | None
) -> dict[str, Any]:
    """A row's values, from a timing for each variant and the reasons of the peers that have none."""
    ours = timings[OURS]
    operations = 2 * M * N * K
    tops = operations / ours.median / 1e12
    peers: dict[str, Any] = {name: {"skipped": reason} for name, reason in skipped.items()}
    for name, timing in timings.items():
        if name != OURS:
            peers[name] = {
                "seconds": timing.to_dict(),
                "tera_per_s": operations / timing.median / 1e12,
                "ratio": paired_ratio(timing, ours),
            }
    return {
        **{"M": M, "N": N, "K": K},
        "seconds": ours.to_dict(),
        "top_per_s": tops,
        "share_of_peak": None if peak_tops is None else tops / peak_tops,
        "peers": peers,
    }


def columns(gemlite: bool) -> tuple[str, ...]:
    return (
        *("MxNxK", "us", "p25..p75", "TOP/s", "% of peak", "bf16 us", "vs bf16"),
        *("_int_mm us", "vs _int_mm", "fp8 us", "vs fp8"),
        *(("gemlite us", "vs gemlite") if gemlite else ()),
    )


def cells_of(row: dict[str, Any], gemlite: bool) -> list[str]:
    """A row of the table, in the order of `columns`."""
    seconds, share = row["seconds"], row["share_of_peak"]
    cells = [
        f"{row['M']}x{row['N']}x{row['K']}",
        f"{1e6 * seconds['median']:.1f}",
        f"{1e6 * seconds['p25']:.1f}..{1e6 * seconds['p75']:.1f}",
        f"{row['top_per_s']:.0f}",
        "-" if share is None else f"{100 * share:.0f}",
    ]
    for name in (BF16, INT8, FP8, *((GEMLITE,) if gemlite else ())):
        peer = row["peers"].get(name, {})
        if "seconds" in peer:
            cells += [f"{1e6 * peer['seconds']['median']:.1f}", f"{peer['ratio']:.2f}x"]
        else:
            cells += ["-", "-"]
    return cells


def measure(
    cases: Sequence[tuple[int, ...]],
    device: torch.device,
    args: argparse.Namespace,
    peak_tops: float | None,
    repeats: int,
) -> list[dict[str, Any]]:
    rows = []
    peer_names = (BF16, INT8, FP8, GEMLITE) if args.gemlite else (BF16, INT8, FP8)
    for M, N, K in cases:
        problem = Problem(N, K, M, device)
        ours = Ours(problem)
        peer_calls, skipped = Peers(problem, peer_names).calls(M)
        calls = {OURS: ours.calls(M, kernel_variable(args), constant=True)} | peer_calls

        def timed(variants: dict[str, list[Call]], seconds: float) -> dict[str, Timing]:
            return time_interleaved(
                variants,
                device,
                repeats=repeats,
                min_block_seconds=0.0 if args.quick else seconds / repeats / len(variants),
                graph_calls=GRAPH_CALLS,
                settle_seconds=0.0 if args.quick else seconds / 2,
            )

        row = row_of(M, N, K, timed(calls, args.seconds), skipped, peak_tops)
        alone = {name: timed({name: call}, args.seconds / 2)[name] for name, call in calls.items()}
        row["alone"] = row_of(M, N, K, alone, skipped, peak_tops)
        rows.append(row)
        del problem, ours, calls, peer_calls
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return rows


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    case = sizes("MxNxK", "4096x14336x4096")
    parser.add_argument("--cases", nargs="+", type=case, metavar="MxNxK", help=f"default: {' '.join(CASES)}")
    parser.add_argument(
        "--seconds", type=positive_number, default=0.5, metavar="S",
        help="a case is measured for about so long in turns, and half as long for each variant by itself; "
        "half as long again is thrown away first (default: 0.5)",
    )  # fmt: skip
    parser.add_argument(
        "--peak", type=positive_number, metavar="TOP/s", help="int8 peak of a device not known here"
    )
    add_common_options(parser, repeats=9)
    args = parser.parse_args(argv)
    args.cases = args.cases or [case(text) for text in (("128x256x256",) if args.quick else CASES)]
    return args


def run(args: argparse.Namespace, device: torch.device) -> None:
    facts = environment(device, HERE)
    ceiling = measure_ceiling(device, quick=args.quick)
    peak_tops = args.peak or peak_of(device_name(facts))
    repeats = args.repeats or (2 if args.quick else 9)
    print(f"{device_name(facts)}, torch {torch.__version__}, int8 peak of the data sheet: ", end="")
    print("unknown" if peak_tops is None else f"{peak_tops:.0f} TOP/s")
    rows = measure(args.cases, device, args, peak_tops, repeats)
    print("in turns:")
    print(format_table(columns(args.gemlite), [cells_of(row, args.gemlite) for row in rows]))
    print("each by itself:")
    print(format_table(columns(args.gemlite), [cells_of(row["alone"], args.gemlite) for row in rows]))
    path = result_path(args.json, HERE, "prefill", facts, args.quick)
    settings = {
        "cases": args.cases,
        "seconds": args.seconds,
        "repeats": repeats,
        "kernel": args.kernel,
        "peak_top_per_s": peak_tops,
        "quick": args.quick,
        "variables": library_variables(),
    }
    write_json(
        path,
        {
            "bench": "prefill",
            "environment": facts,
            "settings": settings,
            "ceiling": ceiling,
            "rows": rows,
        },
    )
    print(f"written: {path}")


if __name__ == "__main__":
    sys.exit(run_on_cuda("bench/prefill.py", parse, run))
