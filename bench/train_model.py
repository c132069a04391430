"""Tokens/s of a whole training step of a larger model, ternary against the same network of nn.Linear in bfloat16.

    python bench/train_model.py                               # bitnet-700m, 8 rows of 2,048 tokens, on the GPU
    python bench/train_model.py --model bitnet-100m --batch 16 --seq-len 1024
    python bench/train_model.py --curve 1000 --data text.txt  # loss curves of both backward modes instead

One step: forward, cross-entropy over the whole vocabulary, backward, clipping to norm 1, AdamW. Parameters and
optimiser state are float32, products bfloat16 (autocast); ours multiply int8 activations with packed ternary weights
in the forward and, with `int8`, in the backward too. The twins are plain PyTorch: nn.Linear, nn.RMSNorm,
F.scaled_dot_product_attention, F.cross_entropy, fused AdamW, eager and with every block under torch.compile; a third
one quantises weights and inputs in floating point, as public BitNet trainers do. Variants run one after the other,
each from an empty GPU.

`--curve` trains a ternary model from one seed on one order of the data in each backward mode and compares the loss
curves.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from bitnet_ext.data import load_corpus
from bitnet_ext.models import PRESETS, BitNetConfig, BitNetForCausalLM, preset
from bitnet_ext.testing import environment, format_table, measure_ceiling, write_json
from bitnet_ext.testing.bench import device_name
from bitnet_ext.testing.script import exit_status, positive, result_path
from bitnet_ext.testing.twin import TwinModel
from bitnet_ext.training import FusedAdam, TrainConfig, Trainer
from bitnet_ext.training.device import resolve_device
from bitnet_ext.training.distributed import World
from bitnet_ext.training.step import TrainStep

HERE = Path(__file__).resolve().parent
#: Dense bfloat16 TFLOP/s of the data sheets, by a part of the device's name; the first that fits.
PEAK_TFLOPS = {"H200": 989.4, "H100 PCIe": 756.5, "H100": 989.4, "A100": 312.0}
BACKWARDS = ("exact", "int8")
#: Losses of a curve are averaged over so many steps before two curves are compared.
WINDOW = 50


class Variant(Protocol):
    """Something that trains."""

    def run(self, rows: NDArray[np.int64]) -> list[float]:
        """One optimiser step for each of rows [n, batch, seq_len + 1]; returns the losses."""


class Ours:
    """TrainStep as the Trainer runs it."""

    def __init__(self, shape: BitNetConfig, config: TrainConfig, device: torch.device) -> None:
        model = BitNetForCausalLM(shape, seed=0).to(device).train()
        self.step = TrainStep(model, FusedAdam(model, config), config, device, World())
        self.count = 0

    def run(self, rows: NDArray[np.int64]) -> list[float]:
        losses: list[float] = []
        for start in range(0, len(rows), self.step.block_steps):
            part = rows[start : start + self.step.block_steps]
            losses += self.step.run(self.count, part)[:, 0].tolist()
            self.count += len(part)
        return losses


class Twin:
    """The ordinary training loop under autocast."""

    def __init__(
        self, shape: BitNetConfig, config: TrainConfig, device: torch.device, compiled: bool = False
    ) -> None:
        self.model = TwinModel(shape).load_from(BitNetForCausalLM(shape, seed=0)).to(device).train()
        self.device = device
        self.loss: Callable[[Tensor, Tensor], Tensor] = self._loss
        if compiled:
            for block in self.model.layers:
                block.compile()
            self.loss = torch.compile(self._loss)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=config.lr,
            betas=(config.beta1, config.beta2),
            weight_decay=config.weight_decay,
            fused=True,
        )

    def _loss(self, hidden: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(self.model.lm_head(hidden).flatten(0, 1).float(), target.flatten())

    def run(self, rows: NDArray[np.int64]) -> list[float]:
        losses = []
        for batch in rows:
            ids = torch.from_numpy(batch).to(self.device)
            self.optimizer.zero_grad()
            with torch.autocast(self.device.type, dtype=torch.bfloat16):
                hidden = self.model.hidden_states(ids[:, :-1])
                loss = self.loss(hidden, ids[:, 1:])
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            losses.append(loss.detach())
        return torch.stack(losses).tolist()


def flops_per_token(shape: BitNetConfig, seq_len: int) -> float:
    """Of forward and backward: 6 a weight of a product, 12 T H a layer for attention (PaLM, arXiv 2204.02311, B)."""
    kv = shape.num_kv_heads * shape.head_dim
    block = shape.hidden_size * (2 * shape.hidden_size + 2 * kv + 3 * shape.intermediate_size)
    products = shape.num_layers * block + shape.vocab_size * shape.hidden_size
    return 6 * products + 12 * shape.num_layers * seq_len * shape.hidden_size


def train_config(args: argparse.Namespace, steps: int, backward: str) -> TrainConfig:
    return TrainConfig(
        steps=steps,
        batch_size=args.batch,
        seq_len=args.seq_len,
        precision="bf16",
        optimizer="adamw",
        lr=args.lr,
        warmup_steps=min(args.warmup, steps),
        backward=backward,
    )


def random_rows(count: int, args: argparse.Namespace, vocab_size: int) -> NDArray[np.int64]:
    generator = np.random.default_rng(0)
    return generator.integers(0, vocab_size, (count, args.batch, args.seq_len + 1))


def free() -> None:
    gc.collect()
    torch.compiler.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def measure(
    build: Callable[[], Variant], rows: NDArray[np.int64], repeats: int, device: torch.device
) -> dict[str, Any]:
    """Seconds of a step, a sample a block of `rows`; the first blocks build, compile, capture and warm up."""
    free()
    variant = build()
    first = variant.run(rows[:1])[0]
    variant.run(rows)
    samples = []
    for _ in range(repeats):
        start = time.perf_counter()
        variant.run(rows)  # ends when its losses are on the host
        samples.append((time.perf_counter() - start) / len(rows))
    on_gpu = device.type == "cuda"
    return {
        "samples": samples,
        "median": statistics.median(samples),
        "peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
        "peak_reserved_bytes": torch.cuda.max_memory_reserved() if on_gpu else None,
        "first_loss": first,
    }


def variants(
    args: argparse.Namespace, shape: BitNetConfig, device: torch.device
) -> Iterator[tuple[str, Callable[[], Variant]]]:
    plain = preset_of(args, quantization="none")
    for backward in BACKWARDS:
        config = train_config(args, 1000, backward)
        yield f"bitnet_ext, backward {backward}", lambda config=config: Ours(shape, config, device)
    config = train_config(args, 1000, "exact")
    yield "nn.Linear, eager", lambda: Twin(plain, config, device)
    if args.compile:
        yield "nn.Linear, torch.compile", lambda: Twin(plain, config, device, compiled=True)
        yield "fake-quant, torch.compile", lambda: Twin(shape, config, device, compiled=True)


def preset_of(args: argparse.Namespace, **overrides: Any) -> BitNetConfig:
    if args.layers:
        overrides["num_layers"] = args.layers
    if args.quick and not args.curve:
        overrides["vocab_size"] = 512
    return preset(args.model, **overrides)


def throughput(args: argparse.Namespace, device: torch.device, facts: dict[str, Any]) -> dict[str, Any]:
    shape = preset_of(args)
    rows = random_rows(args.steps, args, shape.vocab_size)
    tokens = args.batch * args.seq_len
    peak = next((tf for part, tf in PEAK_TFLOPS.items() if part in device_name(facts)), None)
    results: list[dict[str, Any]] = []
    for name, build in variants(args, shape, device):
        try:
            timing = measure(build, rows, args.repeats, device)
        except Exception as error:
            if name.startswith("bitnet_ext"):
                raise
            results.append({"variant": name, "skipped": f"{type(error).__name__}: {error}"[:200]})
            continue
        rate = tokens / timing["median"]
        utilisation = rate * flops_per_token(shape, args.seq_len) / (peak * 1e12) if peak else None
        results.append({"variant": name, "tokens_per_second": rate, "utilisation": utilisation, **timing})
    rates = [r.get("tokens_per_second", 0.0) for r in results if r["variant"].startswith("nn.Linear")]
    best = max(rates, default=0.0) or None
    cells = []
    for row in results:
        if "skipped" in row:
            cells.append([row["variant"], "skipped: " + row["skipped"], *[""] * 6])
            continue
        row["ratio_to_linear"] = None if best is None else row["tokens_per_second"] / best
        samples = [1e3 * s for s in row["samples"]]
        cells.append(
            [
                row["variant"],
                f"{row['tokens_per_second']:.0f}",
                f"{1e3 * row['median']:.1f}",
                f"{min(samples):.1f}..{max(samples):.1f}",
                "-" if row["utilisation"] is None else f"{100 * row['utilisation']:.1f}",
                "-" if row["ratio_to_linear"] is None else f"{row['ratio_to_linear']:.2f}x",
                *(
                    "-" if row[key] is None else f"{row[key] / 2**30:.1f}"
                    for key in ("peak_bytes", "peak_reserved_bytes")
                ),
            ]
        )
    names = ("variant", "tokens/s", "ms/step", "min..max", "MFU %", "vs best nn.Linear")
    print(format_table((*names, "peak GiB", "reserved GiB"), cells))
    return {"rows": results, "flops_per_token": flops_per_token(shape, args.seq_len), "peak_tflops": peak}


def curves(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    shape = preset_of(args)
    tokens = load_corpus(args.data, progress=False).train[:]
    losses: dict[str, list[float]] = {}
    for backward in BACKWARDS:
        free()
        config = train_config(args, args.curve, backward)
        trainer = Trainer(BitNetForCausalLM(shape, seed=0), config, tokens, device=device)
        curve: list[float] = []
        step = TrainStep(trainer.model.train(), trainer.optimizer, config, device, World())
        for start in range(0, args.curve, step.block_steps):
            count = min(step.block_steps, args.curve - start)
            curve += step.run(start, trainer.sampler.batches(start, count))[:, 0].tolist()
        losses[backward] = curve
        del trainer, step
    window = min(WINDOW, args.curve)
    smooth = {name: np.convolve(curve, np.ones(window) / window, "valid") for name, curve in losses.items()}
    exact, int8 = smooth["exact"], smooth["int8"]
    difference = np.abs(int8 - exact) / exact
    result = {
        "losses": losses,
        "window": window,
        "largest_relative_difference": float(difference.max()),
        "final_relative_difference": float(difference[-1]),
    }
    cells = [[name, *(f"{curve[i]:.4f}" for i in (0, len(curve) // 2, -1))] for name, curve in smooth.items()]
    print(format_table(("backward", f"loss of {window} steps: first", "middle", "last"), cells))
    print(
        f"relative difference of the smoothed curves: largest {difference.max():.2%}, last {difference[-1]:.2%}"
    )
    return result


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=list(PRESETS), help="preset (default: bitnet-700m)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("--batch", type=positive, help="rows of a step (default: 8)")
    parser.add_argument("--seq-len", type=positive, help="tokens of a row (default: 2048)")
    parser.add_argument("--layers", type=positive, help="layers, in place of the preset's")
    parser.add_argument("--steps", type=positive, help="steps of a block (default: 3)")
    parser.add_argument("--repeats", type=positive, help="blocks of each variant (default: 5)")
    parser.add_argument("--lr", type=float, default=1.5e-3, help="peak learning rate (default: 1.5e-3)")
    parser.add_argument("--warmup", type=int, default=100, help="steps of warm-up (default: 100)")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")
    parser.add_argument(
        "--curve", type=positive, metavar="STEPS", help="compare loss curves of so many steps"
    )
    parser.add_argument(
        "--data", metavar="CORPUS", default="wiki-leads", help="of --curve: name or path of a text"
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="result file (default: bench/results/...)")
    parser.add_argument(
        "--quick", action="store_true", help="a tiny model and few steps, to see that it runs"
    )
    args = parser.parse_args(argv)
    quick = args.quick
    args.model = args.model or ("collapse-64" if quick else "bitnet-100m" if args.curve else "bitnet-700m")
    args.batch = args.batch or (2 if quick else 8)
    args.seq_len = args.seq_len or (16 if quick else 2048)
    args.steps = args.steps or (1 if quick else 3)
    args.repeats = args.repeats or (1 if quick else 5)
    if quick:
        args.compile = False
    return args


def run(args: argparse.Namespace, device: torch.device) -> None:
    facts = environment(device, HERE)
    print(
        f"{args.model}, {args.batch} x {args.seq_len} tokens a step, {device_name(facts)}, torch {torch.__version__}"
    )
    result = curves(args, device) if args.curve else throughput(args, device, facts)
    name = "train_curve" if args.curve else "train_model"
    path = result_path(args.json, HERE, name, facts, args.quick)
    settings = {key: value for key, value in vars(args).items() if key != "json"}
    settings["data"] = Path(args.data).name
    ceiling = measure_ceiling(device, quick=args.quick)
    write_json(
        path,
        {"bench": "train_model", "environment": facts, "settings": settings, "ceiling": ceiling, **result},
    )
    print(f"written: {path}")


def main() -> int:
    args = parse()
    try:
        device = resolve_device(args.device)
    except ValueError as error:
        print(f"bench/train_model.py: {error}", file=sys.stderr)
        return 2
    return exit_status(lambda: run(args, device))


if __name__ == "__main__":
    sys.exit(main())
