"""int8 x int8 products: exact integers for every shape, scales in the stated order, and the layer made of them."""

from __future__ import annotations

import copy
import io
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from bitnet_ext import ops
from bitnet_ext.nn.int8_linear import Int8Linear
from bitnet_ext.ops.int8_mm import (
    MAX_INT8_K,
    int8_mm,
    int8_mm_ref,
    quantize_rows_int8,
    quantize_rows_int8_ref,
    unprepack_int8,
)
from bitnet_ext.ops.packing import prepack_int8_ref

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
ODD = [1, 3, 15, 17, 127, 129, 257]
raw = torch.ops.bitnet_ext


def problem(M: int, N: int, K: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(M + 1000 * N + K)
    x = torch.randint(-128, 128, (M, K), generator=generator, dtype=torch.int8)
    codes = torch.randint(-128, 128, (N, K), generator=generator, dtype=torch.int8)
    act_scale = torch.rand(M, generator=generator) + 0.1
    return x.to(device), codes.to(device), act_scale.to(device)


def sums_of(x: Tensor, codes: Tensor) -> Tensor:
    return (x.double() @ codes.double().t()).to(torch.int32)


def both_forms(codes: Tensor) -> list[dict[str, object]]:
    """The weight as codes and, on CUDA, prepacked."""
    forms: list[dict[str, object]] = [{"weight": codes}]
    if codes.is_cuda:
        forms += [{"weight": raw.prepack_int8(codes), "out_features": codes.shape[0]}]
    return forms


def poison(shape: tuple[int, ...], device: str) -> None:
    """Fills memory and frees it, so that a result of this shape starts as garbage."""
    block = torch.full(shape, -1_234_567, dtype=torch.int32, device=device)
    del block


# --- the product --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("K", ODD)
@pytest.mark.parametrize("N", ODD)
@pytest.mark.parametrize("M", [0, 1, 5, 17, 40])
def test_int32_equals_reference(device: str, M: int, N: int, K: int) -> None:
    x, codes, _ = problem(M, N, K, device)
    expected = sums_of(x, codes)
    for form in both_forms(codes):
        poison((M, N), device)
        got = int8_mm(x, None, **form, out_dtype=torch.int32)
        assert got.dtype == torch.int32 and got.shape == (M, N)
        assert torch.equal(got, expected)
    assert torch.equal(int8_mm_ref(x, None, codes, out_dtype=torch.int32), expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("K", [2, 64, 1000, 8192, MAX_INT8_K])
@pytest.mark.parametrize("M", [1, 9, 40])
@pytest.mark.parametrize(("value", "code"), [(127, 127), (-128, 127), (127, -128), (-128, -128)])
def test_no_sum_saturates(device: str, M: int, K: int, value: int, code: int) -> None:
    """The largest sums there are, whole and in pairs: int16 steps lose them."""
    x = torch.full((M, K), value, dtype=torch.int8, device=device)
    codes = torch.full((33, K), code, dtype=torch.int8, device=device)
    for form in both_forms(codes):
        got = int8_mm(x, None, **form, out_dtype=torch.int32)
        assert torch.equal(got, torch.full((M, 33), value * code * K, dtype=torch.int32, device=device))


def test_cpu_sums_without_a_sound_int_mm(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU without VNNI: torch._int_mm saturates there, and the sums come from float64 instead."""
    module = sys.modules["bitnet_ext.ops.int8_mm"]  # the attribute of this name is the function
    monkeypatch.setattr(module, "_int_mm_is_exact", lambda: False)
    monkeypatch.setattr(module, "_SLAB_WEIGHTS", 1000)  # several slabs, the last one short
    for M, N, K in ((0, 5, 7), (1, 129, 257), (40, 17, 1001)):
        x, codes, _ = problem(M, N, K, "cpu")
        assert torch.equal(int8_mm(x, None, codes, out_dtype=torch.int32), sums_of(x, codes))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("per_row", [True, False])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("M", "N", "K"), [(1, 96, 257), (3, 7, 64), (17, 65, 300), (130, 130, 96)])
def test_scales_and_bias(
    device: str, per_row: bool, with_bias: bool, dtype: torch.dtype, M: int, N: int, K: int
) -> None:
    x, codes, act_scale = problem(M, N, K, device)
    weight_scale = torch.logspace(-5, -3, N if per_row else 1, device=device)
    bias = torch.linspace(-1, 1, N, device=device) if with_bias else None
    expected = int8_mm_ref(x, act_scale, codes, weight_scale, bias=bias, out_dtype=dtype)
    for form in both_forms(codes):
        for constant in (False, True):
            got = int8_mm(
                x,
                act_scale,
                weight_scale=weight_scale,
                bias=bias,
                out_dtype=dtype,
                weight_is_constant=constant,
                **form,
            )
            assert got.dtype == dtype and torch.equal(got, expected)


@pytest.mark.parametrize("device", DEVICES)
def test_views_and_leading_dimensions(device: str) -> None:
    x, codes, _ = problem(6, 10, 33, device)
    act_scale = torch.rand(2, 3, device=device)
    scale = torch.ones(10, device=device)
    got = int8_mm(x.view(2, 3, 33), act_scale, codes, scale)
    assert got.shape == (2, 3, 10)
    assert torch.equal(int8_mm(x[0], act_scale[0, 0], codes, scale), got[0, 0])
    columns = codes.t().contiguous().t()  # the same matrix, stored by columns
    assert torch.equal(int8_mm(x.view(2, 3, 33), act_scale, columns, scale), got)


@pytest.mark.gpu
@pytest.mark.parametrize("M", [1, 8, 64])
def test_head_of_gpt2(M: int) -> None:
    x, codes, act_scale = problem(M, 50257, 256, "cuda")
    poison((M, 50257), "cuda")
    prepacked = raw.prepack_int8(codes)
    got = int8_mm(x, None, prepacked, out_features=50257, out_dtype=torch.int32)
    assert torch.equal(got, sums_of(x, codes))
    scale = torch.rand(50257, device="cuda")
    y = int8_mm(x, act_scale, prepacked, scale, out_features=50257, out_dtype=torch.bfloat16)
    assert torch.equal(y, int8_mm_ref(x, act_scale, codes, scale, out_dtype=torch.bfloat16))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("K", ODD)
@pytest.mark.parametrize("N", ODD)
def test_prepacked_form(device: str, N: int, K: int) -> None:
    _, codes, _ = problem(1, N, K, device)
    expected = prepack_int8_ref(codes)
    assert expected.shape == (-(-N // 16), -(-K // 128), 4, 32, 4)
    assert torch.equal(unprepack_int8(expected, N, K), codes)
    # Padding holds zeros: the bytes are those of the codes and no others.
    assert torch.equal(expected.view(torch.int8).long().pow(2).sum(), codes.long().pow(2).sum())
    if device == "cuda":
        assert torch.equal(raw.prepack_int8(codes), expected)


def test_prepacked_form_follows_the_formula() -> None:
    """csrc/prepacked.h, byte by byte."""
    _, codes, _ = problem(1, 37, 300, "cpu")
    prepacked = prepack_int8_ref(codes).view(torch.int8).view(3, 3, 4, 32, 4, 4)
    padded = torch.nn.functional.pad(codes, (0, 84, 0, 11))
    for s in range(4):
        for lane in range(32):
            g, t = divmod(lane, 4)
            for j in range(4):
                for i in range(4):
                    row, column = g + 8 * (j % 2), 32 * s + 16 * (j // 2) + 4 * t + i
                    assert torch.equal(prepacked[:, :, s, lane, j, i], padded[row::16, column::128])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_quantize_rows(device: str, dtype: torch.dtype) -> None:
    w = torch.randn(37, 129, generator=torch.Generator().manual_seed(0))
    w = (w * torch.logspace(-3, 1, 37).unsqueeze(1)).to(dtype)
    w[5] = 0
    codes, scale = quantize_rows_int8(w.to(device))
    expected_codes, expected_scale = quantize_rows_int8_ref(w)
    assert torch.equal(codes.cpu(), expected_codes) and torch.equal(scale.cpu(), expected_scale)
    assert scale.shape == (37,) and scale.dtype == torch.float32
    assert (codes[5] == 0).all() and bool((codes.abs().amax(1)[:5] == 127).all())
    assert (
        ((codes.float() * scale.unsqueeze(1)).cpu() - w.float())
        .abs()
        .le(0.5001 * expected_scale[:, None])
        .all()
    )


def test_bad_arguments() -> None:
    x, codes, act_scale = problem(3, 8, 20, "cpu")
    one = torch.ones(())
    prepacked = prepack_int8_ref(codes)
    wide = torch.zeros(1, MAX_INT8_K + 1, dtype=torch.int8)
    cases: list[tuple[Callable[[], object], type[Exception], str]] = [
        (lambda: int8_mm(x.int(), act_scale, codes, one), TypeError, "x_i8 must be of dtype int8"),
        (
            lambda: int8_mm(x, act_scale, codes.short(), one),
            TypeError,
            "weight must be of dtype int8 or int32",
        ),
        (
            lambda: int8_mm(x[:, :19], act_scale, codes, one),
            ValueError,
            r"int8 \[N, K\] with K = 19 like x_i8",
        ),
        (lambda: int8_mm(x[:, :0], act_scale, codes, one), ValueError, "last dimension"),
        (lambda: int8_mm(x, act_scale, codes[:0], one), ValueError, r"rows \(N\) >= 1, got 0"),
        (
            lambda: int8_mm(x, act_scale, codes, one, out_features=9),
            ValueError,
            "the 8 rows of weight, got 9",
        ),
        (lambda: int8_mm(x, act_scale, prepacked, one, out_features=8), ValueError, "which is for CUDA"),
        (lambda: int8_mm(wide, None, wide, out_dtype=torch.int32), ValueError, "K <= 131071.*got 131072"),
        (lambda: int8_mm(x, act_scale[:2], codes, one), ValueError, "x_scale must have shape"),
        (lambda: int8_mm(x, act_scale, codes, torch.ones(3)), ValueError, "1 or N = 8 elements, got 3"),
        (lambda: int8_mm(x, act_scale, codes), ValueError, "weight_scale are needed"),
        (lambda: int8_mm(x, act_scale, codes, one, bias=torch.ones(7)), ValueError, "bias must have shape"),
        (lambda: int8_mm(x, act_scale, codes, one, out_dtype=torch.int8), TypeError, "out_dtype"),
        (lambda: int8_mm(x, act_scale, codes, one, out_dtype=torch.int32), ValueError, "bare sums"),
        (lambda: quantize_rows_int8(codes), TypeError, "w must be of dtype float32"),
        (lambda: quantize_rows_int8(torch.ones(4)), ValueError, "w must have 2 dimensions"),
        (lambda: quantize_rows_int8(torch.ones(0, 4)), ValueError, r"out_features \(N\) >= 1"),
        (lambda: unprepack_int8(prepacked, 17, 20), ValueError, r"must have shape \(2, 1, 4, 32, 4\)"),
        (lambda: unprepack_int8(codes, 8, 20), TypeError, "must be of dtype int32"),
    ]
    for call, error, match in cases:
        with pytest.raises(error, match=match):
            call()


@pytest.mark.gpu
def test_bad_prepacked_arguments() -> None:
    x, codes, act_scale = problem(3, 8, 20, "cuda")
    one, prepacked = torch.ones((), device="cuda"), raw.prepack_int8(codes)
    with pytest.raises(ValueError, match=r"out_features \(N\) is needed"):
        int8_mm(x, act_scale, prepacked, one)
    with pytest.raises(ValueError, match=r"must have shape \(2, 1, 4, 32, 4\)"):
        int8_mm(x, act_scale, prepacked, one, out_features=17)
    with pytest.raises(ValueError, match="must be on one device"):
        int8_mm(x, act_scale, codes.cpu(), one)


# --- the layer ----------------------------------------------------------------------------------------------


def linear(N: int, K: int, device: str, bias: bool = True) -> nn.Linear:
    torch.manual_seed(N + K)
    layer = nn.Linear(K, N, bias=bias)
    nn.init.normal_(layer.weight)
    return layer.to(device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("N", "K"), [(1, 1), (15, 129), (257, 127), (64, 128)])
def test_layer_is_quantiser_and_product(device: str, dtype: torch.dtype, N: int, K: int) -> None:
    layer = linear(N, K, device)
    head = Int8Linear.from_linear(layer)
    codes, scale = quantize_rows_int8_ref(layer.weight.detach().cpu())
    assert torch.equal(head.codes.cpu(), codes) and torch.equal(head.weight_scale.cpu(), scale)
    x = torch.randn(2, 3, K, device=device, dtype=dtype)
    x_i8, act_scale = ops.quantize_act_int8(x)
    y = head(x)
    assert y.dtype == dtype and y.shape == (2, 3, N)
    expected = int8_mm_ref(
        x_i8, act_scale, codes.to(device), scale.to(device), bias=layer.bias.detach(), out_dtype=dtype
    )
    assert torch.equal(y, expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("K", [256, 1024, 4096])
def test_layer_is_as_close_to_float32_as_stated(device: str, K: int) -> None:
    """The docstring's range."""
    layer = linear(512, K, device, bias=False).requires_grad_(False)
    x = torch.randn(64, K, generator=torch.Generator().manual_seed(K)).to(device)
    exact = x.double() @ layer.weight.double().t()
    error = Int8Linear.from_linear(layer)(x).double() - exact
    relative = float(error.square().mean().sqrt() / exact.square().mean().sqrt())
    assert 0.009 <= relative <= 0.013


@pytest.mark.parametrize("device", DEVICES)
def test_layer_under_autocast_and_casts(device: str) -> None:
    head = Int8Linear.from_linear(linear(33, 65, device))
    x = torch.randn(4, 65, device=device)
    y = head(x)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert torch.equal(head(x), y.bfloat16())
    for cast in (copy.deepcopy(head).bfloat16(), copy.deepcopy(head).half(), copy.deepcopy(head).double()):
        assert cast.weight_scale.dtype == torch.float32 and cast.bias is not None
        assert cast.bias.dtype == torch.float32
        assert torch.equal(cast(x), y)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bias", [True, False])
def test_state_dict_round_trip(device: str, bias: bool) -> None:
    head = Int8Linear.from_linear(linear(37, 129, device, bias))
    x = torch.randn(3, 129, device=device)
    state = head.state_dict()
    assert set(state) == {"codes", "weight_scale"} | ({"bias"} if bias else set())
    assert state["codes"].dtype == torch.int8 and state["codes"].shape == (37, 129)
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    state = torch.load(file, map_location="cpu")  # from whatever device to any other
    for assign in (False, True):
        other = Int8Linear.from_linear(linear(37, 129, device, bias)).requires_grad_(False)
        with torch.no_grad():
            other.weight_scale.mul_(3)
        other._weight.zero_()
        model = nn.ModuleDict({"head": other})
        model.load_state_dict({f"head.{name}": value for name, value in state.items()}, assign=assign)
        assert torch.equal(model["head"].to(device)(x), head(x))


def test_state_dict_that_does_not_fit() -> None:
    model = nn.ModuleDict({"head": Int8Linear.from_linear(linear(4, 6, "cpu"))})
    state = dict(model.state_dict())
    codes = state.pop("head.codes")
    with pytest.raises(RuntimeError, match=r"Missing key.*head\.codes"):
        model.load_state_dict(state)
    assert model.load_state_dict(state, strict=False).missing_keys == ["head.codes"]
    with pytest.raises(
        RuntimeError, match=r"head\.codes must be int8 of shape \(4, 6\), got torch\.int8 of shape"
    ):
        model.load_state_dict(state | {"head.codes": codes[:3]})
    with pytest.raises(RuntimeError, match=r"got torch\.float32 of shape"):
        model.load_state_dict(state | {"head.codes": codes.float()})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*head\.other"):
        model.load_state_dict(state | {"head.codes": codes, "head.other": codes})


@pytest.mark.gpu
def test_one_copy_of_the_weights_on_each_device() -> None:
    head = Int8Linear.from_linear(linear(37, 129, "cpu"))
    x, codes = torch.randn(3, 129), head.codes
    y, state = head(x), head.state_dict()
    head = head.cuda()
    weights = [b for b in head.buffers() if b.dim() > 1]
    assert [b.shape for b in weights] == [(3, 2, 4, 32, 4)] and weights[0].dtype == torch.int32
    assert torch.equal(head(x.cuda()).cpu(), y)
    assert torch.equal(head.state_dict()["codes"].cpu(), codes)
    copied = copy.deepcopy(head)
    assert torch.equal(copied(x.cuda()).cpu(), y)
    back = head.cpu()
    assert torch.equal(back.codes, codes) and [b.dtype for b in back.buffers() if b.dim() > 1] == [torch.int8]
    assert torch.equal(back(x), y)
    assert back.state_dict().keys() == state.keys()


def test_meta_layer_takes_a_state_dict() -> None:
    head = Int8Linear.from_linear(linear(5, 7, "cpu"))
    x = torch.randn(2, 7)
    empty = copy.deepcopy(head).to("meta").to_empty(device="cpu")
    empty.load_state_dict(head.state_dict())
    assert torch.equal(empty(x), head(x))
    assigned = copy.deepcopy(head).to("meta")
    assigned.load_state_dict(head.state_dict(), assign=True)
    assert torch.equal(assigned(x), head(x))


@pytest.mark.parametrize("device", DEVICES)
def test_layer_compiles_whole(device: str) -> None:
    head = Int8Linear.from_linear(linear(33, 65, device))
    x = torch.randn(4, 65, device=device)
    compiled = torch.compile(head, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(x), head(x))


def test_bad_layers() -> None:
    layer = linear(4, 6, "cpu")
    codes, scale = quantize_rows_int8(layer.weight.detach())
    with pytest.raises(ValueError, match=r"codes must be torch\.int8 of shape \(5, 6\)"):
        Int8Linear(6, 5, codes, scale)
    with pytest.raises(ValueError, match=r"weight_scale must be torch\.float32"):
        Int8Linear(6, 4, codes, scale.half())
    with pytest.raises(ValueError, match="in_features must be <= 131071, got 131072"):
        Int8Linear(MAX_INT8_K + 1, 4, codes, scale)
    with torch.no_grad():
        layer.weight[1, 2] = float("nan")
    with pytest.raises(ValueError, match="holds NaN or Inf"):
        Int8Linear.from_linear(layer)
