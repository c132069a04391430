"""The CUDA products on prepacked weights: every kernel against exact integers, forced and chosen, repeated, captured,
on several streams, and chained by dependent launch."""

from __future__ import annotations

import random

import pytest
import torch
from cuda_tools import DTYPES, KS, exact_product, integers, normal, poison, shifted
from torch import Tensor

from bitnet_ext import ops

pytestmark = pytest.mark.gpu

raw = torch.ops.bitnet_ext
KERNELS = ["gemv", "decode", "sm80_gemm", "sm90_gemm"]


def floats(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator(device="cuda").manual_seed(seed)
    return torch.rand(*shape, generator=generator, device="cuda") + 0.1


def scaled(sums: Tensor, act_scale: Tensor, rows: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    y = sums.float() * act_scale.unsqueeze(1) * rows
    return (y if bias is None else y + bias).to(dtype)


def prepack(codes: Tensor, kind: str) -> Tensor:
    return (
        ops.prepack_ternary(ops.pack_ternary(codes), codes.shape[1])
        if kind == "ternary"
        else ops.prepack_int8(codes)
    )


def random_codes(kind: str, N: int, K: int, seed: int) -> Tensor:
    return integers(-1, 2, N, K, seed=seed) if kind == "ternary" else integers(-128, 128, N, K, seed=seed)


def can_run(kernel: str, M: int, K: int) -> bool:
    if kernel == "gemv":
        return M == 1
    if kernel == "decode":
        return M <= 16 and M * K <= 100_000
    return kernel == "sm80_gemm" or (K % 16 == 0 and torch.cuda.get_device_capability() == (9, 0))


def random_cases(count: int) -> list[tuple[int, int, int, int]]:
    """(seed, M, N, K): sizes over every power of two's neighbourhood, most of them multiples of nothing."""
    draw = random.Random(5)
    cases = []
    for seed in range(count):
        M = draw.choice(
            [1, 1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 48, 63, 64, 65, 100, 127, 129, 200, 257, 600]
        )
        N = draw.choice(
            [1, 5, 15, 16, 17, 63, 64, 100, 127, 128, 129, 255, 256, 257, 500, 640, 1023, 2560, 3001]
        )
        K = draw.choice(
            [1, 2, 15, 16, 48, 100, 127, 128, 129, 255, 256, 257, 272, 640, 1000, 1023, 2048, 2560, 4100]
        )
        if draw.random() < 0.3:
            M, N, K = draw.randint(1, 300), draw.randint(1, 1500), draw.randint(1, 3000)
        cases.append((seed, M, N, K))
    return cases


@pytest.mark.parametrize(("seed", "M", "N", "K"), random_cases(360))
def test_random_products(seed: int, M: int, N: int, K: int, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(seed)
    kind = draw.choice(["ternary", "ternary", "int8"])
    x, codes = integers(-128, 128, M, K, seed=seed), random_codes(kind, N, K, seed + 1)
    weight = prepack(codes, kind)
    sums = exact_product(x, codes)
    act_scale = floats(M, seed=seed)
    bias = draw.choice([None, floats(N, seed=3)])
    if N >= 6 and draw.random() < 0.4:
        sizes = [N // 3, N // 2, N - N // 3 - N // 2]
        weight_scale = floats(3, seed=4)
        rows = weight_scale.repeat_interleave(torch.tensor(sizes, device="cuda"))
    else:
        sizes = []
        weight_scale = floats(draw.choice([1, N]), seed=4)
        rows = weight_scale
    dtype = draw.choice([torch.bfloat16, torch.float16, torch.float32])
    expected = scaled(sums, act_scale, rows, bias, dtype)
    for kernel in ["auto", *(k for k in KERNELS if can_run(k, M, K))]:
        monkeypatch.setenv("BITNET_EXT_KERNEL", kernel)
        poison(sums)
        assert torch.equal(raw.prepacked_mm_int32(x, weight, N), sums), kernel
        constant = draw.random() < 0.5
        poison(expected)
        got = raw.prepacked_mm(x, act_scale, weight, N, weight_scale, bias, sizes, dtype, constant)
        assert torch.equal(got, expected), kernel


@pytest.mark.parametrize("kind", ["ternary", "int8"])
@pytest.mark.parametrize("M", [1, 5, 8, 12, 16, 17, 32, 40, 64, 100, 128, 192, 300, 512, 1100])
@pytest.mark.parametrize(("N", "K"), [(1024, 1024), (2560, 6912), (4096, 2560), (5120, 14336), (13824, 2560)])
def test_layers_of_real_sizes_twice(M: int, N: int, K: int, kind: str) -> None:
    """Every tile and split that such layers are given; two runs agree bit for bit."""
    x, codes = integers(-128, 128, M, K, seed=M), random_codes(kind, N, K, M)
    weight = prepack(codes, kind)
    sums = exact_product(x, codes)
    for _ in range(2):
        poison(sums)
        assert torch.equal(raw.prepacked_mm_int32(x, weight, N), sums)


def test_int8_operands_stay_until_they_are_used() -> None:
    """Loads ahead of the products that still read the registers spoilt one such product in four."""
    M, N, K = 1100, 5120, 14336
    x, codes = integers(-128, 128, M, K, seed=1), random_codes("int8", N, K, 2)
    weight, sums = prepack(codes, "int8"), exact_product(x, codes)
    for _ in range(20):
        assert torch.equal(raw.prepacked_mm_int32(x, weight, N), sums)


def test_sums_at_the_largest_k() -> None:
    for kind, K, value in (("ternary", 262_143, 1), ("int8", 131_071, -128)):
        codes = torch.full((17, K), value, dtype=torch.int8, device="cuda")
        weight = prepack(codes, kind)
        for M in (1, 3, 20):
            x = torch.full((M, K), -128, dtype=torch.int8, device="cuda")
            assert (raw.prepacked_mm_int32(x, weight, 17) == -128 * value * K).all()
        too_long = torch.zeros(1, K + 1, dtype=torch.int8, device="cuda")
        padded = prepack(torch.zeros(17, K + 1, dtype=torch.int8, device="cuda"), kind)
        with pytest.raises(RuntimeError, match=f"x_i8 must have K <= {K} on CUDA; got {K + 1}"):
            raw.prepacked_mm_int32(too_long, padded, 17)


def split_case() -> tuple[Tensor, Tensor, int, Tensor]:
    """A product whose tiles are split over blocks on a GPU of any usual size."""
    x, codes = integers(-128, 128, 64, 13824, seed=1), integers(-1, 2, 2560, 13824, seed=2)
    return x, prepack(codes, "ternary"), 2560, exact_product(x, codes)


def test_split_tiles_on_several_streams() -> None:
    x, weight, N, sums = split_case()
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(4)]
    results = []
    for _ in range(20):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(raw.prepacked_mm_int32(x, weight, N))
    torch.cuda.synchronize()
    assert all(torch.equal(r, sums) for r in results)


def test_split_tiles_in_graphs_that_run_side_by_side() -> None:
    x, weight, N, sums = split_case()
    raw.prepacked_mm_int32(x, weight, N)
    graphs = []
    for _ in range(2):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outs = [raw.prepacked_mm_int32(x, weight, N) for _ in range(6)]
        graphs.append((graph, outs, torch.cuda.Stream()))
    for _ in range(5):
        for graph, outs, stream in graphs:
            with torch.cuda.stream(stream):
                for out in outs:
                    out.fill_(-77)
                graph.replay()
        eager = raw.prepacked_mm_int32(x, weight, N)
        torch.cuda.synchronize()
        assert torch.equal(eager, sums)
        for _, outs, _ in graphs:
            assert all(torch.equal(out, sums) for out in outs)


@pytest.mark.parametrize("M", [1, 4, 16, 48, 200])
def test_chain_by_dependent_launch(M: int) -> None:
    """quantise -> product -> quantise -> ..., as in decoding: no kernel may read what the one before still writes."""
    K = 2560
    weights = [prepack(integers(-1, 2, K, K, seed=s), "ternary") for s in range(6)]
    scale = torch.full((), 0.02, device="cuda")
    start = floats(M, K, seed=9).bfloat16() - 0.6

    def chain(constant: bool) -> Tensor:
        x = start
        for _ in range(4):
            for weight in weights:
                x_i8, act_scale, _ = raw.rms_norm_quantize(x, None, 1e-5)
                x = raw.prepacked_mm(x_i8, act_scale, weight, K, scale, None, [], torch.bfloat16, constant)
        return x

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BITNET_EXT_DEPENDENT_LAUNCH", "0")
        expected = chain(False)
    graph = torch.cuda.CUDAGraph()
    chain(True)
    with torch.cuda.graph(graph):
        captured = chain(True)
    for _ in range(10):
        assert torch.equal(chain(True), expected)
        captured.fill_(0)
        graph.replay()
        assert torch.equal(captured, expected)


def test_prepack_then_product_at_once() -> None:
    """The product after a prepack on the same stream, with early reads allowed by a quantiser in between."""
    x = floats(1, 4096, seed=1).bfloat16()
    for seed in range(20):
        codes = integers(-1, 2, 4096, 4096, seed=seed)
        weight = prepack(codes, "ternary")
        x_i8, act_scale = raw.quantize_act_int8(x)
        one = torch.ones((), device="cuda")
        y = raw.prepacked_mm(x_i8, act_scale, weight, 4096, one, None, [], torch.float32, True)
        assert torch.equal(y, scaled(exact_product(x_i8, codes), act_scale, one, None, torch.float32))


@pytest.mark.parametrize(
    ("kernel", "M", "K", "message"),
    [
        (
            "nonsense",
            1,
            128,
            "BITNET_EXT_KERNEL must be auto, gemv, decode, sm80_gemm or sm90_gemm; got nonsense",
        ),
        ("gemv", 2, 128, "BITNET_EXT_KERNEL=gemv computes M = 1; got M = 2"),
        ("decode", 17, 128, "BITNET_EXT_KERNEL=decode computes M <= 16 .*; got M = 17 with K = 128"),
        (
            "sm90_gemm",
            64,
            129,
            "sm90_gemm needs K to be a multiple of 16|needs a GPU of compute capability 9.0",
        ),
    ],
)
def test_forced_kernel_that_cannot_run(
    kernel: str, M: int, K: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weight = integers(-128, 128, M, K), prepack(integers(-1, 2, 32, K), "ternary")
    monkeypatch.setenv("BITNET_EXT_KERNEL", kernel)
    with pytest.raises(RuntimeError, match=message):
        raw.prepacked_mm_int32(x, weight, 32)


def test_layout_errors_name_the_shapes() -> None:
    x, weight = integers(-128, 128, 2, 256), prepack(integers(-1, 2, 32, 256), "ternary")
    with pytest.raises(
        RuntimeError, match=r"prepacked must have shape \[3, 2, 32, 4\] .* for N = 33 and K = 256"
    ):
        raw.prepacked_mm_int32(x, weight, 33)
    with pytest.raises(
        RuntimeError, match=r"prepacked must have shape \[2, 1, 32, 4\] .* for N = 32 and K = 100"
    ):
        raw.prepacked_mm_int32(x[:, :100].contiguous(), weight, 32)
    with pytest.raises(RuntimeError, match="prepacked must be int32; got uint8"):
        raw.prepacked_mm_int32(x, weight.view(torch.uint8), 32)
    storage = torch.empty(weight.numel() + 1, dtype=torch.int32, device="cuda")
    with pytest.raises(RuntimeError, match="prepacked must begin at a multiple of 16 bytes"):
        raw.prepacked_mm_int32(x, storage[1:].view(weight.shape), 32)


# --- from the packed form, which each call prepacks: tiles and tails, unaligned memory, largest sums ---------


@pytest.mark.parametrize("K", KS)
@pytest.mark.parametrize("M", [0, 1, 2, 3, 8, 9, 17, 124, 513])
def test_products_of_every_path(M: int, K: int) -> None:
    for N in (1, 33, 257):
        x, codes = integers(-128, 128, M, K, seed=M), integers(-1, 2, N, K, seed=N)
        packed = ops.pack_ternary_ref(codes)
        expected = exact_product(x, codes)
        for shift_x, shift_w in ((0, 0), (1, 0), (0, 1), (3, 2), (16, 16)):
            poison(expected)
            got = raw.int8xint2_mm_int32(shifted(x, shift_x), shifted(packed, shift_w))
            assert got.shape == (M, N) and torch.equal(got, expected), (N, shift_x, shift_w)


@pytest.mark.parametrize(
    ("M", "N", "K"),
    [
        (1300, 2049, 256),  # tiles of 128 x 128, ragged in both directions
        (1280, 2176, 64),  # one step along K, which is shorter than the ring of stages
        (2050, 1100, 1600),
        (513, 1100, 320),  # tiles of 64 x 64
        (1000, 700, 1024),
        (1000, 1001, 1001),  # the same tile with unaligned rows
        (40, 2560, 2560),  # tiles of 32 x 32
        (16, 512, 6912),
    ],
)
def test_tiles(M: int, N: int, K: int) -> None:
    x, codes = integers(-128, 128, M, K), integers(-1, 2, N, K, seed=1)
    packed = ops.pack_ternary_ref(codes)
    expected = exact_product(x, codes)
    poison(expected)
    assert torch.equal(raw.int8xint2_mm_int32(x, packed), expected)


@pytest.mark.parametrize("M", range(1, 9))
@pytest.mark.parametrize(("N", "K"), [(8451, 256), (9001, 2048), (16384, 4160), (20001, 100)])
def test_gemv_with_many_rows(M: int, N: int, K: int) -> None:
    """N beyond 64 rows a multiprocessor: a warp handles two row tiles, a block several groups of them."""
    x, codes = integers(-128, 128, M, K, seed=M), integers(-1, 2, N, K, seed=1)
    packed = ops.pack_ternary_ref(codes)
    expected = exact_product(x, codes)
    poison(expected)
    assert torch.equal(raw.int8xint2_mm_int32(x, packed), expected)


@pytest.mark.parametrize("K", [2560, 8192, 28672])
@pytest.mark.parametrize("M", [1, 2, 5, 8, 40, 300])
@pytest.mark.parametrize(("value", "code"), [(127, 1), (-128, 1), (127, -1), (-128, -1)])
def test_largest_sums(M: int, K: int, value: int, code: int) -> None:
    x = torch.full((M, K), value, dtype=torch.int8, device="cuda")
    packed = ops.pack_ternary_ref(torch.full((33, K), code, dtype=torch.int8, device="cuda"))
    expected = torch.full((M, 33), value * code * K, dtype=torch.int32, device="cuda")
    poison(expected)
    assert torch.equal(raw.int8xint2_mm_int32(x, packed), expected)


@pytest.mark.parametrize("M", [1, 3, 8, 9, 65])
@pytest.mark.parametrize("N", [96, 97])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_scale_and_bias(M: int, N: int, dtype: torch.dtype) -> None:
    K = 192
    x, codes = integers(-128, 128, M, K), integers(-1, 2, N, K, seed=1)
    packed = ops.pack_ternary_ref(codes)
    act_scale = torch.logspace(-4, 1, M, device="cuda")
    uneven = [1, 30, 2, N - 35, 2]
    most = [3] * 15 + [N - 45]  # 16 segments, the largest number
    bias = normal(N, seed=2)
    for sizes, count in (([], 1), ([], N), ([N], 1), (uneven, 5), (most, 16)):
        weight_scale = torch.logspace(-3, 2, count, device="cuda")
        rows = (
            weight_scale if count == N else weight_scale.repeat_interleave(torch.tensor(sizes or [N]).cuda())
        )
        for b in (None, bias):
            expected = exact_product(x, codes).float() * act_scale.unsqueeze(1) * rows
            expected = (expected if b is None else expected + b).to(dtype)
            poison(expected)
            got = raw.int8xint2_mm(x, act_scale, packed, weight_scale, b, sizes, dtype)
            assert torch.equal(got, expected), (sizes, b is not None)


def test_nan_scales_reach_every_output_they_touch() -> None:
    nan = float("nan")
    for M in (1, 8, 9, 70):
        x, packed = integers(-128, 128, M, 64), ops.pack_ternary_ref(integers(-1, 2, 40, 64, seed=1))
        act_scale, one = torch.ones(M, device="cuda"), torch.ones(1, device="cuda")
        act_scale[-1] = nan
        y = raw.int8xint2_mm(x, act_scale, packed, one, None, [], torch.bfloat16)
        assert y[-1].isnan().all() and not y[:-1].isnan().any()
        y = raw.int8xint2_mm(x, torch.ones(M, device="cuda"), packed, one * nan, None, [], torch.float16)
        assert y.isnan().all()
