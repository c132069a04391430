"""int8 x 2-bit products: exact integers for every shape, scales in the stated order."""

from __future__ import annotations

import pytest
import torch

from bitnet_ext import ops

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def problem(M: int, N: int, K: int, device: str, seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-128, 128, (M, K), generator=generator, dtype=torch.int8).to(device)
    codes = torch.randint(-1, 2, (N, K), generator=generator, dtype=torch.int8).to(device)
    act_scale = (torch.rand(M, generator=generator) + 0.1).to(device)
    return x, codes, ops.pack_ternary(codes), act_scale


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("K", [1, 2, 63, 64, 65, 255, 256, 257, 1000, 6912])
@pytest.mark.parametrize("N", [1, 7, 64, 129])
@pytest.mark.parametrize("M", [0, 1, 3, 17, 513])
def test_int32_equals_reference(device: str, M: int, N: int, K: int) -> None:
    if M * N * K > 60e6:
        N = 7
    x, codes, packed, _ = problem(M, N, K, device, seed=M + N + K)
    expected = (x.double() @ codes.double().t()).to(torch.int32)
    got = ops.int8xint2_mm(x, None, packed, out_dtype=torch.int32)
    assert got.dtype == torch.int32 and got.shape == (M, N)
    assert torch.equal(got, expected)
    assert torch.equal(ops.int8xint2_mm_ref(x, None, packed, out_dtype=torch.int32), expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("K", [2560, 8192])
@pytest.mark.parametrize("M", [1, 5, 40])
@pytest.mark.parametrize(("value", "code"), [(127, 1), (-128, 1), (127, -1), (-128, -1)])
def test_no_accumulator_overflows(device: str, K: int, M: int, value: int, code: int) -> None:
    """The largest sums there are: int16 accumulators lose them."""
    x = torch.full((M, K), value, dtype=torch.int8, device=device)
    packed = ops.pack_ternary(torch.full((33, K), code, dtype=torch.int8, device=device))
    got = ops.int8xint2_mm(x, None, packed, out_dtype=torch.int32)
    assert torch.equal(got, torch.full((M, 33), value * code * K, dtype=torch.int32, device=device))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["tensor", "row", "segments"])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("M", "N", "K"), [(1, 96, 257), (3, 7, 64), (17, 65, 300), (130, 130, 96)])
def test_scales_and_bias(
    device: str, kind: str, with_bias: bool, dtype: torch.dtype, M: int, N: int, K: int
) -> None:
    x, _, packed, act_scale = problem(M, N, K, device)
    segments = [N - 3, 1, 2] if kind == "segments" else None
    count = {"tensor": 1, "row": N, "segments": 3}[kind]
    weight_scale = torch.logspace(-3, -1, count, device=device)
    bias = torch.linspace(-1, 1, N, device=device) if with_bias else None
    arguments = dict(bias=bias, segments=segments, out_dtype=dtype)
    got = ops.int8xint2_mm(x, act_scale, packed, weight_scale, **arguments)
    assert torch.equal(got, ops.int8xint2_mm_ref(x, act_scale, packed, weight_scale, **arguments))


@pytest.mark.parametrize("device", DEVICES)
def test_leading_dimensions(device: str) -> None:
    x, _, packed, _ = problem(6, 10, 33, device)
    act_scale = torch.rand(2, 3, device=device)
    got = ops.int8xint2_mm(x.view(2, 3, 33), act_scale, packed, torch.ones((), device=device))
    assert got.shape == (2, 3, 10)
    one = ops.int8xint2_mm(x[0], act_scale[0, 0], packed, torch.ones((), device=device))
    assert torch.equal(one, got[0, 0])


def test_reference_of_both_forms() -> None:
    x, _, packed, act_scale = problem(5, 37, 257, "cpu")
    form = {"weight": ops.prepack_ternary(packed, 257), "out_features": 37}
    scale = torch.linspace(0.1, 1, 37)
    expected = ops.int8xint2_mm(x, act_scale, packed, scale, out_features=37, weight_is_constant=True)
    assert torch.equal(ops.int8xint2_mm_ref(x, act_scale, **form, weight_scale=scale), expected)
    with pytest.raises(ValueError, match=r"weight must be packed uint8 \[N, ceil\(K / 4\)\] on the CPU"):
        ops.int8xint2_mm(x, act_scale, **form, weight_scale=scale)


def test_prepacked_weights_on_the_meta_device() -> None:
    """The checks and shapes of CUDA, where there is none."""
    x, weight = torch.empty(3, 257, dtype=torch.int8), torch.empty(3, 3, 32, 4, dtype=torch.int32)
    x, weight, act_scale, one = (t.to("meta") for t in (x, weight, torch.empty(3), torch.ones(())))
    y = ops.int8xint2_mm(x, act_scale, weight, one, out_features=37, out_dtype=torch.bfloat16)
    assert y.shape == (3, 37) and y.dtype == torch.bfloat16
    assert ops.int8xint2_mm(x, None, weight, out_features=48, out_dtype=torch.int32).shape == (3, 48)
    with pytest.raises(ValueError, match=r"out_features \(N\) is needed with a prepacked int32 weight"):
        ops.int8xint2_mm(x, act_scale, weight, one)
    for N, K in ((32, 257), (49, 257), (48, 256)):
        with pytest.raises(ValueError, match=rf"prepacked, for N = {N} and K = {K}"):
            ops.int8xint2_mm(x[:, :K], act_scale, weight, one, out_features=N)


@pytest.mark.gpu
def test_sweep_on_the_gpu() -> None:
    """Random shapes, poisoned memory, two runs equal."""
    generator = torch.Generator().manual_seed(0)
    for trial in range(120):
        M, N, K = (int(torch.randint(1, high, (1,), generator=generator)) for high in (600, 900, 1200))
        if trial % 3 == 0:
            M = 1 + trial % 9
        x, _, packed, act_scale = problem(M, N, K, "cuda", seed=trial)
        torch.full((M, N), -7, dtype=torch.int32, device="cuda")  # what an unwritten output would show
        got = ops.int8xint2_mm(x, None, packed, out_dtype=torch.int32)
        assert torch.equal(got, ops.int8xint2_mm_ref(x, None, packed, out_dtype=torch.int32)), (M, N, K)
        scale = torch.rand(N, device="cuda")
        first = ops.int8xint2_mm(x, act_scale, packed, scale, out_dtype=torch.bfloat16)
        assert torch.equal(first, ops.int8xint2_mm(x, act_scale, packed, scale, out_dtype=torch.bfloat16))
        assert torch.equal(
            first, ops.int8xint2_mm_ref(x, act_scale, packed, scale, out_dtype=torch.bfloat16)
        ), (M, N, K)


def test_bad_arguments() -> None:
    x, _, packed, act_scale = problem(3, 8, 20, "cpu")
    one = torch.ones(())
    cases = [
        (lambda: ops.int8xint2_mm(x.int(), act_scale, packed, one), TypeError, "x_i8 must be of dtype int8"),
        (
            lambda: ops.int8xint2_mm(x[:, :19], act_scale, packed[:, :4], one),
            ValueError,
            r"ceil\(K / 4\) = 5",
        ),
        (lambda: ops.int8xint2_mm(x, act_scale[:2], packed, one), ValueError, "x_scale must have shape"),
        (
            lambda: ops.int8xint2_mm(x, act_scale, packed, torch.ones(3)),
            ValueError,
            "weight_scale must have 1 or N",
        ),
        (lambda: ops.int8xint2_mm(x, act_scale, packed), ValueError, "weight_scale are needed"),
        (
            lambda: ops.int8xint2_mm(x, act_scale, packed, one, bias=torch.ones(7)),
            ValueError,
            "bias must have shape",
        ),
        (
            lambda: ops.int8xint2_mm(x, act_scale, packed, torch.ones(2), segments=[4, 3]),
            ValueError,
            "add up to N = 8",
        ),
        (
            lambda: ops.int8xint2_mm(x, act_scale, packed, torch.ones(3), segments=[4, 4]),
            ValueError,
            "one element for each of the 2",
        ),
        (lambda: ops.int8xint2_mm(x, act_scale, packed, one, out_dtype=torch.int8), TypeError, "out_dtype"),
        (lambda: ops.int8xint2_mm(x, act_scale, packed, one, out_dtype=torch.int32), ValueError, "bare sums"),
        (lambda: ops.int8xint2_mm(x[:, :0], act_scale, packed, one), ValueError, "last dimension"),
        (
            lambda: ops.int8xint2_mm(x, act_scale, packed, one, out_features=16),
            ValueError,
            "out_features must be None or the 8 rows of weight, got 16",
        ),
        (lambda: ops.int8xint2_mm(x, act_scale, packed.float(), one), TypeError, "uint8 or int32"),
    ]
    for call, error, match in cases:
        with pytest.raises(error, match=match):
            call()


@pytest.mark.gpu
def test_mixed_devices() -> None:
    x, _, packed, act_scale = problem(3, 8, 20, "cuda")
    with pytest.raises(ValueError, match="must be on one device"):
        ops.int8xint2_mm(x, act_scale, packed.cpu(), torch.ones((), device="cuda"))
