"""One training step of a linear layer: forward and both products of the backward, against nn.Linear in bfloat16.

    python bench/train_linear.py                         # the table, on the current GPU
    python bench/train_linear.py --cases 8192x2560x2560 --seconds 2
    python bench/train_linear.py --master float32        # latent weights in float32

A case is MxNxK: x [M, K] in bfloat16, weight [N, K], a given gradient of y [M, N]; the step makes y, dL/dx and dL/dW.
Variants: nn.Linear; a fake-quantised BitLinear, eager and compiled; torchao's BitNet training linear, where it is
installed; ops.bit_linear with backward="exact" and backward="int8". A ternary layer quantises weight and
input in each step. There is no norm in any of them.

Large products are bound by the power limit, so a time depends on what ran just before: each variant is timed in
turns with the others and by itself (see prefill.py). Forward is timed alone; backward is the difference. Memory is
that of one eager step: what is held between forward and backward beside y, and the peak. Gradients are
compared with float64, on a sample of rows, each with the exact straight-through gradient of its own layer.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitnet_ext import ops
from bitnet_ext.testing import (
    environment,
    format_table,
    measure_ceiling,
    paired_ratio,
    time_interleaved,
    write_json,
)
from bitnet_ext.testing.bench import Timing, device_name
from bitnet_ext.testing.script import (
    library_variables,
    positive,
    positive_number,
    result_path,
    run_on_cuda,
    sizes,
)
from bitnet_ext.testing.twin import FakeQuantLinear

HERE = Path(__file__).resolve().parent
CASES = ("16384x14336x4096", "16384x4096x14336", "16384x4096x4096", "8192x2560x2560")
LINEAR, FAKE, COMPILED, TORCHAO = "nn.Linear bf16", "fake-quant eager", "fake-quant compiled", "torchao"
EXACT, INT8 = "bitnet_ext exact", "bitnet_ext int8"
#: Rows of dL/dx and of dL/dW that are compared with float64.
SAMPLED_ROWS = 64
GRAPH_CALLS = 2

Forward = Callable[[Tensor], Tensor]


@dataclass
class Problem:
    """Operands of a case; the weight's values are bfloat16 in every variant."""

    M: int
    N: int
    K: int
    device: torch.device
    master: torch.dtype

    def __post_init__(self) -> None:
        generator = torch.Generator(self.device).manual_seed(0)
        make = lambda *shape: torch.randn(*shape, device=self.device, generator=generator)  # noqa: E731
        self.x = make(self.M, self.K).to(torch.bfloat16).requires_grad_()
        self.weight = (make(self.N, self.K) * 0.02).to(torch.bfloat16).to(self.master).requires_grad_()
        self.grad_y = (make(self.M, self.N) * 1e-3).to(torch.bfloat16)

    def layer(self, kind: type[nn.Linear]) -> nn.Linear:
        layer = kind(self.K, self.N, bias=False, device="meta")
        layer.weight = nn.Parameter(self.weight.detach().clone())
        return layer


def variants(problem: Problem, skipped: dict[str, str]) -> dict[str, tuple[Forward, Tensor]]:
    """Of each variant, its forward and its weight."""

    def autocast(forward: Forward) -> Forward:
        def run(x: Tensor) -> Tensor:
            with torch.autocast("cuda", torch.bfloat16, enabled=problem.master != torch.bfloat16):
                return forward(x)

        return run

    plain, fake = problem.layer(nn.Linear), problem.layer(FakeQuantLinear)
    weight = problem.weight
    found: dict[str, tuple[Forward, Tensor]] = {
        LINEAR: (autocast(plain), plain.weight),
        EXACT: (
            lambda x: ops.bit_linear(x, weight, backward="exact", out_dtype=torch.bfloat16),
            weight,
        ),
        INT8: (lambda x: ops.bit_linear(x, weight, backward="int8", out_dtype=torch.bfloat16), weight),
        FAKE: (autocast(fake), fake.weight),
        COMPILED: (autocast(torch.compile(fake, dynamic=False)), fake.weight),
    }
    try:
        training = importlib.import_module("torchao.prototype.quantized_training")
        quantization = importlib.import_module("torchao.quantization")
        theirs = nn.Sequential(problem.layer(nn.Linear))
        quantization.quantize_(theirs, training.bitnet_training())
        found[TORCHAO] = (theirs, next(theirs.parameters()))
    except (ImportError, RuntimeError) as error:
        skipped[TORCHAO] = f"{type(error).__name__}: {error}"
    return found


def step_of(problem: Problem, forward: Forward, weight: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: torch.autograd.grad(forward(problem.x), [problem.x, weight], problem.grad_y)


def memory_of(problem: Problem, forward: Forward, weight: Tensor) -> dict[str, int]:
    """Bytes held between forward and backward beside y, and the peak of a step above what was there before."""
    step_of(problem, forward, weight)()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    y = forward(problem.x)
    held = torch.cuda.memory_allocated() - before - y.numel() * y.element_size()
    grads = torch.autograd.grad(y, [problem.x, weight], problem.grad_y)
    peak = torch.cuda.max_memory_allocated() - before
    del y, grads
    return {"held_bytes": held, "peak_bytes": peak}


def fidelity(problem: Problem, forward: Forward, weight: Tensor, quantised: bool) -> dict[str, float]:
    """Cosine and relative error of a sample of rows of dL/dx and of dL/dW against float64."""
    grad_x, grad_weight = step_of(problem, forward, weight)()
    x, w = problem.x.detach(), problem.weight.detach()
    tokens = torch.linspace(0, problem.M - 1, min(SAMPLED_ROWS, problem.M), device=x.device).long()
    rows = torch.linspace(0, problem.N - 1, min(SAMPLED_ROWS, problem.N), device=x.device).long()
    if quantised:
        codes, weight_scale = ops.quantize_weight_ternary(w)
        x_i8, act_scale = ops.quantize_act_int8(x)
        w_exact = codes.double() * weight_scale.double()
        x_exact = x_i8.double() * act_scale.double().unsqueeze(1)
    else:
        w_exact, x_exact = w.double(), x.double()
    pairs = {
        "x": (grad_x[tokens].double(), problem.grad_y[tokens].double() @ w_exact),
        "weight": (grad_weight[rows].double(), problem.grad_y[:, rows].double().t() @ x_exact),
    }
    result = {}
    for name, (ours, exact) in pairs.items():
        result[f"cosine_{name}"] = float(
            nn.functional.cosine_similarity(ours.flatten(), exact.flatten(), dim=0)
        )
        result[f"error_{name}"] = float((ours - exact).norm() / exact.norm())
    return result


def measure(problem: Problem, args: argparse.Namespace, repeats: int) -> dict[str, Any]:
    skipped: dict[str, str] = {}
    facts: dict[str, dict[str, Any]] = {}
    steps, forwards = {}, {}
    for name, (forward, weight) in variants(problem, skipped).items():
        try:
            facts[name] = fidelity(problem, forward, weight, name != LINEAR) | memory_of(
                problem, forward, weight
            )
        except RuntimeError as error:  # a compiler that is missing, a peer that does not run here
            skipped[name] = str(error).splitlines()[0]
            continue
        steps[name] = [step_of(problem, forward, weight)]
        forwards[name] = [lambda forward=forward: forward(problem.x)]

    def timed(calls: dict[str, Any], seconds: float) -> dict[str, Timing]:
        return time_interleaved(
            calls,
            problem.device,
            repeats=repeats,
            min_block_seconds=0.0 if args.quick else seconds / repeats / len(calls),
            graph_calls=GRAPH_CALLS,
            settle_seconds=0.0 if args.quick else seconds / 2,
        )

    together = timed(steps, args.seconds)
    forward_alone = timed(forwards, args.seconds / 2)
    rows = {}
    for name, timing in together.items():
        alone = timed({name: steps[name]}, args.seconds / 4)[name]
        rows[name] = facts[name] | {
            "step_seconds": timing.to_dict(),
            "forward_seconds": forward_alone[name].to_dict(),
            "of_linear": 1 / paired_ratio(together[LINEAR], timing),
            "alone_seconds": alone.to_dict(),
        }
    linear = rows[LINEAR]["alone_seconds"]["median"]
    for row in rows.values():
        row["alone_of_linear"] = row["alone_seconds"]["median"] / linear
    case = {"M": problem.M, "N": problem.N, "K": problem.K}
    return case | {"variants": rows, "skipped": skipped}


COLUMNS = (
    *("variant", "ms", "of nn.Linear", "forward", "backward", "alone ms", "of nn.Linear"),
    *("held MiB", "peak MiB", "cos dx", "cos dW", "error dx", "error dW"),
)


def cells_of(name: str, row: dict[str, Any]) -> list[str]:
    step, forward = row["step_seconds"]["median"], row["forward_seconds"]["median"]
    return [
        name,
        f"{1e3 * step:.3f}",
        f"{row['of_linear']:.3f}x",
        f"{1e3 * forward:.3f}",
        f"{1e3 * (step - forward):.3f}",
        f"{1e3 * row['alone_seconds']['median']:.3f}",
        f"{row['alone_of_linear']:.3f}x",
        f"{row['held_bytes'] / 2**20:.0f}",
        f"{row['peak_bytes'] / 2**20:.0f}",
        *(f"{row[f'cosine_{name}']:.5f}" for name in ("x", "weight")),
        *(f"{row[f'error_{name}']:.2e}" for name in ("x", "weight")),
    ]


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    case = sizes("MxNxK", "8192x2560x2560")
    parser.add_argument("--cases", nargs="+", type=case, metavar="MxNxK", help=f"default: {' '.join(CASES)}")
    parser.add_argument(
        "--master", choices=("bfloat16", "float32"), default="bfloat16",
        help="dtype of the latent weights; nn.Linear and its like then run under autocast (default: bfloat16)",
    )  # fmt: skip
    parser.add_argument(
        "--seconds", type=positive_number, default=1.0, metavar="S",
        help="a case is measured for about so long in turns, half as long for the forward, a quarter for each "
        "variant by itself; half as long again is thrown away first (default: 1)",
    )  # fmt: skip
    parser.add_argument(
        "--repeats", type=positive, help="blocks of each variant (default: 9, 2 with --quick)"
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="result file (default: bench/results/...)")
    parser.add_argument("--quick", action="store_true", help="one small shape, to see that it runs")
    args = parser.parse_args(argv)
    args.cases = args.cases or [case(text) for text in (("256x384x256",) if args.quick else CASES)]
    return args


def run(args: argparse.Namespace, device: torch.device) -> None:
    facts = environment(device, HERE)
    ceiling = measure_ceiling(device, quick=args.quick)
    repeats = args.repeats or (2 if args.quick else 9)
    print(f"{device_name(facts)}, torch {torch.__version__}, latent weights {args.master}")
    rows = []
    for M, N, K in args.cases:
        row = measure(Problem(M, N, K, device, getattr(torch, args.master)), args, repeats)
        print(f"\n{M}x{N}x{K}")
        print(format_table(COLUMNS, [cells_of(name, each) for name, each in row["variants"].items()]))
        for name, reason in row["skipped"].items():
            print(f"{name}: {reason}")
        sys.stdout.flush()
        rows.append(row)
        torch.cuda.empty_cache()
    path = result_path(args.json, HERE, "train_linear", facts, args.quick)
    settings = {
        "cases": args.cases,
        "master": args.master,
        "seconds": args.seconds,
        "repeats": repeats,
        "quick": args.quick,
        "variables": library_variables(),
    }
    write_json(
        path,
        {
            "bench": "train_linear",
            "environment": facts,
            "settings": settings,
            "ceiling": ceiling,
            "rows": rows,
        },
    )
    print(f"written: {path}")


if __name__ == "__main__":
    sys.exit(run_on_cuda("bench/train_linear.py", parse, run))
