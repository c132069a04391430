"""Output layer and loss, forward and backward: ours, plain PyTorch, torch.compile and the fused peers.

    python bench/cross_entropy.py                                  # on the best device
    python bench/cross_entropy.py --cases 8192x256x50257 --peers eager
    python bench/cross_entropy.py --cases 128x256x50257-fp32 --device cpu --threads 2

A case is tokens x hidden x vocabulary, bfloat16 on a GPU and float32 on a CPU unless it ends in -fp32 or -bf16. The
call that is timed computes the mean loss with label smoothing 0.1 (cut-cross-entropy and QuACK have none and
compute the plain one) and the gradients of hidden and weight. On a GPU the times are of replayed CUDA graphs
where a variant can be captured. Memory is the most that was allocated beyond the inputs during one call, its
gradients included. The floor is the arithmetic of the three products at the rate of a square product
measured in the same run. The errors are those of the gradients of a sample of the tokens against float64:
|g - exact| / |exact| and the largest difference over the largest value. Peers are timed where they can be
imported; none is needed: liger-kernel, cut-cross-entropy (its default, which skips small gradients, and exact)
and quack-kernels.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bitnet_ext import ops
from bitnet_ext.testing import (
    environment,
    format_table,
    measure_ceiling,
    paired_ratio,
    time_interleaved,
    write_json,
)
from bitnet_ext.testing.bench import device_name
from bitnet_ext.testing.script import WrongResultError, exit_status, positive, result_path
from bitnet_ext.training.device import resolve_device

HERE = Path(__file__).resolve().parent
#: The collapse model's step in both precisions, two larger batches of it, and a model of 8 billion parameters.
CUDA_CASES = (
    "128x256x50257-fp32",
    "128x256x50257",
    "8192x256x50257",
    "32768x256x50257",
    "16384x4096x128256",
)
CPU_CASES = ("128x256x50257",)
SMOOTHING = 0.1
SAMPLE_TOKENS = 256
OURS, EAGER = "ours", "eager"

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    tokens: int
    hidden: int
    vocabulary: int
    dtype: torch.dtype | None = None

    @classmethod
    def read(cls, text: str) -> Case:
        """Type of an option."""
        found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)x([1-9]\d*)(-fp32|-bf16)?", text)
        if not found:
            raise argparse.ArgumentTypeError(
                f"a case is TOKENSxHIDDENxVOCABULARY, maybe with -fp32 or -bf16, got {text!r}"
            )
        dtype = {"-fp32": torch.float32, "-bf16": torch.bfloat16, None: None}[found[4]]
        return cls(*(int(size) for size in found.groups()[:3]), dtype)

    def on(self, device: torch.device) -> Case:
        default = torch.bfloat16 if device.type == "cuda" else torch.float32
        return Case(self.tokens, self.hidden, self.vocabulary, self.dtype or default)

    def __str__(self) -> str:
        kind = "fp32" if self.dtype == torch.float32 else "bf16"
        return f"{self.tokens} x {self.hidden} x {self.vocabulary} {kind}"

    @property
    def flop(self) -> float:
        return 6.0 * self.tokens * self.hidden * self.vocabulary


# --- the variants -------------------------------------------------------------------------------------------


def ours(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return ops.linear_cross_entropy(hidden, weight, target, label_smoothing=SMOOTHING).loss


def eager(hidden: Tensor, weight: Tensor, target: Tensor, smoothing: float = SMOOTHING) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), target, label_smoothing=smoothing)


def compiled() -> Loss:
    return torch.compile(eager, dynamic=False)


def liger() -> Loss:
    module = importlib.import_module("liger_kernel.transformers.fused_linear_cross_entropy")
    loss = module.LigerFusedLinearCrossEntropyLoss(label_smoothing=SMOOTHING)
    return lambda hidden, weight, target: loss(weight, hidden, target)


def cut(**options: Any) -> Loss:
    function = importlib.import_module("cut_cross_entropy").linear_cross_entropy
    return lambda hidden, weight, target: function(hidden, weight, target, **options)


def quack() -> Loss:
    function = importlib.import_module("quack.linear_cross_entropy").chunked_linear_cross_entropy
    return lambda hidden, weight, target: function(hidden, weight, target)


#: By name: how to get the function, whether it smooths labels, whether it must be exact, whether it needs CUDA.
VARIANTS: dict[str, tuple[Callable[[], Loss], bool, bool, bool]] = {
    OURS: (lambda: ours, True, True, False),
    EAGER: (lambda: eager, True, True, False),
    "torch.compile": (compiled, True, True, False),
    "liger": (liger, True, True, True),
    "cut-cross-entropy": (cut, False, False, True),
    "cut-cross-entropy exact": (functools.partial(cut, filter_eps=None), False, True, True),
    "quack": (quack, False, True, True),
}


class Problem:
    """Inputs of a case, about as a trained model has them: logits of a few units."""

    def __init__(self, case: Case, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(case.tokens + case.vocabulary)
        self.hidden = torch.randn(case.tokens, case.hidden, generator=generator).to(device, case.dtype)
        scale = 2.0 * case.hidden**-0.5
        self.weight = (torch.randn(case.vocabulary, case.hidden, device=device) * scale).to(case.dtype)
        self.target = torch.randint(0, case.vocabulary, (case.tokens,), generator=generator).to(device)

    def call(self, function: Loss, tokens: int | None = None) -> Callable[[], tuple[Tensor, Tensor, Tensor]]:
        """Forward and backward for the first `tokens`; returns the loss and the two gradients."""
        hidden = self.hidden[:tokens].detach().clone().requires_grad_()
        weight = self.weight.detach().requires_grad_()
        target = self.target[:tokens]

        def run() -> tuple[Tensor, Tensor, Tensor]:
            loss = function(hidden, weight, target)
            loss.backward()
            assert hidden.grad is not None and weight.grad is not None
            result = loss.detach(), hidden.grad, weight.grad
            hidden.grad = weight.grad = None  # or the next call's memory would be measured without them
            return result

        return run

    def exact(self, smoothing: float) -> tuple[Tensor, Tensor, Tensor]:
        """The same in float64, for the sample."""
        hidden, weight = (
            t.detach().double().requires_grad_() for t in (self.hidden[:SAMPLE_TOKENS], self.weight)
        )
        logits = hidden @ weight.t()
        loss = F.cross_entropy(logits, self.target[:SAMPLE_TOKENS], label_smoothing=smoothing)
        loss.backward()
        assert hidden.grad is not None and weight.grad is not None
        return loss.detach(), hidden.grad, weight.grad


def errors(got: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> dict[str, float]:
    found = {"loss": abs(float(got[0]) - float(exact[0]))}
    for name, a, b in zip(("hidden", "weight"), got[1:], exact[1:], strict=True):
        difference = a.double() - b
        found[f"{name}_relative"] = float(difference.norm() / b.norm())
        found[f"{name}_max"] = float(difference.abs().max() / b.abs().max())
    return found


def peak_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """Most bytes that one call holds beyond what was there before it."""
    if device.type != "cuda":
        return None
    call()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return _peak(call)


def _peak(call: Callable[[], object]) -> int:
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = call()
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before


# --- measuring ----------------------------------------------------------------------------------------------


def product_rate(device: torch.device, dtype: torch.dtype, quick: bool) -> float:
    """FLOP/s of a square product."""
    side = (256 if quick else 1536) if device.type == "cpu" else 512 if quick else 8192
    a, b = (torch.randn(side, side).to(device, dtype) for _ in range(2))
    out = torch.empty_like(a)
    timing = time_interleaved(
        {"product": [lambda: torch.mm(a, b, out=out)]},
        device,
        repeats=5,
        min_block_seconds=0.0,
        graph_calls=2,
    )["product"]
    return 2.0 * side**3 / timing.min


def measure(
    case: Case,
    names: list[str],
    device: torch.device,
    rate: float,
    timing_options: dict[str, Any],
) -> dict[str, Any]:
    problem = Problem(case, device)
    calls: dict[str, Callable[[], object]] = {}
    found: dict[str, dict[str, float]] = {}
    peaks: dict[str, int | None] = {}
    skipped: dict[str, str] = {}
    exact = {smoothing: problem.exact(smoothing) for smoothing in {VARIANTS[n][1] * SMOOTHING for n in names}}
    for name in names:
        build, smooths, _must_be_exact, needs_cuda = VARIANTS[name]
        if needs_cuda and device.type != "cuda":
            skipped[name] = "needs a GPU"
            continue
        try:  # whatever a peer does wrong becomes a note
            function = build()
            found[name] = errors(problem.call(function, SAMPLE_TOKENS)(), exact[smooths * SMOOTHING])
            call = problem.call(function)
            peaks[name] = peak_bytes(call, device)
            calls[name] = call
        except Exception as error:
            if name in (OURS, EAGER):
                raise
            skipped[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            found.pop(name, None)
    if EAGER in found and OURS in found:
        for part in ("hidden", "weight"):
            key = f"{part}_relative"
            if found[OURS][key] > 2 * found[EAGER][key] + 1e-6:
                raise WrongResultError(
                    f"{case}: the gradient of {part} is {found[OURS][key]:.1e} from float64, "
                    f"plain PyTorch's {found[EAGER][key]:.1e}"
                )
    del exact
    timings = time_interleaved({name: [call] for name, call in calls.items()}, device, **timing_options)
    rows = []
    for name, timing in timings.items():
        rows.append(
            {
                "variant": name,
                "label_smoothing": SMOOTHING if VARIANTS[name][1] else 0.0,
                "seconds": timing.to_dict(),
                "ratio_to_ours": paired_ratio(timing, timings[OURS]),
                "share_of_floor": case.flop / rate / timing.median,
                "peak_bytes": peaks[name],
                "errors": found[name],
            }
        )
    return {
        "tokens": case.tokens,
        "hidden": case.hidden,
        "vocabulary": case.vocabulary,
        "dtype": str(case.dtype).removeprefix("torch."),
        "sample_tokens": min(SAMPLE_TOKENS, case.tokens),
        "floor_seconds": case.flop / rate,
        "rows": rows,
        "skipped": skipped,
    }


COLUMNS = (
    "tokens x hidden x vocabulary",
    "variant",
    "ms",
    "p25..p75",
    "graph",
    "vs ours",
    "% of floor",
    "peak MiB",
    "error d hidden",
    "error d weight",
    "largest",
)


def cells(case: Case, measured: dict[str, Any]) -> list[list[str]]:
    table = []
    for row in measured["rows"]:
        seconds, error = row["seconds"], row["errors"]
        table.append(
            [
                str(case),
                row["variant"],
                f"{1e3 * seconds['median']:.3f}",
                f"{1e3 * seconds['p25']:.3f}..{1e3 * seconds['p75']:.3f}",
                "yes" if seconds["graph"] else "no",
                f"{row['ratio_to_ours']:.2f}x",
                f"{100 * row['share_of_floor']:.0f}",
                "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.0f}",
                f"{error['hidden_relative']:.1e}",
                f"{error['weight_relative']:.1e}",
                f"{max(error['hidden_max'], error['weight_max']):.1e}",
            ]
        )
    return table


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument(
        "--cases", nargs="+", type=Case.read, metavar="TxHxV", help=f"default: {' '.join(CUDA_CASES)}"
    )
    parser.add_argument(
        "--peers", nargs="*", choices=list(VARIANTS)[1:], metavar="NAME",
        help=f"what is timed beside ours (default: all of {', '.join(list(VARIANTS)[1:])})",
    )  # fmt: skip
    parser.add_argument("--repeats", type=positive, help="blocks of each variant (default: 9)")
    parser.add_argument("--threads", type=positive, help="CPU threads (default: PyTorch's choice)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="result file (default: bench/results/...)")
    parser.add_argument("--quick", action="store_true", help="one small case, to see that it runs")
    return parser.parse_args(arguments)


def run(args: argparse.Namespace, device: torch.device) -> None:
    if device.index is not None:
        torch.cuda.set_device(device)
    if args.threads:
        torch.set_num_threads(args.threads)
    default = ("33x24x1001",) if args.quick else CUDA_CASES if device.type == "cuda" else CPU_CASES
    cases = [case.on(device) for case in args.cases or [Case.read(text) for text in default]]
    peers = args.peers if args.peers is not None else [EAGER] if args.quick else list(VARIANTS)[1:]
    facts = environment(device, HERE)
    ceiling = measure_ceiling(device, quick=args.quick)
    rates = {
        dtype: product_rate(device, dtype, args.quick) for dtype in {case.dtype for case in cases} if dtype
    }
    timing_options = {
        "repeats": args.repeats or (2 if args.quick else 9),
        "min_block_seconds": 0.0 if args.quick else 0.01,
    }
    print(
        f"{device_name(facts)}, {torch.get_num_threads()} CPU threads, torch {torch.__version__}, products: ",
        end="",
    )
    print(
        ", ".join(
            f"{rate / 1e12:.3g} TFLOP/s {str(dtype).removeprefix('torch.')}" for dtype, rate in rates.items()
        )
    )
    measured, table = [], []
    for case in cases:
        assert case.dtype is not None
        # A call of many tokens fills a graph by itself; few are captured several times over.
        graph_calls = 16 if case.tokens <= 1024 else 1
        with contextlib.suppress(AttributeError):
            torch.compiler.reset()
        result = measure(
            case, [OURS, *peers], device, rates[case.dtype], {**timing_options, "graph_calls": graph_calls}
        )
        measured.append(result)
        table += cells(case, result)
        for name, reason in result["skipped"].items():
            print(f"{case}: no {name}: {reason}")
        if device.type == "cuda":
            torch.cuda.empty_cache()
    print(format_table(COLUMNS, table))
    path = result_path(args.json, HERE, "cross_entropy", facts, args.quick)
    write_json(
        path,
        {
            "bench": "cross_entropy",
            "environment": facts,
            "settings": {"quick": args.quick, "label_smoothing": SMOOTHING, "peers": peers, **timing_options},
            "ceiling": {
                **ceiling,
                "product_flop_per_s": {str(d).removeprefix("torch."): rate for d, rate in rates.items()},
            },
            "cases": measured,
        },
    )
    print(f"written: {path}")


def main() -> None:
    args = parse()
    run(args, resolve_device(args.device))


if __name__ == "__main__":
    sys.exit(exit_status(main))
