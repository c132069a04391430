"""Steps/s of the collapse report's training step, ours against the same network in plain eager PyTorch.

    python bench/train_step.py                    # the report's model, 256 wide, on the best device
    python bench/train_step.py --device cpu --threads 2

One step is 4 rows of 32 tokens: forward, cross-entropy over 50,257 tokens, backward, gradient clipping to
norm 1, Adam with weight decay 0.1, a new learning rate. Ours is the step as the Trainer runs it (on a GPU a
CUDA graph). The twin is what one writes without this package: nn.Linear with fake-quantised weight and
input, nn.RMSNorm, F.cross_entropy, clip_grad_norm_, torch.optim.Adam. Both start from the same weights and
see the same rows; the losses of the first steps must agree within 2 %, or no ratio is reported. With
--compared-steps the same is done for more steps, and beside it for a second twin whose starting weights differ from
the first's in their last bit: how far apart two runs of one program come by rounding alone. Blocks of
steps are timed in turns. On a CPU a second table splits one step into its phases and puts beside each the
floor that this machine's memory bandwidth and GEMM rate, measured in the same run, set.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from bitnet_ext import ops
from bitnet_ext.collapse.arms import arm_config
from bitnet_ext.models import PRESETS, BitNetForCausalLM, preset
from bitnet_ext.testing import Timing, environment, format_table, measure_ceiling, paired_ratio, write_json
from bitnet_ext.testing.bench import device_name, slug
from bitnet_ext.testing.script import positive
from bitnet_ext.testing.twin import TwinModel
from bitnet_ext.training import FusedAdam, TrainConfig, learning_rates, streams_side_by_side
from bitnet_ext.training.device import resolve_device
from bitnet_ext.training.distributed import World
from bitnet_ext.training.step import TrainStep

HERE = Path(__file__).resolve().parent
#: Default of --compared-steps.
COMPARED_STEPS = 10
MAX_RELATIVE_DIFFERENCE = 0.02
#: Learning rates exist for so many steps; a run of the benchmark makes fewer.
SCHEDULED_STEPS = 50_000
#: Shortest block: a fast variant makes more steps in a block than --steps asks for.
MIN_BLOCK_SECONDS = 0.2


# --- the variants -------------------------------------------------------------------------------------------


class Variant(Protocol):
    """Something that trains."""

    step_multiple: int

    def run(self, rows: NDArray[np.int64]) -> list[float]:
        """One optimiser step for each of rows [n, 4, 32]; returns the losses once all have been made."""


class Ours:
    """TrainStep, fed as the Trainer feeds it."""

    def __init__(self, model: BitNetForCausalLM, config: TrainConfig, device: torch.device) -> None:
        self.model = model.to(device).train()
        self.optimizer = FusedAdam(self.model, config)
        self.step = TrainStep(self.model, self.optimizer, config, device, World())
        self.step_multiple = self.step.block_steps
        self.count = 0

    def run(self, rows: NDArray[np.int64]) -> list[float]:
        losses: list[float] = []
        for start in range(0, len(rows), self.step.block_steps):
            part = rows[start : start + self.step.block_steps]
            losses += self.step.run(self.count, part)[:, 0].tolist()
            self.count += len(part)
        return losses


class Together:
    """Several runs of ours on one GPU, each on a stream of its own; its steps are those of all runs.

    A step of one run is a chain of small kernels that leaves most of the GPU idle; the chains of others fit beside it.
    """

    def __init__(self, runs: list[Ours], device: torch.device) -> None:
        self.runs = runs
        self.streams = streams_side_by_side(len(runs), device)
        self.step_multiple = runs[0].step_multiple * len(runs)

    def run(self, rows: NDArray[np.int64]) -> list[float]:
        """Each run makes len(rows) / runs steps, on the first of the rows."""
        block = self.runs[0].step.block_steps
        losses: list[float] = []
        for start in range(0, len(rows) // len(self.runs), block):
            part = rows[start : start + block]
            for member, stream in zip(self.runs, self.streams, strict=True):
                with torch.cuda.stream(stream):
                    member.step.launch(member.count, part)
            for member, stream in zip(self.runs, self.streams, strict=True):
                with torch.cuda.stream(stream):
                    losses += member.step.finish()[:, 0].tolist()
                member.count += len(part)
        return losses


class Twin:
    """The ordinary training loop. Losses stay on the device until the end of a block."""

    step_multiple = 1

    def __init__(
        self, model: TwinModel, config: TrainConfig, device: torch.device, compiled: bool = False, **adam: Any
    ) -> None:
        self.model = model.to(device).train()
        self.forward: Callable[[Tensor], Tensor] = torch.compile(self.model) if compiled else self.model
        self.device = device
        self.grad_clip = config.grad_clip
        self.rates = learning_rates(config)
        self.optimizer = torch.optim.Adam(
            self.model.parameters(),
            lr=config.lr,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            weight_decay=config.weight_decay,
            **adam,
        )
        self.count = 0

    def run(self, rows: NDArray[np.int64]) -> list[float]:
        losses = []
        for batch in rows:
            ids = torch.from_numpy(batch).to(self.device)
            for group in self.optimizer.param_groups:
                group["lr"] = float(self.rates[self.count])
            self.optimizer.zero_grad()
            logits = self.forward(ids[:, :-1])
            loss = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1))
            loss.backward()
            if self.grad_clip is not None:
                nn.utils.clip_grad_norm_(self.model.parameters(), self.grad_clip)
            self.optimizer.step()
            losses.append(loss.detach())
            self.count += 1
        return torch.stack(losses).tolist()


@dataclass
class Result:
    """One row of the table."""

    name: str
    variant: Variant | None = None
    skipped: str | None = None
    first_losses: list[float] = field(default_factory=list)
    steps_in_block: int = 0
    peak_bytes: int | None = None
    held_bytes: int | None = None
    samples: list[float] = field(default_factory=list)
    cpu_samples: list[float] = field(default_factory=list)

    @property
    def timing(self) -> Timing:
        return Timing(tuple(self.samples), tuple(self.cpu_samples), self.steps_in_block, graph=False)


# --- measuring ----------------------------------------------------------------------------------------------


def zipf_batches(count: int, config: TrainConfig, vocab_size: int) -> NDArray[np.int64]:
    """Random rows [count, batch, seq_len + 1] in which the token of rank r has a share of about 1 / r."""
    generator = np.random.default_rng(0)
    share = 1.0 / np.arange(1, vocab_size + 1)
    shape = (count, config.batch_size, config.seq_len + 1)
    return generator.choice(vocab_size, size=shape, p=share / share.sum()).astype(np.int64)


def prepare(
    name: str,
    build: Callable[[], Variant],
    batches: NDArray[np.int64],
    steps: int,
    device: torch.device,
    compared: int = COMPARED_STEPS,
) -> Result:
    """Builds a variant, makes its first steps (compared later) and finds the length of its blocks."""
    result = Result(name)
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    variant = build()
    result.first_losses = variant.run(batches[:compared])[:compared]
    count = variant.step_multiple
    variant.run(batches[:count])
    start = time.perf_counter()
    variant.run(batches[:count])
    a_step = (time.perf_counter() - start) / count
    wanted = max(steps, MIN_BLOCK_SECONDS / a_step) if steps > 1 else 1
    result.steps_in_block = min(len(batches), math.ceil(wanted / count) * count)
    if cuda:
        torch.cuda.empty_cache()
        result.peak_bytes = torch.cuda.max_memory_allocated() - allocated
        result.held_bytes = torch.cuda.memory_reserved() - reserved
    result.variant = variant
    return result


def measure(results: list[Result], batches: NDArray[np.int64], repeats: int) -> None:
    """Times blocks of steps in turns; each block ends when its losses have arrived on the host."""
    for _ in range(repeats):
        for result in results:
            if result.variant is None:
                continue
            rows = batches[: result.steps_in_block]
            cpu, start = time.process_time(), time.perf_counter()
            result.variant.run(rows)
            result.samples.append((time.perf_counter() - start) / len(rows))
            result.cpu_samples.append((time.process_time() - cpu) / len(rows))


def max_relative_difference(losses: list[float], base: list[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(losses, base, strict=True))


@torch.no_grad()
def move_by_one_bit(model: nn.Module) -> None:
    """Replaces every parameter by its neighbour in float32, up or down at random."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        up = torch.randint(2, parameter.shape, generator=generator).bool()
        towards = torch.where(up, math.inf, -math.inf).to(parameter.device)
        parameter.copy_(torch.nextafter(parameter, towards))


def differences(losses: dict[str, list[float]], base: list[float]) -> dict[str, dict[str, float]]:
    """Largest relative difference from base within the first 10, 20, 50, ... steps, of each run."""
    marks = [m * 10**e for e in range(1, 6) for m in (1, 2, 5) if m * 10**e < len(base)] + [len(base)]
    return {
        name: {str(mark): max_relative_difference(run[:mark], base[:mark]) for mark in marks}
        for name, run in losses.items()
    }


PHASES = ("forward", "head and loss, with gradients", "backward of the body", "gradient norm", "Adam")


def phases_of_ours(ours: Ours, config: TrainConfig, batches: NDArray[np.int64]) -> list[list[float]]:
    """Seconds of each phase of our step on a CPU, a list a step."""
    hyper = torch.tensor([config.lr, config.weight_decay, 1 - config.beta1, 1 - config.beta2])
    steps = []
    for batch in batches:
        rows = torch.from_numpy(batch)
        ours.optimizer.zero_grad()
        marks = [time.perf_counter()]
        hidden = ours.model.hidden_states(rows[:, :-1].contiguous())
        leaf = hidden.detach().requires_grad_()
        marks.append(time.perf_counter())
        loss = ops.linear_cross_entropy(leaf, ours.model.head_weight, rows[:, 1:].contiguous()).loss
        loss.backward()  # the gradients themselves come with the loss
        marks.append(time.perf_counter())
        hidden.backward(leaf.grad)
        marks.append(time.perf_counter())
        _norm, scale = ours.optimizer.grad_norm_and_scale()
        marks.append(time.perf_counter())
        ours.optimizer.step(hyper, scale)
        marks.append(time.perf_counter())
        steps.append(np.diff(marks).tolist())
    return steps


def phases_of_twin(twin: Twin, batches: NDArray[np.int64]) -> list[list[float]]:
    """The same of the eager twin."""
    steps = []
    for batch in batches:
        ids = torch.from_numpy(batch)
        twin.optimizer.zero_grad()
        marks = [time.perf_counter()]
        hidden = twin.model.hidden_states(ids[:, :-1])
        leaf = hidden.detach().requires_grad_()
        marks.append(time.perf_counter())
        logits = twin.model.lm_head(leaf)
        loss = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1))
        loss.backward()
        marks.append(time.perf_counter())
        hidden.backward(leaf.grad)
        marks.append(time.perf_counter())
        if twin.grad_clip is not None:
            nn.utils.clip_grad_norm_(twin.model.parameters(), twin.grad_clip)
        marks.append(time.perf_counter())
        twin.optimizer.step()
        marks.append(time.perf_counter())
        steps.append(np.diff(marks).tolist())
    return steps


def floors(model: BitNetForCausalLM, config: TrainConfig, ceiling: dict[str, float]) -> list[float]:
    """Seconds a phase cannot undercut: its float32 GEMM work, or its bytes, at the rates measured in this run.

    The ternary forward has no float32 GEMM; its int8 work is not counted. Adam moves 28 bytes a parameter
    (reads 16, writes 12: at the rate of an in-place product), the norm reads 4 (at the rate of a sum).
    """
    counts = model.num_parameters()
    flops = 2 * config.tokens_per_step
    head = flops * model.head_weight.numel() / (ceiling["fp32_gflop_per_s"] * 1e9)
    linear_weights = sum(
        p.numel()
        for n, p in model.named_parameters()
        if p.dim() == 2 and "embed" not in n and "lm_head" not in n
    )
    body = flops * linear_weights / (ceiling["fp32_gflop_per_s"] * 1e9)
    norm = 4 * counts["total"] / (ceiling["read_gb_per_s"] * 1e9)
    adam = 28 * counts["total"] / (ceiling["update_gb_per_s"] * 1e9)
    forward = body if model.config.quantization == "none" else 0.0
    return [forward, 3 * head, 2 * body, norm, adam]


# --- the report ---------------------------------------------------------------------------------------------


def row_of(result: Result, base: Result, comparable: bool, cuda: bool) -> tuple[list[str], dict[str, Any]]:
    """A result as cells and as JSON."""
    if result.variant is None:
        return [result.name, f"skipped: {result.skipped}", *[""] * 7], {
            "variant": result.name,
            "skipped": result.skipped,
        }
    timing = result.timing
    ratio = paired_ratio(base.timing, timing) if comparable else None
    mebibytes = "" if result.peak_bytes is None else f"{result.peak_bytes / 2**20:.0f}"
    held = "" if result.held_bytes is None else f"{result.held_bytes / 2**20:.0f}"
    cells = [
        result.name,
        f"{1 / timing.median:.2f}",
        f"{1 / timing.max:.2f}..{1 / timing.min:.2f}",
        f"{1e3 * timing.median:.2f}",
        f"{1e3 * timing.p25:.2f}..{1e3 * timing.p75:.2f}",
        "" if cuda else f"{1e3 * timing.cpu_median:.1f}",
        "refused" if ratio is None else f"{ratio:.2f}x",
        mebibytes,
        held,
    ]
    return cells, {
        "variant": result.name,
        "steps_per_second": 1 / timing.median,
        "seconds": timing.to_dict(),
        "ratio_to_eager": ratio,
        "peak_bytes": result.peak_bytes,
        "held_bytes": result.held_bytes,
        "first_losses": result.first_losses,
    }


COLUMNS = (
    "variant",
    "steps/s",
    "min..max",
    "ms/step",
    "p25..p75",
    "CPU ms/step",
    "vs eager",
    "peak MiB",
    "held MiB",
)


def parse() -> tuple[argparse.Namespace, torch.device]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("--steps", type=int, help="steps in a block (default: 10 on a CPU, 64 on a GPU)")
    parser.add_argument("--repeats", type=int, help="blocks of each variant (default: 7)")
    parser.add_argument("--model", choices=list(PRESETS), help="preset (default: collapse-256)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's choice)")
    parser.add_argument(
        "--compared-steps", type=positive, default=COMPARED_STEPS, metavar="N",
        help="losses of so many steps are compared with the eager twin's; the first "
        f"{COMPARED_STEPS} decide whether there are ratios (default: {COMPARED_STEPS})",
    )  # fmt: skip
    parser.add_argument("--compile", action="store_true", help="also time the twin under torch.compile")
    parser.add_argument(
        "--together", type=positive, nargs="+", default=[], metavar="N",
        help="also time so many runs at once on one GPU, each on its own stream; steps/s are then of all of them",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="PATH", help="result file (default: bench/results/...)")
    parser.add_argument(
        "--quick", action="store_true", help="a tiny model and few steps, to see that it runs"
    )
    args = parser.parse_args()
    for name in ("steps", "repeats", "threads"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name} must be >= 1, got {value}")
    try:
        device = resolve_device(args.device)
    except ValueError as error:
        parser.error(str(error))
    if args.threads:
        torch.set_num_threads(args.threads)
    args.model = args.model or ("collapse-64" if args.quick else "collapse-256")
    args.steps = args.steps or (1 if args.quick else 64 if device.type == "cuda" else 10)
    args.repeats = args.repeats or (1 if args.quick else 7)
    return args, device


def build_results(
    args: argparse.Namespace, config: TrainConfig, batches: NDArray[np.int64], device: torch.device
) -> list[Result]:
    """Every variant, ready to be timed."""
    shape = preset(args.model, **({"vocab_size": 512} if args.quick else {}))
    cuda = device.type == "cuda"

    def model() -> BitNetForCausalLM:
        return BitNetForCausalLM(shape, seed=0)

    def twin(compiled: bool = False, **adam: Any) -> Callable[[], Variant]:
        return lambda: Twin(TwinModel(shape).load_from(model()), config, device, compiled, **adam)

    builders: dict[str, Callable[[], Variant]] = {
        f"bitnet_ext{' (CUDA graph)' if cuda else ''}": lambda: Ours(model(), config, device),
        "eager twin": twin(),
        "eager twin, Adam(fused=True)": twin(fused=True),
    }
    for count in args.together if cuda else []:
        builders[f"bitnet_ext, {count} runs at once"] = lambda count=count: Together(
            [Ours(model(), config, device) for _ in range(count)], device
        )
    if not cuda:  # on a GPU foreach is torch.optim.Adam's own choice
        builders["eager twin, Adam(foreach=True)"] = twin(foreach=True)
    if args.compile:
        builders["torch.compile twin, Adam(fused=True)"] = twin(compiled=True, fused=True)
    results = []
    for index, (name, build) in enumerate(builders.items()):
        try:
            compared = args.compared_steps if index < 2 else COMPARED_STEPS
            results.append(prepare(name, build, batches, args.steps, device, compared))
        except Exception as error:
            if index < 2:  # ours and its measure must run; the rest may lack a compiler or an operator
                raise
            reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
            results.append(Result(name, skipped=reason[:100]))
    return results


def main() -> int:
    args, device = parse()
    cuda = device.type == "cuda"
    if device.index is not None:
        torch.cuda.set_device(device)
    config = arm_config("standard-lr", SCHEDULED_STEPS, seed=0)
    facts = environment(device, HERE)
    vocab_size = 512 if args.quick else PRESETS[args.model].vocab_size
    batches = zipf_batches(64 if args.quick else 1024, config, vocab_size)
    ceiling = measure_ceiling(device, quick=args.quick)
    results = build_results(args, config, batches, device)
    ours, base = results[0], results[1]
    difference = max_relative_difference(
        ours.first_losses[:COMPARED_STEPS], base.first_losses[:COMPARED_STEPS]
    )
    comparable = difference <= MAX_RELATIVE_DIFFERENCE
    compared = {"ours": ours.first_losses}
    if args.compared_steps > COMPARED_STEPS:
        shape = preset(args.model, **({"vocab_size": 512} if args.quick else {}))
        neighbour = TwinModel(shape).load_from(BitNetForCausalLM(shape, seed=0))
        move_by_one_bit(neighbour)
        compared["twin, weights moved by one bit"] = Twin(neighbour, config, device).run(
            batches[: args.compared_steps]
        )
        del neighbour
    parted = differences(compared, base.first_losses)
    measure(results, batches, args.repeats)

    rows = [row_of(result, base, comparable, cuda) for result in results]
    print(
        f"{args.model}, {config.batch_size} x {config.seq_len + 1} tokens a step, {device_name(facts)}, ",
        end="",
    )
    print(f"{torch.get_num_threads()} CPU threads, torch {torch.__version__}")
    print(f"losses of the first {COMPARED_STEPS} steps, ours against the eager twin: ", end="")
    print(f"largest relative difference {difference:.1e}")
    if args.compared_steps > COMPARED_STEPS:
        marks = list(parted["ours"])
        lines = [[name, *(f"{run[mark]:.1e}" for mark in marks)] for name, run in parted.items()]
        print(format_table(("largest relative difference within", *(f"{m} steps" for m in marks)), lines))
        print()
    print(format_table(COLUMNS, [cells for cells, _ in rows]))

    assert isinstance(ours.variant, Ours) and isinstance(base.variant, Twin)
    least = floors(ours.variant.model, config, ceiling)
    breakdown: list[dict[str, Any]] = []
    if not cuda:
        count = 1 if args.quick else max(7, args.steps)
        mine, theirs = [], []
        for batch in batches[:count, None]:
            mine += phases_of_ours(ours.variant, config, batch)
            theirs += phases_of_twin(base.variant, batch)
        medians = (
            [statistics.median(times) for times in zip(*steps, strict=True)] for steps in (mine, theirs)
        )
        for name, a, b, floor in zip(PHASES, *medians, least, strict=True):
            breakdown.append({"phase": name, "seconds": a, "eager_seconds": b, "floor_seconds": floor})
        total = {key: sum(row[key] for row in breakdown) for key in list(breakdown[0])[1:]}
        print()
        print(
            format_table(
                ("phase", "ms", "eager twin ms", "floor ms"),
                [
                    [row["phase"], *(f"{1e3 * row[key]:.2f}" for key in total)]
                    for row in [*breakdown, {"phase": "sum", **total}]
                ],
            )
        )
    print(
        f"\nceilings measured here: read {ceiling['read_gb_per_s']:.1f} GB/s, update "
        f"{ceiling['update_gb_per_s']:.1f} GB/s, fp32 GEMM {ceiling['fp32_gflop_per_s']:.0f} GFLOP/s; floor of a "
        f"step {1e3 * sum(least):.2f} ms, ours is at {100 * sum(least) / ours.timing.median:.0f} % of it"
    )
    path = args.json or (
        HERE / "results" / f"train_step-{slug(device_name(facts))}{'-quick' if args.quick else ''}.json"
    )
    write_json(
        path,
        {
            "bench": "train_step",
            "environment": facts,
            "settings": {
                "model": args.model,
                "steps": args.steps,
                "repeats": args.repeats,
                "quick": args.quick,
                "train": config.to_dict(),
            },
            "ceiling": ceiling,
            "max_relative_loss_difference": difference,
            "max_relative_loss_difference_within": parted,
            "rows": [values for _, values in rows],
            "breakdown": breakdown,
            "floor_seconds": dict(zip(PHASES, least, strict=True)),
        },
    )
    print(f"written: {path}")
    if not comparable:
        limit = f"{100 * MAX_RELATIVE_DIFFERENCE:.0f} %"
        print(f"no ratio is reported: the losses differ by more than {limit}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("\ninterrupted: nothing was written", file=sys.stderr)
        sys.exit(130)
