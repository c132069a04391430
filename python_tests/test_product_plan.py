"""The choice of a CUDA kernel and its tiles (csrc/cuda/heuristics.h): what every plan must satisfy. Needs no GPU."""

from __future__ import annotations

import random
from typing import Any

import pytest

import bitnet_ext

_native: Any = pytest.importorskip(
    f"{bitnet_ext.__name__}._native", reason="this wheel of bitnet_ext holds no _native for this Python"
)

H200 = {"num_sms": 132, "shared_limit": 232_448, "sm90": True}
A100 = {"num_sms": 108, "shared_limit": 166_912, "sm90": False}
RTX_4090 = {"num_sms": 128, "shared_limit": 101_376, "sm90": False}
SMALL = {"num_sms": 1, "shared_limit": 101_376, "sm90": True}
DEVICES = {"H200": H200, "A100": A100, "RTX 4090": RTX_4090, "one multiprocessor": SMALL}


def up(a: int, b: int) -> int:
    return -(-a // b)


def shapes(count: int) -> list[tuple[int, int, int]]:
    draw = random.Random(1)
    named = [(2560, 2560), (13824, 2560), (2560, 6912), (5120, 27648), (55296, 5120), (128_256, 2560), (1, 1)]
    found = [(M, N, K) for N, K in named for M in (1, 2, 4, 5, 8, 9, 16, 17, 64, 65, 128, 129, 1000, 16384)]
    for _ in range(count):
        M = int(2 ** draw.uniform(0, 14))
        found.append((M, int(2 ** draw.uniform(0, 17)), int(2 ** draw.uniform(0, 16.9))))
    return found


def check_gemv(plan: dict[str, Any], M: int, N: int, int8_weight: bool) -> None:
    assert M == 1
    vectors = plan["row_tiles"] * plan["depth"] * (4 if int8_weight else 1)
    assert plan["row_tiles"] in (1, 2) and plan["depth"] in (1, 2, 4) and vectors <= 8
    # The kernel's register budget: 1,024 threads with few registers, else 640.
    assert 1 <= plan["warps"] <= (32 if plan["row_tiles"] == 1 and vectors <= 4 else 20)
    assert 32 * plan["warps"] >= 16 * plan["row_tiles"]  # a thread an output
    assert plan["blocks"] == up(up(N, 16), plan["row_tiles"])


def check_decode(plan: dict[str, Any], M: int, N: int, K: int, device: dict[str, Any]) -> None:
    assert M <= 16
    assert plan["splits"] >= 1 and plan["warps"] % plan["splits"] == 0 and plan["warps"] <= 20
    assert plan["splits"] <= up(K, 128)  # a warp without a block of K would read beyond the weight
    teams = plan["warps"] // plan["splits"]
    groups = up(up(N, 16), plan["row_tiles"])
    assert teams <= 5 and (plan["blocks"] - 1) * teams < groups
    assert plan["shared_bytes"] <= device["shared_limit"]
    per_sm = up(plan["blocks"], device["num_sms"])
    assert per_sm * plan["shared_bytes"] <= device["shared_limit"] or plan["blocks"] <= device["num_sms"]


def check_sm90(
    plan: dict[str, Any], M: int, N: int, K: int, device: dict[str, Any], int8_weight: bool
) -> None:
    features, tokens, split = plan["features"], plan["tokens"], plan["split_tiles"]
    compiled = {(128, 16), (128, 32), (128, 64), (128, 128), (128, 192), (256, 64), (256, 128)}
    assert (features, tokens) in compiled - ({(128, 192), (256, 128)} if int8_weight else set())
    tiles, stages = up(N, features) * up(M, tokens), up(K, 256)
    # Blocks wait for one another, so all must run at once; and each must have work.
    assert 1 <= plan["blocks"] <= device["num_sms"] * (2 if tokens <= 32 else 1)
    assert 0 <= split <= tiles
    assert split * stages >= plan["blocks"] if split else tiles >= plan["blocks"]


@pytest.mark.parametrize("int8_weight", [False, True])
@pytest.mark.parametrize("name", DEVICES)
def test_every_plan_is_one_its_kernel_can_run(name: str, int8_weight: bool) -> None:
    device = DEVICES[name]
    seen = set()
    for M, N, K in shapes(1500):
        plan = _native.product_plan(M, N, K, int8_weight=int8_weight, **device)
        seen.add(plan["kernel"])
        if plan["kernel"] == "gemv":
            check_gemv(plan, M, N, int8_weight)
        elif plan["kernel"] == "decode":
            check_decode(plan, M, N, K, device)
        elif plan["kernel"] == "sm80_gemm":
            assert plan["features"] in (32, 64, 128) and plan["tokens"] in (32, 64, 128)
        else:
            assert device["sm90"]
            check_sm90(plan, M, N, K, device, int8_weight)
    assert seen >= {"gemv", "decode", "sm80_gemm"}
    assert ("sm90_gemm" in seen) == device["sm90"]


def test_choices_that_were_measured() -> None:
    """docs/kernels.md: which kernel won where, on an H200."""

    def kernel(M: int, N: int, K: int) -> str:
        return str(_native.product_plan(M, N, K, **H200)["kernel"])

    assert kernel(1, 2560, 2560) == "gemv"
    assert kernel(1, 55296, 5120) == "decode"
    assert kernel(16, 14336, 4096) == "decode"
    assert kernel(16, 5120, 27648) == "sm90_gemm"  # 16 tokens of 27,648 do not fit shared memory
    assert kernel(32, 2560, 2560) == "sm80_gemm"
    assert kernel(64, 14336, 4096) == "sm90_gemm"
    large = _native.product_plan(16384, 14336, 4096, **H200)
    assert (large["features"], large["tokens"], large["split_tiles"]) == (256, 128, 0)


def test_bad_sizes() -> None:
    with pytest.raises(ValueError, match="M, N, K and num_sms must be >= 1"):
        _native.product_plan(0, 1, 1)
