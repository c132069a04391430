"""Two norms one behind the other in front of a ternary layer: the bits of the operators one by one, both ways."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from bitnet_ext import ops
from bitnet_ext.models import BitNetForCausalLM, preset

raw = torch.ops.bitnet_ext
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
#: Of x and of what is added to it.
DTYPES = [
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
]
EPS = (1e-5, 1e-6)  # of the first norm and of the last
#: What one launch takes on CUDA: short rows, one and two chunks a lane, both sides of each limit.
PAIR_SHAPES = [(1, 8), (3, 96), (4, 40), (124, 256), (128, 256), (65, 248), (129, 264), (5, 384), (124, 512)]
PAIR_SHAPES += [(512, 64), (511, 512), (0, 64)]
#: What is two launches on CUDA.
OTHER_SHAPES = [(1, 3), (3, 100), (124, 255), (2, 520), (513, 64), (7, 768)]


def make(device: str, dtype: torch.dtype, *shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def shifted(t: Tensor) -> Tensor:
    """A contiguous copy of `t` that starts an element into its storage: aligned to nothing else."""
    view = torch.empty(t.numel() + 1, dtype=t.dtype, device=t.device)[1:].view(t.shape)
    return view.copy_(t)


def poison(tensors: Sequence[Tensor]) -> None:
    """Frees garbage of the sizes of the results to come, so that what is not written is not right by luck."""
    blocks = [torch.full((max(t.nbytes, 1),), 0xC5, dtype=torch.uint8, device=t.device) for t in tensors]
    del blocks


def assert_same(got: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Equal bits, NaN included."""
    for index, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert a.dtype == b.dtype and a.shape == b.shape, index
        first, second = (t.contiguous().view(-1).view(torch.uint8) for t in (a, b))
        assert torch.equal(first, second), f"tensor {index}: {int((first != second).sum())} bytes differ"


def operands(device: str, dtypes: tuple[torch.dtype, torch.dtype], M: int, K: int) -> dict[str, Tensor]:
    rows = torch.logspace(-2, 2, max(M, 1))[:M].unsqueeze(1)  # of very different sizes
    gain = 1.0 + 0.3 * make("cpu", torch.float32, K, seed=2)
    return {
        "x": (make("cpu", torch.float32, M, K) * rows).to(device, dtypes[0]),
        "delta": make(device, dtypes[1], M, K, seed=1),
        "first_gain": gain.to(device),
        "gain": make(device, torch.float32, K, seed=3),
        "grad": make(device, dtypes[1], M, K, seed=4),
        "residual": make(device, dtypes[0], M, K, seed=5),
        "weight": make(device, torch.float32, 16, K, seed=6),
    }


def forward_pair(t: dict[str, Tensor], has_delta: bool) -> tuple[Tensor, ...]:
    """(x_i8, act_scale, rstd, sum, first_rstd) of the one operator."""
    delta = t["delta"] if has_delta else None
    return raw.bit_linear(
        *(t["x"], delta, [t["weight"]], *ops.quantize_weights([t["weight"]]), None, t["gain"], EPS[1], True),
        *(t["first_gain"], EPS[0], torch.float32, "exact"),
    )[1:]


def forward_apart(t: dict[str, Tensor], has_delta: bool) -> tuple[Tensor, ...]:
    y, total, first_rstd = raw.rms_norm(t["x"], t["delta"] if has_delta else None, t["first_gain"], EPS[0])
    x_i8, act_scale, rstd = raw.rms_norm_quantize(y, t["gain"], EPS[1])
    return x_i8, act_scale, rstd, total if has_delta else t["x"], first_rstd


def backward_operands(t: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """(y, first_rstd, rstd) of the forward of x itself."""
    y, _, first_rstd = raw.rms_norm(t["x"], None, t["first_gain"], EPS[0])
    return y, first_rstd, raw.rms_norm_quantize(y, t["gain"], EPS[1])[2]


def backward_pair(t: dict[str, Tensor], delta_dtype: torch.dtype, has_residual: bool) -> tuple[Tensor, ...]:
    _, first_rstd, rstd = backward_operands(t)
    return raw.norm_pair_backward(
        *(t["grad"], t["x"], t["first_gain"], first_rstd, t["gain"], rstd),
        *(t["residual"] if has_residual else None, delta_dtype),
    )


def backward_apart(t: dict[str, Tensor], delta_dtype: torch.dtype, has_residual: bool) -> tuple[Tensor, ...]:
    y, first_rstd, rstd = backward_operands(t)
    grad_y, _, grad_gain = raw.rms_norm_backward(t["grad"], y, t["gain"], rstd, None, y.dtype)
    grad_x, grad_delta, grad_first_gain = raw.rms_norm_backward(
        grad_y, t["x"], t["first_gain"], first_rstd, t["residual"] if has_residual else None, delta_dtype
    )
    return grad_x, grad_delta, grad_first_gain, grad_gain


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize(("M", "K"), PAIR_SHAPES)
def test_forward_and_backward(device: str, M: int, K: int, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    t = operands(device, dtypes, M, K)
    for flag in (True, False):
        expected = forward_apart(t, flag)
        poison(expected)
        assert_same(forward_pair(t, flag), expected)
        expected = backward_apart(t, dtypes[1], flag)
        for _ in range(3):  # the flags are zero again after each
            poison(expected)
            assert_same(backward_pair(t, dtypes[1], flag), expected)


def layers_apart(
    x: Tensor, delta: Tensor | None, first_gain: Tensor, gain: Tensor, bias: Tensor, *weights: Tensor
) -> tuple[Tensor, Tensor]:
    if delta is None:
        y, total = ops.rms_norm(x, first_gain, EPS[0]), x
    else:
        y, total = ops.add_rms_norm(x, delta, first_gain, EPS[0])
    return ops.bit_linear(y, weights, bias=bias, norm_weight=gain, norm_eps=EPS[1]), total


def layers_pair(
    x: Tensor, delta: Tensor | None, first_gain: Tensor, gain: Tensor, bias: Tensor, *weights: Tensor
) -> tuple[Tensor, Tensor]:
    norms = {"norm_weight": gain, "norm_eps": EPS[1], "first_norm": (first_gain, EPS[0])}
    return ops.add_bit_linear(x, delta, weights, bias=bias, **norms)  # type: ignore[arg-type]


def gradients(
    function: Callable[..., tuple[Tensor, Tensor]], used: str, *leaves: Tensor | None
) -> list[Tensor | None]:
    """Both results and the gradients of all leaves, of the results that are used."""
    leaves = tuple(None if t is None else t.detach().clone().requires_grad_() for t in leaves)
    results = function(*leaves)
    loss = sum(
        (r.float() * make(str(r.device), torch.float32, *r.shape, seed=7 + i)).sum()
        for i, r in enumerate(results)
        if used in ("both", ("y", "sum")[i])
    )
    loss.backward()  # type: ignore[union-attr]
    return [*(r.detach() for r in results), *(None if t is None else t.grad for t in leaves)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtypes", DTYPES[:4])
@pytest.mark.parametrize("sizes", [(32,), (16, 24), (5, 16)])  # the last do not stack
@pytest.mark.parametrize(("M", "K"), [*PAIR_SHAPES[:4], *OTHER_SHAPES])
def test_layers(
    device: str, M: int, K: int, sizes: tuple[int, ...], dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    t = operands(device, dtypes, M, K)
    weights = [make(device, torch.float32, n, K, seed=n) for n in sizes]
    bias = make(device, torch.float32, sum(sizes), seed=8)
    for delta in (t["delta"], None):
        leaves = (t["x"], delta, t["first_gain"], t["gain"], bias, *weights)
        for used in ("both", "y", "sum"):
            if used == "both" and delta is None and dtypes[0] != torch.float32:
                continue  # autograd rounds the gradient of the norms before it adds the other
            got, expected = (gradients(f, used, *leaves) for f in (layers_pair, layers_apart))
            assert [a is None for a in got] == [b is None for b in expected]
            assert_same(*([a for a in r if a is not None] for r in (got, expected)))


def test_against_the_reference() -> None:
    t = operands("cpu", DTYPES[1], 6, 24)
    weights = [make("cpu", torch.float32, n, 24, seed=n) for n in (16, 7)]
    bias = make("cpu", torch.float32, 23, seed=8)
    leaves = (t["x"], t["delta"], t["first_gain"], t["gain"], bias, *weights)

    def reference(
        x: Tensor, delta: Tensor, first_gain: Tensor, gain: Tensor, bias: Tensor, *weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        norms = {"norm_weight": gain, "norm_eps": EPS[1], "first_norm": (first_gain, EPS[0])}
        return ops.add_bit_linear_ref(x, delta, weights, bias=bias, **norms)  # type: ignore[arg-type]

    got, expected = (gradients(f, "both", *leaves) for f in (layers_pair, reference))
    assert_same(got[:2], expected[:2])  # type: ignore[arg-type]
    for a, b in zip(got[2:], expected[2:], strict=True):
        assert a is not None and b is not None
        size = b.float().abs().max().item()
        torch.testing.assert_close(a, b, rtol=2e-2 if a.dtype != torch.float32 else 2e-5, atol=2e-5 * size)


def saved_bytes(function: Callable[..., tuple[Tensor, Tensor]], *leaves: Tensor) -> int:
    """Of the tensors kept for the backward that are not leaves, each storage once."""
    storages: dict[int, int] = {}
    own = {t.untyped_storage().data_ptr() for t in leaves}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own and t.numel():
            storages[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        results = function(*leaves)
    assert len(results) == 2
    return sum(storages.values())


@pytest.mark.parametrize("device", DEVICES)
def test_less_is_kept_for_the_backward(device: str) -> None:
    t = operands(device, DTYPES[0], 64, 256)
    weight, bias = make(device, torch.float32, 32, 256), make(device, torch.float32, 32)
    leaves = [x.requires_grad_() for x in (t["x"], t["delta"], t["first_gain"], t["gain"], bias, weight)]
    pair, apart = (saved_bytes(f, *leaves) for f in (layers_pair, layers_apart))
    assert pair <= apart - t["x"].nbytes  # the first norm's result is computed again


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("T", [1, 31])
def test_of_a_model(device: str, T: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without the pair, parameters' gradients included."""
    module = importlib.import_module("bitnet_ext.ops.bit_linear")
    results = []
    for fits in (True, False):
        if not fits:
            monkeypatch.setattr(module, "fits_norm_pair", lambda x: False)
        model = BitNetForCausalLM(preset("collapse-64", vocab_size=50), seed=0).to(device)
        ids = torch.randint(50, (2, T), generator=torch.Generator().manual_seed(1)).to(device)
        hidden = model.hidden_states(ids)
        hidden.square().sum().backward()
        results.append([hidden.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    assert_same(*results)


def test_bad_arguments() -> None:
    x, gain, weight = torch.ones(2, 8), torch.ones(8), torch.ones(4, 8)
    with pytest.raises(ValueError, match="first_norm needs norm_weight"):
        ops.bit_linear(x, weight, first_norm=(gain, 1e-5))
    with pytest.raises(ValueError, match=r"first_norm\[0\] must have shape"):
        ops.bit_linear(x, weight, norm_weight=gain, norm_eps=1e-5, first_norm=(gain[:3], 1e-5))
    with pytest.raises(ValueError, match=r"first_norm\[1\] must be >= 0"):
        ops.bit_linear(x, weight, norm_weight=gain, norm_eps=1e-5, first_norm=(gain, -1.0))
    with pytest.raises(RuntimeError, match="first_norm_weight needs norm_weight"):
        packed = ops.quantize_weights([weight])
        raw.bit_linear(x, None, [weight], *packed, None, None, 1e-5, True, gain, 1e-5, torch.float32, "exact")


@pytest.mark.parametrize("device", DEVICES)
def test_compiles_without_a_graph_break(device: str) -> None:
    t = operands(device, DTYPES[0], 5, 64)
    weight, bias = make(device, torch.float32, 32, 64), make(device, torch.float32, 32)
    leaves = (t["x"], t["delta"], t["first_gain"], t["gain"], bias, weight)
    compiled = torch.compile(layers_pair, fullgraph=True, backend="aot_eager")
    assert_same(*(gradients(f, "both", *leaves) for f in (compiled, layers_pair)))  # type: ignore[arg-type]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("has_delta", [True, False])
def test_opcheck(device: str, has_delta: bool) -> None:
    t = operands(device, DTYPES[1], 5, 40)
    x, delta, gain, first_gain = (t[k].requires_grad_() for k in ("x", "delta", "gain", "first_gain"))
    weight = [make(device, torch.float32, 16, 40, seed=6).requires_grad_()]
    codes = ops.quantize_weights([w.detach() for w in weight])
    norms = (gain, EPS[1], True, first_gain, EPS[0])
    sample = (x, delta if has_delta else None, weight, *codes, None, *norms, torch.float32, "exact")
    torch.library.opcheck(raw.bit_linear.default, sample)


# --- on the GPU ---------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtypes", DTYPES)
def test_rows_that_are_not_aligned(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    t = operands("cuda", dtypes, 17, 96)
    moved = {name: value if name == "weight" else shifted(value) for name, value in t.items()}
    assert_same(forward_pair(moved, True), forward_pair(t, True))
    _, first_rstd, rstd = backward_operands(t)
    got = raw.norm_pair_backward(
        *(moved["grad"], moved["x"], moved["first_gain"], first_rstd, moved["gain"], rstd),
        *(moved["residual"], dtypes[1]),
    )
    assert_same(got, backward_pair(t, dtypes[1], True))


@pytest.mark.gpu
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_is_never_silent_on_the_gpu(bad: float) -> None:
    for place in (0, 1, 254, 255):
        t = operands("cuda", DTYPES[0], 9, 256)
        t["x"][1, place] = bad
        assert_same(forward_pair(t, True), forward_apart(t, True))
        assert forward_pair(t, True)[1].isnan().tolist() == [row == 1 for row in range(9)]
        got = backward_pair(t, torch.float32, True)  # NaN is a signal like any number
        assert got[0].isnan().any(dim=1).tolist() == [row == 1 for row in range(9)]
        t["grad"][2, place] = bad
        assert_same(
            [g.isnan() for g in backward_pair(t, torch.float32, True)],
            [g.isnan() for g in backward_apart(t, torch.float32, True)],
        )


@pytest.mark.gpu
@pytest.mark.parametrize(("M", "K"), [(124, 256), (512, 512), (3, 64)])
def test_in_graphs(M: int, K: int) -> None:
    """Captured launches have flags of their own: replays of two graphs at once, in two streams, change nothing."""
    sets = [operands("cuda", DTYPES[0], M, K) for _ in range(2)]

    def chain(t: dict[str, Tensor]) -> list[Tensor]:
        results = []
        grad = t["grad"]
        for _ in range(8):
            results += [*forward_pair(t, True), *backward_pair({**t, "grad": grad}, torch.float32, True)]
            grad = results[-4] * 0.01
        return results

    chain(sets[0])
    torch.cuda.synchronize()
    graphs, outputs = [torch.cuda.CUDAGraph() for _ in sets], []
    for graph, t in zip(graphs, sets, strict=True):
        with torch.cuda.graph(graph):
            outputs.append(chain(t))
    streams = [torch.cuda.Stream() for _ in sets]
    for seed in (5, 6, 7):
        for index, t in enumerate(sets):
            t["x"].copy_(make("cuda", torch.float32, M, K, seed=seed + 10 * index))
        torch.cuda.synchronize()
        for _ in range(20):
            for graph, stream in zip(graphs, streams, strict=True):
                with torch.cuda.stream(stream):
                    graph.replay()
        torch.cuda.synchronize()
        for t, got in zip(sets, outputs, strict=True):
            assert_same(got, chain(t))


@pytest.mark.gpu
@pytest.mark.parametrize("M", [1, 124, 500])
def test_overlapping_launches_change_nothing(M: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches right behind each other share a stream's flags, and each reads what the one before wrote."""
    t = operands("cuda", DTYPES[0], M, 256)

    def chain() -> list[Tensor]:
        grad, results = t["grad"], []
        for i in range(60):
            got = backward_pair({**t, "grad": grad}, torch.float32, i % 2 == 0)
            results += got[2:]
            grad = got[0]
        return [grad, *results]

    monkeypatch.setenv("BITNET_EXT_DEPENDENT_LAUNCH", "0")
    expected = chain()
    monkeypatch.delenv("BITNET_EXT_DEPENDENT_LAUNCH")
    for _ in range(5):
        assert_same(chain(), expected)


@pytest.mark.gpu
def test_limits_of_the_operator() -> None:
    for M, K in ((3, 100), (3, 520)):
        with pytest.raises(RuntimeError, match="for two norms at once on CUDA"):
            forward_pair(operands("cuda", DTYPES[0], M, K), True)
    with pytest.raises(RuntimeError, match="x must have at most 512 rows"):
        backward_pair(operands("cuda", DTYPES[0], 513, 64), torch.float32, True)
