"""Packed products at few tokens, as in decoding: bound by the bytes of the weights.

    python bench/decode.py                                          # the table, on the current GPU
    python bench/decode.py --shapes 2560x6912 --tokens 1 8 64
    python bench/decode.py --sweep --shapes 2560x2560 14336x4096    # M = 1 to 4096: where are the cliffs?

One product a call, y [M, N] in bfloat16 from int8 x [M, K] and prepacked ternary weights [N, K] (the last rows
of the table: int8 weights, as of an output head). Times are of replayed CUDA graphs of many calls over copies of
the weight that exceed three times the L2 cache, in two ways:

isolated: each call begins when the one before it has ended.
chained:  each call may start while the one before it drains (dependent launch) and read its weights early, as
          the layers of a model do.

The floor is the time that weight, x and y take at the read bandwidth measured in the same run. Every result is
checked whole against the exact integers before it is timed. Peers see the same values in their own formats.
"""

from __future__ import annotations

import argparse
import itertools
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
from bitnet_ext.testing.bench import Timing, device_name
from bitnet_ext.testing.products import BF16, FP8, GEMLITE, INT8, Ours, Peers, Problem
from bitnet_ext.testing.script import (
    add_common_options,
    kernel_variable,
    library_variables,
    positive,
    result_path,
    run_on_cuda,
    sizes,
)

HERE = Path(__file__).resolve().parent
#: BitNet b1.58 2B4T (qkv, gate + up, down), models of 3B and 30B, and Llama's at 8B and 70B.
SHAPES = (
    *("2560x2560", "3840x2560", "13824x2560", "2560x6912", "3200x10240", "20480x3200"),
    *("5120x27648", "55296x5120", "4096x4096", "14336x4096", "28672x8192"),
)
TOKENS = (1, 2, 4, 8, 16, 32, 64)
HEADS = ("128256x2560", "50304x2560")
HEAD_TOKENS = (1, 8)
SWEEP_SHAPES = ("2560x2560", "14336x4096")
#: Every M up to DENSE_TOKENS, where each may take another path through the code.
DENSE_TOKENS = 64
SWEEP_TOKENS = (
    *range(1, DENSE_TOKENS + 1),
    *(80, 96, 128, 160, 192, 256, 320, 384, 512, 768, 1024, 1536, 2048, 3072, 4096),
)

ISOLATED, CHAINED = "isolated", "chained"


# --- one product --------------------------------------------------------------------------------------------


def our_calls(ours: Ours, M: int, kernel: dict[str, str]) -> dict[str, Any]:
    alone = kernel | {"BITNET_EXT_DEPENDENT_LAUNCH": "0"}
    return {
        ISOLATED: ours.calls(M, alone, constant=False),
        CHAINED: ours.calls(M, kernel, constant=True),
    }


def row_of(
    label: dict[str, Any],
    timings: dict[str, Timing],
    skipped: dict[str, str],
    moved_bytes: int,
    read_gb_per_s: float,
    one_token: float | None,
) -> dict[str, Any]:
    """A row's values.

    Args:
        label: N, K, M, bits and weight_bytes.
        skipped: reasons of the peers that have no timing.
        one_token: seconds of the isolated product at M = 1, None when it is not measured.
    """
    isolated, chained = timings[ISOLATED], timings[CHAINED]
    floor = moved_bytes / read_gb_per_s / 1e9
    peers: dict[str, Any] = {name: {"skipped": reason} for name, reason in skipped.items()}
    for name, timing in timings.items():
        if name not in (ISOLATED, CHAINED):
            peers[name] = {"seconds": timing.to_dict(), "ratio": paired_ratio(timing, isolated)}
    return label | {
        "seconds": isolated.to_dict(),
        "chained_seconds": chained.to_dict(),
        "floor_seconds": floor,
        "share_of_read_ceiling": floor / isolated.median,
        "chained_share_of_read_ceiling": floor / chained.median,
        "ratio_to_one_token": None if one_token is None else isolated.median / one_token,
        "peers": peers,
    }


def columns(gemlite: bool) -> tuple[str, ...]:
    return (
        *("NxK", "M", "us", "p25..p75", "chained us", "floor us", "% of read", "chained %"),
        *("bf16 us", "vs bf16", "_int_mm us", "fp8 us"),
        *(("gemlite us",) if gemlite else ()),
        "/ M=1",
    )


def cells_of(row: dict[str, Any], gemlite: bool) -> list[str]:
    """A row of the table, in the order of `columns`."""

    def us(name: str) -> str:
        peer = row["peers"].get(name, {})
        return f"{1e6 * peer['seconds']['median']:.2f}" if "seconds" in peer else "-"

    seconds, one = row["seconds"], row["ratio_to_one_token"]
    return [
        f"{row['N']}x{row['K']}{' int8' if row['bits'] == 8 else ''}",
        str(row["M"]),
        f"{1e6 * seconds['median']:.2f}",
        f"{1e6 * seconds['p25']:.2f}..{1e6 * seconds['p75']:.2f}",
        f"{1e6 * row['chained_seconds']['median']:.2f}",
        f"{1e6 * row['floor_seconds']:.2f}",
        f"{100 * row['share_of_read_ceiling']:.0f}",
        f"{100 * row['chained_share_of_read_ceiling']:.0f}",
        us(BF16),
        f"{row['peers'][BF16]['ratio']:.2f}x",
        us(INT8),
        us(FP8),
        *((us(GEMLITE),) if gemlite else ()),
        "-" if one is None else f"{one:.2f}",
    ]


def measure(
    shapes: Sequence[tuple[int, ...]],
    tokens: Sequence[int],
    device: torch.device,
    args: argparse.Namespace,
    read_gb_per_s: float,
    timing_options: dict[str, Any],
    *,
    int8: bool = False,
) -> list[dict[str, Any]]:
    rows = []
    peer_names = (BF16, INT8, FP8, GEMLITE) if args.gemlite else (BF16, INT8, FP8)
    for N, K in shapes:
        problem = Problem(N, K, max(tokens), device, int8=int8)
        ours, peers = Ours(problem), Peers(problem, peer_names)
        one_token = None
        for M in tokens:
            calls = our_calls(ours, M, kernel_variable(args))
            peer_calls, skipped = peers.calls(M)
            timings = time_interleaved(calls | peer_calls, device, **timing_options)
            if M == 1:
                one_token = timings[ISOLATED].median
            label = {"N": N, "K": K, "M": M, "bits": 8 if int8 else 2, "weight_bytes": ours.weight_bytes}
            rows.append(row_of(label, timings, skipped, ours.moved_bytes(M), read_gb_per_s, one_token))
        del problem, ours, peers, calls, peer_calls
        free_memory(device)
    return rows


def free_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()


# --- the sweep over M ---------------------------------------------------------------------------------------


def summary_of(points: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The worst places of a sweep.

    Returns:
        ``largest_step`` (up to DENSE_TOKENS) and ``largest_step_beyond``: between which neighbours time grows most;
        ``lowest_ratio``: where the ratio to bfloat16 is lowest. None where there is no such point.
    """
    steps = [
        {"from": a["M"], "to": b["M"], "ratio": b["seconds"] / a["seconds"]}
        for a, b in itertools.pairwise(points)
    ]

    def largest(among: list[dict[str, Any]]) -> dict[str, Any] | None:
        return max(among, key=lambda step: float(step["ratio"])) if among else None

    lowest = min(points, key=lambda point: float(point["ratio_to_bf16"]))
    return {
        "largest_step": largest([step for step in steps if step["to"] <= DENSE_TOKENS]),
        "largest_step_beyond": largest([step for step in steps if step["to"] > DENSE_TOKENS]),
        "lowest_ratio": {"M": lowest["M"], "ratio_to_bf16": lowest["ratio_to_bf16"]},
    }


def sentence_of(summary: dict[str, Any]) -> str:
    parts = []
    for name, where in (("largest_step", f"up to M = {DENSE_TOKENS}"), ("largest_step_beyond", "beyond")):
        step = summary[name]
        if step:
            parts.append(
                f"largest step {where}: {step['ratio']:.2f}x from M = {step['from']} to {step['to']} "
                f"({step['to'] / step['from']:.2f}x the tokens)"
            )
    lowest = summary["lowest_ratio"]
    parts.append(f"lowest ratio to bf16: {lowest['ratio_to_bf16']:.2f}x at M = {lowest['M']}")
    return "; ".join(parts)


SWEEP_COLUMNS = ("NxK", "M", "us", "p25..p75", "step", "bf16 us", "vs bf16")


def sweep_cells(N: int, K: int, points: Sequence[dict[str, Any]]) -> list[list[str]]:
    cells = []
    before: float | None = None
    for point in points:
        cells.append(
            [
                f"{N}x{K}",
                str(point["M"]),
                f"{1e6 * point['seconds']:.2f}",
                f"{1e6 * point['p25']:.2f}..{1e6 * point['p75']:.2f}",
                "-" if before is None else f"{point['seconds'] / before:.2f}",
                f"{1e6 * point['bf16_seconds']:.2f}",
                f"{point['ratio_to_bf16']:.2f}x",
            ]
        )
        before = point["seconds"]
    return cells


def sweep(
    N: int,
    K: int,
    tokens: Sequence[int],
    device: torch.device,
    args: argparse.Namespace,
    timing_options: dict[str, Any],
) -> list[dict[str, Any]]:
    """Times of ours, isolated, and of cuBLAS over M."""
    problem = Problem(N, K, max(tokens), device)
    ours, peers = Ours(problem), Peers(problem, (BF16,))
    points = []
    for M in tokens:
        calls = {ISOLATED: our_calls(ours, M, kernel_variable(args))[ISOLATED]} | peers.calls(M)[0]
        timings = time_interleaved(calls, device, **timing_options)
        mine = timings[ISOLATED]
        points.append(
            {
                "M": M,
                "seconds": mine.median,
                "p25": mine.p25,
                "p75": mine.p75,
                "bf16_seconds": timings[BF16].median,
                "ratio_to_bf16": paired_ratio(timings[BF16], mine),
            }
        )
    free_memory(device)
    return points


# --- the report ---------------------------------------------------------------------------------------------


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    shape = sizes("NxK", "2560x6912")
    parser.add_argument(
        "--shapes", nargs="+", type=shape, metavar="NxK",
        help=f"default: {' '.join(SHAPES)}; of a sweep: {' '.join(SWEEP_SHAPES)}",
    )  # fmt: skip
    parser.add_argument(
        "--tokens", nargs="+", type=positive, metavar="M",
        help=f"default: {' '.join(map(str, TOKENS))}; of a sweep: 1 to {DENSE_TOKENS} and on to 4096",
    )  # fmt: skip
    parser.add_argument(
        "--heads", nargs="*", type=shape, metavar="NxK",
        help=f"shapes with int8 weights, none for no heads (default: {' '.join(HEADS)}, with --shapes none)",
    )  # fmt: skip
    parser.add_argument(
        "--sweep", action="store_true", help="only ours and bf16, over many M, for the cliffs between them"
    )
    add_common_options(parser, repeats=9)
    args = parser.parse_args(argv)
    if args.heads is None:
        heads = () if args.shapes or args.sweep else ("512x256",) if args.quick else HEADS
        args.heads = [shape(text) for text in heads]
    if args.shapes is None:
        shapes = ("256x256",) if args.quick else SWEEP_SHAPES if args.sweep else SHAPES
        args.shapes = [shape(text) for text in shapes]
    if args.tokens is None:
        tokens = SWEEP_TOKENS if args.sweep else TOKENS
        args.tokens = [M for M in tokens if M <= 4 or not args.quick]
    args.tokens = sorted(set(args.tokens))
    return args


def run(args: argparse.Namespace, device: torch.device) -> None:
    facts = environment(device, HERE)
    ceiling = measure_ceiling(device, quick=args.quick)
    timing_options = {
        "repeats": args.repeats or (2 if args.quick else 7 if args.sweep else 9),
        "min_block_seconds": 0.0 if args.quick else 0.005,
    }
    read = ceiling["read_gb_per_s"]
    print(f"{device_name(facts)}, torch {torch.__version__}, read ceiling {read:.0f} GB/s")
    rows: list[dict[str, Any]] = []
    sweeps: list[dict[str, Any]] = []
    if args.sweep:
        for N, K in args.shapes:
            points = sweep(N, K, args.tokens, device, args, timing_options)
            summary = summary_of(points)
            sweeps.append({"N": N, "K": K, "points": points} | summary)
            print(format_table(SWEEP_COLUMNS, sweep_cells(N, K, points)))
            print(f"{N}x{K}: {sentence_of(summary)}\n")
    else:
        rows = measure(args.shapes, args.tokens, device, args, read, timing_options)
        head_tokens = [M for M in HEAD_TOKENS if M in args.tokens] or args.tokens
        rows += measure(args.heads, head_tokens, device, args, read, timing_options, int8=True)
        print(format_table(columns(args.gemlite), [cells_of(row, args.gemlite) for row in rows]))
    name = "decode-sweep" if args.sweep else "decode"
    path = result_path(args.json, HERE, name, facts, args.quick)
    settings = {
        "shapes": args.shapes,
        "heads": args.heads,
        "tokens": args.tokens,
        "sweep": args.sweep,
        "kernel": args.kernel,
        "quick": args.quick,
        "variables": library_variables(),
        **timing_options,
    }
    write_json(
        path,
        {
            "bench": "decode",
            "environment": facts,
            "settings": settings,
            "ceiling": ceiling,
            "rows": rows,
            "sweeps": sweeps,
        },
    )
    print(f"written: {path}")


if __name__ == "__main__":
    sys.exit(run_on_cuda("bench/decode.py", parse, run))
