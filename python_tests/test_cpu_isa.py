"""Every instruction set of the CPU kernels gives the bits of the scalar kernels, for any number of threads."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import bitnet_ext
from bitnet_ext.ops import abs_sums_like

ops = torch.ops.bitnet_ext

SUPPORTED: list[str] = bitnet_ext.build_info()["cpu_isas"]
WIDE = [isa for isa in SUPPORTED if isa != "scalar"]
FLOATS = [torch.float32, torch.bfloat16, torch.float16]

# K around the widths of a vector (16), a block of packed bytes (64) and a block of the product (256); M around
# the tiles of 2 and 4 tokens; N odd, so that no tile of rows fits.
K_SIZES = [1, 3, 15, 16, 17, 63, 64, 65, 255, 257, 1000, 6912]
M_SIZES = [0, 1, 2, 3, 5, 7, 17]
N_SIZES = [1, 7, 67]

Outputs = list[Tensor]


@pytest.fixture(autouse=True)
def _restore_settings() -> Iterator[None]:
    isa, threads = ops._cpu_isa(), torch.get_num_threads()
    torch.set_num_threads(1)  # thousands of small calls; threads have a test of their own
    yield
    ops._set_cpu_isa(isa)
    torch.set_num_threads(threads)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equality of dtype, shape and every bit, so that -0 differs from 0 and equal NaNs agree."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))


def normal(generator: torch.Generator, *shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=generator) * scale


# Each case takes (M, N, K, dtype, generator) and runs operators on tensors drawn from the generator.


def case_activations(M: int, N: int, K: int, dtype: torch.dtype, generator: torch.Generator) -> Outputs:
    x = normal(generator, M, K, scale=3.0).to(dtype)
    gain = normal(generator, K)
    x_i8, act_scale = ops.quantize_act_int8(x)
    return [
        x_i8,
        act_scale,
        *ops.rms_norm_quantize(x, None, 1e-5),
        *ops.rms_norm_quantize(x, gain, 1e-6),
        ops.dequantize_act(x_i8, act_scale, dtype),
    ]


def case_weights(M: int, N: int, K: int, dtype: torch.dtype, generator: torch.Generator) -> Outputs:
    weight = normal(generator, N, K, scale=0.02).to(dtype)
    codes, scale = ops.quantize_weight_ternary(weight)
    packed, packed_scale = ops.quantize_pack_weight(weight)
    row_scale = normal(generator, N)
    return [
        codes,
        scale,
        packed,
        packed_scale,
        ops.pack_ternary(codes),
        ops.unpack_ternary(packed, K),
        ops.dequantize_ternary(packed, scale, K, dtype),
        ops.dequantize_ternary(packed, row_scale, K, dtype),
    ]


def case_products(M: int, N: int, K: int, dtype: torch.dtype, generator: torch.Generator) -> Outputs:
    x_i8 = torch.randint(-128, 128, (M, K), generator=generator, dtype=torch.int8)
    packed = ops.pack_ternary(torch.randint(-1, 2, (N, K), generator=generator, dtype=torch.int8))
    act_scale = normal(generator, M).abs()
    bias = normal(generator, N)
    outputs = [
        ops.int8xint2_mm_int32(x_i8, packed),
        ops.int8xint2_mm(x_i8, act_scale, packed, torch.tensor(0.37), None, [], dtype),
        ops.int8xint2_mm(x_i8, act_scale, packed, normal(generator, N), bias, [], dtype),
    ]
    if N > 1:
        segments = [1, N - 1]
        outputs.append(ops.int8xint2_mm(x_i8, act_scale, packed, normal(generator, 2), bias, segments, dtype))
    return outputs


def case_bit_linear(M: int, N: int, K: int, dtype: torch.dtype, generator: torch.Generator) -> Outputs:
    x = normal(generator, M, K).to(dtype)
    weight = normal(generator, N, K, scale=0.02)
    gain, bias = normal(generator, K), normal(generator, N)
    weights = [weight, normal(generator, 3, K, scale=0.05)]
    packed, weight_scale = ops.quantize_weights(weights)
    stacked_bias = torch.cat([bias, bias[:3] if N >= 3 else torch.ones(3)])
    one = ops.quantize_weights([weight])
    return [
        packed,
        weight_scale,
        *ops.bit_linear(
            x, None, weights, packed, weight_scale, stacked_bias, gain, 1e-5, True, None, 0.0, dtype, "exact"
        ),
        *ops.bit_linear(x, x, [weight], *one, None, gain, 1e-5, True, None, 0.0, dtype, "exact"),
        *ops.bit_linear(x, None, [weight], *one, None, None, 1e-5, False, None, 0.0, dtype, "exact"),
    ]


def case_glu(M: int, N: int, K: int, dtype: torch.dtype, generator: torch.Generator) -> Outputs:
    gate_up, grad_y = normal(generator, M, 2 * K).to(dtype), normal(generator, M, K)
    gain, weight = normal(generator, K), normal(generator, N, K)
    codes = ops.quantize_weights([weight])
    y, x_i8, act_scale, rstd = ops.glu_bit_linear(
        gate_up, weight, *codes, None, gain, 1e-5, True, "relu2", dtype, "exact"
    )
    return [
        y,
        x_i8,
        act_scale,
        rstd,
        *ops.glu_backward(grad_y, gate_up, "silu", gain, rstd, True),
        *ops.glu_backward(grad_y.to(dtype), gate_up, "relu2", None, rstd[:0], False),
    ]


def case_norm_backward(M: int, N: int, K: int, dtype: torch.dtype, generator: torch.Generator) -> Outputs:
    x, grad_y = normal(generator, M, K).to(dtype), normal(generator, M, K)
    gain, rstd = normal(generator, K), normal(generator, M).abs()
    return [
        *ops.rms_norm(x, None, gain, 1e-5),
        *ops.rms_norm(x, x, None, 1e-5),
        *ops.rms_norm_backward(grad_y, x, gain, rstd, None, dtype),
        *ops.rms_norm_backward(grad_y.to(dtype), x, None, rstd, x, torch.bfloat16),
    ]


def case_optimizer(M: int, N: int, K: int, dtype: torch.dtype, generator: torch.Generator) -> Outputs:
    outputs: Outputs = [ops.sum_of_squares([normal(generator, N, K).to(dtype), normal(generator, M, K)])]
    for decoupled, decay in [(True, True), (False, True), (False, False)]:
        params, grads, exp_avg = ([normal(generator, N, K), normal(generator, K)] for _ in range(3))
        exp_avg_sq = [normal(generator, N, K).square(), normal(generator, K).square()]
        hyper = torch.tensor([1e-2, 0.1, 0.271, 0.002997])
        scale = torch.tensor(0.7)
        sums = abs_sums_like(params[:1])
        state = (params, grads, exp_avg, exp_avg_sq, hyper, scale, [int(decay), 0])
        constants = (0.9, 0.999, 1e-8, decoupled)
        ops.adam_step_(*state, [1, 0], sums, None, -1, *constants, 0)
        outputs += [*(t.clone() for t in (*params, *exp_avg, *exp_avg_sq)), sums]
        ids = torch.randint(0, N, (M,), generator=generator)
        slots = ops.row_slots(ids, N)
        grads[0] = ops.sum_rows(ids, normal(generator, M, K), slots)
        ops.adam_step_(*state, [0, 0], None, slots, 0, *constants, 0)
        outputs += [grads[0], slots, *params, *exp_avg, *exp_avg_sq]
    return outputs


def case_softmax(M: int, N: int, K: int, dtype: torch.dtype, generator: torch.Generator) -> Outputs:
    # Few distinct values, so that the largest logit is often tied; some far below, where exp is 0.
    logits = (normal(generator, M, K, scale=4.0).round() * 3.0).to(dtype)
    logits[torch.rand(M, K, generator=generator) < 0.1] = -250.0
    target = torch.randint(-1, K, (M,), generator=generator)
    stats = ops.softmax_stats(logits, target)
    outputs = list(stats)
    rows = logits.float()
    log_marginal = normal(generator, K) - 5.0
    count = ops.count_targets(target)
    for V in {K, max(1, K - 5)}:
        inside = torch.where(target < V, target, -1)
        for marginal, entropy_weight, softcap in (
            (None, 0.0, 0.0),
            (log_marginal[:V], 0.3, 0.0),
            (None, 0.3, 7.0),
        ):
            grad, terms = rows.clone(), (0.1, 1e-3, entropy_weight, 0.2)
            outputs += ops.cross_entropy_rows_(grad, V, inside, count, marginal, *terms, softcap)
            outputs.append(grad)
            before = ops.cross_entropy_rows_(rows, V, inside, None, None, *terms, softcap)
            outputs += [*before, ops.probability_sums(rows, V, inside, before[0], softcap)]
        used = rows.clone()
        outputs += [*ops.predicted_rows_(used, V, inside), used]
    return outputs


CASES: list[Callable[[int, int, int, torch.dtype, torch.Generator], Outputs]] = [
    case_activations,
    case_weights,
    case_products,
    case_bit_linear,
    case_norm_backward,
    case_glu,
    case_optimizer,
    case_softmax,
]


def run_case(case: Callable[..., Outputs], M: int, N: int, K: int, dtype: torch.dtype, isa: str) -> Outputs:
    ops._set_cpu_isa(isa)
    assert ops._cpu_isa() == isa
    return case(M, N, K, dtype, torch.Generator().manual_seed(1000 * M + 10 * K + N))


@pytest.mark.skipif(not WIDE, reason="this CPU runs the scalar kernels only")
@pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__.removeprefix("case_"))
def test_same_bits_as_scalar(case: Callable[..., Outputs], dtype: torch.dtype) -> None:
    sizes = [(M, 7, K) for K in K_SIZES for M in M_SIZES] + [(3, N, K) for K in (17, 257) for N in N_SIZES]
    for M, N, K in sizes:
        expected = run_case(case, M, N, K, dtype, "scalar")
        for isa in WIDE:
            actual = run_case(case, M, N, K, dtype, isa)
            for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
                assert same_bits(a, b), f"output {i} of {isa} differs for M={M} N={N} K={K}"


@pytest.mark.parametrize("isa", WIDE)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_value(dtype: torch.dtype, isa: str) -> None:
    """All 65536 patterns are read alike (subnormals, Inf, NaN), and rounding to 16 bits agrees everywhere."""
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    finite = patterns[torch.isfinite(patterns)].reshape(1, -1)
    # Scaling by 1 + 2^-9 puts values between, on and beside the midpoints; large ones overflow to Inf.
    codes = torch.randint(-128, 128, (512, 512), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    scales = torch.logspace(-12, 5, 512) * (1 + 2**-9)
    results = []
    for name in ("scalar", isa):
        ops._set_cpu_isa(name)
        target = torch.zeros(1, dtype=torch.int64)
        results.append(
            [
                ops.sum_of_squares([finite]),
                *ops.softmax_stats(finite, target),
                ops.dequantize_act(codes, scales, dtype),
                *(torch.isnan(v) for v in ops.softmax_stats(patterns.reshape(1, -1), target)),
            ]
        )
    for a, b in zip(*results, strict=True):
        assert same_bits(a, b)
    expected = (codes.float() * scales[:, None]).to(dtype)
    assert same_bits(results[1][6], expected)
    assert results[1][0].item() == pytest.approx(finite.double().square().sum().item(), rel=1e-12)


@pytest.mark.parametrize("isa", SUPPORTED)
@pytest.mark.parametrize("K", [*K_SIZES, 8192])
def test_product_is_exact(K: int, isa: str) -> None:
    """Against int64, random and at the extremes: full rows of +-127 and -128 times weights all 1 or all -1."""
    ops._set_cpu_isa(isa)
    generator = torch.Generator().manual_seed(K)
    rows = [torch.full((1, K), value, dtype=torch.int8) for value in (127, -127, -128)]
    noise = torch.randint(-128, 128, (14, K), generator=generator, dtype=torch.int8)
    x_i8 = torch.cat([*rows, noise])
    ones = torch.ones(1, K, dtype=torch.int8)
    codes = torch.cat([ones, -ones, torch.randint(-1, 2, (65, K), generator=generator, dtype=torch.int8)])
    for M in (1, 2, 3, 4, 5, 6, 7, 17):
        actual = ops.int8xint2_mm_int32(x_i8[:M].contiguous(), ops.pack_ternary(codes))
        assert torch.equal(actual.long(), x_i8[:M].long() @ codes.long().T)


@pytest.mark.parametrize("isa", SUPPORTED)
def test_product_of_many_tokens_and_features(isa: str) -> None:
    """More than one task of 64 features by 40 tokens, and more than one set of planes (4 MiB)."""
    ops._set_cpu_isa(isa)
    generator = torch.Generator().manual_seed(0)
    for M, N, K in [(83, 131, 40), (100, 5, 65536)]:
        x_i8 = torch.randint(-128, 128, (M, K), generator=generator, dtype=torch.int8)
        codes = torch.randint(-1, 2, (N, K), generator=generator, dtype=torch.int8)
        # fp64 holds these sums (below 2^24) exactly and multiplies faster than int64.
        expected = x_i8.double() @ codes.double().T
        assert torch.equal(ops.int8xint2_mm_int32(x_i8, ops.pack_ternary(codes)).double(), expected)


@pytest.mark.parametrize("isa", SUPPORTED)
def test_exponential_is_accurate(isa: str) -> None:
    """With lse = 0, probability_sums of one row is exp(z): within 2 units in the last place."""
    ops._set_cpu_isa(isa)
    generator = torch.Generator().manual_seed(0)
    z = torch.cat([torch.rand(200_000, generator=generator) * -87.0, -torch.logspace(-10, 1.9, 50_000)])
    z = z.reshape(1, -1)
    zero, target = torch.zeros(1), torch.zeros(1, dtype=torch.int64)
    actual = ops.probability_sums(z, z.shape[1], target, zero, 0.0)
    expected = z.double().exp()
    unit = torch.nextafter(expected.float(), torch.tensor(torch.inf)) - expected.float()
    assert ((actual.double() - expected).abs() / unit.double()).max() <= 2.0
    below = torch.tensor([[-87.5, -104.0, -1e4, -1e30, -torch.inf, 0.0]])
    assert ops.probability_sums(below, 6, target, zero, 0.0).tolist() == [[0.0, 0.0, 0.0, 0.0, 0.0, 1.0]]


@pytest.mark.parametrize("isa", SUPPORTED)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__.removeprefix("case_"))
def test_thread_count_does_not_show(case: Callable[..., Outputs], isa: str) -> None:
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        # Large enough that every operator shares its work out.
        results.append(run_case(case, 83, 131, 6912, torch.float32, isa))
    for other in results[1:]:
        for i, (a, b) in enumerate(zip(results[0], other, strict=True)):
            assert same_bits(a, b), f"output {i} depends on the number of threads"


@pytest.mark.parametrize("isa", SUPPORTED)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_nan_and_inf_are_refused(dtype: torch.dtype, bad: float, isa: str) -> None:
    ops._set_cpu_isa(isa)
    for position in (0, 40, 66):
        x = torch.ones(3, 67, dtype=dtype)
        x[1, position] = bad
        weight = torch.ones(5, 67)
        for call in (
            lambda x=x: ops.quantize_act_int8(x),
            lambda x=x: ops.rms_norm_quantize(x, None, 1e-5),
            lambda x=x: ops.rms_norm_quantize(x, torch.ones(67), 1e-5),
            lambda x=x: ops.quantize_weight_ternary(x),
            lambda x=x: ops.quantize_pack_weight(x),
            lambda x=x, w=weight: ops.bit_linear(
                x,
                None,
                [w],
                *ops.quantize_weights([w]),
                None,
                None,
                1e-5,
                False,
                None,
                0.0,
                torch.float32,
                "exact",
            ),
        ):
            with pytest.raises(RuntimeError, match=r"^bitnet_ext\.\w+: (x|weight) holds NaN or Inf"):
                call()


@pytest.mark.parametrize("isa", SUPPORTED)
def test_invalid_codes_are_refused(isa: str) -> None:
    ops._set_cpu_isa(isa)
    for K in (3, 64, 259):
        for k in {0, K // 2, K - 1}:
            for value in (-128, -2, 2, 3, 127):
                codes = torch.zeros(3, K, dtype=torch.int8)
                codes[1, k] = value
                with pytest.raises(RuntimeError, match="codes hold a value outside"):
                    ops.pack_ternary(codes)
            packed = ops.pack_ternary(torch.zeros(3, K, dtype=torch.int8))
            packed[2, k // 4] |= 3 << 2 * (k % 4)
            with pytest.raises(RuntimeError, match="invalid stored value 3"):
                ops.unpack_ternary(packed, K)
            with pytest.raises(RuntimeError, match="invalid stored value 3"):
                ops.dequantize_ternary(packed, torch.tensor(1.0), K, torch.float32)


def test_unknown_isa_is_refused() -> None:
    before = ops._cpu_isa()
    with pytest.raises(RuntimeError, match=r"^bitnet_ext\._set_cpu_isa: .*got 'sse9', accepted here: scalar"):
        ops._set_cpu_isa("sse9")
    assert ops._cpu_isa() == before


def run_with_isa(isa: str) -> subprocess.CompletedProcess[str]:
    code = "import bitnet_ext, torch; print(torch.ops.bitnet_ext._cpu_isa())"
    environment = {**os.environ, "BITNET_EXT_CPU_ISA": isa}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


def test_environment_variable_forces_an_isa() -> None:
    process = run_with_isa("scalar")
    assert process.returncode == 0, process.stderr
    assert process.stdout.split() == ["scalar"]
    assert run_with_isa("").stdout.split() == [SUPPORTED[-1]]  # empty: as if it were not set


# An unknown name, and the names of real instruction sets that this CPU lacks.
@pytest.mark.parametrize("isa", ["AVX2", *({"scalar", "avx2", "avx512"} - set(SUPPORTED))])
def test_environment_variable_with_an_unusable_isa(isa: str) -> None:
    process = run_with_isa(isa)
    assert process.returncode != 0
    last_line = process.stderr.strip().splitlines()[-1]
    assert "BITNET_EXT_CPU_ISA must name an instruction set" in last_line
    assert f"got '{isa}'" in last_line and f"accepted here: {', '.join(SUPPORTED)}" in last_line
