"""What ends in int8 activations, as one kernel each against separate PyTorch operators: bound by bytes or latency.

    python bench/fused_norm.py                                  # on the best device
    python bench/fused_norm.py --tokens 1 16384 --widths 4096 --no-compile

rms_norm_quantize      RMSNorm with a gain and absmax int8 of bfloat16 x [M, K]
add_rms_norm_quantize  the same of x + residual, which is also written
glu_quantize           relu(gate)^2 * up, the sub-norm and absmax int8 of two halves of one [M, 2K] product

Peers compute the same in plain PyTorch, operator by operator (in float32 where ours computes in float32) and
through torch.compile, which may keep more digits between the steps; F.rms_norm alone, without the quantiser, is
what a norm costs. Every result is checked before it is timed. Inputs rotate over copies that exceed three times
the last cache, up to 512; for few tokens they come from it, as they do in a model. On a GPU the times are of
replayed CUDA graphs. `chained` lets each of our kernels start while the one before it drains, as in a model;
`us` does not. The floor is the time of the bytes at the bandwidth of a copy in the same run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bitnet_ext import ops
from bitnet_ext.ops.fused_quantize import (
    add_rms_norm_quantize,
    add_rms_norm_quantize_ref,
    glu_quantize,
    glu_quantize_ref,
)
from bitnet_ext.testing import (
    Timing,
    environment,
    format_table,
    measure_ceiling,
    paired_ratio,
    rotation_count,
    time_interleaved,
    write_json,
)
from bitnet_ext.testing.bench import Call, device_name
from bitnet_ext.testing.script import (
    WrongResultError,
    environment_variables,
    exit_status,
    library_variables,
    positive,
    result_path,
)
from bitnet_ext.training.device import resolve_device

HERE = Path(__file__).resolve().parent
TOKENS = (1, 16, 512, 4096, 16384)
CPU_TOKENS = (1, 16, 512)
WIDTHS = (2560, 4096, 6912)
GLU_WIDTHS = (*WIDTHS, 14336)
EPS = 1e-5

OURS, CHAINED, EAGER, COMPILED, NORM = "ours", "ours, chained", "eager", "torch.compile", "F.rms_norm alone"

Results = tuple[Tensor, ...]
Function = Callable[..., Results]


# --- the operators and their peers --------------------------------------------------------------------------


def eager_quantize(y: Tensor) -> Results:
    absmax = y.abs().amax(-1, keepdim=True).clamp(min=1e-5)
    return (y * (127.0 / absmax)).round().clamp(-128, 127).to(torch.int8), (absmax / 127.0).squeeze(-1)


def eager_norm_quantize(x: Tensor, gain: Tensor) -> Results:
    return eager_quantize(F.rms_norm(x.float(), (x.shape[-1],), gain, EPS))


def eager_add_norm_quantize(x: Tensor, residual: Tensor, gain: Tensor) -> Results:
    total = x + residual
    return (*eager_norm_quantize(total, gain), total)


def eager_glu_quantize(gate: Tensor, up: Tensor, gain: Tensor) -> Results:
    return eager_norm_quantize(F.relu(gate).square() * up, gain)


class Case:
    """One operator: its forms and its inputs.

    Attributes:
        name: the operator's.
        ours, reference, eager: functions of the inputs and the gain.
        inputs: number of bfloat16 inputs of [M, K].
        bytes_per_element: read and written.
    """

    def __init__(
        self, name: str, ours: Function, reference: Function, eager: Function, inputs: int, size: int
    ):
        self.name, self.ours, self.reference, self.eager = name, ours, reference, eager
        self.inputs, self.bytes_per_element = inputs, size

    def make_inputs(self, M: int, K: int, device: torch.device, seed: int) -> tuple[Tensor, ...]:
        """Views of one [M, inputs * K] tensor for glu_quantize, tensors of their own otherwise."""
        generator = torch.Generator(device=device).manual_seed(seed)

        def normal(width: int) -> Tensor:
            return torch.randn(M, width, generator=generator, device=device, dtype=torch.bfloat16)

        if self.name == "glu_quantize":
            return normal(self.inputs * K).chunk(self.inputs, -1)
        return tuple(normal(K) for _ in range(self.inputs))

    def moved_bytes(self, M: int, K: int) -> int:
        return M * K * self.bytes_per_element + 4 * K + 4 * M


CASES = (
    Case(
        "rms_norm_quantize",
        lambda x, gain: ops.rms_norm_quantize(x, gain, EPS)[:2],
        lambda x, gain: ops.rms_norm_quantize_ref(x, gain, EPS)[:2],
        eager_norm_quantize,
        inputs=1,
        size=2 + 1,
    ),
    Case(
        "add_rms_norm_quantize",
        lambda x, residual, gain: add_rms_norm_quantize(x, residual, gain, EPS),
        lambda x, residual, gain: add_rms_norm_quantize_ref(x, residual, gain, EPS),
        eager_add_norm_quantize,
        inputs=2,
        size=3 * 2 + 1,
    ),
    Case(
        "glu_quantize",
        lambda gate, up, gain: glu_quantize(gate, up, "relu2", gain, EPS),
        lambda gate, up, gain: glu_quantize_ref(gate, up, "relu2", gain, EPS),
        eager_glu_quantize,
        inputs=2,
        size=2 * 2 + 1,
    ),
)


def check(what: str, got: Results, expected: Results, *, exact: bool) -> None:
    """Raises WrongResultError unless the integers, the scales and the sum are the expected ones.

    Not exact: no integer further than one step away, scales within two roundings to bfloat16.
    """
    different = got[0] != expected[0]
    if exact:
        rows = different.any(-1) | (got[1] != expected[1])
        # The order of a float64 sum may change the last place of its rounding to float32, once in 2^28 rows.
        right = int(rows.sum()) <= len(rows) // 4096
    else:
        distance = int((got[0].short() - expected[0].short()).abs().max())
        right = distance <= 1 and bool(((got[1] / expected[1] - 1).abs() < 2**-7).all())
    if right and len(got) > 2:
        right = torch.equal(got[2], expected[2])
    if not right:
        raise WrongResultError(f"{what}: {int(different.sum())} of {different.numel()} integers differ")


class Calls:
    """Calls of a function over copies of its inputs. Results are kept, so each copy has outputs of its own."""

    def __init__(self, copies: list[tuple[Tensor, ...]], gain: Tensor) -> None:
        self.copies, self.gain = copies, gain

    def of(self, function: Function, variables: dict[str, str] | None = None) -> list[Call]:
        results: list[Results | None] = [None] * len(self.copies)

        def call(i: int) -> None:
            with environment_variables(variables or {}):
                results[i] = function(*self.copies[i], self.gain)

        return [lambda i=i: call(i) for i in range(len(self.copies))]  # type: ignore[misc]


def compiled_calls(
    calls: Calls, compiled: Function, expected: Results, what: str
) -> tuple[list[Call] | None, str | None]:
    """Calls of a compiled function, or why there are none."""
    try:
        got = compiled(*calls.copies[0], calls.gain)
    except Exception as error:  # whatever a compiler, or its absence, comes up with
        reason = str(error).strip().splitlines() or [type(error).__name__]
        return None, reason[0][:200]
    check(f"{COMPILED} of {what}", got, expected, exact=False)
    return calls.of(compiled), None


# --- measuring ----------------------------------------------------------------------------------------------


def row_of(
    label: dict[str, Any],
    timings: dict[str, Timing],
    skipped: dict[str, str],
    moved_bytes: int,
    copy_gb_per_s: float,
) -> dict[str, Any]:
    ours = timings[OURS]
    floor = moved_bytes / copy_gb_per_s / 1e9
    chained = timings.get(CHAINED)
    peers: dict[str, Any] = {name: {"skipped": reason} for name, reason in skipped.items()}
    for name, timing in timings.items():
        if name not in (OURS, CHAINED):
            peers[name] = {"seconds": timing.to_dict(), "ratio": paired_ratio(timing, ours)}
    return label | {
        "seconds": ours.to_dict(),
        "chained_seconds": chained.to_dict() if chained else None,
        "bytes": moved_bytes,
        "floor_seconds": floor,
        "share_of_copy_ceiling": floor / ours.median,
        "peers": peers,
    }


def measure(
    case: Case,
    K: int,
    tokens: Sequence[int],
    device: torch.device,
    compile_peer: bool,
    copy_gb_per_s: float,
    timing_options: dict[str, Any],
) -> list[dict[str, Any]]:
    rows = []
    gain = torch.rand(K, device=device) + 0.5
    torch._dynamo.reset()
    # One compilation of M = 1 and one of every other M, as torch.compile does by default.
    compiled: Function = torch.compile(case.eager)
    for M in tokens:
        what = f"{case.name} for M x K = {M} x {K}"
        input_bytes = case.inputs * M * K * 2
        count = rotation_count(input_bytes, device)
        calls = Calls([case.make_inputs(M, K, device, seed) for seed in range(count)], gain)
        first = (*calls.copies[0], gain)
        expected = case.reference(*first)
        check(what, case.ours(*first), expected, exact=True)
        check(f"{EAGER} of {what}", case.eager(*first), expected, exact=False)
        variants = {OURS: calls.of(case.ours, {"BITNET_EXT_DEPENDENT_LAUNCH": "0"})}
        if device.type == "cuda":
            variants[CHAINED] = calls.of(case.ours)
        variants[EAGER] = calls.of(case.eager)
        skipped = {}
        if compile_peer:
            compiled_variant, reason = compiled_calls(calls, compiled, expected, what)
            if compiled_variant is None:
                skipped[COMPILED] = reason or ""
            else:
                variants[COMPILED] = compiled_variant
        else:
            skipped[COMPILED] = "not asked for"
        if case.name == "rms_norm_quantize":
            half_gain = gain.bfloat16()
            variants[NORM] = calls.of(lambda x, _, g=half_gain, K=K: (F.rms_norm(x, (K,), g, EPS),))  # type: ignore[misc]
        del expected
        timings = time_interleaved(variants, device, **timing_options)
        label = {"operator": case.name, "M": M, "K": K, "copies": count}
        rows.append(row_of(label, timings, skipped, case.moved_bytes(M, K), copy_gb_per_s))
        del calls, first, variants, timings
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return rows


COLUMNS = (
    *("operator", "MxK", "us", "p25..p75", "chained us", "floor us", "% of copy"),
    *("eager us", "vs eager", "compiled us", "vs compiled", "F.rms_norm us"),
)


def cells_of(row: dict[str, Any]) -> list[str]:
    """A row of the table, in the order of `COLUMNS`."""

    def us(name: str) -> str:
        peer = row["peers"].get(name, {})
        return f"{1e6 * peer['seconds']['median']:.2f}" if "seconds" in peer else "-"

    def ratio(name: str) -> str:
        peer = row["peers"].get(name, {})
        return f"{peer['ratio']:.2f}x" if "ratio" in peer else "-"

    seconds, chained = row["seconds"], row["chained_seconds"]
    return [
        row["operator"],
        f"{row['M']}x{row['K']}",
        f"{1e6 * seconds['median']:.2f}",
        f"{1e6 * seconds['p25']:.2f}..{1e6 * seconds['p75']:.2f}",
        f"{1e6 * chained['median']:.2f}" if chained else "-",
        f"{1e6 * row['floor_seconds']:.2f}",
        f"{100 * row['share_of_copy_ceiling']:.0f}",
        us(EAGER),
        ratio(EAGER),
        us(COMPILED),
        ratio(COMPILED),
        us(NORM),
    ]


# --- the report ---------------------------------------------------------------------------------------------


def parse(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, torch.device]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument(
        "--tokens", nargs="+", type=positive, metavar="M",
        help=f"default: {' '.join(map(str, TOKENS))}; on a CPU {' '.join(map(str, CPU_TOKENS))}",
    )  # fmt: skip
    parser.add_argument(
        "--widths", nargs="+", type=positive, metavar="K",
        help=f"default: {' '.join(map(str, WIDTHS))}, and {GLU_WIDTHS[-1]} for glu_quantize",
    )  # fmt: skip
    parser.add_argument(
        "--no-compile", action="store_true", help="without torch.compile, which takes minutes"
    )
    parser.add_argument(
        "--repeats", type=positive, help="blocks of each variant (default: 9, 2 with --quick)"
    )
    parser.add_argument("--threads", type=positive, help="CPU threads (default: PyTorch's choice)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="result file (default: bench/results/...)")
    parser.add_argument(
        "--quick", action="store_true", help="one small shape, not compiled, to see that it runs"
    )
    args = parser.parse_args(argv)
    try:
        device = resolve_device(args.device)
    except ValueError as error:
        parser.error(str(error))
    if args.threads:
        torch.set_num_threads(args.threads)
    tokens = (1, 17) if args.quick else TOKENS if device.type == "cuda" else CPU_TOKENS
    args.tokens = sorted(set(args.tokens or tokens))
    args.no_compile |= args.quick
    return args, device


def widths_of(case: Case, args: argparse.Namespace) -> Sequence[int]:
    if args.widths:
        return list(args.widths)
    if args.quick:
        return (264,)
    return GLU_WIDTHS if case.name == "glu_quantize" else WIDTHS


def main(argv: Sequence[str] | None = None) -> None:
    args, device = parse(argv)
    if device.index is not None:
        torch.cuda.set_device(device)
    facts = environment(device, HERE)
    ceiling = measure_ceiling(device, quick=args.quick)
    copy = ceiling["copy_gb_per_s"]
    timing_options = {
        "repeats": args.repeats or (2 if args.quick else 9),
        "min_block_seconds": 0.0 if args.quick else 0.02 if device.type == "cpu" else 0.005,
    }
    print(f"{device_name(facts)}, {torch.get_num_threads()} CPU threads, torch {torch.__version__}, ", end="")
    print(f"copy ceiling {copy:.1f} GB/s")
    rows: list[dict[str, Any]] = []
    for case in CASES:
        for K in widths_of(case, args):
            rows += measure(case, K, args.tokens, device, not args.no_compile, copy, timing_options)
    print(format_table(COLUMNS, [cells_of(row) for row in rows]))
    reasons = {row["peers"][COMPILED].get("skipped", "") for row in rows}
    for reason in sorted(reasons - {""}):
        print(f"{COMPILED} left out: {reason}")
    path = result_path(args.json, HERE, "fused_norm", facts, args.quick)
    settings = {
        "tokens": args.tokens,
        "widths": args.widths,
        "compile": not args.no_compile,
        "quick": args.quick,
        "dtype": "bfloat16",
        "variables": library_variables(),
        **timing_options,
    }
    write_json(
        path,
        {
            "bench": "fused_norm",
            "environment": facts,
            "settings": settings,
            "ceiling": ceiling,
            "rows": rows,
        },
    )
    print(f"written: {path}")


if __name__ == "__main__":
    sys.exit(exit_status(main))
