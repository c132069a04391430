"""float32 products of few tokens with a tall matrix: as accurate as float32, any V, special values, determinism."""

from __future__ import annotations

import math

import cuda_tools as tools
import pytest
import torch
from torch import Tensor

from bitnet_ext import ops

SHAPES = [
    (128, 256, 50257),
    (1, 256, 1000),
    (3, 96, 3),
    (127, 96, 257),
    (128, 8, 64),
    (129, 136, 1021),
    (300, 256, 130),
    (65, 200, 4100),
]
NAMES = ["nt", "nn", "tn"]


@pytest.fixture(params=["wgmma", "mma"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels for sm_90a, where the device has them, and those for sm_80."""
    monkeypatch.setenv("BITNET_EXT_WGMMA", "1" if request.param == "wgmma" else "0")


def operands(T: int, H: int, V: int) -> dict[str, tuple[Tensor, Tensor]]:
    hidden, weight = tools.normal(T, H, seed=1), 0.02 * tools.normal(V, H, seed=2)
    grad = padded(tools.normal(T, V, seed=3).mul(3).softmax(-1) / T)
    grad[torch.arange(T), torch.arange(T) % V] -= 1 / T
    return {"nt": (hidden, weight), "nn": (grad, weight), "tn": (grad, hidden)}


def padded(t: Tensor) -> Tensor:
    """The same numbers in rows a multiple of 64 apart, with NaN between them."""
    rows = torch.full((t.shape[0], -(-t.shape[1] // 64) * 64), math.nan, device=t.device)
    rows[:, : t.shape[1]] = t
    return rows[:, : t.shape[1]]


def plain(name: str, a: Tensor, b: Tensor) -> Tensor:
    return a @ b.t() if name == "nt" else a @ b if name == "nn" else a.t() @ b


def run(name: str, a: Tensor, b: Tensor) -> Tensor:
    """The public function, which leaves some shapes to torch."""
    result: Tensor = getattr(ops, f"skinny_mm_{name}")(a, b)
    return result


def kernel(name: str, a: Tensor, b: Tensor) -> Tensor:
    """The operator itself, in poisoned memory."""
    V = b.shape[0] if name == "nt" else a.shape[1]
    rows, cols = {
        "nt": (a.shape[0], -(-V // 64) * 64),
        "nn": (a.shape[0], b.shape[1]),
        "tn": (V, b.shape[1]),
    }[name]
    out = torch.full((rows, cols), math.nan, device="cuda")
    operator = getattr(torch.ops.bitnet_ext, f"skinny_mm_{name}_")
    operator(out, a, b, *([False, 0] if name == "tn" else []))
    if name == "nt":
        assert not out[a.isfinite().all(1), V:].any()  # beyond V stand zeros times hidden
        return out[:, :V]
    return out


@pytest.mark.gpu
@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_as_accurate_as_float32(name: str, shape: tuple[int, int, int]) -> None:
    a, b = operands(*shape)[name]
    assert not torch.backends.cuda.matmul.allow_tf32
    eager, exact = plain(name, a, b), plain(name, a.double(), b.double())
    got = kernel(name, a, b)
    tools.assert_same((got,), (kernel(name, a, b),))
    # Of each product at most 3 * 2^-24 are lost, and the tensor cores chop up to 16 times a sum.
    sums = plain(name, a.double().abs(), b.double().abs())
    assert ((got - exact).abs() <= 2.0**-18 * sums).all()
    public = run(name, a, b)
    tools.assert_within_twice(public, eager, exact)
    if ops.prefers_skinny_mm(name, *shape[:2]):
        tools.assert_same((got,), (public,))
    else:
        assert torch.equal(public, eager)


@pytest.mark.gpu
@pytest.mark.usefixtures("kernels")
def test_tn_adds() -> None:
    grad, hidden = operands(140, 64, 200)["tn"]
    out = tools.normal(200, 64, seed=4)
    want = out + kernel("tn", grad, hidden)
    torch.ops.bitnet_ext.skinny_mm_tn_(out, grad, hidden, True, 0)
    torch.testing.assert_close(out, want)


@pytest.mark.gpu
@pytest.mark.usefixtures("kernels")
def test_tn_on_a_part_of_the_gpu_gives_the_same_bits() -> None:
    grad, hidden = operands(128, 256, 5003)["tn"]
    want = kernel("tn", grad, hidden)
    for max_blocks in (1, 66, 10_000):
        out = torch.full_like(want, float("nan"))
        torch.ops.bitnet_ext.skinny_mm_tn_(out, grad, hidden, False, max_blocks)
        assert torch.equal(out, want)


@pytest.mark.gpu
@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("name", NAMES)
def test_rows_of_any_magnitude(name: str) -> None:
    """Every row of the contraction has its own power of two: small rows keep their digits beside large ones."""
    a, b = operands(64, 128, 200)[name]
    size = 10.0 ** torch.linspace(-25, 15, 64, device="cuda").unsqueeze(1)
    if name == "tn":
        columns = 10.0 ** torch.linspace(-25, 15, 200, device="cuda")
        a = padded(a * columns)
        relative = columns.unsqueeze(1)
    else:
        a = a * size if name == "nt" else padded(a * size)
        relative = size
    eager, exact = plain(name, a, b), plain(name, a.double(), b.double())
    got = kernel(name, a, b).double() / relative
    limit = 2 * (eager.double() / relative - exact / relative).abs().max()
    assert (got - exact / relative).abs().max() <= limit


@pytest.mark.gpu
@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("where", [0, 1])
def test_special_values_spread_as_in_pytorch(name: str, value: float, where: int) -> None:
    pair = operands(40, 64, 130)[name]
    pair[where][7, 11] = value
    eager, got = plain(name, *pair), kernel(name, *pair)
    assert torch.equal(got.isnan(), eager.isnan())
    infinite = eager.isinf()
    assert torch.equal(got.isinf(), infinite)
    assert torch.equal(got[infinite], eager[infinite])


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_shapes_and_layouts_for_the_library(name: str) -> None:
    """H of no multiple of 8, more tokens, rows at odd addresses: computed by torch, with the same result."""
    for T, H, V in ((40, 100, 33), (513, 64, 40), (40, 512, 33), (1, 64, 40)):
        a, b = operands(T, H, V)[name]
        assert torch.equal(run(name, a, b), plain(name, a, b))
    a, b = operands(100, 64, 33)[name]
    a, b = tools.shifted(a.contiguous()), tools.shifted(b)
    assert torch.equal(run(name, a, b), plain(name, a, b))


@pytest.mark.gpu
def test_logits_start_at_256_bytes() -> None:
    logits = run("nt", *operands(30, 64, 130)["nt"])
    assert logits.shape == (30, 130) and logits.stride() == (192, 1)


@pytest.mark.gpu
@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("name", NAMES)
def test_in_a_cuda_graph(name: str) -> None:
    pair = operands(100, 64, 130)[name]
    want = run(name, *pair)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run(name, *pair)
    got.zero_()
    graph.replay()
    tools.assert_same((want,), (got,))


@pytest.mark.parametrize("name", NAMES)
def test_on_the_cpu(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight, grad = (torch.randn(*s, generator=generator) for s in ((4, 16), (9, 16), (4, 9)))
    a, b = {"nt": (hidden, weight), "nn": (grad, weight), "tn": (grad, hidden)}[name]
    torch.testing.assert_close(run(name, a, b), getattr(ops, f"skinny_mm_{name}_ref")(a, b))


def test_errors_name_the_argument() -> None:
    with pytest.raises(ValueError, match="weight must have shape"):
        ops.skinny_mm_nt(torch.zeros(2, 8), torch.zeros(3, 16))
    with pytest.raises(TypeError, match="grad must be of dtype float32"):
        ops.skinny_mm_nn(torch.zeros(2, 8).half(), torch.zeros(8, 16))
    with pytest.raises(ValueError, match="hidden must have shape"):
        ops.skinny_mm_tn(torch.zeros(2, 8), torch.zeros(3, 16))
