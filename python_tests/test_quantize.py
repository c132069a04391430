"""Quantisers against their references: integers and scales equal, errors said clearly."""

from __future__ import annotations

import pytest
import torch

from bitnet_ext import ops

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def tensor(*shape: int, device: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(device, dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("K", [1, 3, 16, 255, 256, 257, 1000, 6912])
@pytest.mark.parametrize("M", [0, 1, 3, 17])
def test_act_equals_reference(device: str, dtype: torch.dtype, K: int, M: int) -> None:
    x = tensor(M, K, device=device, dtype=dtype, seed=M + K)
    x_i8, scale = ops.quantize_act_int8(x)
    expected, expected_scale = ops.quantize_act_int8_ref(x)
    assert torch.equal(x_i8, expected)
    assert torch.equal(scale, expected_scale)
    if M:
        assert int(x_i8.abs().max()) == 127  # the largest magnitude of a token takes the whole range


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (7, 255), (33, 257), (256, 256), (513, 1000)])
def test_weight_equals_reference(device: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    w = tensor(*shape, device=device, dtype=dtype, seed=shape[1]) * 0.03
    codes, scale = ops.quantize_weight_ternary(w)
    expected, expected_scale = ops.quantize_weight_ternary_ref(w)
    assert torch.equal(scale, expected_scale)
    assert torch.equal(codes, expected)
    packed, packed_scale = ops.quantize_pack_weight(w)
    assert torch.equal(packed, ops.pack_ternary_ref(expected))
    assert torch.equal(packed_scale, expected_scale)


@pytest.mark.parametrize("device", DEVICES)
def test_ties_and_neighbours_of_the_threshold(device: str) -> None:
    """w = +-0.5 scale rounds to 0 (half to even); the next float above it to +-1."""
    half = torch.tensor(0.5)
    above, below = torch.nextafter(half, torch.tensor(1.0)), torch.nextafter(half, torch.tensor(0.0))
    w = torch.stack([half, above, below, -half, -above, -below]).repeat(1, 1)
    fill = (w.numel() * 2 - w.abs().double().sum()) / w.numel()  # brings the mean magnitude to 1
    w = torch.cat([w, torch.full_like(w, float(fill))], dim=1).to(device)
    codes, scale = ops.quantize_weight_ternary(w)
    assert float(scale) == pytest.approx(1.0, abs=1e-6)
    assert torch.equal(codes, ops.quantize_weight_ternary_ref(w)[0])
    if float(scale) == 1.0:
        assert codes[0, :6].tolist() == [0, 1, 0, 0, -1, 0]


@pytest.mark.parametrize("device", DEVICES)
def test_zero_input_has_a_finite_scale(device: str) -> None:
    x_i8, scale = ops.quantize_act_int8(torch.zeros(2, 8, device=device))
    assert x_i8.abs().sum() == 0
    assert torch.equal(scale.cpu(), torch.full((2,), 1e-5) / 127)
    codes, weight_scale = ops.quantize_weight_ternary(torch.zeros(4, 8, device=device))
    assert codes.abs().sum() == 0
    assert float(weight_scale) == pytest.approx(1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("K", [1, 4, 31, 256, 257, 2560])
@pytest.mark.parametrize("with_gain", [True, False])
def test_rms_norm_quantize(device: str, K: int, with_gain: bool) -> None:
    x = tensor(2, 9, K, device=device, seed=K) * torch.logspace(-3, 3, 9, device=device).reshape(1, 9, 1)
    gain = tensor(K, device=device, seed=1) if with_gain else None
    x_i8, scale, rstd = ops.rms_norm_quantize(x, gain, 1e-5)
    ref_i8, ref_scale, ref_rstd = ops.rms_norm_quantize_ref(x, gain, 1e-5)
    assert torch.equal(rstd, ref_rstd)
    assert torch.equal(scale, ref_scale)
    assert torch.equal(x_i8, ref_i8)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("K", [1, 64, 257])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("M", [0, 1, 300])
def test_rms_norm_backward(device: str, K: int, dtype: torch.dtype, M: int) -> None:
    x, grad = (tensor(M, K, device=device, dtype=dtype, seed=s) for s in (1, 2))
    gain = tensor(K, device=device, seed=3)
    _, _, rstd = ops.rms_norm_quantize(x, gain, 1e-5)
    grad_x, grad_gain = ops.rms_norm_backward(grad, x, gain, rstd)
    ref_x, ref_gain = ops.rms_norm_backward_ref(grad, x, gain, rstd)
    assert grad_x.dtype == dtype
    torch.testing.assert_close(grad_x, ref_x, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-5)
    torch.testing.assert_close(grad_gain, ref_gain, rtol=1e-5, atol=1e-4)
    no_gain, nothing = ops.rms_norm_backward(grad, x, None, rstd)
    assert nothing is None
    torch.testing.assert_close(
        no_gain, ops.rms_norm_backward_ref(grad, x, None, rstd)[0], rtol=1e-2, atol=1e-5
    )


def test_rms_norm_backward_is_the_gradient() -> None:
    x = tensor(5, 33, device="cpu").requires_grad_()
    gain = tensor(33, device="cpu", seed=1).requires_grad_()
    y = torch.nn.functional.rms_norm(x, (33,), gain, 1e-5)
    grad = tensor(5, 33, device="cpu", seed=2)
    y.backward(grad)
    _, _, rstd = ops.rms_norm_quantize(x.detach(), gain.detach(), 1e-5)
    grad_x, grad_gain = ops.rms_norm_backward(grad, x.detach(), gain.detach(), rstd)
    torch.testing.assert_close(grad_x, x.grad)
    torch.testing.assert_close(grad_gain, gain.grad)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_is_refused_on_the_cpu(bad: float) -> None:
    x = torch.ones(3, 40)
    x[1, 37] = bad
    for call in (
        lambda: ops.quantize_act_int8(x),
        lambda: ops.rms_norm_quantize(x, None),
        lambda: ops.quantize_weight_ternary(x),
        lambda: ops.quantize_pack_weight(x),
    ):
        with pytest.raises(RuntimeError, match="holds NaN or Inf"):
            call()


@pytest.mark.gpu
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_is_never_silent_on_the_gpu(bad: float) -> None:
    x = torch.ones(3, 40, device="cuda")
    x[1, 37] = bad
    assert ops.quantize_act_int8(x)[1].isnan().tolist() == [False, True, False]
    assert ops.rms_norm_quantize(x, None)[1].isnan().tolist() == [False, True, False]
    assert ops.quantize_weight_ternary(x)[1].isnan().item()
    assert ops.quantize_pack_weight(x)[1].isnan().item()


@pytest.mark.parametrize("device", DEVICES)
def test_leading_dimensions_and_strides(device: str) -> None:
    x = tensor(4, 3, 2, 24, device=device).transpose(0, 2)
    x_i8, scale = ops.quantize_act_int8(x)
    assert x_i8.shape == x.shape and scale.shape == x.shape[:-1]
    assert torch.equal(x_i8, ops.quantize_act_int8_ref(x)[0])
    w = tensor(24, 16, device=device).t()
    assert torch.equal(ops.quantize_weight_ternary(w)[0], ops.quantize_weight_ternary_ref(w)[0])


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (
            lambda: ops.quantize_act_int8(torch.ones(2, 3, dtype=torch.int32)),
            TypeError,
            "x must be of dtype float32",
        ),
        (lambda: ops.quantize_act_int8(torch.ones(2, 0)), ValueError, "last dimension"),
        (lambda: ops.quantize_act_int8(torch.tensor(1.0)), ValueError, "at least 1 dimensions"),
        (lambda: ops.quantize_weight_ternary(torch.ones(3)), ValueError, "w must have 2 dimensions"),
        (lambda: ops.quantize_weight_ternary(torch.ones(0, 3)), ValueError, "out_features"),
        (lambda: ops.quantize_weight_ternary([[1.0]]), TypeError, "w must be a float32"),
        (
            lambda: ops.rms_norm_quantize(torch.ones(2, 3), torch.ones(4)),
            ValueError,
            r"gain must have shape \(3,\)",
        ),
        (lambda: ops.rms_norm_quantize(torch.ones(2, 3), None, -1.0), ValueError, "eps must be >= 0"),
        (
            lambda: ops.dequantize_act(torch.ones(2, 3, dtype=torch.int8), torch.ones(3)),
            ValueError,
            "act_scale",
        ),
    ],
)
def test_bad_arguments(call: object, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        call()  # type: ignore[operator]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantize_act(device: str, dtype: torch.dtype) -> None:
    x_i8, scale = ops.quantize_act_int8(tensor(5, 7, 33, device=device))
    assert torch.equal(ops.dequantize_act(x_i8, scale, dtype), ops.dequantize_act_ref(x_i8, scale, dtype))


@pytest.mark.parametrize("value", [0.0, 1e-40])
def test_a_norm_without_epsilon_of_a_row_of_zeros_names_the_epsilon(value: float) -> None:
    """Not the input, which is finite. Other rows have a norm without epsilon."""
    x, gain, weight = torch.full((2, 8), value), torch.ones(8), torch.ones(3, 8)
    calls = {
        "eps": [
            lambda: ops.rms_norm_quantize(x, None, 0.0),
            lambda: ops.rms_norm(x, gain, 0.0),
            lambda: ops.add_rms_norm(x, x, gain, 0.0),
            lambda: ops.add_rms_norm_quantize(x, x, gain, 0.0),
            lambda: ops.glu_quantize(x, x, "silu", gain, 0.0),
        ],
        "norm_eps": [
            lambda: ops.bit_linear(x, weight, norm_eps=0.0),
            lambda: ops.glu_bit_linear(torch.cat((x, x), 1), weight, "relu2", norm_weight=gain, norm_eps=0.0),
        ],
        "first_norm_eps": [
            lambda: ops.bit_linear(x, weight, norm_weight=gain, norm_eps=0.1, first_norm=(gain, 0.0))
        ],
    }
    for name, functions in calls.items():
        for function in functions:
            with pytest.raises(
                RuntimeError, match=rf"^bitnet_ext\.\w+: {name} must be > 0 for a row of zeros"
            ):
                function()
    assert torch.isfinite(ops.rms_norm(torch.ones(2, 8), gain, 0.0)).all()
