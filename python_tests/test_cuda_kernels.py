"""What only the CUDA kernels can get wrong: tiles and tails, unaligned memory, stale memory, streams, graphs,
offsets beyond 2**31. What both devices share is tested by the files named after the operators."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from cuda_tools import (
    DTYPES,
    KS,
    assert_same,
    assert_within_twice,
    exact_product,
    exact_ref,
    generator,
    integers,
    normal,
    poison,
    shifted,
)
from torch import Tensor

from bitnet_ext import ops

pytestmark = pytest.mark.gpu

raw = torch.ops.bitnet_ext


# --- quantisers and packing ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("K", [*KS, 8192, 8200, 16383])
def test_quantisers_on_unaligned_rows(K: int, dtype: torch.dtype) -> None:
    """Rows longer than a thread's registers (1,024 and 8,192 values) and rows that start anywhere."""
    x = normal(9, K, dtype=dtype, seed=K) * torch.logspace(-3, 3, 9, device="cuda").unsqueeze(1).to(dtype)
    gain = normal(K, seed=1)
    expected = exact_ref(ops.quantize_act_int8_ref, x)
    expected_norm = exact_ref(ops.rms_norm_quantize_ref, x, gain, 1e-6)
    for values, gains in ((x, gain), (shifted(x), shifted(gain)), (shifted(x, 3), gain)):
        poison(*expected, *expected_norm)
        assert_same(raw.quantize_act_int8(values), expected)
        x_i8, act_scale, rstd = raw.rms_norm_quantize(values, gains, 1e-6)
        # The float64 sum of squares has another order than the reference's; its rounding to float32 may
        # differ once in 2**28, and then the integers would too.
        assert_same((x_i8, act_scale, rstd), expected_norm)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("K", [*KS, 8192])
@pytest.mark.parametrize("N", [1, 37, 301])
def test_weight_quantisers_on_unaligned_rows(K: int, N: int, dtype: torch.dtype) -> None:
    w = (normal(N, K, seed=K + N) * 0.02).to(dtype)
    codes, scale = exact_ref(ops.quantize_weight_ternary_ref, w)
    packed = ops.pack_ternary_ref(codes)
    for weight in (w, shifted(w), shifted(w, 2)):
        poison(codes, packed, scale)
        assert_same(raw.quantize_weight_ternary(weight), (codes, scale))
        poison(codes, packed, scale)
        assert_same(raw.quantize_pack_weight(weight), (packed, scale))


@pytest.mark.parametrize("K", KS)
@pytest.mark.parametrize("N", [1, 37])
def test_packing_on_unaligned_rows(K: int, N: int) -> None:
    codes = integers(-1, 2, N, K, seed=K)
    packed = ops.pack_ternary_ref(codes)
    row_scale = torch.rand(N, generator=generator(1), device="cuda") + 0.1
    for shift in (0, 1, 2, 4):
        poison(packed, codes)
        assert torch.equal(raw.pack_ternary(shifted(codes, shift)), packed)
        poison(packed, codes)
        assert torch.equal(raw.unpack_ternary(shifted(packed, shift), K), codes)
        for dtype in DTYPES:
            for scale in (row_scale[:1], row_scale):
                poison(torch.empty(N, K, dtype=dtype))
                got = raw.dequantize_ternary(shifted(packed, shift), scale, K, dtype)
                assert torch.equal(got, (codes.float() * scale.unsqueeze(1)).to(dtype))
            poison(torch.empty(N, K, dtype=dtype))
            got = raw.dequantize_act(shifted(codes * 100, shift), row_scale, dtype)
            assert torch.equal(got, ((codes * 100).float() * row_scale.unsqueeze(1)).to(dtype))


def test_pack_clamps_and_unpack_reads_the_invalid_value_as_one() -> None:
    codes = torch.arange(-128, 128, dtype=torch.int16, device="cuda").to(torch.int8).view(4, 64)
    assert torch.equal(raw.unpack_ternary(raw.pack_ternary(codes), 64), codes.clamp(-1, 1))
    every_byte = torch.arange(256, device="cuda").to(torch.uint8).view(4, 64)
    stored = (every_byte.int().unsqueeze(-1) >> torch.tensor([0, 2, 4, 6], device="cuda")) & 3
    expected = (stored.clamp(max=2) - 1).to(torch.int8).view(4, 256)
    assert torch.equal(raw.unpack_ternary(every_byte, 256), expected)
    assert torch.equal(raw.unpack_ternary(every_byte, 253), expected[:, :253])


# --- bit_linear ---------------------------------------------------------------------------------------------


def bit_linear(
    x: Tensor, w: Tensor, bias: Tensor | None, gain: Tensor | None, normalize: bool, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """(y, x_i8, act_scale, rstd, packed, weight_scale)"""
    codes = raw.quantize_weights([w])
    norms = (gain, 1e-5, normalize, None, 0.0)
    return (*raw.bit_linear(x, None, [w], *codes, bias, *norms, dtype, "exact")[:4], *codes)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_bit_linear_of_bad_values(bad: float) -> None:
    x, w = normal(12, 80), normal(24, 80, seed=1)
    poisoned = x.clone()
    poisoned[5, 79] = bad
    for normalize in (False, True):
        y = bit_linear(poisoned, w, None, None, normalize, torch.float32)[0]
        assert y.isnan().any(1).tolist() == [row == 5 for row in range(12)]
        assert y[5].isnan().all()
    w[23, 0] = bad
    assert bit_linear(x, w, None, None, True, torch.float32)[0].isnan().all()


@pytest.mark.parametrize("shape", [(0,), (1,), (2, 5), (4, 31), (3, 1, 171)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bit_linear_is_its_parts(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    K, N = 320, 129
    x, w = normal(*shape, K, dtype=dtype), (normal(N, K, seed=1) * 0.02).to(dtype)
    gain, bias = normal(K, seed=2), normal(N, seed=3)
    for normalize, gains in ((False, None), (True, None), (True, gain)):
        y, x_i8, act_scale, rstd, packed, weight_scale = bit_linear(
            x, w, bias, gains, normalize, torch.float32
        )
        if normalize:
            assert_same((x_i8, act_scale, rstd), exact_ref(ops.rms_norm_quantize_ref, x, gains, 1e-5))
        else:
            assert_same((x_i8, act_scale), exact_ref(ops.quantize_act_int8_ref, x))
            assert rstd.shape == (0,)
        codes, scale = exact_ref(ops.quantize_weight_ternary_ref, w)
        canonical = ops.pack_ternary_ref(codes)
        assert_same((packed, weight_scale), (ops.prepack_ternary_ref(canonical, K), scale.reshape(1)))
        assert torch.equal(y, ops.int8xint2_mm_ref(x_i8, act_scale, canonical, weight_scale, bias=bias))


# --- norm backward, optimiser, loss -------------------------------------------------------------------------


def norm_backward(grad: Tensor, x: Tensor, gain: Tensor | None, rstd: Tensor) -> tuple[Tensor, Tensor]:
    rstd = rstd.unsqueeze(-1)
    xhat, scaled = x * rstd, grad if gain is None else grad * gain
    grad_x = rstd * (scaled - xhat * (scaled * xhat).mean(-1, keepdim=True))
    return grad_x, (grad * xhat).sum(0)


@pytest.mark.parametrize("grad_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("M", "K"), [(0, 8), (1, 1), (124, 256), (257, 63), (1025, 2560), (3, 6912)])
def test_norm_backward(M: int, K: int, dtype: torch.dtype, grad_dtype: torch.dtype) -> None:
    x, grad = normal(M, K, dtype=dtype), normal(M, K, dtype=grad_dtype, seed=1)
    gain = normal(K, seed=2)
    rstd = (x.double().square().mean(-1) + 1e-5).rsqrt().float()
    for gains, shift in ((gain, 0), (gain, 1), (None, 0)):
        values, grads = shifted(x, shift), shifted(grad, shift)
        poison(x, gain)
        call = grads, values, gains, rstd, None, dtype
        grad_x, grad_delta, grad_gain = raw.rms_norm_backward(*call)
        assert grad_delta.shape == (0,)
        assert_same((grad_x, grad_delta, grad_gain), raw.rms_norm_backward(*call))
        wide = [None if t is None else t.double() for t in (grad, x, gains, rstd)]
        exact_x, exact_gain = norm_backward(*wide)  # type: ignore[arg-type]
        eager_x, eager_gain = norm_backward(grad.float(), x.float(), gains, rstd)
        assert grad_x.dtype == dtype
        assert_within_twice(grad_x, eager_x.to(dtype), exact_x)
        if gains is None:
            assert grad_gain.shape == (0,)
        else:
            assert_within_twice(grad_gain, eager_gain, exact_gain)


def odd_tensors(count: int, seed: int) -> list[Tensor]:
    """Sizes around a block of 4,096, an empty one, and one that starts at an odd element."""
    sizes = [1, 3, 4095, 4096, 4097, 0, 12289, 257]
    tensors = [normal(sizes[i % len(sizes)], seed=seed * 1000 + i) for i in range(count)]
    tensors[2] = shifted(tensors[2])
    tensors[6 % count] = shifted(tensors[6 % count], 2)
    return tensors


@pytest.mark.parametrize("count", [7, 73, 300])
def test_sum_of_squares(count: int) -> None:
    """More tensors than one launch's table holds; 16-bit tensors among them."""
    tensors = odd_tensors(count, 1)
    tensors[0], tensors[3] = tensors[0].bfloat16(), tensors[3].half()
    tensors = [t if t.is_contiguous() else t.contiguous() for t in tensors]
    total = raw.sum_of_squares(tensors)
    assert total.dtype == torch.float64 and total.shape == ()
    exact = math.fsum(float(t.double().square().sum()) for t in tensors)
    assert float(total) == pytest.approx(exact, rel=1e-13)
    assert_same((total,), (raw.sum_of_squares(tensors),))
    assert float(raw.sum_of_squares([tensors[5]])) == 0.0  # an empty tensor only
    tensors[4][17] = float("inf")
    assert math.isinf(float(raw.sum_of_squares(tensors)))


@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("decay", [False, True])
@pytest.mark.parametrize("count", [8, 150])
def test_adam_many_tensors(count: int, decoupled: bool, decay: bool) -> None:
    lr, weight_decay, beta1, beta2, eps, scale = 3e-3, 0.1, 0.9, 0.95, 1e-8, 0.37
    params, grads = odd_tensors(count, 1), odd_tensors(count, 2)
    starts = [p.clone() for p in params]
    exp_avg, exp_avg_sq = ([torch.zeros_like(p) for p in params] for _ in range(2))
    exact = [(p.double(), torch.zeros_like(p).double(), torch.zeros_like(p).double()) for p in starts]
    eager = [(p.clone(), torch.zeros_like(p), torch.zeros_like(p)) for p in starts]
    options = dict(lr=lr, weight_decay=weight_decay, beta1=beta1, beta2=beta2, eps=eps)
    options |= dict(decoupled=decoupled, decay=decay, grad_scale=scale)
    grad_scale = torch.tensor(scale, device="cuda")
    for step in range(1, 4):
        hyper = torch.tensor([lr, weight_decay, 1 - beta1**step, 1 - beta2**step], device="cuda")
        ops.adam_step_(
            params,
            grads,
            exp_avg,
            exp_avg_sq,
            hyper,
            grad_scale,
            beta1=beta1,
            beta2=beta2,
            eps=eps,
            decoupled=decoupled,
            decay=decay,
        )
        exact = [
            ops.adam_step_ref(p, g.double(), m, v, step=step, **options)
            for (p, m, v), g in zip(exact, grads, strict=True)
        ]
        eager = [
            ops.adam_step_ref(p, g, m, v, step=step, **options)
            for (p, m, v), g in zip(eager, grads, strict=True)
        ]
    for i in range(count):
        for got, plain, true in zip((params[i], exp_avg[i], exp_avg_sq[i]), eager[i], exact[i], strict=True):
            # Three steps of one rounding of lr and of the bias corrections, which arrive as float32: relative to
            # the value, or to the length of the way (3 lr) where that has nearly cancelled it.
            floor = 4e-7 * max(float(true.abs().max()), 3 * lr) if true.numel() else 0.0
            if true.numel():
                limit = 2 * (plain.double() - true).abs().max() + floor
                assert (got.double() - true).abs().max() <= limit, (i, got.shape)


def logits_of(T: int, V: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    z = (normal(T, V, seed=seed) * 4).to(dtype)
    target = torch.randint(0, V, (T,), generator=generator(seed + 1), device="cuda")
    target[::3] = -100
    return z, target


def eager_stats(z: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    lse = z.logsumexp(-1)
    p = torch.softmax(z, -1)
    picked = z.gather(1, target.clamp(min=0).unsqueeze(1)).squeeze(1)
    return lse, torch.where(target >= 0, picked, 0), z.mean(-1), (p * z).sum(-1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("V", [1, 2, 7, 33, 1000, 8191, 8192, 50257])
def test_softmax_stats(V: int, dtype: torch.dtype) -> None:
    z, target = logits_of(13, V, dtype)
    exact, eager = eager_stats(z.double(), target), eager_stats(z.float(), target)
    for logits in (z, shifted(z), shifted(z, 3)):
        poison(*exact)
        got = raw.softmax_stats(logits, target)
        assert [a.dtype for a in got[:4]] == [torch.float64, *[torch.float32] * 3]
        for a, b, c in zip(got[:4], eager, exact, strict=True):
            assert_within_twice(a, b, c)
        assert torch.equal(got[4], z.float().argmax(-1))
        assert_same(tuple(got), tuple(raw.softmax_stats(logits, target)))


def test_softmax_stats_of_ties_and_infinities() -> None:
    V = 50257
    z = torch.zeros(5, V, device="cuda")
    z[0] = 1.5  # all equal: the lowest index
    z[1, [40001, 123, 50256]] = 9.0  # ties far apart
    z[2] = -float("inf")
    z[2, 777:779] = 2.0  # masked logits count for nothing
    z[3, 5] = float("nan")
    z[4, 6] = float("inf")
    target = torch.tensor([0, 123, 777, 1, V], device="cuda")
    lse, target_logit, mean_logit, expected_logit, argmax = raw.softmax_stats(z, target)
    assert argmax[:3].tolist() == [0, 123, 777]
    assert ((argmax >= 0) & (argmax < V)).all()
    torch.testing.assert_close(lse[0].item(), 1.5 + math.log(V), rtol=1e-6, atol=0)
    torch.testing.assert_close(lse[2].item(), 2.0 + math.log(2), rtol=1e-6, atol=0)
    torch.testing.assert_close(expected_logit[2].item(), 2.0, rtol=1e-6, atol=0)
    assert mean_logit[2].item() == -float("inf")
    assert not lse[3:].isfinite().any() and not expected_logit[3:].isfinite().any()
    assert target_logit[4].isnan()  # a target beyond the vocabulary cannot throw here, and is not hidden
    nothing = raw.softmax_stats(torch.full((1, 9000), -float("inf"), device="cuda"), target[:1])
    assert nothing[0].item() == -float("inf") or nothing[0].isnan().item()
    assert nothing[4].item() == 0


TERMS = {  # label_smoothing, z_loss, entropy_weight, diversity_weight, softcap
    "plain": (0.0, 0.0, 0.0, 0.0, 0.0),
    "smoothed": (0.1, 1e-2, 0.0, 0.0, 0.0),
    "entropy": (0.0, 0.0, 0.3, 0.0, 0.0),
    "capped": (0.1, 0.0, 0.0, 0.0, 6.0),
    "all": (0.1, 1e-2, 0.3, 0.2, 6.0),
}


def padded_logits(T: int, V: int, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor]:
    """Rows of a multiple of 64 elements; what stands behind the vocabulary must not matter."""
    z, target = logits_of(T, V, dtype, seed)
    rows = torch.full((T, -(-V // 64) * 64), float("nan"), dtype=dtype, device="cuda")
    rows[:, :V] = z
    return rows, target


def eager_rows(raw_z: Tensor, target: Tensor, log_marginal: Tensor | None, terms: tuple[float, ...],
               dtype: torch.dtype) -> tuple[Tensor, ...]:  # fmt: skip
    """lse, cross-entropy, entropy, lse - mean logit and gradient of rows, by autograd in `dtype`."""
    smoothing, z_loss, entropy_weight, diversity_weight, softcap = terms
    raw_z = raw_z.to(dtype).requires_grad_()
    z = softcap * torch.tanh(raw_z / softcap) if softcap else raw_z
    lse, log_p = z.logsumexp(-1), z.log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    cross_entropy = -log_p.gather(1, target.clamp(min=0).unsqueeze(1)).squeeze(1)
    cross_entropy = torch.where(target >= 0, cross_entropy, 0.0)
    smooth = lse - z.mean(-1)
    loss = (1 - smoothing) * cross_entropy + smoothing * smooth + z_loss * lse.square()
    loss = loss - entropy_weight * entropy
    if log_marginal is not None:  # its gradient: p_j (l_j - sum p l)
        loss = loss + diversity_weight * (log_p.exp() * log_marginal.to(dtype)).sum(-1)
    (torch.where(target >= 0, loss, 0.0).sum() / (target >= 0).sum()).backward()
    return tuple(t.detach() for t in (lse, cross_entropy, entropy, smooth, raw_z.grad))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("V", [1, 7, 33, 4099, 50257, 128256])
@pytest.mark.parametrize("terms", TERMS.values(), ids=TERMS)
def test_cross_entropy_rows(V: int, dtype: torch.dtype, terms: tuple[float, ...]) -> None:
    for T in (11, 300) if V in (33, 50257) and terms == TERMS["plain"] else (11,):
        rows, target = padded_logits(T, V, dtype, seed=3)
        log_marginal = -torch.rand(V, device="cuda") * 9 if terms == TERMS["all"] else None
        z = rows[:, :V].clone()
        count = raw.count_targets(target)
        assert count.item() == (target >= 0).sum().item()
        exact = eager_rows(z, target, log_marginal, terms, torch.float64)
        eager = eager_rows(z, target, log_marginal, terms, torch.float32)
        before = raw.cross_entropy_rows_(rows, V, target, None, log_marginal, *terms)
        assert torch.equal(rows[:, :V], z)
        again = rows.clone()
        got = raw.cross_entropy_rows_(rows, V, target, count, log_marginal, *terms)
        assert_same(tuple(before), tuple(got))
        assert_same(tuple(raw.cross_entropy_rows_(again, V, target, count, log_marginal, *terms)), tuple(got))
        assert_same((again,), (rows,))
        for a, b, c in zip(got[:4], eager[:4], exact[:4], strict=True):
            # One rounding of the logits, of up to 20, where the result itself is small or zero (V = 1).
            assert (a.double() - c).abs().max() <= 2 * (b.double() - c).abs().max() + 2e-6
        assert torch.equal(got[4], z.float().argmax(-1))
        assert rows[:, V:].abs().sum() == 0 and rows[target < 0].abs().sum() == 0
        grad_error, eager_error = (
            (t.double() - exact[4]).abs().max() for t in (rows[:, :V], eager[4].to(dtype))
        )
        assert grad_error <= 2 * eager_error + 2e-7  # p = 1, less 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("V", [1, 33, 50257])
def test_probability_sums(V: int, dtype: torch.dtype) -> None:
    for T, softcap in ((70, 0.0), (5, 6.0)):
        rows, target = padded_logits(T, V, dtype, seed=4)
        lse = raw.cross_entropy_rows_(rows, V, target, None, None, 0.0, 0.0, 0.0, 0.0, softcap)[0]
        got = raw.probability_sums(rows, V, target, lse, softcap)
        assert got.shape == (-(-T // 32), V)
        z = rows[:, :V].double()
        z = softcap * torch.tanh(z / softcap) if softcap else z
        exact = (z.softmax(-1) * (target >= 0).unsqueeze(1)).sum(0)
        torch.testing.assert_close(got.double().sum(0), exact, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scale(dtype: torch.dtype) -> None:
    tensors = [normal(1000, 37).to(dtype), normal(3).to(dtype)]
    before = [t.clone() for t in tensors]
    raw.scale_(tensors, torch.ones((), device="cuda"))
    assert_same(tuple(tensors), tuple(before))
    raw.scale_(tensors, torch.tensor(0.3, device="cuda"))
    assert_same(
        tuple(tensors), tuple((t.float() * torch.tensor(0.3, device="cuda")).to(dtype) for t in before)
    )


# --- CUDA itself: graphs, streams, devices, large tensors, errors -------------------------------------------


def captured(function: Callable[[], object]) -> tuple[torch.cuda.CUDAGraph, object]:
    """Warms up on a side stream (modules are loaded lazily), then captures one call."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()
    return graph, result


@pytest.mark.parametrize("M", [1, 8, 31, 600])
def test_bit_linear_in_a_graph(M: int) -> None:
    x, w, gain = normal(M, 512), normal(300, 512, seed=1) * 0.02, normal(512, seed=2)
    graph, outputs = captured(lambda: bit_linear(x, w, None, gain, True, torch.bfloat16))
    for seed in (5, 6):
        x.copy_(normal(M, 512, seed=seed))
        w.copy_(normal(300, 512, seed=seed + 10) * 0.05)
        graph.replay()
        assert_same(tuple(outputs), tuple(bit_linear(x, w, None, gain, True, torch.bfloat16)))


def test_optimiser_in_a_graph() -> None:
    """lr, the bias corrections and the clipping factor are read on the device, so a replay follows them."""
    beta1, beta2, eps = 0.9, 0.95, 1e-8
    params, grads = odd_tensors(80, 1), odd_tensors(80, 2)
    exp_avg, exp_avg_sq = ([torch.zeros_like(p) for p in params] for _ in range(2))
    hyper, grad_scale = torch.zeros(4, device="cuda"), torch.zeros((), device="cuda")
    set_hyper = [torch.tensor([1e-3 / s, 0.1, 1 - beta1**s, 1 - beta2**s], device="cuda") for s in (1, 2, 3)]
    hyper.copy_(set_hyper[0])

    def step() -> Tensor:
        total = raw.sum_of_squares(grads)
        grad_scale.copy_((1.0 / total.sqrt()).clamp(max=1.0))
        ops.adam_step_(
            params,
            grads,
            exp_avg,
            exp_avg_sq,
            hyper,
            grad_scale,
            beta1=beta1,
            beta2=beta2,
            eps=eps,
            decoupled=True,
            decay=True,
        )
        return total

    start = [p.clone() for p in params]
    graph, total = captured(step)
    for tensors, values in ((params, start), (exp_avg, None), (exp_avg_sq, None)):
        for i, t in enumerate(tensors):
            t.copy_(values[i]) if values else t.zero_()
    for values in set_hyper:
        hyper.copy_(values)
        graph.replay()
    replayed = [p.clone() for p in params]

    for tensors, values in ((params, start), (exp_avg, None), (exp_avg_sq, None)):
        for i, t in enumerate(tensors):
            t.copy_(values[i]) if values else t.zero_()
    for values in set_hyper:
        hyper.copy_(values)
        assert_same((step(),), (total,))  # type: ignore[arg-type]
    assert_same(tuple(params), tuple(replayed))
    assert all(not torch.equal(p, s) for p, s in zip(params, start, strict=True) if p.numel())


def test_loss_and_norm_in_a_graph() -> None:
    z, target = logits_of(9, 50257, torch.float32)
    x, grad, gain, rstd = normal(600, 64), normal(600, 64, seed=1), normal(64, seed=2), torch.rand(600).cuda()

    def step() -> tuple[Tensor, ...]:
        stats = raw.softmax_stats(z, target)
        out = torch.nn.functional.pad(z, (0, 47))
        rows = raw.cross_entropy_rows_(
            out, z.shape[1], target, raw.count_targets(target), None, 0.1, 1e-3, 0.1, 0.0, 0.0
        )
        return (*stats, *rows, out, *raw.rms_norm_backward(grad, x, gain, rstd, x, torch.bfloat16))

    graph, outputs = captured(step)
    z.copy_(logits_of(9, 50257, torch.float32, seed=7)[0])
    x.copy_(normal(600, 64, seed=8))
    graph.replay()
    assert_same(outputs, step())  # type: ignore[arg-type]


def test_current_stream_is_used() -> None:
    """Without it the product would start before the slow fill of its input is done."""
    x, packed = (
        torch.zeros(64, 4096, dtype=torch.int8, device="cuda"),
        ops.pack_ternary_ref(integers(-1, 2, 96, 4096)),
    )
    new = integers(-128, 128, 64, 4096)
    expected = raw.int8xint2_mm_int32(new, packed)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        x.copy_(new)
        got = raw.int8xint2_mm_int32(x, packed)
    stream.synchronize()
    assert torch.equal(got, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_device_of_the_tensors_is_used() -> None:
    x, w = normal(20, 128), normal(64, 128, seed=1)
    expected = bit_linear(x, w, None, None, True, torch.float32)
    got = bit_linear(x.to("cuda:1"), w.to("cuda:1"), None, None, True, torch.float32)
    assert torch.cuda.current_device() == 0
    assert all(t.device == torch.device("cuda:1") for t in got)
    assert_same(tuple(t.to("cuda:0") for t in got), tuple(expected))


def _needs(gib: int) -> None:
    free = torch.cuda.mem_get_info()[0] >> 30
    if free < gib:
        pytest.skip(f"needs {gib} GiB of GPU memory, {free} are free")


def test_offsets_beyond_int32() -> None:
    """More than 2**31 elements in one tensor, and more rows than gridDim.y could count."""
    _needs(40)
    M, K = (1 << 21) + 5, 1024
    x = torch.zeros(M, K, dtype=torch.bfloat16, device="cuda")
    x[-3:] = normal(3, K, dtype=torch.bfloat16)
    expected, expected_scale = exact_ref(ops.quantize_act_int8_ref, x[-3:])
    x_i8, act_scale = raw.quantize_act_int8(x)
    assert torch.equal(x_i8[-3:], expected) and torch.equal(act_scale[-3:], expected_scale)
    del x
    codes = integers(-1, 2, 3, K)
    packed = ops.pack_ternary_ref(codes)
    assert torch.equal(raw.int8xint2_mm_int32(x_i8, packed)[-3:], exact_product(expected, codes))
    del x_i8
    codes = torch.zeros(M, K, dtype=torch.int8, device="cuda")
    codes[-3:] = integers(-1, 2, 3, K, seed=1)
    packed = raw.pack_ternary(codes)
    assert torch.equal(packed[-3:], ops.pack_ternary_ref(codes[-3:]))
    assert torch.equal(raw.unpack_ternary(packed, K)[-3:], codes[-3:])
    for tokens in (2, 12):  # outputs [12, 2**21], and the rows of a gemv
        small = integers(-128, 128, tokens, K)
        assert torch.equal(raw.int8xint2_mm_int32(small, packed)[:, -3:], exact_product(small, codes[-3:]))
    del codes, packed
    x = integers(-128, 128, 70_000, 64)
    codes = integers(-1, 2, 32_768, 64, seed=1)
    got = raw.int8xint2_mm_int32(x, ops.pack_ternary_ref(codes))  # 2.3e9 outputs
    assert torch.equal(got[-200:], exact_product(x[-200:], codes))
    del x, codes, got
    torch.cuda.empty_cache()


def test_errors_name_operator_and_argument() -> None:
    x, w = normal(3, 20), normal(8, 20, seed=1)
    codes = raw.quantize_weights([w])

    def bit_linear(x: Tensor, weight: Tensor) -> None:
        raw.bit_linear(x, None, [weight], *codes, None, None, 1e-5, True, None, 0.0, torch.float32, "exact")

    cases = [
        (lambda: raw.quantize_act_int8(x.t()), r"bitnet_ext.quantize_act_int8: x must be contiguous"),
        (lambda: raw.quantize_act_int8(x.double()), "x must be float32, bfloat16 or float16; got float64"),
        (lambda: raw.quantize_weights([normal(16, 20), w.cpu()]), r"weights\[1\] must be on cuda:0"),
        (lambda: bit_linear(x[:, :19].contiguous(), w), "K = 20"),
        (lambda: raw.rms_norm_quantize(x, w[0, :7].contiguous(), 1e-5), r"gain must have shape \[20\]"),
        (lambda: raw.unpack_ternary(torch.zeros(2, 4, dtype=torch.uint8).cuda(), 20), r"\[N, 5\] for K = 20"),
        (lambda: raw.softmax_stats(x, torch.zeros(2, dtype=torch.int64).cuda()), r"target must have shape \[3\]"),
        (lambda: raw.sum_of_squares([x, w.cpu()]), r"tensors\[1\] must be on cuda:0"),
    ]  # fmt: skip
    for call, match in cases:
        with pytest.raises(RuntimeError, match=match):
            call()
