"""rotary_attention against the same composed of PyTorch's operators, forward and with the backward pass.

    python bench/attention.py                                   # on the best device
    python bench/attention.py --shapes 4x32x4x4x64xfloat32 8x2048x24x24x64xbfloat16

A shape is batch x tokens x query heads x key heads x head dimension x dtype. The peer rotates queries and keys with
rolled copies and calls F.scaled_dot_product_attention, as a model without the operator does. Both start from one
stacked [B, T, (num_heads + 2 num_kv_heads) D] product and, backward, end in its gradient. Results are checked before
they are timed. On a GPU the times are of replayed CUDA graphs, the inputs the same in every call.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from bitnet_ext import ops
from bitnet_ext.ops.attention import apply_rotary
from bitnet_ext.testing import environment, format_table, paired_ratio, time_interleaved, write_json
from bitnet_ext.testing.bench import Call, device_name
from bitnet_ext.testing.script import WrongResultError, exit_status, library_variables, positive, result_path
from bitnet_ext.training.device import resolve_device

HERE = Path(__file__).resolve().parent
SHAPES = (
    "4x32x4x4x64xfloat32",
    "4x32x4x4x64xbfloat16",
    "8x64x8x8x64xfloat32",
    "8x64x8x8x64xbfloat16",
    "8x512x8x8x64xfloat32",
    "8x2048x24x24x64xbfloat16",
    "8x2048x24x8x64xbfloat16",
)
CPU_SHAPES = ("4x32x4x4x64xfloat32", "2x256x8x8x64xfloat32")
QUICK_SHAPES = ("2x9x4x2x32xfloat32",)
COLUMNS = ("shape", "us", "PyTorch us", "speedup", "with backward us", "PyTorch us", "speedup")

Attention = Callable[[Tensor, Tensor, Tensor, int, int], Tensor]


class Shape(NamedTuple):
    B: int
    T: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype


def shape_of(text: str) -> Shape:
    *sizes, dtype = text.split("x")
    names = {str(d).removeprefix("torch."): d for d in (torch.float32, torch.bfloat16, torch.float16)}
    if len(sizes) != 5 or dtype not in names:
        raise argparse.ArgumentTypeError(f"must be BxTxHQxHKVxDxDTYPE such as {SHAPES[0]}, got {text}")
    B, T, num_heads, num_kv_heads, head_dim = (positive(size) for size in sizes)
    return Shape(B, T, num_heads, num_kv_heads, head_dim, names[dtype])


def composed(qkv: Tensor, cos: Tensor, sin: Tensor, num_heads: int, num_kv_heads: int) -> Tensor:
    heads = qkv.unflatten(-1, (num_heads + 2 * num_kv_heads, -1)).transpose(1, 2)
    query, key, value = heads.split((num_heads, num_kv_heads, num_kv_heads), dim=1)
    query, key = apply_rotary(query, cos, sin), apply_rotary(key, cos, sin)
    grouped = num_heads != num_kv_heads
    out = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=grouped)
    return out.transpose(1, 2).flatten(-2)


def calls_of(attention: Attention, qkv: Tensor, grad_out: Tensor, rest: tuple[Any, ...]) -> tuple[Call, Call]:
    """The forward alone, and with the backward."""

    def forward() -> Tensor:
        with torch.no_grad():
            return attention(qkv, *rest)

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(attention(qkv, *rest), qkv, grad_out)

    return forward, both


def measure(shape: Shape, device: torch.device, timing_options: dict[str, Any]) -> dict[str, Any]:
    B, T, num_heads, num_kv_heads, head_dim, dtype = shape
    qkv, grad_out = (
        torch.randn(B, T, heads * head_dim, device=device).to(dtype)
        for heads in (num_heads + 2 * num_kv_heads, num_heads)
    )
    frequency = 10000.0 ** (-2 * torch.arange(head_dim // 2, dtype=torch.float64) / head_dim)
    angle = torch.arange(T, dtype=torch.float64)[:, None] * frequency
    cos = torch.cat((angle.cos(), angle.cos()), dim=1).float().to(device)
    sin = torch.cat((-angle.sin(), angle.sin()), dim=1).float().to(device)
    rest = (cos, sin, num_heads, num_kv_heads)
    ours = calls_of(ops.rotary_attention, qkv.requires_grad_(), grad_out, rest)
    peer = calls_of(composed, qkv, grad_out, rest)
    for what, a, b in zip(("output", "gradient"), ours, peer, strict=True):
        got, expected = (t[0] if isinstance(t, tuple) else t for t in (a(), b()))
        limit = 32 * torch.finfo(dtype).eps * float(expected.float().abs().max())
        error = float((got.float() - expected.float()).abs().max())
        if not error <= limit:
            raise WrongResultError(f"{what} of {shape}: differs by {error:.3g}, more than {limit:.3g}")
    row: dict[str, Any] = {**shape._asdict(), "dtype": str(dtype).removeprefix("torch.")}
    for name, index in (("forward", 0), ("both", 1)):
        timings = time_interleaved({"ours": [ours[index]], "peer": [peer[index]]}, device, **timing_options)
        row[name] = {
            "seconds": timings["ours"].to_dict(),
            "peer_seconds": timings["peer"].to_dict(),
            "ratio": paired_ratio(timings["peer"], timings["ours"]),
        }
    return row


def cells_of(row: dict[str, Any]) -> list[str]:
    """A row of the table, in the order of `COLUMNS`."""
    cells = ["x".join(str(row[name]) for name in Shape._fields)]
    for name in ("forward", "both"):
        part = row[name]
        cells += [f"{1e6 * part[key]['median']:.1f}" for key in ("seconds", "peer_seconds")]
        cells.append(f"{part['ratio']:.2f}x")
    return cells


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("--shapes", nargs="+", type=shape_of, metavar="SHAPE", help="see above")
    parser.add_argument("--repeats", type=positive, help="blocks of each variant (default: 9, 2 if quick)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="result file (default: bench/results/...)")
    parser.add_argument("--quick", action="store_true", help="one small shape, to see that it runs")
    args = parser.parse_args(argv)
    try:
        device = resolve_device(args.device)
    except ValueError as error:
        parser.error(str(error))
    names = QUICK_SHAPES if args.quick else SHAPES if device.type == "cuda" else CPU_SHAPES
    facts = environment(device, HERE)
    timing_options = {
        "repeats": args.repeats or (2 if args.quick else 9),
        "min_block_seconds": 0.0 if args.quick else 0.02,
    }
    print(f"{device_name(facts)}, torch {torch.__version__}, {torch.get_num_threads()} CPU threads")
    rows = [measure(shape, device, timing_options) for shape in args.shapes or map(shape_of, names)]
    print(format_table(COLUMNS, [cells_of(row) for row in rows]))
    path = result_path(args.json, HERE, "attention", facts, args.quick)
    settings = {"quick": args.quick, "variables": library_variables(), **timing_options}
    write_json(path, {"bench": "attention", "environment": facts, "settings": settings, "rows": rows})
    print(f"written: {path}")


if __name__ == "__main__":
    sys.exit(exit_status(main))
