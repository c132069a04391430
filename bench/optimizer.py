"""One optimiser step of a whole model: clipping, the update, and the ternary codes of its new weights.

    python bench/optimizer.py                                  # on the best device
    python bench/optimizer.py --models bitnet-700m --no-muon

ours        gradient norm, clipping, AdamW, and the codes and scales of every ternary weight (one launch each on
            CUDA for up to 72 tensors, the norm takes two); its parts are timed by themselves too
fused       torch.nn.utils.clip_grad_norm_ and torch.optim.AdamW(fused=True), without any codes
foreach     the same with foreach=True
muon        ours with Muon for the matrices between embedding and head

Gradients are dense and given. One step of ours is checked against one of torch's before anything is timed; on a
GPU the times are of replayed CUDA graphs. The floor is the time of the bytes at the bandwidth of a copy in the
same run: 4 bytes a parameter for the norm, 28 for the update, 4.25 a ternary weight for the codes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bitnet_ext.models import PRESETS, BitNetForCausalLM, preset
from bitnet_ext.nn import frozen_weights
from bitnet_ext.testing import (
    Timing,
    environment,
    format_table,
    measure_ceiling,
    paired_ratio,
    time_interleaved,
    write_json,
)
from bitnet_ext.testing.bench import Call, device_name
from bitnet_ext.testing.script import WrongResultError, exit_status, positive, result_path
from bitnet_ext.training import FusedAdam, TrainConfig
from bitnet_ext.training.device import resolve_device

HERE = Path(__file__).resolve().parent
MODELS = ("collapse-256", "bitnet-100m", "bitnet-700m")
LR, DECAY, MAX_NORM = 1e-3, 0.1, 1.0
OURS, FUSED, FOREACH, MUON = "ours", "fused", "foreach", "muon"
PARTS = ("norm and clipping", "update and sums", "codes from the weights")


class Ours:
    """Our optimiser of a model whose gradients are given."""

    def __init__(self, model: BitNetForCausalLM, kind: str) -> None:
        config = TrainConfig(optimizer=kind, grad_clip=MAX_NORM, weight_decay=DECAY)
        self.optimizer = FusedAdam(model, config)
        device = next(model.parameters()).device
        with frozen_weights(model) as frozen:
            model(torch.zeros(1, 2, dtype=torch.int64, device=device))
            made = frozen.made()
        self.ternary = sum(w.numel() for _, weights, _ in made for w in weights)
        self.optimizer.keep_codes([weights for _, weights, _ in made], [codes for *_, codes in made])
        self.hyper = torch.tensor([LR, DECAY, 1 - config.beta1, 1 - config.beta2, 10 * LR], device=device)
        self.scale = torch.ones((), device=device)

    def step(self) -> None:
        _norm, scale = self.optimizer.grad_norm_and_scale()
        self.optimizer.step(self.hyper, scale)

    def parts(self) -> dict[str, Call]:
        return {
            PARTS[0]: self.optimizer.grad_norm_and_scale,
            PARTS[1]: self.update,
            PARTS[2]: self.optimizer.refresh_codes,
        }

    def update(self) -> None:
        """The update alone: the codes are left out for its time."""
        groups, self.optimizer._groups = self.optimizer._groups, []
        self.optimizer.step(self.hyper, self.scale)
        self.optimizer._groups = groups


class Torch:
    """torch.optim.AdamW behind clip_grad_norm_."""

    def __init__(self, model: nn.Module, **options: Any) -> None:
        self.parameters = list(model.parameters())
        inner = [p for p in self.parameters if p.dim() >= 2]
        rest = [p for p in self.parameters if p.dim() < 2]
        config = TrainConfig()
        self.optimizer = torch.optim.AdamW(
            [{"params": inner, "weight_decay": DECAY}, {"params": rest, "weight_decay": 0.0}],
            lr=LR,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            capturable=self.parameters[0].is_cuda,
            **options,
        )

    def step(self) -> None:
        nn.utils.clip_grad_norm_(self.parameters, MAX_NORM)
        self.optimizer.step()


def make_model(name: str, device: torch.device) -> BitNetForCausalLM:
    with device:
        model = BitNetForCausalLM(preset(name), seed=0)
    generator = torch.Generator(device=device).manual_seed(1)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator, device=device) * 1e-3
    return model


def check(name: str, device: torch.device) -> None:
    """Raises WrongResultError unless one step of ours gives the weights of one of torch's."""
    model, other = make_model(name, device), make_model(name, device)
    Ours(model, "adamw").step()
    Torch(other, foreach=True).step()
    for (path, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        # The first step moves every weight by about lr, whatever its gradient.
        if float((p - q).detach().abs().max()) > 1e-3 * LR:
            raise WrongResultError(f"{name}: {path} differs from torch.optim.AdamW's after a step")


def measure(
    name: str, device: torch.device, muon: bool, copy_gb_per_s: float, **options: Any
) -> dict[str, Any]:
    check(name, device)
    model = make_model(name, device)
    ours = Ours(model, "adamw")
    variants = {OURS: ours.step} | ours.parts()
    variants |= {FUSED: Torch(model, fused=True).step, FOREACH: Torch(model, foreach=True).step}
    if muon:
        variants[MUON] = Ours(model, "muon").step
    timings: dict[str, Timing] = time_interleaved(
        {name: [call] for name, call in variants.items()}, device, graph_calls=1, **options
    )
    total = sum(p.numel() for p in model.parameters())
    moved = dict(zip(PARTS, (4 * total, 28 * total, 8.25 * ours.ternary), strict=True))
    moved[OURS] = 32 * total + 4.25 * ours.ternary
    return {
        "model": name,
        "parameters": total,
        "ternary": ours.ternary,
        "variants": {
            variant: {
                "seconds": timing.to_dict(),
                "bytes": moved.get(variant),
                "floor_seconds": moved[variant] / copy_gb_per_s / 1e9 if variant in moved else None,
                "ratio": paired_ratio(timing, timings[OURS]),
            }
            for variant, timing in timings.items()
        },
    }


COLUMNS = ("model", "variant", "us", "p25..p75", "GB/s", "% of copy", "time / ours")


def cells_of(row: dict[str, Any]) -> list[list[str]]:
    cells = []
    for variant, result in row["variants"].items():
        seconds, moved = result["seconds"], result["bytes"]
        cells.append(
            [
                row["model"],
                variant,
                f"{1e6 * seconds['median']:.1f}",
                f"{1e6 * seconds['p25']:.1f}..{1e6 * seconds['p75']:.1f}",
                f"{moved / seconds['median'] / 1e9:.0f}" if moved else "-",
                f"{100 * result['floor_seconds'] / seconds['median']:.0f}" if moved else "-",
                f"{result['ratio']:.2f}x",
            ]
        )
    return cells


def parse(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, torch.device]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("--models", nargs="+", choices=sorted(PRESETS), metavar="NAME", help="presets")
    parser.add_argument("--no-muon", action="store_true", help="without Muon")
    parser.add_argument(
        "--repeats", type=positive, help="blocks of each variant (default: 9, 2 with --quick)"
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
        args.models = ["collapse-64"] if args.quick else MODELS if device.type == "cuda" else MODELS[:1]
    return args, device


def main(argv: Sequence[str] | None = None) -> None:
    args, device = parse(argv)
    if device.index is not None:
        torch.cuda.set_device(device)
    facts = environment(device, HERE)
    ceiling = measure_ceiling(device, quick=args.quick)
    options = {
        "repeats": args.repeats or (2 if args.quick else 9),
        "min_block_seconds": 0.0 if args.quick else 0.02,
    }
    print(f"{device_name(facts)}, {torch.get_num_threads()} CPU threads, torch {torch.__version__}, ", end="")
    print(f"copy ceiling {ceiling['copy_gb_per_s']:.1f} GB/s")
    rows = []
    for name in args.models:
        rows.append(measure(name, device, not args.no_muon, ceiling["copy_gb_per_s"], **options))
        if device.type == "cuda":
            torch.cuda.empty_cache()
    print(format_table(COLUMNS, [cells for row in rows for cells in cells_of(row)]))
    path = result_path(args.json, HERE, "optimizer", facts, args.quick)
    settings = {"models": args.models, "muon": not args.no_muon, "quick": args.quick, **options}
    results = {
        "bench": "optimizer",
        "environment": facts,
        "settings": settings,
        "ceiling": ceiling,
        "rows": rows,
    }
    write_json(path, results)
    print(f"written: {path}")


if __name__ == "__main__":
    sys.exit(exit_status(main))
