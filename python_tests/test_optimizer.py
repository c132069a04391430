"""The fused update against torch.optim, and the two meanings of weight decay."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from bitnet_ext import ops
from bitnet_ext.models import BitNetForCausalLM, preset
from bitnet_ext.training import FusedAdam, TrainConfig

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_equals_torch_optim(device: str, decoupled: bool, decay: float) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(3,), (17, 5), (1,), (300, 129), (1, 40001)]
    start = [torch.randn(s, generator=generator).to(device) for s in shapes]
    exact = [p.double().requires_grad_() for p in start]
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    optimizer = kind(exact, lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=decay)
    params = [p.clone() for p in start]
    moments = [torch.zeros_like(p) for p in params], [torch.zeros_like(p) for p in params]
    for step in range(1, 6):
        grads = [torch.randn(s, generator=generator).to(device) for s in shapes]
        for p, g in zip(exact, grads, strict=True):
            p.grad = g.double() * 0.5
        optimizer.step()
        hyper = torch.tensor([1e-2, decay, 1 - 0.9**step, 1 - 0.95**step], device=device)
        half = torch.tensor(0.5, device=device)
        ops.adam_step_(params, grads, *moments, hyper, half, decoupled=decoupled)
    for p, q in zip(params, exact, strict=True):
        torch.testing.assert_close(p.double(), q.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
def test_reference_twin(device: str) -> None:
    p, g = torch.randn(1000, device=device), torch.randn(1000, device=device)
    m, v = torch.rand(1000, device=device) * 0.1, torch.rand(1000, device=device) * 0.1
    expected = ops.adam_step_ref(
        p, g, m, v, lr=1e-3, weight_decay=0.1, step=3, grad_scale=0.7, decoupled=False
    )
    hyper = torch.tensor([1e-3, 0.1, 1 - 0.9**3, 1 - 0.95**3], device=device)
    ops.adam_step_([p], [g], [m], [v], hyper, torch.tensor(0.7, device=device), decoupled=False)
    for got, want in zip((p, m, v), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)


def test_what_decay_does_to_a_weight_without_gradient() -> None:
    """Coupled L2 moves it by -lr sign(w) whatever the decay; decoupled by -lr wd w (arXiv 1711.05101)."""
    for decay in (0.1, 0.01):
        for decoupled in (False, True):
            p = torch.tensor([0.5, -0.02, 3.0])
            m, v = torch.zeros(3), torch.zeros(3)
            before = p.clone()
            hyper = torch.tensor([1e-3, decay, 1 - 0.9, 1 - 0.95])
            ops.adam_step_([p], [torch.zeros(3)], [m], [v], hyper, torch.ones(()), decoupled=decoupled)
            moved = -1e-3 * decay * before if decoupled else -1e-3 * before.sign()
            torch.testing.assert_close(p - before, moved, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("device", DEVICES)
def test_sum_of_squares(device: str) -> None:
    tensors = [torch.randn(n, device=device) for n in (1, 7, 70001)]
    got = ops.sum_of_squares(tensors)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, ops.sum_of_squares_ref(tensors), rtol=1e-12, atol=0)
    assert torch.equal(got, ops.sum_of_squares(tensors))


def test_clipping_equals_torch() -> None:
    model = BitNetForCausalLM(preset("collapse-64", vocab_size=97), seed=0)
    model(torch.randint(0, 97, (2, 9))).square().sum().backward()
    optimizer = FusedAdam(model, TrainConfig(grad_clip=0.3))
    norm, scale = optimizer.grad_norm_and_scale()
    clipped = {name: p.grad * scale for name, p in model.named_parameters()}
    expected = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.3)
    torch.testing.assert_close(norm, expected)
    for name, p in model.named_parameters():
        torch.testing.assert_close(clipped[name], p.grad)


@pytest.mark.parametrize(
    ("settings", "decayed"),
    [
        ({}, {"embed_tokens.weight", "lm_head.weight", "layers.0.attention.q_proj.weight"}),
        ({"decay_embeddings": False}, {"layers.0.attention.q_proj.weight"}),
        (
            {"decay_norms": True, "decay_embeddings": False},
            {"layers.0.attention.q_proj.weight", "final_norm.weight"},
        ),
    ],
)
def test_decay_groups(settings: dict[str, bool], decayed: set[str]) -> None:
    """With a zero gradient only decayed parameters move."""
    model = BitNetForCausalLM(preset("collapse-64", vocab_size=97), seed=0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer = FusedAdam(model, TrainConfig(**settings))
    optimizer.step(torch.tensor([1e-2, 0.1, 0.1, 0.05]), torch.ones(()))
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    for name in (
        "embed_tokens.weight",
        "lm_head.weight",
        "layers.0.attention.q_proj.weight",
        "final_norm.weight",
    ):
        assert (name in moved) == (name in decayed), name


def test_bad_arguments() -> None:
    p, hyper, one = torch.ones(3), torch.ones(4), torch.ones(())
    with pytest.raises(ValueError, match="grads must have as many tensors"):
        ops.adam_step_([p], [p, p], [p], [p], hyper, one, decoupled=True)
    with pytest.raises(ValueError, match=r"grads\[0\] must have the shape"):
        ops.adam_step_([p], [torch.ones(4)], [p.clone()], [p.clone()], hyper, one, decoupled=True)
    with pytest.raises(ValueError, match="hyper must have shape"):
        ops.adam_step_([p], [p.clone()], [p.clone()], [p.clone()], torch.ones(3), one, decoupled=True)
    with pytest.raises(TypeError, match=r"params\[0\] must be of dtype float32"):
        ops.adam_step_([p.half()], [p], [p], [p], hyper, one, decoupled=True)
    with pytest.raises(ValueError, match="at least one tensor"):
        ops.sum_of_squares([])
    with pytest.raises(ValueError, match="must be float32"):
        FusedAdam(torch.nn.Linear(2, 2).half(), TrainConfig())


def _tensors(shapes: list[tuple[int, ...]], device: str, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(device) for shape in shapes]


def _hyper(device: str) -> torch.Tensor:
    return torch.tensor([1e-2, 0.1, 1 - 0.9**3, 1 - 0.95**3], device=device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("decoupled", [False, True])
def test_decay_by_tensor_equals_two_calls(device: str, decoupled: bool) -> None:
    """100 tensors: more than one table on CUDA."""
    shapes = [(i % 7 + 1, 3 * i + 1) for i in range(100)]
    decay = [i % 3 != 0 for i in range(100)]
    scale = torch.tensor(0.7, device=device)
    results = []
    for together in (True, False):
        p, g, m, v = (_tensors(shapes, device, seed) for seed in range(4))
        v = [t.abs() for t in v]
        parts = (
            [list(range(100))]
            if together
            else [[i for i in range(100) if decay[i] == d] for d in (True, False)]
        )
        for part in parts:
            lists = [[t[i] for i in part] for t in (p, g, m, v)]
            ops.adam_step_(*lists, _hyper(device), scale, decoupled=decoupled, decay=[decay[i] for i in part])
        results.append(p + m + v)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


#: Small, odd, exactly a partial sum, just beyond it; the last two only on CUDA (over 4 M elements).
TERNARY_SHAPES = [(3, 5), (16, 129), (64, 64), (33, 257), (256, 512), (1537, 4096), (2560, 2561)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("skipped", [False, True])
def test_sums_of_magnitudes_give_the_scale_of_the_new_weight(device: str, skipped: bool) -> None:
    shapes = TERNARY_SHAPES if device == "cuda" else TERNARY_SHAPES[:5]
    shapes = [shape for ternary in shapes for shape in (ternary, (17,))]  # others in between
    ternary = [len(shape) == 2 for shape in shapes]
    p, g, m, v = (_tensors(shapes, device, seed) for seed in range(4))
    v = [t.abs() for t in v]
    flat = torch.randn(32 * 70 + 1, generator=torch.Generator().manual_seed(9)).to(device)
    p.append(flat[1:].view(32, 70))  # not 16-byte aligned
    for t in (g, m, v):
        t.append(torch.ones(32, 70, device=device))
    ternary.append(True)
    before = [t.clone() for t in p + m + v]
    weights = [t for t, is_ternary in zip(p, ternary, strict=True) if is_ternary]
    sums = ops.abs_sums_like(weights)
    scale = torch.tensor(float("nan") if skipped else 0.7, device=device)
    ops.adam_step_(p, g, m, v, _hyper(device), scale, decoupled=True, ternary=ternary, abs_sums=sums)
    assert all(torch.equal(a, b) == skipped for a, b in zip(before, p + m + v, strict=True))
    targets = [ops.quantize_weights([torch.zeros_like(w)]) for w in weights]
    ops.quantize_weight_groups_([[w] for w in weights], targets, sums)
    for w, target in zip(weights, targets, strict=True):
        expected = ops.quantize_weights([w])
        assert torch.equal(target.weight_scale, ops.quantize_weight_ternary(w)[1].reshape(1))
        assert torch.equal(target.packed, expected.packed)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("count", [1, 55, 1200])
@pytest.mark.parametrize("max_norm", [None, 0.5, 1e9])
def test_clip_gradients(device: str, count: int, max_norm: float | None) -> None:
    """1,200 tensors: more than one table of either kernel."""
    grads = _tensors([(i % 5 + 1, i + 1) for i in range(count)], device, 0)
    if device == "cuda":
        grads.append(torch.randn(5_000_001, device=device))  # more than 4,096 elements a partial sum
    step = torch.tensor([7], device=device)
    latch = torch.zeros(2 + len(grads), dtype=torch.float64, device=device)
    latch[0] = -1
    norm, scale = ops.clip_gradients_(grads, step, max_norm, latch)
    want_norm, want_scale, _ = ops.clip_gradients_ref(grads, step, max_norm, latch)
    torch.testing.assert_close(norm, want_norm, rtol=1e-7, atol=0)
    torch.testing.assert_close(scale, want_scale, rtol=3e-7, atol=0)
    assert float(latch[0]) == -1.0
    again = ops.clip_gradients_(grads, step, max_norm, latch)
    assert torch.equal(norm, again[0]) and torch.equal(scale, again[1])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_the_latch_keeps_the_first_bad_step(device: str, bad: float) -> None:
    grads = _tensors([(3,), (70, 100), (1,)], device, 0)
    step = torch.zeros(1, dtype=torch.int64, device=device)
    latch = torch.tensor([-1.0, 0, 0, 0, 0], dtype=torch.float64, device=device)

    def clip() -> float:
        scale = float(ops.clip_gradients_(grads, step, 1.0, latch)[1])
        step.add_(1)
        return scale

    assert clip() < 1
    good = grads[1][69, 99].item()
    grads[1][69, 99] = bad
    assert math.isnan(clip())  # step 1
    first = latch.clone()
    assert latch[0] == 1 and torch.isfinite(latch).tolist() == [True, True, True, False, True]
    grads[1][69, 99] = good
    grads[0][0] = bad
    assert math.isnan(clip())  # a later one does not replace it
    grads[0][0] = 1.0
    assert math.isnan(clip())  # nor does a good one
    torch.testing.assert_close(latch, first, equal_nan=True, rtol=0, atol=0)
    latch[0] = -1
    assert clip() < 1


def test_bad_arguments_of_the_new_operators() -> None:
    p, hyper, one = torch.ones(3, 4), torch.ones(4), torch.ones(())
    step = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="latch must have shape"):
        ops.clip_gradients_([p], step, 1.0, torch.zeros(2, dtype=torch.float64))
    with pytest.raises(ValueError, match="max_norm must be > 0 or None, got 0"):
        ops.clip_gradients_([p], step, 0, torch.zeros(3, dtype=torch.float64))
    with pytest.raises(TypeError, match="step must be of dtype int64"):
        ops.clip_gradients_([p], step.int(), 1.0, torch.zeros(3, dtype=torch.float64))
    lists = [[p.clone()] for _ in range(4)]
    with pytest.raises(RuntimeError, match="decay must have one entry for each of params, 1; got 2"):
        ops.adam_step_(*lists, hyper, one, decoupled=True, decay=[True, False])
    with pytest.raises(RuntimeError, match="abs_sums must be given with ternary params"):
        ops.adam_step_(*lists, hyper, one, decoupled=True, ternary=[True])
    with pytest.raises(RuntimeError, match=r"abs_sums must have shape \[1\]; got \[2\]"):
        sums = torch.zeros(2, dtype=torch.float64)
        ops.adam_step_(*lists, hyper, one, decoupled=True, ternary=[True], abs_sums=sums)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("T", "H", "V"), [(1, 1, 1), (5, 7, 3), (128, 256, 50257), (300, 515, 40), (0, 4, 9)]
)
def test_sum_rows(device: str, T: int, H: int, V: int) -> None:
    generator = torch.Generator().manual_seed(T)
    ids = torch.randint(0, V, (T,), generator=generator).to(device)
    rows = torch.randn(T, H, generator=generator).to(device)
    slots = ops.row_slots(ids, V)
    sums = ops.sum_rows(ids, rows, slots)
    if T:
        torch.testing.assert_close(
            sums.double(), ops.sum_rows_ref(ids, rows.double(), slots), rtol=1e-5, atol=1e-5
        )
        assert torch.equal(slots, ops.row_slots_ref(ids, V))
        of_steps = torch.stack([ids, ids.flip(0), torch.zeros_like(ids)])
        assert torch.equal(ops.row_slots(of_steps, V), ops.row_slots_ref(of_steps, V))
    else:
        assert (slots == -1).all()
    assert torch.equal(sums, ops.sum_rows(ids, rows, slots))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("T", "H", "V"), [(1, 1, 1), (5, 7, 33), (128, 256, 5003), (300, 514, 40)])
@pytest.mark.parametrize("decoupled", [False, True])
def test_a_gradient_by_rows_equals_a_dense_one(device: str, T: int, H: int, V: int, decoupled: bool) -> None:
    generator = torch.Generator().manual_seed(T)
    ids = torch.randint(0, V, (T,), generator=generator).to(device)
    rows = torch.randn(T, H, generator=generator).to(device)
    slots = ops.row_slots(ids, V)
    sums = ops.sum_rows(ids, rows, slots)
    dense = torch.where((slots < 0)[:, None], 0.0, sums[slots.long()])
    other, scale = torch.randn(3, 5, device=device), torch.tensor(0.7, device=device)
    results = []
    for grad in (dense, sums):
        p, m, v = (_tensors([(3, 5), (V, H)], device, seed) for seed in range(3))
        v = [t.abs() for t in v]
        by_rows = {"slots": slots, "row_param": 1} if grad is sums else {}
        ops.adam_step_(p, [other, grad], m, v, _hyper(device), scale, decoupled=decoupled, **by_rows)
        results.append(p + m + v)
    assert all(map(torch.equal, *results))


def test_bad_arguments_of_rows() -> None:
    ids, rows = torch.tensor([1, 5]), torch.ones(2, 3)
    with pytest.raises(RuntimeError, match=r"ids must be in 0\.\.4; got 5"):
        ops.row_slots(ids, 5)
    slots = ops.row_slots(ids, 9)
    with pytest.raises(ValueError, match="rows must have shape"):
        ops.sum_rows(ids, torch.ones(3, 3), slots)
    with pytest.raises(RuntimeError, match="token 0 has no place"):
        ops.sum_rows(torch.tensor([2, 5]), rows, slots)
    sums = ops.sum_rows(ids, rows, slots)
    hyper, one = torch.ones(4), torch.ones(())
    for bad, match in (
        ({"slots": slots}, "row_param must be the index of one of 1 params; got -1"),
        ({"slots": slots[:5].clone(), "row_param": 0}, r"slots must have shape \[9\]; got \[5\]"),
    ):
        moments = [torch.zeros(9, 3)], [torch.zeros(9, 3)]
        with pytest.raises((RuntimeError, ValueError), match=match):
            grads = [sums if "row_param" in bad else torch.zeros(9, 3)]
            ops.adam_step_([torch.ones(9, 3)], grads, *moments, hyper, one, decoupled=True, **bad)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("num_blocks", [1, 3, 1000])
@pytest.mark.parametrize("sizes", [((64, 64),), ((3, 5), (5003, 8), (17,), (4097,))])
@pytest.mark.parametrize("scale", [0.7, math.nan])
def test_an_update_beside_equals_a_full_one(
    device: str, num_blocks: int, sizes: tuple[tuple[int, ...], ...], scale: float
) -> None:
    results = []
    for blocks in (0, num_blocks):
        lists = [_tensors(list(sizes), device, seed) for seed in range(4)]
        lists[3] = [t.abs() for t in lists[3]]
        decay = [i % 2 == 0 for i in range(len(sizes))]
        factor = torch.tensor(scale, device=device)
        ops.adam_step_(*lists, _hyper(device), factor, decoupled=False, decay=decay, num_blocks=blocks)
        results.append(lists[0] + lists[2] + lists[3])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("T", "H", "V"), [(5, 8, 33), (40, 256, 1003), (70, 514, 41), (9, 132, 50), (3, 1, 7)]
)
@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize(("steps", "stop"), [(1, None), (1, 0), (6, None), (6, 3), (16, None)])
def test_rows_that_wait_for_updates_equal_one_step_after_the_other(
    device: str, T: int, H: int, V: int, decoupled: bool, steps: int, stop: int | None
) -> None:
    """Before each step the rows of its tokens are current, behind the last all. `stop`: the first NaN."""
    generator = torch.Generator().manual_seed(T)
    ids = torch.randint(0, V, (steps, T), generator=generator)
    ids[1::2, : T // 2] = ids[0 : steps - 1 : 2, : T // 2][: len(ids[1::2])]  # of two steps in a row
    ids = ids.to(device)
    slots = ops.row_slots(ids, V)
    grads = [
        ops.sum_rows(i, torch.randn(T, H, generator=generator).to(device), s)
        for i, s in zip(ids, slots, strict=True)
    ]
    numbers = torch.arange(1, steps + 1)
    hyper = torch.stack(
        [1e-2 / numbers, numbers * 0 + 0.1, 1 - 0.9**numbers, 1 - 0.95**numbers, numbers * 0 + 9.0], 1
    ).to(device)
    scales = [torch.tensor(0.7 + 0.01 * s, device=device) for s in range(steps)]
    for s in range(steps if stop is None else stop, steps):
        scales[s].fill_(math.nan)

    def start() -> list[torch.Tensor]:
        p, m, v = (_tensors([(V, H)], device, seed)[0] for seed in range(3))
        m[::3], v[::3] = 0.0, 0.0  # rows that no step has been at
        return [p, m, v.abs()]

    expected, state = start(), start()
    for s in range(steps):
        p, m, v = expected
        by_rows = {"slots": slots[s], "row_param": 0}
        rows = ids[s]
        assert all(torch.equal(a[rows], b[rows]) for a, b in zip(expected, state, strict=True)), s
        ops.adam_step_(
            [p], [grads[s]], [m], [v], hyper[s, :4], scales[s], decoupled=decoupled, decay=T > 3, **by_rows
        )
        pending = (grads[: s + 1], slots, hyper, scales[: s + 1])
        if s + 1 < steps:
            ops.adam_rows_(*state, *pending, ids[s + 1], decoupled=decoupled, decay=T > 3)
    before = [t.clone() for t in state]
    for num_blocks in (0, 1, 7):
        state = [t.clone() for t in before]
        ops.adam_rows_(*state, *pending, decoupled=decoupled, decay=T > 3, num_blocks=num_blocks)
        assert all(map(torch.equal, expected, state)), num_blocks


@pytest.mark.gpu
@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("step", [1, 3, 1000])
def test_each_result_is_rounded_as_written(decoupled: bool, step: int) -> None:
    """The short ways to root and quotient give what PyTorch's own correctly rounded ones give, wherever a result
    is larger than what is left of it in fp32; the products and sums around them are exact in fp64."""

    def fma(a: torch.Tensor | float, b: torch.Tensor | float, c: torch.Tensor | float) -> torch.Tensor:
        return (a * b + c).float().double()  # all of them fp32 values, but in fp64

    def single(x: float) -> float:
        return float(torch.tensor(x, dtype=torch.float32))

    generator = torch.Generator().manual_seed(step)
    n = 1 << 22
    magnitude = torch.rand(n, generator=generator) * 60 - 40  # powers of two
    p, g, m = (torch.randn(n, generator=generator).cuda() for _ in range(3))
    g = g * torch.exp2(magnitude.cuda())
    m = m * torch.exp2(magnitude.cuda() / 2)
    v = torch.exp2(2 * magnitude.cuda()) * torch.rand(n, generator=generator).cuda()
    m[::64], v[::64], g[::64] = 0.0, 0.0, 0.0
    beta1, beta2, eps, lr, wd = 0.9, 0.95, 1e-8, 1e-3, 0.1
    hyper = torch.tensor([lr, wd, 1 - beta1**step, 1 - beta2**step], device="cuda")
    scale = torch.tensor(0.37, device="cuda")
    lr32, wd32, bc1, bc2 = hyper.double().tolist()
    grad = fma(g.double(), float(scale), 0.0 if decoupled else fma(wd32, p.double(), 0.0))
    new_m = fma(single(beta1), m.double(), fma(single(1 - beta1), grad, 0.0))
    new_v = fma(single(beta2), v.double(), fma(single(1 - beta2), fma(grad, grad, 0.0), 0.0))
    correction = torch.tensor(bc2, device="cuda").float().sqrt()
    root = new_v.float().sqrt() / correction
    ratio = new_m.float() / (root + torch.tensor(eps, device="cuda"))
    moved = fma(single(lr32 / bc1), ratio.double(), 0.0)
    keep = single(1 - lr32 * wd32) if decoupled else 1.0
    expected = fma(p.double(), keep, -moved).float()
    lists = [[p], [g], [m], [v]]
    ops.adam_step_(*lists, hyper, scale, beta1=beta1, beta2=beta2, eps=eps, decoupled=decoupled)
    # A sum is rounded twice on its way through fp64, which shows once in 2^29 sums.
    for got, want in ((m, new_m.float()), (v, new_v.float()), (p, expected)):
        assert (got != want).sum() <= 2, (got != want).sum()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bad", [False, True])
def test_known_partial_sums_change_no_bit(device: str, bad: bool) -> None:
    grads = _tensors([(3,), (70, 1001), (5000, 17), (1,)], device, 0)
    if bad:
        grads[1][69, 99] = math.inf
    step = torch.tensor([7], device=device)
    results = []
    for known in (None, *((i, ops.square_partials(grads[i])) for i in range(4))):
        latch = torch.tensor([-1.0, *[0.0] * 5], dtype=torch.float64, device=device)
        given = list(grads)
        if known is not None:
            given[known[0]] = torch.full_like(given[known[0]], math.nan)  # is not read
        results.append((*ops.clip_gradients_(given, step, 0.5, latch, known=known), latch))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def test_bad_arguments_of_an_update_beside() -> None:
    hyper, one = torch.ones(4), torch.ones(())
    lists = [[torch.ones(9, 4)] for _ in range(4)]
    slots = ops.row_slots(torch.tensor([1, 5]), 9)
    with pytest.raises(RuntimeError, match="num_blocks must be >= 0; got -1"):
        ops.adam_step_(*lists, hyper, one, decoupled=True, num_blocks=-1)
    with pytest.raises(RuntimeError, match="num_blocks must be 0 with slots; got 1"):
        ops.adam_step_(*lists, hyper, one, decoupled=True, slots=slots, row_param=0, num_blocks=1)
    with pytest.raises(RuntimeError, match="num_blocks must be 0 with ternary params"):
        sums = ops.abs_sums_like(lists[0])
        ops.adam_step_(*lists, hyper, one, decoupled=True, ternary=[True], abs_sums=sums, num_blocks=1)
    with pytest.raises(RuntimeError, match="known_index must be the index of one of 1 grads"):
        latch = torch.zeros(3, dtype=torch.float64)
        partials = ops.square_partials(lists[0][0])
        ops.clip_gradients_(lists[0], torch.zeros(1, dtype=torch.int64), 1.0, latch, known=(1, partials))


def test_bad_arguments_of_rows_that_wait() -> None:
    ids = torch.tensor([[1, 5], [2, 2]])
    good: dict[str, Any] = {
        "param": torch.ones(9, 4),
        "exp_avg": torch.zeros(9, 4),
        "exp_avg_sq": torch.zeros(9, 4),
        "grads": [torch.ones(2, 4)],
        "slots": ops.row_slots(ids, 9),
        "hyper": torch.ones(2, 5),
        "grad_scales": [torch.ones(())],
        "ids": ids[1],
    }
    ops.adam_rows_(**good, decoupled=True)
    slots = good["slots"]
    for bad, match in (
        ({"param": torch.ones(9)}, "param must have"),
        ({"exp_avg": torch.ones(8, 4)}, "exp_avg"),
        ({"grads": []}, "grads must be a list of at least one tensor"),
        ({"grads": [torch.ones(2, 4)] * 17}, "grads must be those of 1 to 16 steps; got 17"),
        ({"grads": [torch.ones(2, 3)]}, r"each of grads must have shape \[T, 4\]; got \[2, 3\]"),
        ({"slots": slots[0]}, "slots must have"),
        ({"slots": slots[:1]}, r"slots must have shape \[S, 9\] with S >= 2; got \[1, 9\]"),
        ({"slots": slots[:, :5]}, r"slots must have shape \[S, 9\] with S >= 2; got \[2, 5\]"),
        ({"hyper": torch.ones(1, 3)}, r"hyper must have shape \[S, 4 or more\] with S >= 1; got \[1, 3\]"),
        ({"grad_scales": [torch.ones(())] * 2}, "grad_scales must be one for each of 1 grads; got 2"),
        ({"ids": ids}, "ids must have"),
        ({"ids": None, "num_blocks": -1}, "num_blocks must be >= 0; got -1"),
    ):
        with pytest.raises((RuntimeError, ValueError), match=match):
            ops.adam_rows_(**{**good, **bad}, decoupled=True)


@pytest.mark.parametrize("slot", [2, 2_000_000_000])
@pytest.mark.parametrize("which", ["step", "rows", "rows of ids"])
def test_slots_beyond_the_rows_are_refused(which: str, slot: int) -> None:
    V, H, T = 8, 16, 2
    tensors = [torch.randn(V, H), torch.randn(V, H), torch.rand(V, H)]
    before = [t.clone() for t in tensors]
    slots = torch.full((2, V), -1, dtype=torch.int32)
    slots[0, 3] = slot
    hyper, one, rows = torch.tensor([1.0, 0.0, 0.1, 0.05]), torch.tensor(1.0), torch.ones(T, H)
    ids = None
    if which == "rows of ids":
        ids = torch.tensor([1, 3])
        slots[1, 1], slots[1, 3] = 0, 1
    with pytest.raises(
        RuntimeError, match=rf"slots must be below the 2 rows of grads\[0\]; got {slot} for row 3"
    ):
        if which == "step":
            p, m, v = ([t] for t in tensors)
            ops.adam_step_(p, [rows], m, v, hyper, one, decoupled=True, slots=slots[0], row_param=0)
        else:
            ops.adam_rows_(*tensors, [rows], slots, hyper[None], [one], ids, decoupled=True)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("H", [16, 6])
@pytest.mark.parametrize("which", ["step", "rows", "rows of ids"])
def test_slots_beyond_the_rows_show_as_nan_on_cuda(which: str, H: int) -> None:
    V, T = 8, 2
    tensors = [t.cuda() for t in (torch.randn(V, H), torch.randn(V, H), torch.rand(V, H))]
    slots = torch.full((2, V), -1, dtype=torch.int32)
    slots[0, 3], slots[0, 4] = 2_000_000_000, 1
    hyper, one, rows = (
        torch.tensor([1.0, 0.0, 0.1, 0.05]).cuda(),
        torch.tensor(1.0).cuda(),
        torch.ones(T, H).cuda(),
    )
    ids = None
    if which == "rows of ids":
        ids = torch.tensor([4, 3]).cuda()
        slots[1, 4], slots[1, 3] = 0, 1
    slots = slots.cuda()
    if which == "step":
        p, m, v = ([t] for t in tensors)
        ops.adam_step_(p, [rows], m, v, hyper, one, decoupled=True, slots=slots[0].contiguous(), row_param=0)
    else:
        ops.adam_rows_(*tensors, [rows], slots, hyper[None], [one], ids, decoupled=True)
    for t in tensors:
        assert t[3].isnan().all() and t[[0, 1, 2, 4, 5, 6, 7]].isfinite().all()
