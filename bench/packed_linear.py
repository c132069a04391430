"""Packed 2-bit weights against full-precision weights: one layer, and small models as a whole.

    python bench/packed_linear.py                           # on the best device
    python bench/packed_linear.py --shapes 2560x2560 --tokens 1 64 --device cpu

One layer, N x K (out_features x in_features), M tokens: PackedBitLinear (activations quantised within), its
product alone, nn.Linear's product in fp32 and bf16, and torch._int_mm on int8 weights. Every result is
checked against the exact product before it is timed. Weights are rotated over copies that exceed three
times the last cache, so M = 1 reads them from memory as decoding does. Activations are fp32 on a CPU and
bf16 on a GPU.

Whole model: prefill of 128 tokens, and one decoding step behind them through a KVCache, of the packed
model, of the form it was trained in, and of the full-precision twin in fp32 and bf16 (autocast, weights
stored in bf16). On a GPU the times are of replayed CUDA graphs, the device's own; `eager` adds the launches.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bitnet_ext import ops
from bitnet_ext.models import PRESETS, BitNetForCausalLM, KVCache, preset
from bitnet_ext.nn import PackedBitLinear, pack_model
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
from bitnet_ext.testing.bench import MAX_COPIES, Call, device_name
from bitnet_ext.testing.script import WrongResultError, exit_status, positive, result_path, sizes
from bitnet_ext.training.device import resolve_device

HERE = Path(__file__).resolve().parent
#: q/o and the feed-forward's two products of BitNet b1.58 2B4T, and a square of a larger model.
SHAPES = ("2560x2560", "6912x2560", "2560x6912", "4096x4096")
TOKENS = (1, 8, 64, 512)
MODELS = ("collapse-256", "bitnet-100m")
PROMPT_TOKENS = 128

PACKED, PRODUCT, FP32, BF16, INT8 = (
    "packed 2-bit",
    "packed, product alone",
    "torch fp32",
    "torch bf16",
    "torch._int_mm",
)


shape = sizes("NxK", "2560x6912")

# --- one layer ----------------------------------------------------------------------------------------------


def int_mm_limit(M: int, N: int, K: int, device: torch.device) -> str | None:
    """Why torch._int_mm does not take a shape, None when it does."""
    if device.type != "cuda":
        return None
    if M <= 16:
        return "needs M > 16"
    if N % 8 or K % 8:
        return "needs N and K in multiples of 8"
    return None


class Layer:
    """Operands of one shape, with as many copies of each weight as the rotation needs."""

    def __init__(self, N: int, K: int, device: torch.device, most_copies: int = MAX_COPIES) -> None:
        self.N, self.K, self.device, self.most_copies = N, K, device, most_copies
        generator = torch.Generator().manual_seed(N * 10007 + K)
        self.codes = torch.randint(-1, 2, (N, K), generator=generator).to(device, torch.int8)
        self.weight_scale = torch.tensor(0.0371, device=device)
        self.act_dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        dense = self.codes.float() * self.weight_scale
        self.weights: dict[str, list[Tensor]] = {
            PACKED: self._copies(ops.pack_ternary(self.codes)),
            FP32: self._copies(dense),
            BF16: self._copies(dense.bfloat16()),
            INT8: self._copies(self.codes),
        }
        if device.type == "cuda":  # in the layout that the products read, as the layer keeps it
            self.weights[PRODUCT] = self._copies(ops.prepack_ternary(self.weights[PACKED][0], K))
        else:
            self.weights[PRODUCT] = self.weights[PACKED]
        self.layers = [PackedBitLinear(K, N, packed, self.weight_scale) for packed in self.weights[PACKED]]

    def _copies(self, weight: Tensor) -> list[Tensor]:
        count = rotation_count(weight.numel() * weight.element_size(), self.device)
        return [weight.clone() for _ in range(min(count, self.most_copies))]

    def weight_bytes(self, name: str) -> int:
        weight = self.weights[name][0]
        return weight.numel() * weight.element_size()

    def calls(self, M: int) -> tuple[dict[str, list[Call]], dict[str, str]]:
        """Checked calls by variant, and the reasons of those that are left out."""
        generator = torch.Generator().manual_seed(M)
        x = torch.randn(M, self.K, generator=generator).to(self.device, self.act_dtype)
        x_i8, act_scale = ops.quantize_act_int8(x)
        x_fp32 = ops.dequantize_act(x_i8, act_scale)
        x_bf16 = x_fp32.bfloat16()

        def product(weight: Tensor) -> Tensor:
            return ops.int8xint2_mm(
                x_i8,
                act_scale,
                weight,
                self.weight_scale,
                out_features=self.N if weight.dim() > 2 else None,
                out_dtype=self.act_dtype,
            )

        def each(name: str, call: Callable[[Any], Tensor]) -> list[Call]:
            operands: list[Any] = self.layers if name == PACKED else self.weights[name]
            return [lambda operand=operand: call(operand) for operand in operands]  # type: ignore[misc]

        calls = {
            PACKED: each(PACKED, lambda layer: layer(x)),
            PRODUCT: each(PRODUCT, product),
            FP32: each(FP32, lambda w: F.linear(x_fp32, w)),
            BF16: each(BF16, lambda w: F.linear(x_bf16, w)),
        }
        skipped = {}
        limit = int_mm_limit(M, self.N, self.K, self.device)
        if limit is None:
            calls[INT8] = each(INT8, lambda w: torch._int_mm(x_i8, w.t()))
        else:
            skipped[INT8] = limit
        self._check(calls, x_i8, act_scale)
        return calls, skipped

    def _check(self, calls: dict[str, list[Call]], x_i8: Tensor, act_scale: Tensor) -> None:
        sums = x_i8.double() @ self.codes.double().t()  # exact: integers below 2^53
        exact = sums.float() * act_scale[:, None] * self.weight_scale
        for name, variants in calls.items():
            result = variants[0]()
            assert isinstance(result, Tensor)
            if name == INT8:
                right = torch.equal(result.double(), sums)
            elif name in (PACKED, PRODUCT):
                right = torch.equal(result, exact.to(result.dtype))
            else:
                error = float((result.float() - exact).abs().max() / exact.abs().max())
                right = error < (1e-4 if name == FP32 else 2e-2)
            if not right:
                raise WrongResultError(
                    f"{name} is not the exact product for M x N x K = {x_i8.shape[0]} x {self.N} x {self.K}"
                )


def measure_layers(
    shapes: list[tuple[int, int]],
    tokens: list[int],
    device: torch.device,
    quick: bool,
    ceiling: dict[str, float],
    timing_options: dict[str, Any],
) -> tuple[list[list[str]], list[dict[str, Any]]]:
    cells: list[list[str]] = []
    values: list[dict[str, Any]] = []
    for N, K in shapes:
        layer = Layer(N, K, device, 2 if quick else MAX_COPIES)
        for M in tokens:
            calls, skipped = layer.calls(M)
            timings = time_interleaved(calls, device, **timing_options)
            for name in (PACKED, PRODUCT, FP32, BF16, INT8):
                row: dict[str, Any] = {"N": N, "K": K, "M": M, "variant": name}
                label = [f"{N}x{K}", str(M), name]
                if name in skipped:
                    cells.append([*label, "skipped", skipped[name], *[""] * 5])
                    values.append(row | {"skipped": skipped[name]})
                    continue
                timing, nbytes = timings[name], layer.weight_bytes(name)
                rate = nbytes / timing.median / 1e9
                to_fp32, to_bf16 = (paired_ratio(timings[base], timing) for base in (FP32, BF16))
                share = rate / ceiling["read_gb_per_s"] if M == 1 else None
                cells.append(
                    [
                        *label,
                        f"{1e6 * timing.median:.2f}",
                        f"{1e6 * timing.p25:.2f}..{1e6 * timing.p75:.2f}",
                        f"{nbytes / 2**20:.2f}",
                        f"{rate:.1f}",
                        f"{to_fp32:.2f}x",
                        f"{to_bf16:.2f}x",
                        "" if share is None else f"{100 * share:.0f} %",
                    ]
                )
                values.append(
                    row
                    | {
                        "seconds": timing.to_dict(),
                        "weight_bytes": nbytes,
                        "weight_gb_per_s": rate,
                        "ratio_to_fp32": to_fp32,
                        "ratio_to_bf16": to_bf16,
                        "share_of_read_ceiling": share,
                    }
                )
        del layer
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return cells, values


LAYER_COLUMNS = (
    "NxK",
    "M",
    "variant",
    "us",
    "p25..p75",
    "weight MiB",
    "GB/s",
    "vs fp32",
    "vs bf16",
    "% of read ceiling",
)


# --- whole models -------------------------------------------------------------------------------------------


def to_bf16(model: BitNetForCausalLM) -> BitNetForCausalLM:
    """Stores every float matrix in bfloat16; norm gains stay float32. To be run under autocast."""
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            parameter.data = parameter.data.bfloat16()
    return model


def model_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and persistent buffers, a shared one counted once."""
    tensors = {t.data_ptr(): t for t in [*model.parameters(), *model.buffers()]}
    rotary = {getattr(model, name).data_ptr() for name in ("cos", "sin")}
    return sum(t.numel() * t.element_size() for pointer, t in tensors.items() if pointer not in rotary)


class Runner:
    """Prefill and decoding of one model, each as a call that can be repeated."""

    def __init__(self, model: BitNetForCausalLM, device: torch.device, bf16: bool) -> None:
        self.model = model.to(device).requires_grad_(False).eval()
        self.device, self.bf16 = device, bf16
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(0, model.config.vocab_size, (1, PROMPT_TOKENS + 1), generator=generator)
        self.prompt, self.token = ids[:, :-1].to(device), ids[:, -1:].to(device)
        dtype = torch.bfloat16 if bf16 else torch.float32
        self.cache = KVCache(model.config, 1, PROMPT_TOKENS + 1, device=device, dtype=dtype)

    @torch.no_grad()
    def _logits(self, ids: Tensor, start: int) -> Tensor:
        self.cache.length = start
        # Casts are not cached: a graph must not hold weights that autocast made in another call.
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16, cache_enabled=False):
            hidden = self.model.hidden_states(ids, self.cache)[:, -1]
            return self.model.logits(hidden)

    def prefill(self) -> Tensor:
        return self._logits(self.prompt, 0)

    def decode(self) -> Tensor:
        return self._logits(self.token, PROMPT_TOKENS)


def build_models(name: str, device: torch.device, quick: bool) -> dict[str, Runner]:
    overrides = {"vocab_size": 512} if quick else {}

    def model(quantization: str) -> BitNetForCausalLM:
        return BitNetForCausalLM(preset(name, quantization=quantization, **overrides), seed=0).to(device)

    return {
        "packed": Runner(pack_model(model("b1.58"), inplace=True), device, False),
        "packed, rest in bf16": Runner(to_bf16(pack_model(model("b1.58"), inplace=True)), device, True),
        "training form": Runner(model("b1.58"), device, False),
        "fp32 twin": Runner(model("none"), device, False),
        "bf16 twin": Runner(to_bf16(model("none")), device, True),
    }


def check_models(runners: dict[str, Runner]) -> float:
    """Largest difference of the packed model's logits from the training form's, relative to their size.

    On a CPU it must be zero. Leaves the caches filled with the prompt.
    """
    differences = []
    for phase in ("prefill", "decode"):
        logits = {name: getattr(runner, phase)() for name, runner in runners.items()}
        for name, value in logits.items():
            if not bool(torch.isfinite(value).all()):
                raise WrongResultError(f"{name}: the logits of {phase} hold NaN or Inf")
        reference = logits["training form"]
        differences.append(float((logits["packed"] - reference).abs().max() / reference.abs().max()))
    worst = max(differences)
    if worst > (0.0 if reference.device.type == "cpu" else 1e-2):
        raise WrongResultError(f"the packed model's logits differ from the training form's by {worst:.1e}")
    return worst


def measure_models(
    names: list[str], device: torch.device, quick: bool, timing_options: dict[str, Any]
) -> tuple[list[list[str]], list[dict[str, Any]]]:
    cells: list[list[str]] = []
    values: list[dict[str, Any]] = []
    for name in names:
        runners = build_models(name, device, quick)
        difference = check_models(runners)
        timings: dict[tuple[str, bool], dict[str, Timing]] = {}
        for phase in ("prefill", "decode"):
            for graph in (True, False) if device.type == "cuda" else (False,):
                calls: dict[str, list[Call]] = {n: [getattr(r, phase)] for n, r in runners.items()}
                timings[phase, graph] = time_interleaved(calls, device, graph=graph, **timing_options)
        sizes = {n: model_bytes(r.model) for n, r in runners.items()}
        for variant in runners:
            for graph in (True, False) if device.type == "cuda" else (False,):
                prefill, decode = timings["prefill", graph], timings["decode", graph]
                ratios = [paired_ratio(t["fp32 twin"], t[variant]) for t in (prefill, decode)]
                cells.append(
                    [
                        name,
                        variant + (", eager" if device.type == "cuda" and not graph else ""),
                        f"{1e3 * prefill[variant].median:.2f}",
                        f"{ratios[0]:.2f}x",
                        f"{1 / decode[variant].median:.1f}",
                        f"{1 / decode[variant].p75:.1f}..{1 / decode[variant].p25:.1f}",
                        f"{ratios[1]:.2f}x",
                        f"{sizes[variant] / 2**20:.1f}",
                        f"{sizes['fp32 twin'] / sizes[variant]:.2f}x",
                    ]
                )
                values.append(
                    {
                        "model": name,
                        "variant": variant,
                        "graph": graph and prefill[variant].graph and decode[variant].graph,
                        "prefill_tokens": PROMPT_TOKENS,
                        "prefill_seconds": prefill[variant].to_dict(),
                        "decode_seconds": decode[variant].to_dict(),
                        "decode_tokens_per_second": 1 / decode[variant].median,
                        "prefill_ratio_to_fp32": ratios[0],
                        "decode_ratio_to_fp32": ratios[1],
                        "model_bytes": sizes[variant],
                        "bytes_ratio_to_fp32": sizes["fp32 twin"] / sizes[variant],
                        "packed_logits_difference": difference,
                    }
                )
        del runners
    return cells, values


MODEL_COLUMNS = (
    "model",
    "variant",
    f"prefill {PROMPT_TOKENS}, ms",
    "vs fp32",
    "decode tokens/s",
    "p25..p75",
    "vs fp32",
    "MiB",
    "smaller than fp32",
)


# --- the report ---------------------------------------------------------------------------------------------


def parse() -> tuple[argparse.Namespace, torch.device]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("--shapes", nargs="+", type=shape, metavar="NxK", help=f"default: {' '.join(SHAPES)}")
    parser.add_argument("--tokens", nargs="+", type=positive, metavar="M", help="default: 1 8 64 512")
    parser.add_argument(
        "--models", nargs="*", choices=list(PRESETS), metavar="NAME",
        help=f"presets measured as a whole, none for no models (default: {' '.join(MODELS)})",
    )  # fmt: skip
    parser.add_argument("--repeats", type=positive, help="blocks of each variant (default: 11)")
    parser.add_argument("--threads", type=positive, help="CPU threads (default: PyTorch's choice)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="result file (default: bench/results/...)")
    parser.add_argument("--quick", action="store_true", help="one small shape and model, to see that it runs")
    args = parser.parse_args()
    try:
        device = resolve_device(args.device)
    except ValueError as error:
        parser.error(str(error))
    if args.threads:
        torch.set_num_threads(args.threads)
    args.shapes = args.shapes or [shape(text) for text in (("256x256",) if args.quick else SHAPES)]
    args.tokens = args.tokens or ([1, 32] if args.quick else list(TOKENS))
    if args.models is None:
        args.models = ["collapse-64"] if args.quick else list(MODELS)
    return args, device


def main() -> None:
    args, device = parse()
    if device.index is not None:
        torch.cuda.set_device(device)
    facts = environment(device, HERE)
    ceiling = measure_ceiling(device, quick=args.quick)
    timing_options = {
        "repeats": args.repeats or (2 if args.quick else 11),
        "min_block_seconds": 0.0 if args.quick else 0.02 if device.type == "cpu" else 0.005,
    }
    print(f"{device_name(facts)}, {torch.get_num_threads()} CPU threads, torch {torch.__version__}, ", end="")
    print(f"read ceiling {ceiling['read_gb_per_s']:.1f} GB/s")
    layer_cells, layers = measure_layers(
        args.shapes, args.tokens, device, args.quick, ceiling, timing_options
    )
    print(format_table(LAYER_COLUMNS, layer_cells))
    model_cells, models = measure_models(args.models, device, args.quick, timing_options)
    if models:
        print()
        print(format_table(MODEL_COLUMNS, model_cells))
    path = result_path(args.json, HERE, "packed_linear", facts, args.quick)
    write_json(
        path,
        {
            "bench": "packed_linear",
            "environment": facts,
            "settings": {
                "shapes": args.shapes,
                "tokens": args.tokens,
                "models": args.models,
                "quick": args.quick,
                "activation_dtype": "bfloat16" if device.type == "cuda" else "float32",
                **timing_options,
            },
            "ceiling": ceiling,
            "layers": layers,
            "models": models,
        },
    )
    print(f"written: {path}")


if __name__ == "__main__":
    sys.exit(exit_status(main))
