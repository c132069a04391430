"""The packed form: the documented bits, round trips, damaged input."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitnet_ext import ops

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def codes(N: int, K: int, device: str = "cpu", seed: int = 0) -> torch.Tensor:
    return torch.randint(-1, 2, (N, K), generator=torch.Generator().manual_seed(seed), dtype=torch.int8).to(
        device
    )


@pytest.mark.parametrize("device", DEVICES)
def test_the_documented_bits(device: str) -> None:
    row = torch.tensor([[-1, 0, 1, 1, -1, 1]], dtype=torch.int8, device=device)
    # 00 | 01 << 2 | 10 << 4 | 10 << 6, then 00 | 10 << 2 and a tail of t = 0 (01, 01).
    assert ops.pack_ternary(row).tolist() == [[0b10100100, 0b01011000]]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("K", [1, 2, 3, 4, 5, 63, 64, 65, 255, 257, 6912])
@pytest.mark.parametrize("N", [1, 3, 33])
def test_round_trip(device: str, N: int, K: int) -> None:
    original = codes(N, K, device, seed=N * K)
    packed = ops.pack_ternary(original)
    assert packed.shape == (N, (K + 3) // 4)
    assert torch.equal(packed, ops.pack_ternary_ref(original))
    assert torch.equal(ops.unpack_ternary(packed, K), original)
    assert torch.equal(ops.unpack_ternary_ref(packed, K), original)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 140), st.integers(0, 2**31))
def test_round_trip_of_any_shape(N: int, K: int, seed: int) -> None:
    original = codes(N, K, seed=seed)
    assert torch.equal(ops.unpack_ternary(ops.pack_ternary(original), K), original)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("K", [1, 37, 256])
def test_dequantize(device: str, per_row: bool, dtype: torch.dtype, K: int) -> None:
    packed = ops.pack_ternary(codes(5, K, device))
    scale = torch.rand(5, device=device) if per_row else torch.tensor(0.37, device=device)
    got = ops.dequantize_ternary(packed, scale, K, dtype)
    assert torch.equal(got, ops.dequantize_ternary_ref(packed, scale, K, dtype))


@pytest.mark.parametrize("device", DEVICES)
def test_codes_out_of_range_are_refused(device: str) -> None:
    for bad in (2, -2, -128, 127):
        matrix = codes(4, 9, device)
        matrix[2, 8] = bad
        with pytest.raises((RuntimeError, ValueError), match="codes"):
            ops.pack_ternary(matrix)


def test_an_invalid_stored_value_is_refused_on_the_cpu() -> None:
    packed = ops.pack_ternary(codes(2, 8))
    packed[1, 1] |= 0b11
    with pytest.raises(RuntimeError, match="packed"):
        ops.unpack_ternary(packed, 8)


def test_bad_arguments() -> None:
    packed = ops.pack_ternary(codes(2, 8))
    with pytest.raises(ValueError, match=r"packed must have ceil\(K / 4\) = 3 columns"):
        ops.unpack_ternary(packed, 9)
    with pytest.raises(TypeError, match="codes must be of dtype int8"):
        ops.pack_ternary(torch.zeros(2, 2))
    with pytest.raises(ValueError, match="in_features"):
        ops.unpack_ternary(packed, 0)
    with pytest.raises(ValueError, match="weight_scale must have 1 or N = 2"):
        ops.dequantize_ternary(packed, torch.ones(3), 8)
