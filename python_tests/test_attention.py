"""rotary_attention against fp64, and against the same composed of PyTorch's operators, on its three paths."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bitnet_ext import ops
from bitnet_ext.ops.attention import apply_rotary

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
#: (T, D, query heads, key heads). On CUDA the first eight take one kernel, the others a rotation and an
#: attention kernel.
SHAPES = [
    (1, 64, 2, 2),
    (3, 32, 4, 2),
    (32, 64, 4, 4),
    (33, 128, 3, 1),
    (64, 128, 2, 1),
    (65, 64, 6, 2),
    (128, 64, 2, 2),
    (100, 32, 4, 1),
    (65, 128, 2, 1),
    (200, 64, 4, 2),
    (200, 128, 2, 2),
    (33, 80, 4, 2),
    (7, 6, 3, 3),
]


def tables(T: int, D: int, device: str) -> tuple[Tensor, Tensor]:
    frequency = 10000.0 ** (-2 * torch.arange(D // 2, dtype=torch.float64) / D)
    angle = torch.arange(T, dtype=torch.float64)[:, None] * frequency
    cos, sin = angle.cos().float(), angle.sin().float()
    return torch.cat((cos, cos), dim=1).to(device), torch.cat((-sin, sin), dim=1).to(device)


def composed(qkv: Tensor, cos: Tensor, sin: Tensor, num_heads: int, num_kv_heads: int) -> Tensor:
    """The same of PyTorch's operators, each of which rounds to qkv's dtype."""
    heads = qkv.unflatten(-1, (num_heads + 2 * num_kv_heads, -1)).transpose(1, 2)
    query, key, value = heads.split((num_heads, num_kv_heads, num_kv_heads), dim=1)
    query, key = apply_rotary(query, cos, sin), apply_rotary(key, cos, sin)
    grouped = num_heads != num_kv_heads
    out = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=grouped)
    return out.transpose(1, 2).flatten(-2)


def with_gradient(
    function: Callable[..., Tensor], qkv: Tensor, grad_out: Tensor, *rest: object
) -> tuple[Tensor, Tensor]:
    leaf = qkv.detach().clone().requires_grad_()
    out = function(leaf, *rest)
    (grad,) = torch.autograd.grad(out, leaf, grad_out.to(out.dtype))
    return out.detach(), grad


def sample(
    T: int, D: int, heads: int, kv_heads: int, dtype: torch.dtype, device: str, B: int = 2
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(T * D + heads)
    qkv = torch.randn(B, T, (heads + 2 * kv_heads) * D, generator=generator)
    grad_out = torch.randn(B, T, heads * D, generator=generator)
    return qkv.to(device, dtype), grad_out.to(device, dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("T", "D", "heads", "kv_heads"), SHAPES)
def test_output_and_gradient(
    T: int, D: int, heads: int, kv_heads: int, dtype: torch.dtype, device: str
) -> None:
    qkv, grad_out = sample(T, D, heads, kv_heads, dtype, device)
    rest = (*tables(T, D, device), heads, kv_heads)
    exact = with_gradient(ops.rotary_attention_ref, qkv.double(), grad_out, *rest)
    plain = with_gradient(composed, qkv, grad_out, *rest)
    got = with_gradient(ops.rotary_attention, qkv, grad_out, *rest)
    for name, e, p, g in zip(("out", "grad"), exact, plain, got, strict=True):
        assert g.shape == e.shape and g.dtype == dtype and g.is_contiguous()
        # A single key makes the exact result one of the inputs, which plain PyTorch may meet without error.
        floor = torch.finfo(dtype).eps * e.abs().max()
        error = (g - e).abs().max()
        assert error <= 2 * (p - e).abs().max() + floor, f"{name}: {error}"
        mean = (g - e).abs().mean()
        assert mean <= 2 * (p - e).abs().mean() + 0.1 * floor, f"{name}: {mean} on average"


@pytest.mark.parametrize(("T", "D", "heads", "kv_heads"), [(5, 8, 2, 1), (4, 6, 3, 3)])
def test_reference_has_the_gradient_of_its_output(T: int, D: int, heads: int, kv_heads: int) -> None:
    qkv, _ = sample(T, D, heads, kv_heads, torch.float64, "cpu", B=1)
    cos, sin = tables(T, D, "cpu")
    assert torch.autograd.gradcheck(
        lambda x: ops.rotary_attention_ref(x, cos, sin, heads, kv_heads), qkv.requires_grad_()
    )


@pytest.mark.parametrize("device", DEVICES)
def test_only_the_distance_of_positions_matters(device: str) -> None:
    qkv, _ = sample(32, 64, 4, 2, torch.float32, device)
    cos, sin = tables(96, 64, device)
    near = ops.rotary_attention(qkv, cos[:32], sin[:32], 4, 2)
    far = ops.rotary_attention(qkv, cos[64:], sin[64:], 4, 2)
    torch.testing.assert_close(near, far, rtol=0, atol=2e-5)
    assert (near - ops.rotary_attention(qkv, cos[:32] * 0 + 1, sin[:32] * 0, 4, 2)).abs().max() > 0.1


@pytest.mark.gpu
@pytest.mark.parametrize("T", [32, 65])
def test_a_nan_reaches_what_follows_and_nothing_before(T: int) -> None:
    qkv, grad_out = sample(T, 64, 4, 2, torch.float32, "cuda")
    at = T // 2
    qkv[0, at, 5 * 64 + 3] = math.nan  # key head 1, which queries 2 and 3 share
    out, grad = with_gradient(ops.rotary_attention, qkv, grad_out, *tables(T, 64, "cuda"), 4, 2)
    bad = out.view(2, T, 4, 64).isnan().any(-1)
    assert not bad[1].any() and not bad[0, :at].any() and not bad[0, :, :2].any()
    assert bad[0, at:, 2:].all()
    assert grad[0].isnan().any() and not grad[1].isnan().any()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [4, 300])
def test_short_attention_repeats_its_bits(dtype: torch.dtype, batch: int) -> None:
    """Also whether a block owns few rows or many, which depends on the batch: each row is computed alike."""

    def short(*args: Any) -> Tensor:
        return torch.ops.bitnet_ext.short_attention(*args)[0]

    qkv, grad_out = sample(64, 64, 6, 2, dtype, "cuda", B=batch)
    rest = (*tables(64, 64, "cuda"), 6, 2)
    first = with_gradient(short, qkv, grad_out, *rest)
    again = with_gradient(short, qkv, grad_out, *rest)
    alone = with_gradient(short, qkv[1:2], grad_out[1:2], *rest)
    for a, b, c in zip(first, again, alone, strict=True):
        assert torch.equal(a, b) and torch.equal(a[1:2], c)


@pytest.mark.gpu
@pytest.mark.parametrize(("T", "dtype"), [(32, torch.float32), (256, torch.bfloat16)])
def test_attention_in_a_cuda_graph(T: int, dtype: torch.dtype) -> None:
    qkv, grad_out = sample(T, 64, 4, 4, dtype, "cuda")
    rest = (*tables(T, 64, "cuda"), 4, 4)
    expected = with_gradient(ops.rotary_attention, qkv, grad_out, *rest)
    still = torch.zeros_like(qkv)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        with_gradient(ops.rotary_attention, still, grad_out, *rest)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = with_gradient(ops.rotary_attention, still, grad_out, *rest)
    still.copy_(qkv)
    graph.replay()
    assert torch.equal(got[0], expected[0])
    torch.testing.assert_close(got[1], expected[1])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("T", "D", "heads", "kv_heads"), SHAPES)
def test_overwritten_qkv_gives_the_same_bits(
    T: int, D: int, heads: int, kv_heads: int, dtype: torch.dtype, device: str
) -> None:
    qkv, grad_out = sample(T, D, heads, kv_heads, dtype, device)
    rest = (*tables(T, D, device), heads, kv_heads)
    expected, grad = with_gradient(ops.rotary_attention, qkv, grad_out, *rest)
    leaf = qkv.clone().requires_grad_()
    product = leaf * 1  # whose backward does not need it
    out = ops.rotary_attention(product, *rest, overwrite_qkv=True)
    assert torch.equal(out, expected)
    torch.testing.assert_close(torch.autograd.grad(out, leaf, grad_out)[0], grad)
    with torch.inference_mode():
        assert torch.equal(ops.rotary_attention(qkv.clone(), *rest, overwrite_qkv=True), expected)


@pytest.mark.gpu
def test_overwritten_qkv_is_missed_by_a_backward_that_needs_it() -> None:
    qkv, _ = sample(200, 64, 4, 2, torch.float32, "cuda")
    product = qkv.requires_grad_().exp()
    out = ops.rotary_attention(product, *tables(200, 64, "cuda"), 4, 2, overwrite_qkv=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.gpu
def test_overwritten_qkv_is_all_that_is_kept() -> None:
    B, T, D, heads = 2, 512, 64, 8
    rest = (*tables(T, D, "cuda"), heads, heads)
    held = {}
    for overwrite in (False, True):
        leaf = torch.randn(B, T, 3 * heads * D, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        before = torch.cuda.memory_allocated()
        out = ops.rotary_attention(leaf * 1, *rest, overwrite_qkv=overwrite)
        held[overwrite] = torch.cuda.memory_allocated() - before
        del out
    assert held[False] - held[True] == 2 * B * T * heads * D * 2


@pytest.mark.gpu
@pytest.mark.parametrize("overwrite", [False, True])
def test_half_precision_runs_flash_attention_without_copies(overwrite: bool) -> None:
    qkv, grad_out = sample(256, 64, 6, 2, torch.bfloat16, "cuda")
    rest = (*tables(256, 64, "cuda"), 6, 2)
    with_gradient(ops.rotary_attention, qkv, grad_out, *rest)
    leaf = qkv.requires_grad_()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        torch.autograd.grad(ops.rotary_attention(leaf, *rest, overwrite_qkv=overwrite), leaf, grad_out)
        torch.cuda.synchronize()
    names = [event.name for event in profile.events()]
    assert sum("rotary_kernel" in name for name in names) == 2, names
    assert any("flash" in name for name in names), names
    copies = [n for n in names if ("elementwise" in n and "Fill" not in n) or "copy" in n.lower()]
    assert not copies


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("T", [32, 200])
@pytest.mark.parametrize("overwrite", [False, True])
def test_compiles_as_one_graph(overwrite: bool, T: int, device: str) -> None:
    qkv, grad_out = sample(T, 64, 4, 2, torch.float32, device)
    rest = (*tables(T, 64, device), 4, 2)
    expected = with_gradient(ops.rotary_attention, qkv, grad_out, *rest)

    def attention(qkv: Tensor, *rest: Any) -> Tensor:
        return ops.rotary_attention(qkv * 1, *rest, overwrite_qkv=overwrite)

    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    got = with_gradient(compiled, qkv, grad_out, *rest)
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e)


@pytest.mark.parametrize("device", DEVICES)
def test_strided_and_empty_input(device: str) -> None:
    qkv, grad_out = sample(32, 64, 4, 2, torch.float32, device)
    cos, sin = tables(32, 64, device)
    apart = torch.cat((qkv, qkv), dim=-1)[..., : qkv.shape[-1]]
    expected = with_gradient(ops.rotary_attention, qkv, grad_out, cos, sin, 4, 2)
    leaf = apart.detach().requires_grad_()
    out = ops.rotary_attention(leaf, cos, sin, 4, 2)
    torch.testing.assert_close(out, expected[0])
    torch.testing.assert_close(torch.autograd.grad(out, leaf, grad_out)[0], expected[1])
    assert ops.rotary_attention(qkv[:0], cos, sin, 4, 2).shape == (0, 32, 256)


def test_bad_arguments_are_named() -> None:
    qkv, _ = sample(4, 8, 4, 2, torch.float32, "cpu")
    cos, sin = tables(4, 8, "cpu")
    with pytest.raises(ValueError, match="num_heads must be a multiple of num_kv_heads"):
        ops.rotary_attention(qkv, cos, sin, 4, 3)
    with pytest.raises(ValueError, match="qkv must have shape"):
        ops.rotary_attention(qkv, cos, sin, 3, 3)
    with pytest.raises(ValueError, match="cos must have shape"):
        ops.rotary_attention(qkv, cos[:3], sin, 4, 2)
    with pytest.raises(TypeError, match="sin must be of dtype float32"):
        ops.rotary_attention(qkv, cos, sin.double(), 4, 2)
    with pytest.raises(TypeError, match="qkv must be of dtype"):
        ops.rotary_attention(qkv.double(), cos, sin, 4, 2)


@pytest.mark.parametrize("device", DEVICES)
def test_the_benchmark_runs(device: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("safetensors")  # of bitnet_ext.training, whose choice of device the script uses
    script = Path(__file__).resolve().parent.parent / "bench" / "attention.py"
    spec = importlib.util.spec_from_file_location("attention", script)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    file = tmp_path / "result.json"
    module.main(["--quick", "--device", device, "--json", str(file)])
    (row,) = json.loads(file.read_text())["rows"]
    assert (row["B"], row["T"], row["num_kv_heads"], row["dtype"]) == (2, 9, 2, "float32")
    for name in ("forward", "both"):
        assert row[name]["seconds"]["median"] > 0 and row[name]["ratio"] > 0
    assert "2x9x4x2x32xfloat32 " in capsys.readouterr().out
