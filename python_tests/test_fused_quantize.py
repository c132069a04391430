"""The fused producers of int8 activations against the separate operators, and the quantiser's row shapes on CUDA."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import pytest
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

raw = torch.ops.bitnet_ext
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KS = [1, 3, 255, 257, 1000, 2560, 6912, 8200, 16383, 27648]
MS = [1, 3, 17]


def normal(*shape: int, device: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype).to(device)


def spread(*shape: int, device: str, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Rows of very different sizes."""
    rows = torch.logspace(-2, 2, shape[0]).unsqueeze(1)
    return (normal(*shape, device="cpu", seed=seed) * rows).to(dtype).to(device)


def shifted(t: Tensor, elements: int = 1) -> Tensor:
    """A contiguous copy of `t` that starts `elements` elements into its storage: aligned to nothing else."""
    storage = torch.empty(t.numel() + elements, dtype=t.dtype, device=t.device)
    view = storage[elements:].view(t.shape)
    view.copy_(t)
    return view


def poison(*tensors: Tensor) -> None:
    """Frees garbage of the sizes of the results to come, so that what is not written is not right by luck."""
    blocks = [torch.full((max(t.nbytes, 1),), 0xC5, dtype=torch.uint8, device=t.device) for t in tensors]
    del blocks


def on_cpu(
    reference: Callable[..., tuple[Tensor, ...]], *args: object, **kwargs: object
) -> tuple[Tensor, ...]:
    """A reference computed on the CPU and brought to where its arguments are."""
    device = next(a.device for a in args if isinstance(a, Tensor))
    results = reference(*[a.cpu() if isinstance(a, Tensor) else a for a in args], **kwargs)
    return tuple(t.to(device) for t in results)


def assert_same(first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> None:
    """Equal bits, NaN included."""
    for a, b in zip(first, second, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert torch.equal(
            a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8)
        )


def assert_close_codes(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """Equal but for what a last-place difference of one exponential can do."""
    difference = (got[0].int() - expected[0].int()).abs()
    assert int(difference.max()) <= 1
    assert float((difference > 0).float().mean()) < 0.01
    torch.testing.assert_close(got[1], expected[1], rtol=2**-7, atol=0)


# --- residual and norm --------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("K", KS)
def test_add_is_the_separate_operators(device: str, dtype: torch.dtype, K: int) -> None:
    gain = normal(K, device=device, seed=3)
    for M in MS:
        x = spread(M, K, device=device, dtype=dtype, seed=K + M)
        residual = normal(M, K, device=device, dtype=dtype, seed=1)
        for gains in (gain, None):
            expected = on_cpu(add_rms_norm_quantize_ref, x, residual, gains, 1e-6)
            poison(*expected)
            got = add_rms_norm_quantize(x, residual, gains, 1e-6)
            assert_same(got, expected)
            total = x + residual
            assert_same((*ops.rms_norm_quantize(total, gains, 1e-6)[:2], total), got)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("K", [24, 1000, 2560, 8200])
def test_add_of_unaligned_tensors(device: str, dtype: torch.dtype, K: int) -> None:
    x, residual = (normal(5, K, device=device, dtype=dtype, seed=s) for s in (1, 2))
    gain = normal(K, device=device, seed=3)
    expected = add_rms_norm_quantize(x, residual, gain)
    for a, b, g in (
        (shifted(x), residual, gain),
        (x, shifted(residual, 3), gain),
        (x, residual, shifted(gain)),
    ):
        poison(*expected)
        assert_same(add_rms_norm_quantize(a, b, g), expected)


@pytest.mark.parametrize("device", DEVICES)
def test_add_keeps_leading_dimensions_and_takes_strides(device: str) -> None:
    x = normal(4, 3, 2, 24, device=device).transpose(0, 2)
    residual = normal(2, 3, 4, 24, device=device, seed=1)
    x_i8, act_scale, total = add_rms_norm_quantize(x, residual, None)
    assert x_i8.shape == total.shape == x.shape and act_scale.shape == x.shape[:-1]
    assert_same((x_i8, act_scale, total), add_rms_norm_quantize_ref(x, residual, None))
    empty = add_rms_norm_quantize(x[:0], residual[:0], None)
    assert [t.shape for t in empty] == [(0, 3, 4, 24), (0, 3, 4), (0, 3, 4, 24)]


# --- gated product ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("K", KS)
def test_relu2_is_the_separate_operators(device: str, dtype: torch.dtype, K: int) -> None:
    gain = normal(K, device=device, seed=3)
    for M in MS:
        gate, up = (
            spread(M, K, device=device, dtype=dtype, seed=K + M) / 4,
            normal(M, K, device=device, dtype=dtype, seed=1),
        )
        h = F.relu(gate).square() * up
        for normalize, gains in ((True, gain), (True, None), (False, None)):
            expected = on_cpu(glu_quantize_ref, gate, up, "relu2", gains, 1e-6, normalize=normalize)
            poison(*expected)
            got = glu_quantize(gate, up, "relu2", gains, 1e-6, normalize=normalize)
            assert_same(got, expected)
            separate = ops.rms_norm_quantize(h, gains, 1e-6)[:2] if normalize else ops.quantize_act_int8(h)
            assert_same(tuple(separate), got)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("K", KS)
def test_silu(device: str, dtype: torch.dtype, K: int) -> None:
    gain = normal(K, device=device, seed=3)
    for M in MS:
        gate = spread(M, K, device=device, dtype=dtype, seed=K + M) * 3
        up = normal(M, K, device=device, dtype=dtype, seed=1)
        for normalize, gains in ((True, gain), (False, None)):
            expected = glu_quantize_ref(gate, up, "silu", gains, 1e-6, normalize=normalize)
            poison(*expected)
            got = glu_quantize(gate, up, "silu", gains, 1e-6, normalize=normalize)
            assert_close_codes(got, expected)


@pytest.mark.parametrize("device", DEVICES)
def test_silu_of_large_and_small_gates(device: str) -> None:
    """exp(-gate) overflows below -88.7; the quotient is then -0, as PyTorch's."""
    gate = torch.tensor([[-1e4, -200.0, -89.0, -88.0, -1e-30, 0.0, 1e-30, 88.0, 200.0, 1e4]], device=device)
    got = glu_quantize(gate, torch.ones_like(gate), "silu", normalize=False)
    assert_close_codes(got, glu_quantize_ref(gate, torch.ones_like(gate), "silu", normalize=False))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["relu2", "silu"])
@pytest.mark.parametrize("K", [5, 257, 1000, 2560, 6912])
def test_rows_that_lie_apart(device: str, dtype: torch.dtype, activation: str, K: int) -> None:
    fused = normal(3, 2, 2 * K + 8, device=device, dtype=dtype, seed=K)
    gain = normal(K, device=device, seed=3)
    halves = fused[..., :K], fused[..., K : 2 * K]
    views = {
        "halves": halves,
        "halves, odd start": (fused[..., 1 : K + 1], fused[..., K + 3 : 2 * K + 3]),
        "one of them": (halves[0], halves[1].contiguous()),
        "every second row": (fused[:, :1, :K], fused[:, :1, K : 2 * K]),
        "one row": (fused[0, 0, :K], fused[0, 0, K : 2 * K]),
        "one row for all": (fused[0, 0, :K].expand(4, 5, K), fused[1, 1, :K].expand(4, 5, K)),
        "not evenly spaced": (fused[:, :, :K].transpose(0, 1), fused[:, :, K : 2 * K].transpose(0, 1)),
    }
    for gate, up in views.values():
        expected = glu_quantize(gate.contiguous(), up.contiguous(), activation, gain)  # type: ignore[arg-type]
        poison(*expected)
        assert_same(glu_quantize(gate, up, activation, gain), expected)  # type: ignore[arg-type]
    assert_same(glu_quantize(gate[:0], up[:0], activation, gain), (expected[0][:0], expected[1][:0]))  # type: ignore[arg-type]


@pytest.mark.parametrize("device", DEVICES)
def test_the_operator_refuses_what_it_cannot_read(device: str) -> None:
    t = normal(4, 6, 8, device=device)
    for gate in (t.transpose(1, 2), t.transpose(0, 1), t[:, :5]):
        with pytest.raises(
            RuntimeError, match="gate must have contiguous rows, all one stride apart; got shape"
        ):
            raw.glu_quantize(gate, gate, "relu2", None, 1e-5, True)
    with pytest.raises(RuntimeError, match="activation must be relu2 or silu; got 'gelu'"):
        raw.glu_quantize(t, t, "gelu", None, 1e-5, True)
    with pytest.raises(RuntimeError, match="residual must be contiguous"):
        raw.add_rms_norm_quantize(t, normal(4, 8, 6, device=device).transpose(1, 2), None, 1e-5)
    with pytest.raises(RuntimeError, match="residual must be float32; got bfloat16"):
        raw.add_rms_norm_quantize(t, t.bfloat16(), None, 1e-5)


# --- values -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("K", [40, 1003, 4096])
def test_squares_beyond_the_range_of_float32(device: str, dtype: torch.dtype, K: int) -> None:
    """The mean square is summed in float64: rows near both ends of float32, subnormal values among them."""
    size = torch.tensor([2.0**-125, 2.0**-70, 1.0, 2.0**70, 2.0**120]).unsqueeze(1)
    x = (normal(5, K, device="cpu") * size).to(dtype).to(device)
    zero = -torch.zeros_like(x)  # -0.0, which changes no x, not even -0.0
    expected = on_cpu(ops.rms_norm_quantize_ref, x, None, 0.0)
    assert_same(ops.rms_norm_quantize(x, None, 0.0), expected)
    assert_same(add_rms_norm_quantize(x, zero, None, 0.0), (*expected[:2], x))


@pytest.mark.parametrize("device", DEVICES)
def test_rows_of_zeros(device: str) -> None:
    zero, gain = torch.zeros(2, 2560, device=device), normal(2560, device=device)
    floor = torch.full((2,), 1e-5, device=device) / torch.full((2,), 127.0, device=device)
    for x_i8, act_scale, *_ in (
        add_rms_norm_quantize(zero, zero, gain),
        glu_quantize(-torch.ones_like(zero), gain.expand(2, -1), "relu2", gain),
        glu_quantize(zero, zero, "silu", normalize=False),
    ):
        assert not x_i8.any() and torch.equal(act_scale, floor)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_is_refused_on_the_cpu(bad: float) -> None:
    x, one, gain = torch.ones(3, 40), torch.ones(3, 40), torch.ones(40)
    x[1, 37] = bad
    bad_gain = gain.clone()
    bad_gain[5] = bad
    for call, what in (
        (lambda: add_rms_norm_quantize(x, one, None), r"x \+ residual holds NaN or Inf; accepted"),
        (lambda: add_rms_norm_quantize(one, x, gain), r"x \+ residual holds NaN or Inf \(by itself or"),
        (lambda: add_rms_norm_quantize(one, one, bad_gain), "gain holds NaN or Inf"),
        (lambda: glu_quantize(one, x, "silu"), r"act\(gate\) \* up holds NaN or Inf"),
        (lambda: glu_quantize(one, x, "relu2", normalize=False), r"act\(gate\) \* up holds NaN or Inf"),
        (lambda: glu_quantize(one, one, "relu2", bad_gain), "gain holds NaN or Inf"),
    ):
        with pytest.raises(RuntimeError, match=what):
            call()
    for dtype in DTYPES:
        nan = torch.tensor([1.0, -float("nan"), 2.0], dtype=dtype)
        nan = torch.stack([nan, nan.copysign(torch.tensor(-1.0))])
        for gate, up in (
            (nan[:1], nan[:1]),
            (nan[1:], one[:1, :3].to(dtype)),
            (one[:1, :3].to(dtype), nan[1:]),
        ):
            for activation in ("relu2", "silu"):
                with pytest.raises(RuntimeError, match=r"act\(gate\) \* up holds NaN or Inf"):
                    glu_quantize(gate, up, activation)  # type: ignore[arg-type]
    half = torch.full((1, 4), 300.0, dtype=torch.float16)  # 300^2 is beyond float16
    with pytest.raises(RuntimeError, match="holds NaN or Inf"):
        glu_quantize(half, half, "relu2")


@pytest.mark.gpu
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("K", [40, 41, 2560, 6912, 20000])
@pytest.mark.parametrize("M", [3, 300])
def test_non_finite_is_never_silent_on_the_gpu(bad: float, K: int, M: int) -> None:
    for place in (0, 1, K - 2, K - 1):  # fp64 sums take odd places another way
        x = torch.ones(M, K, device="cuda")
        x[1, place] = bad
        one, gain = torch.ones_like(x), torch.ones(K, device="cuda")
        gain[place] = 0.0
        expected = [row == 1 for row in range(M)]
        _, act_scale, rstd = ops.rms_norm_quantize(x, gain)
        assert act_scale.isnan().tolist() == rstd.isnan().tolist() == expected
        assert ops.quantize_act_int8(x)[1].isnan().tolist() == expected
        assert add_rms_norm_quantize(x, one, gain)[1].isnan().tolist() == expected
        assert add_rms_norm_quantize(one, -x, None)[1].isnan().tolist() == expected
        for activation in ("relu2", "silu"):
            assert glu_quantize(x, one, activation, gain)[1].isnan().tolist() == expected  # type: ignore[arg-type]
            assert glu_quantize(one, x, activation, normalize=False)[1].isnan().tolist() == expected  # type: ignore[arg-type]


# --- arguments ----------------------------------------------------------------------------------------------

x23 = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: add_rms_norm_quantize(x23.int(), x23, None), TypeError, "x must be of dtype float32"),
        (
            lambda: add_rms_norm_quantize(x23, x23.half(), None),
            TypeError,
            "residual must be of dtype float32",
        ),
        (lambda: add_rms_norm_quantize(x23, x23[:1], None), ValueError, r"residual must have shape \(2, 3\)"),
        (lambda: add_rms_norm_quantize(x23, x23, torch.ones(2)), ValueError, r"gain must have shape \(3,\)"),
        (lambda: add_rms_norm_quantize(x23, x23, None, -1.0), ValueError, "eps must be >= 0, got -1.0"),
        (lambda: add_rms_norm_quantize(x23[:, :0], x23[:, :0], None), ValueError, "last dimension"),
        (lambda: glu_quantize(x23, x23.bfloat16(), "relu2"), TypeError, "up must be of dtype float32"),
        (lambda: glu_quantize(x23, x23[:, :2], "relu2"), ValueError, r"up must have shape \(2, 3\)"),
        (lambda: glu_quantize(x23, x23, "gelu"), ValueError, "activation must be relu2 or silu, got 'gelu'"),
        (lambda: glu_quantize(x23, x23, "silu", eps=float("nan")), ValueError, "eps must be finite, got nan"),
        (
            lambda: glu_quantize(x23, x23, "silu", torch.ones(3), normalize=False),
            ValueError,
            "gain must be None when normalize is False",
        ),
        (lambda: glu_quantize(torch.tensor(1.0), x23, "silu"), ValueError, "gate must have at least 1 dim"),
    ],
)
def test_bad_arguments(call: Callable[[], object], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        call()


# --- the framework around the operators ---------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device: str) -> None:
    fused, gain = normal(2, 5, 74, device=device), normal(37, device=device)
    gate, up = fused.chunk(2, -1)
    x = gate.contiguous()
    samples = [(x, up.contiguous(), gain, 1e-5), (x.bfloat16(), x.bfloat16(), None, 1e-5)]
    for sample in samples:
        torch.library.opcheck(raw.add_rms_norm_quantize.default, sample)
    for glu_sample in (
        (gate, up, "relu2", gain, 1e-5, True),
        (gate.half(), up.half(), "silu", None, 0.0, False),
    ):
        torch.library.opcheck(raw.glu_quantize.default, glu_sample)


@pytest.mark.parametrize("device", DEVICES)
def test_compiles_without_a_graph_break(device: str) -> None:
    def block(x: Tensor, residual: Tensor, weight: Tensor, gain: Tensor) -> tuple[Tensor, ...]:
        x_i8, act_scale, total = add_rms_norm_quantize(x, residual, gain)
        gate, up = (ops.dequantize_act(x_i8, act_scale) @ weight).chunk(2, -1)
        return (*glu_quantize(gate, up, "relu2", None), total)

    args = [
        normal(*shape, device=device, seed=i)
        for i, shape in enumerate([(3, 5, 16), (3, 5, 16), (16, 48), (16,)])
    ]
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    assert_same(compiled(*args), block(*args))


@pytest.mark.gpu
@pytest.mark.parametrize("M", [1, 300])
def test_in_a_graph(M: int) -> None:
    """A chain of launches, each of which may start before the one ahead of it has finished."""
    K = 2560
    x, residual, gain = (normal(*s, device="cuda", dtype=torch.bfloat16) for s in ((M, K), (M, K), (K,)))
    gain = gain.float()

    def chain() -> tuple[Tensor, ...]:
        total, results = residual, []
        for _ in range(12):
            x_i8, act_scale, total = add_rms_norm_quantize(x, total, gain)
            h = ops.dequantize_act(x_i8, act_scale, torch.bfloat16)
            results += [x_i8, act_scale, total, *glu_quantize(h, total, "relu2", gain)]
            results += ops.rms_norm_quantize(total, gain)
        return tuple(results)

    chain()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = chain()
    for seed in (5, 6):
        x.copy_(normal(M, K, device="cuda", dtype=torch.bfloat16, seed=seed))
        graph.replay()
        assert_same(outputs, chain())


@pytest.mark.gpu
@pytest.mark.parametrize("M", [1, 64, 2000])
def test_overlapping_launches_change_nothing(M: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each launch reads what the one right before it wrote, and the allocator hands out memory just read."""
    K = 4096
    x, start = (normal(M, K, device="cuda", dtype=torch.bfloat16, seed=s) for s in (1, 2))

    def chain() -> tuple[Tensor, ...]:
        total = start
        for _ in range(40):
            total = add_rms_norm_quantize(x, total, None)[2]
            total = total * 0.5 if M == 64 else total  # another's kernel between
        return (*glu_quantize(total, x, "relu2"), total)

    monkeypatch.setenv("BITNET_EXT_DEPENDENT_LAUNCH", "0")
    expected = chain()
    monkeypatch.delenv("BITNET_EXT_DEPENDENT_LAUNCH")
    for _ in range(5):
        assert_same(chain(), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("M", [2, 300])
@pytest.mark.parametrize("length", [128, 129, 384, 385, 512, 513, 1024, 1025, 2048, 2049, 4096, 4097, 9000])
def test_every_row_shape(length: int, M: int, dtype: torch.dtype) -> None:
    """Rows of `length` vectors of 16 bytes, on both sides of each limit, few and many."""
    K = length * 16 // dtype.itemsize
    x, residual = spread(M, K, device="cuda", dtype=dtype, seed=K), normal(M, K, device="cuda", dtype=dtype)
    gain = normal(K, device="cuda", seed=1)
    expected = ops.rms_norm_quantize_ref(x, gain, 1e-6)
    poison(*expected)
    assert_same(raw.rms_norm_quantize(x, gain, 1e-6), expected)
    expected = ops.quantize_act_int8_ref(x)
    poison(*expected)
    assert_same(raw.quantize_act_int8(x), expected)
    expected = add_rms_norm_quantize_ref(x, residual, gain)
    poison(*expected)
    assert_same(add_rms_norm_quantize(x, residual, gain), expected)
    gate = residual
    expected = glu_quantize_ref(gate, x, "relu2", gain)
    poison(*expected)
    assert_same(glu_quantize(gate, x, "relu2", gain), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_is_torchs(dtype: torch.dtype) -> None:
    """How far the exponentials agree: h itself, recovered from rows of one value, whose code is always 127."""
    gate = torch.linspace(-20, 20, 200_001, device="cuda").to(dtype).unsqueeze(1)
    got = glu_quantize(gate, torch.ones_like(gate), "silu", normalize=False)[1]
    expected = ops.quantize_act_int8_ref(F.silu(gate))[1]
    if dtype != torch.float32:
        assert float((got != expected).float().mean()) < 1e-3
    torch.testing.assert_close(got, expected, rtol=2 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.gpu
@pytest.mark.slow
def test_offsets_beyond_an_int() -> None:
    if torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("needs 40 GiB of free GPU memory")
    M, K = 1_100_000, 2560
    assert M * K > 2**31
    x = torch.ones(M, K, device="cuda", dtype=torch.bfloat16)
    x[-1] = normal(K, device="cuda", dtype=torch.bfloat16)
    x_i8, act_scale, total = add_rms_norm_quantize(x, x, None)
    assert_same((x_i8[-1], act_scale[-1], total[-1]), add_rms_norm_quantize(x[-1], x[-1], None))
    del total
    x_i8, act_scale = glu_quantize(x, x, "relu2")
    assert_same((x_i8[-1], act_scale[-1]), glu_quantize(x[-1], x[-1], "relu2"))


# --- the benchmark ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
def test_the_benchmark_runs(device: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("safetensors")  # of bitnet_ext.training, whose choice of device the script uses
    script = Path(__file__).resolve().parent.parent / "bench" / "fused_norm.py"
    spec = importlib.util.spec_from_file_location("fused_norm", script)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    file = tmp_path / "result.json"
    module.main(["--quick", "--device", device, "--json", str(file)])
    result = json.loads(file.read_text())
    printed = capsys.readouterr().out
    names = ["rms_norm_quantize", "add_rms_norm_quantize", "glu_quantize"]
    assert [(r["operator"], r["M"], r["K"]) for r in result["rows"]] == [
        (name, M, 264) for name in names for M in (1, 17)
    ]
    for row in result["rows"]:
        assert row["seconds"]["median"] > 0 and row["peers"][module.EAGER]["ratio"] > 0
        assert (row["chained_seconds"] is None) == (device == "cpu")
        assert row["floor_seconds"] == pytest.approx(row["share_of_copy_ceiling"] * row["seconds"]["median"])
        assert f"{row['operator']} " in printed and f"{row['M']}x264 " in printed
    assert result["rows"][1]["bytes"] == 17 * 264 * 3 + 4 * 264 + 4 * 17

    expected = (torch.ones(2, 3, dtype=torch.int8), torch.ones(2))
    for got in ((expected[0] + 1, expected[1]), (expected[0], expected[1] * 1.1)):
        with pytest.raises(module.WrongResultError, match=r"ours: \d of 6 integers differ"):
            module.check("ours", got, expected, exact=True)
    with pytest.raises(module.WrongResultError):
        module.check("eager", (expected[0] + 2, expected[1]), expected, exact=False)
    module.check("eager", (expected[0] + 1, expected[1]), expected, exact=False)
