"""The cost of codes that are never stale: ternary weights are quantised in every forward, or once per launch.

    python bench/weight_cache.py                  # on the best device; the row of two processes runs on the CPU
    python bench/weight_cache.py --device cpu --threads 2

step      TrainStep as the Trainer runs it: all weights are quantised again at each launch, of up to 64 steps on a GPU
          and of one step on a CPU. "1 per launch" is the launch of an evaluated step.
loop      forward, backward and torch.optim.AdamW, with so many micro-batches per step: every forward quantises.
FSDP2     the loop on two processes of the CPU, gloo.

rule      the step as it is
frozen    the micro-batches of a step within nn.frozen_weights, which quantises once per step
vouched   the codes are never made again: the lower bound, which in a loop trains with old codes
codes     all weights of the model quantised once, by itself

The losses of rule and frozen, and of the two kinds of TrainStep, must be the same bits. bitnet-700m is trained in
bfloat16 on a GPU, where PyTorch adds up the embedding's gradient by atomics: there only the first loss must be the same
bits, and later ones the same within 0.1 %. Variants are timed in turns; ratios are medians over the rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from bitnet_ext import ops
from bitnet_ext.models import PRESETS, BitNetForCausalLM, preset
from bitnet_ext.nn import frozen_weights, resident_weights
from bitnet_ext.testing import Timing, environment, format_table, paired_ratio, time_interleaved, write_json
from bitnet_ext.testing.bench import device_name
from bitnet_ext.testing.script import WrongResultError, exit_status, positive, result_path
from bitnet_ext.training import TrainConfig, make_optimizer
from bitnet_ext.training.device import resolve_device
from bitnet_ext.training.distributed import World
from bitnet_ext.training.step import TrainStep

HERE = Path(__file__).resolve().parent
RULE, FROZEN, VOUCHED, CODES = "rule", "frozen", "vouched", "codes"
#: Rows and length of a step's batch: the report's for its own models, a usual one for large models.
SMALL, LARGE = (4, 32), (8, 2048)
#: Steps for which learning rates exist.
SCHEDULED_STEPS = 50_000
#: Steps before anything is timed, whose losses are compared.
REORDERED = 1e-3  # of losses after an update whose gradients were added up in another order
COMPARED_STEPS = 2
#: Vocabulary of the model of two processes, so that its output head does not hide the ternary layers.
SHARDED_VOCABULARY = 4096


def is_large(name: str) -> bool:
    return not name.startswith("collapse")


class Trusting(TrainStep):
    """Relies on its codes from launch to launch."""

    def _refresh_codes(self) -> None:
        pass


class Launches:
    """TrainStep, `steps` steps per launch."""

    def __init__(self, kind: type[TrainStep], name: str, device: torch.device, steps: int) -> None:
        batch, length = LARGE if is_large(name) else SMALL
        precision = "bf16" if is_large(name) else "fp32"
        config = TrainConfig(
            steps=SCHEDULED_STEPS, batch_size=batch, seq_len=length - 1, precision=precision, seed=0
        )
        with device:
            model = BitNetForCausalLM(preset(name), seed=0).train()
        self.step = kind(model, make_optimizer(model, config), config, device, World())
        self.rows = np.random.default_rng(0).integers(0, model.config.vocab_size, (steps, batch, length))
        self.count = 0

    def __call__(self) -> list[float]:
        losses: list[float] = self.step.run(self.count, self.rows)[:, 0].tolist()
        self.count += len(self.rows)
        return losses


class Loop:
    """A loop as users write it, with `micro` micro-batches per step."""

    def __init__(
        self,
        model: BitNetForCausalLM,
        device: torch.device,
        shape: tuple[int, int],
        micro: int,
        variant: str,
        bf16: bool = False,
    ) -> None:
        self.model, self.variant, self.bf16 = model.train(), variant, bf16
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        generator = torch.Generator().manual_seed(0)
        rows = torch.randint(model.config.vocab_size, shape, generator=generator).to(device)
        self.parts = rows.chunk(micro)
        with frozen_weights(model) as frozen, torch.no_grad():
            self.loss(self.parts[0])
            made = frozen.made()
        self.codes = {cache: codes for cache, _, codes in made}
        self.groups = [weights for _, weights, _ in made]

    def quantize(self) -> None:
        """As the forwards of a step do."""
        for weights in self.groups:
            ops.quantize_weights(weights)

    def loss(self, rows: Tensor) -> Tensor:
        with torch.autocast(rows.device.type, dtype=torch.bfloat16, enabled=self.bf16):
            logits = self.model(rows[:, :-1])
        return F.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten()) / len(self.parts)

    def __call__(self) -> list[float]:
        blocks: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
            RULE: contextlib.nullcontext,
            FROZEN: functools.partial(frozen_weights, self.model),
            VOUCHED: functools.partial(resident_weights, self.codes),
        }
        losses = []
        with blocks[self.variant]():
            for rows in self.parts:
                loss = self.loss(rows)
                loss.backward()
                losses.append(loss.detach())
        self.optimizer.step()
        self.optimizer.zero_grad()
        return [float(loss) for loss in losses]


def compare(
    name: str, first: Callable[[], list[float]], second: Callable[[], list[float]], tolerance: float = 0.0
) -> None:
    for step in range(COMPARED_STEPS):
        a, b = first(), second()
        near = all(abs(x - y) <= tolerance * abs(x) for x, y in zip(a, b, strict=True))
        if not near or (step == 0 and a[0] != b[0]):
            raise WrongResultError(f"{name}: the losses of step {step + 1} differ: {a} and {b}")


def row(name: str, timings: dict[str, Timing], steps: int = 1) -> dict[str, Any]:
    """One row of the table, from timings of calls that make `steps` steps each."""
    return {
        "name": name,
        "steps_per_call": steps,
        "variants": {
            variant: {
                "seconds_per_call": timing.to_dict(),
                "seconds_per_step": timing.median / steps,
                "ratio": paired_ratio(timing, timings[VOUCHED]),
            }
            for variant, timing in timings.items()
        },
    }


def measure_step(name: str, device: torch.device, steps: int, **options: Any) -> dict[str, Any]:
    title = f"{name} step, {steps} per launch"
    variants = {
        RULE: Launches(TrainStep, name, device, steps),
        VOUCHED: Launches(Trusting, name, device, steps),
    }
    compare(title, *variants.values(), tolerance=REORDERED if is_large(name) else 0.0)
    calls: dict[str, list[Any]] = {variant: [call] for variant, call in variants.items()}
    calls[CODES] = [variants[RULE].step.optimizer.refresh_codes]
    return row(title, time_interleaved(calls, device, graph=False, **options), steps)


def measure_loop(name: str, device: torch.device, micro: int, **options: Any) -> dict[str, Any]:
    title = f"{name} loop, {micro} micro-batch{'es' if micro > 1 else ''}"
    variants = {}
    for variant in (RULE, FROZEN, VOUCHED):
        with device:
            model = BitNetForCausalLM(preset(name), seed=0)
        shape = LARGE if is_large(name) else SMALL
        variants[variant] = Loop(model, device, shape, micro, variant, bf16=is_large(name))
    compare(title, variants[RULE], variants[FROZEN], REORDERED if is_large(name) else 0.0)
    calls: dict[str, list[Any]] = {variant: [call] for variant, call in variants.items()}
    calls[CODES] = [variants[RULE].quantize]
    return row(title, time_interleaved(calls, device, graph=False, **options))


def shard_and_time(rank: int, store: str, name: str, micro: int, repeats: int, out: str) -> None:
    """In each of two processes; the first writes the samples."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    loops = {}
    for variant in (RULE, FROZEN, VOUCHED):
        model = BitNetForCausalLM(preset(name, vocab_size=SHARDED_VOCABULARY), seed=0)
        for part in (*model.layers, model):
            fully_shard(part, mesh=mesh)
        loops[variant] = Loop(model, torch.device("cpu"), SMALL, micro, variant)
    compare("FSDP2", loops[RULE], loops[FROZEN])
    samples: dict[str, list[float]] = {variant: [] for variant in loops}
    for _ in range(repeats):
        for variant, loop in loops.items():  # in the same order in both
            dist.barrier()
            started = time.perf_counter()
            loop()
            samples[variant].append(time.perf_counter() - started)
    if rank == 0:
        torch.save(samples, out)
    dist.barrier()
    dist.destroy_process_group()


def measure_sharded(name: str, micro: int, repeats: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        store, out = f"{folder}/store", f"{folder}/samples.pt"
        arguments = (store, name, micro, repeats, out)
        torch.multiprocessing.spawn(shard_and_time, args=arguments, nprocs=2)
        samples = torch.load(out, weights_only=True)
    timings = {variant: Timing(tuple(s), tuple(s), 1, False) for variant, s in samples.items()}
    return row(f"{name} FSDP2, 2 CPU processes, {micro} micro-batches", timings)


COLUMNS = ("ms", "rule", "frozen", "vouched", "codes", "rule / vouched", "frozen / vouched")


def seconds_of(variant: dict[str, Any], name: str) -> float:
    """Seconds per step; for the codes, seconds per call."""
    return float(variant["seconds_per_call"]["median"] if name == CODES else variant["seconds_per_step"])


def cells_of(result: dict[str, Any]) -> list[str]:
    """Milliseconds per step, but per call of the codes."""
    variants = result["variants"]
    times = [
        f"{1e3 * seconds_of(variants[v], v):.3f}" if v in variants else "-"
        for v in (RULE, FROZEN, VOUCHED, CODES)
    ]
    ratios = [f"{variants[v]['ratio']:.3f}" if v in variants else "-" for v in (RULE, FROZEN)]
    return [result["name"], *times, *ratios]


def parse(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, torch.device]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("--models", nargs="+", choices=sorted(PRESETS), metavar="NAME", help="presets")
    parser.add_argument("--micro", type=positive, default=4, help="micro-batches of a step (default: 4)")
    parser.add_argument("--no-fsdp", action="store_true", help="without the row of two processes")
    parser.add_argument(
        "--repeats", type=positive, help="rounds (default: 7, 2 with --quick), of two processes twice as many"
    )
    parser.add_argument("--threads", type=positive, help="CPU threads (default: PyTorch's choice)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="result file (default: bench/results/...)")
    parser.add_argument("--quick", action="store_true", help="one small model, to see that it runs")
    args = parser.parse_args(argv)
    try:
        device = resolve_device(args.device)
    except ValueError as error:
        parser.error(str(error))
    if args.threads:
        torch.set_num_threads(args.threads)
    if not args.models:
        large = ["bitnet-700m"] if device.type == "cuda" else []
        args.models = ["collapse-64"] if args.quick else ["collapse-256", *large]
    args.repeats = args.repeats or (2 if args.quick else 7)
    return args, device


def main(argv: Sequence[str] | None = None) -> None:
    args, device = parse(argv)
    if device.index is not None:
        torch.cuda.set_device(device)
    facts = environment(device, HERE)
    print(
        f"{device_name(facts)}, {torch.get_num_threads()} CPU threads, torch {torch.__version__}", flush=True
    )
    options = {"repeats": args.repeats, "min_block_seconds": 0.0 if args.quick else 0.1}
    measures: list[Callable[[], dict[str, Any]]] = []
    for name in args.models:
        block = 1 if device.type == "cpu" else 4 if is_large(name) else 64
        for steps in dict.fromkeys((block, 1)):
            measures.append(functools.partial(measure_step, name, device, steps, **options))
        for micro in (1, args.micro):
            measures.append(functools.partial(measure_loop, name, device, micro, **options))
    if not args.no_fsdp and dist.is_available():
        measures.append(functools.partial(measure_sharded, args.models[0], args.micro, 2 * args.repeats))
    rows = []
    for measure in measures:
        rows.append(measure())
        print(f"  {rows[-1]['name']}", flush=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    print(format_table(COLUMNS, [cells_of(result) for result in rows]))
    path = result_path(args.json, HERE, "weight_cache", facts, args.quick)
    settings = {"models": args.models, "micro": args.micro, "quick": args.quick, **options}
    write_json(path, {"bench": "weight_cache", "environment": facts, "settings": settings, "rows": rows})
    print(f"written: {path}")


if __name__ == "__main__":
    sys.exit(exit_status(main))
