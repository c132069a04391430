"""The fused objective against plain PyTorch: values, parts, gradients, chunks, ignored tokens."""

from __future__ import annotations

import math

import pytest
import torch

from bitnet_ext import ops

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
TERMS = [
    {},
    {"label_smoothing": 0.1},
    {"z_loss": 1e-2},
    {"entropy_weight": 0.3},
    {"diversity_weight": 0.3},
    {"logit_softcap": 4.0},
    {"output_l2": 1e-2},
    {"label_smoothing": 0.05, "z_loss": 1e-3, "entropy_weight": 0.1, "diversity_weight": 0.2},
    {
        "label_smoothing": 0.05,
        "z_loss": 1e-3,
        "entropy_weight": 0.1,
        "diversity_weight": 0.2,
        "logit_softcap": 6.0,
        "output_l2": 1e-2,
    },
]
BF16_SHAPES = [(1, 3, 8), (3, 101, 96), (70, 50257, 96), (300, 50257, 64), (5, 70001, 32), (40, 5003, 24)]


def problem(T: int, V: int, H: int, device: str, scale: float = 1.0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(T + V)
    hidden = (torch.randn(T, H, generator=generator) * scale).to(device)
    weight = torch.randn(V, H, generator=generator).to(device)
    target = torch.randint(0, V, (T,), generator=generator).to(device)
    return hidden, weight, target


def gradients(function, hidden, weight, target, dtype=torch.float32, **terms):  # type: ignore[no-untyped-def]
    hidden, weight = (t.detach().to(dtype, copy=True).requires_grad_() for t in (hidden, weight))
    out = function(hidden, weight, target, **terms)
    out.loss.backward()
    return out, hidden.grad, weight.grad


def assert_same_statistics(out, ref, tolerance: float) -> None:  # type: ignore[no-untyped-def]
    assert torch.equal(out.argmax, ref.argmax)
    for name in ("token_cross_entropy", "token_entropy"):
        got, exact = getattr(out, name), getattr(ref, name)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), exact.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("terms", TERMS, ids=lambda t: "+".join(t) or "plain")
@pytest.mark.parametrize(("T", "V", "H"), [(1, 3, 8), (3, 50257, 96), (13, 101, 16), (40, 5003, 24)])
@pytest.mark.parametrize("chunked", [False, True])
def test_against_the_reference(
    device: str, terms: dict[str, float], T: int, V: int, H: int, chunked: bool
) -> None:
    hidden, weight, target = problem(T, V, H, device, scale=0.7)
    # Halves: with a few rows the library itself sums thousands of products one after another.
    extra = {"chunk_bytes": 4 * (V + 63) * max(1, T // 2)} if chunked else {}
    out, grad_hidden, grad_weight = gradients(
        ops.linear_cross_entropy, hidden, weight, target, **terms, **extra
    )
    ref, ref_hidden, ref_weight = gradients(
        ops.linear_cross_entropy_ref, hidden, weight, target, torch.float64, **terms
    )
    _, eager_hidden, eager_weight = gradients(ops.linear_cross_entropy_ref, hidden, weight, target, **terms)
    for name in ("loss", "cross_entropy", "entropy", "z_loss"):
        torch.testing.assert_close(
            getattr(out, name).double(), getattr(ref, name).double(), rtol=2e-6, atol=2e-6
        )
    if "diversity_weight" in terms:
        torch.testing.assert_close(out.marginal_entropy.double(), ref.marginal_entropy, rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(out.mean_p.double(), ref.mean_p, rtol=1e-5, atol=1e-9)
    else:
        assert out.marginal_entropy is None and out.mean_p is None
    assert_same_statistics(out, ref, 1e-5)
    # No further from float64 than twice plain PyTorch in float32, and two roundings: of a few numbers (T = 1,
    # V = 3) its own are now and then all lucky.
    for got, eager, exact in (
        (grad_hidden, eager_hidden, ref_hidden),
        (grad_weight, eager_weight, ref_weight),
    ):
        limit = 2 * (eager.double() - exact).norm() + 2**-22 * exact.norm()
        assert (got.double() - exact).norm() <= limit


@pytest.mark.parametrize("terms", TERMS, ids=lambda t: "+".join(t) or "plain")
def test_the_reference_by_gradcheck(terms: dict[str, float]) -> None:
    hidden, weight, target = problem(4, 7, 3, "cpu")
    function = lambda h, w: ops.linear_cross_entropy_ref(h, w, target, **terms).loss  # noqa: E731
    torch.autograd.gradcheck(function, (hidden.double().requires_grad_(), weight.double().requires_grad_()))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("terms", [TERMS[0], TERMS[3], TERMS[-1]], ids=["plain", "entropy", "all"])
def test_ignored_tokens(device: str, terms: dict[str, float]) -> None:
    hidden, weight, target = problem(11, 53, 8, device)
    target[[0, 4, 10]] = -100
    out, grad_hidden, grad_weight = gradients(ops.linear_cross_entropy, hidden, weight, target, **terms)
    ref, ref_hidden, ref_weight = gradients(ops.linear_cross_entropy_ref, hidden, weight, target, **terms)
    torch.testing.assert_close(out.loss, ref.loss)
    torch.testing.assert_close(grad_hidden, ref_hidden, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(grad_weight, ref_weight, rtol=1e-4, atol=1e-6)
    assert grad_hidden[[0, 4, 10]].abs().sum() == 0
    assert out.token_cross_entropy[[0, 4, 10]].abs().sum() == 0
    assert_same_statistics(out, ref, 1e-4)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("terms", [TERMS[0], TERMS[3], TERMS[4]], ids=["plain", "entropy", "diversity"])
def test_no_token_to_predict(device: str, terms: dict[str, float]) -> None:
    """NaN as in torch.nn.functional.cross_entropy, with zeros for gradients; and no token at all."""
    for T in (5, 0):
        hidden, weight, target = problem(T, 53, 8, device)
        target.fill_(-100)
        out, grad_hidden, grad_weight = gradients(ops.linear_cross_entropy, hidden, weight, target, **terms)
        assert torch.isnan(out.loss) and torch.isnan(out.cross_entropy)
        assert grad_hidden.abs().sum() == 0 and grad_weight.abs().sum() == 0


@pytest.mark.parametrize("device", DEVICES)
def test_what_an_ignored_token_holds_does_not_matter(device: str) -> None:
    hidden, weight, target = problem(6, 53, 8, device)
    target[2] = -1
    out, grad_hidden, _ = gradients(ops.linear_cross_entropy, hidden, weight, target)
    hidden[2] = float("inf")
    poisoned, poisoned_hidden, _ = gradients(ops.linear_cross_entropy, hidden, weight, target)
    assert torch.equal(out.loss, poisoned.loss)
    assert torch.equal(grad_hidden, poisoned_hidden)


@pytest.mark.parametrize("device", DEVICES)
def test_uniform_and_confident_logits(device: str) -> None:
    V, H = 1009, 4
    target = torch.arange(6, device=device)
    uniform = ops.linear_cross_entropy(
        torch.zeros(6, H, device=device), torch.ones(V, H, device=device), target
    )
    assert float(uniform.loss) == pytest.approx(math.log(V), abs=1e-5)
    assert float(uniform.entropy) == pytest.approx(math.log(V), abs=1e-5)
    weight = torch.zeros(V, H, device=device)
    weight[:6] = 1.0
    confident = ops.linear_cross_entropy(torch.full((6, H), 500.0, device=device), weight, target)
    assert float(confident.entropy) == pytest.approx(math.log(6), abs=1e-3)
    assert torch.isfinite(confident.loss)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("terms", [TERMS[0], TERMS[-1]], ids=["plain", "all"])
def test_a_second_backward_is_right(device: str, terms: dict[str, float]) -> None:
    """The last backward hands out the saved gradients themselves, scaled in place; those before it must not."""
    hidden, weight, target = problem(9, 41, 8, device)
    hidden.requires_grad_()
    weight.requires_grad_()
    loss = ops.linear_cross_entropy(hidden, weight, target, **terms).loss
    loss.backward(torch.tensor(3.0, device=device), retain_graph=True)
    first = hidden.grad.clone(), weight.grad.clone()
    hidden.grad.zero_()
    weight.grad.fill_(7.0)  # were it the saved tensor, the next backward would show it
    again = torch.autograd.grad(loss * 3, (hidden, weight), retain_graph=True)
    loss.backward(torch.tensor(3.0, device=device))
    for grads in (again, (hidden.grad, weight.grad - 7.0)):
        for got, expected in zip(grads, first, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_accumulate(device: str) -> None:
    hidden, weight, target = problem(12, 41, 8, device)
    weight.requires_grad_()
    for half in (slice(0, 6), slice(6, 12)):
        (ops.linear_cross_entropy(hidden[half], weight, target[half]).loss / 2).backward()
    _, _, whole = gradients(ops.linear_cross_entropy_ref, hidden, weight, target)
    torch.testing.assert_close(weight.grad, whole)


@pytest.mark.parametrize("device", DEVICES)
def test_only_what_is_asked_for(device: str) -> None:
    hidden, weight, target = problem(7, 41, 8, device)
    frozen = weight.clone().requires_grad_()
    ops.linear_cross_entropy(hidden, frozen, target).loss.backward()
    leaf = hidden.clone().requires_grad_()
    ops.linear_cross_entropy(leaf, weight, target).loss.backward()
    _, ref_hidden, ref_weight = gradients(ops.linear_cross_entropy_ref, hidden, weight, target)
    torch.testing.assert_close(frozen.grad, ref_weight)
    torch.testing.assert_close(leaf.grad, ref_hidden)
    with torch.no_grad():
        out = ops.linear_cross_entropy(leaf, frozen, target)
    assert not out.loss.requires_grad
    torch.testing.assert_close(out.loss, ops.linear_cross_entropy_ref(hidden, weight, target).loss)


def test_there_is_no_second_derivative() -> None:
    hidden, weight, target = problem(7, 41, 8, "cpu")
    hidden.requires_grad_()
    loss = ops.linear_cross_entropy(hidden, weight, target).loss
    (gradient,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("half_weight", [False, True])
@pytest.mark.parametrize("keep", [False, True])
def test_a_loss_scale_protects_float16_gradients(device: str, half_weight: bool, keep: bool) -> None:
    """The scale reaches the gradients before they are rounded to float16, as in plain PyTorch."""
    torch.manual_seed(0)
    T, scale = 32768, 65536.0
    hidden = torch.randn(T, 64).half().to(device).requires_grad_()
    weight = (torch.randn(100, 64) * 0.02).to(device)
    weight = (weight.half() if half_weight else weight).requires_grad_()
    target = torch.randint(0, 100, (T,)).to(device)
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    torch.nn.functional.cross_entropy(exact[0] @ exact[1].t(), target).backward()

    def errors(loss: torch.Tensor) -> list[float]:
        grads = torch.autograd.grad(loss * scale, (hidden, weight), retain_graph=keep)
        assert [g.dtype for g in grads] == [hidden.dtype, weight.dtype]
        return [
            ((g.double() / scale - e.grad).norm() / e.grad.norm()).item()
            for g, e in zip(grads, exact, strict=True)
        ]

    fused = errors(ops.linear_cross_entropy(hidden, weight, target).loss)
    logits = hidden.float() @ weight.to(hidden.dtype).float().t()
    plain = errors(torch.nn.functional.cross_entropy(logits, target))
    assert all(f <= 2 * p + 1e-6 for f, p in zip(fused, plain, strict=True)), (fused, plain)


@pytest.mark.parametrize("device", DEVICES)
def test_no_graph_break(device: str) -> None:
    hidden, weight, target = problem(9, 41, 8, device)
    target[3] = -100

    def step(h: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out = ops.linear_cross_entropy(h * 2, w, target, **TERMS[-1])
        return 3 * out.loss, out.argmax

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        loss, argmax = function(h, w)
        loss.backward()
        results.append((loss, argmax, h.grad, w.grad))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=0, atol=0)


@pytest.mark.parametrize("device", DEVICES)
def test_softmax_stats(device: str) -> None:
    logits = torch.randn(6, 50257, generator=torch.Generator().manual_seed(0)).to(device) * 4
    logits[2] = 3.0  # all equal: the lowest index wins
    logits[3, [7, 100]] = 50.0
    target = torch.tensor([0, 50256, -100, 7, 5, 5], device=device)
    got, exact = ops.softmax_stats(logits, target), ops.softmax_stats_ref(logits, target)
    assert got.argmax.tolist() == exact.argmax.tolist()
    assert got.argmax[2] == 0 and got.argmax[3] == 7
    for name in ("lse", "target_logit", "mean_logit", "expected_logit"):
        torch.testing.assert_close(getattr(got, name), getattr(exact, name), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("V", "columns", "scale", "shift"), [(50257, 50304, 4.0, 0.0), (67, 128, 1e-3, 5.0), (1, 4, 1.0, 0.0)]
)
def test_predicted_rows(device: str, V: int, columns: int, scale: float, shift: float) -> None:
    """Against float64, no further from it than twice plain PyTorch in float32 (and two roundings)."""
    generator = torch.Generator().manual_seed(V)
    logits = scale * torch.randn(70, columns, generator=generator) + shift  # three slices of rows on a CPU
    logits[2, :V] = 3.0  # all equal: the lowest index wins
    logits[3, V // 2] = logits[3, V - 1] = 60.0
    logits[4, : V - 1] = -250.0  # exp is 0
    target = torch.randint(0, V, (70,), generator=generator)
    target[::9] = -100
    logits, target = logits.to(device), target.to(device)
    exact = ops.predicted_rows_ref(logits.double(), V, target)
    plain = ops.predicted_rows_ref(logits, V, target)
    got = ops.predicted_rows_(logits.clone(), V, target)
    assert torch.equal(got.argmax, exact.argmax) and got.argmax[2] == 0
    for name, value in got._asdict().items():
        reference = getattr(exact, name).double()
        error = (value.double() - reference).abs().max().item()
        allowed = (getattr(plain, name).double() - reference).abs().max().item()
        rounding = torch.finfo(torch.float32).eps * reference.abs().max().item()
        assert error <= 2 * allowed + 2 * rounding, (name, error, allowed)


def test_predicted_rows_do_not_depend_on_threads() -> None:
    logits = torch.randn(100, 4096, generator=torch.Generator().manual_seed(0))
    target = torch.arange(100)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        results.append(ops.predicted_rows_(logits.clone(), 4000, target))
    torch.set_num_threads(before)
    for one, three in zip(*results, strict=True):
        assert torch.equal(one, three)


def test_predicted_rows_refuse_what_they_cannot_read() -> None:
    logits, target = torch.zeros(2, 8), torch.zeros(2, dtype=torch.int64)
    assert ops.predicted_rows_(logits[:0], 8, target[:0]).mass.tolist() == [0.0] * 8
    with pytest.raises(ValueError, match="one a row of logits"):
        ops.predicted_rows_(logits, 8, target[:1])
    with pytest.raises(RuntimeError, match="V must be between 1 and 8; got 9"):
        ops.predicted_rows_(logits, 9, target)
    with pytest.raises(RuntimeError, match="target must be below V = 8"):
        ops.predicted_rows_(logits, 8, target + 8)
    with pytest.raises(RuntimeError, match="logits must be contiguous"):
        ops.predicted_rows_(torch.zeros(8, 2).t(), 8, target)


@pytest.mark.parametrize("device", DEVICES)
def test_logits_of_a_buffer(device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(5, 16, generator=generator), torch.randn(67, 16, generator=generator)
    hidden, head = hidden.to(device), head.to(device)
    buffer = ops.logits_buffer(9, 67, dtype=hidden.dtype, device=hidden.device)
    assert buffer.shape == (9, 128) and buffer.is_contiguous()
    logits = ops.logits_in(buffer, hidden, head)
    assert logits.shape == (5, 67) and logits.data_ptr() == buffer.data_ptr()
    torch.testing.assert_close(logits, hidden @ head.t(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_nan_stays_visible(device: str) -> None:
    hidden, weight, target = problem(4, 19, 8, device)
    hidden[1, 2] = float("nan")
    assert torch.isnan(ops.linear_cross_entropy(hidden, weight, target).loss)


@pytest.mark.gpu
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("terms", TERMS, ids=lambda t: "+".join(t) or "plain")
@pytest.mark.parametrize(("T", "V", "H"), BF16_SHAPES)
def test_bf16_hidden(T: int, V: int, H: int, terms: dict[str, float], weight_dtype: torch.dtype) -> None:
    """Within twice the error of plain PyTorch in bfloat16, one chunk and several."""
    hidden, weight, target = problem(T, V, H, "cuda", scale=2 * H**-0.5)
    target[1::5] = -100
    hidden, weight = hidden.bfloat16(), weight.to(weight_dtype)

    def run(function, h_dtype, w_dtype, **extra):  # type: ignore[no-untyped-def]
        h, w = hidden.to(h_dtype).requires_grad_(), weight.to(w_dtype, copy=True).requires_grad_()
        out = function(h, w, target, **terms, **extra)
        out.loss.backward()
        return out, h.grad, w.grad

    rounded = weight.bfloat16().to(weight_dtype)
    if "output_l2" not in terms:
        weight = rounded  # the products see it so, and only the penalty the weight itself
    ref, *exact = run(ops.linear_cross_entropy_ref, torch.float64, torch.float64)
    plain_out, *plain = run(ops.linear_cross_entropy_ref, torch.bfloat16, weight_dtype)
    for extra in ({}, {"chunk_bytes": 2 * (V + 63) * max(1, T // 3)}):
        out, *got = run(ops.linear_cross_entropy, torch.bfloat16, weight_dtype, **extra)
        limit = 2 * (plain_out.loss.double() - ref.loss).abs() + 1e-3
        assert (out.loss.double() - ref.loss).abs() <= limit
        assert got[0].dtype == torch.bfloat16 and got[1].dtype == weight_dtype
        for a, b, c in zip(got, plain, exact, strict=True):
            assert (a.double() - c).norm() <= 2 * (b.double() - c).norm() + 1e-4 * c.norm()


@pytest.mark.gpu
def test_equal_inputs_give_equal_bits() -> None:
    hidden, weight, target = problem(300, 50257, 64, "cuda")
    runs = [
        gradients(ops.linear_cross_entropy, hidden, weight, target, torch.bfloat16, **TERMS[-1])
        for _ in range(2)
    ]
    for a, b in zip(runs[0][0], runs[1][0], strict=True):
        assert torch.equal(a, b)
    assert torch.equal(runs[0][1], runs[1][1]) and torch.equal(runs[0][2], runs[1][2])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_a_graph(dtype: torch.dtype) -> None:
    """Captured whole, with no wait for the device; the scale of the loss is read at replay."""
    hidden, weight, target = problem(40, 5003, 32, "cuda")
    hidden, weight = hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
    scale = torch.ones((), device="cuda")

    def step() -> torch.Tensor:
        hidden.grad = weight.grad = None
        loss = ops.linear_cross_entropy(hidden, weight, target, label_smoothing=0.1).loss
        (loss * scale).backward()
        return loss

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    captured = hidden.grad, weight.grad
    for value in (1.0, 0.5):
        scale.fill_(value)
        target.copy_(target.roll(1))
        graph.replay()
        got = [loss.clone(), *(t.clone() for t in captured)]
        expected = step()
        for a, b in zip(got, (expected, hidden.grad, weight.grad), strict=True):
            assert torch.equal(a, b)


@pytest.mark.gpu
def test_a_target_beyond_the_vocabulary_shows() -> None:
    hidden, weight, target = problem(4, 5003, 8, "cuda")
    target[2] = 5003
    out, grad_hidden, _ = gradients(ops.linear_cross_entropy, hidden, weight, target)
    assert torch.isnan(out.loss)
    assert torch.isnan(grad_hidden[2]).all() and torch.isfinite(grad_hidden[[0, 1, 3]]).all()


def test_bad_arguments() -> None:
    hidden, weight, target = problem(4, 19, 8, "cpu")
    with pytest.raises(ValueError, match="label_smoothing must be in"):
        ops.linear_cross_entropy(hidden, weight, target, label_smoothing=1.0)
    with pytest.raises(ValueError, match="weight must have H = 8 columns"):
        ops.linear_cross_entropy(hidden, weight[:, :7], target)
    with pytest.raises(TypeError, match="target must be of dtype int64"):
        ops.linear_cross_entropy(hidden, weight, target.int())
    with pytest.raises(ValueError, match="logit_softcap must be positive"):
        ops.linear_cross_entropy(hidden, weight, target, logit_softcap=0.0)
    with pytest.raises(ValueError, match="ignore_index must be negative"):
        ops.linear_cross_entropy(hidden, weight, target, ignore_index=0)
    with pytest.raises(RuntimeError, match="target"):
        ops.linear_cross_entropy(hidden, weight, target + 19)
