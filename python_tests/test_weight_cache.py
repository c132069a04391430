"""The cache of ternary codes: what invalidates it, and that nothing stale is ever handed out."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bitnet_ext import ops
from bitnet_ext.nn import WeightCache, resident_weights, weight_caches

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


class Layer(nn.Module):
    """Stands for a layer with two weights that share an input."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.a = nn.Parameter(torch.randn(32, 24, generator=generator))
        self.b = nn.Parameter(torch.randn(16, 24, generator=generator))
        self.cache = WeightCache()

    def codes(self) -> ops.QuantizedWeight:
        return self.cache.get([self.a, self.b])

    def forward(self, x: Tensor) -> Tensor:
        return x * self.codes().weight_scale.sum() + self.codes().packed.sum()


def fresh(layer: Layer) -> ops.QuantizedWeight:
    return ops.quantize_weights([layer.a, layer.b])


def same(got: ops.QuantizedWeight, want: ops.QuantizedWeight) -> bool:
    return torch.equal(got.packed, want.packed) and torch.equal(got.weight_scale, want.weight_scale)


def no_grad_change(layer: Layer) -> None:
    with torch.no_grad():
        layer.b.mul_(-1.5)


def one_element(layer: Layer) -> None:
    with torch.no_grad():
        layer.a[3, 4] = 17.0


def detached(layer: Layer) -> None:
    layer.a.detach().add_(1.0)


def load(layer: Layer) -> None:
    layer.load_state_dict({name: value + 1 for name, value in layer.state_dict().items()})


def new_parameter(layer: Layer) -> None:
    layer.a = nn.Parameter(layer.a.detach() + 1)


def new_data(layer: Layer) -> None:
    layer.a.data = layer.a.detach() * -1


def to_double_and_back(layer: Layer) -> None:
    layer.bfloat16()


def optimizer(kind: Callable[..., torch.optim.Optimizer], **options: Any) -> Callable[[Layer], None]:
    def change(layer: Layer) -> None:
        for p in layer.parameters():
            p.grad = torch.ones_like(p)
        kind(layer.parameters(), lr=0.1, **options).step()

    return change


def adam_step(layer: Layer) -> None:
    p = layer.a.detach()
    hyper = torch.tensor([0.5, 0.0, 0.1, 0.05], device=p.device)
    one = torch.ones((), device=p.device)
    zeros = torch.zeros_like(p), torch.zeros_like(p)
    ops.adam_step_([p], [torch.ones_like(p)], [zeros[0]], [zeros[1]], hyper, one, decoupled=True)


CHANGES = {
    "no_grad": no_grad_change,
    "element": one_element,
    "detach": detached,
    "load_state_dict": load,
    "parameter": new_parameter,
    "data": new_data,
    "dtype": to_double_and_back,
    "sgd": optimizer(torch.optim.SGD),
    "adamw_loop": optimizer(torch.optim.AdamW, foreach=False),
    "adamw_foreach": optimizer(torch.optim.AdamW, foreach=True),
    "adamw_fused": optimizer(torch.optim.AdamW, fused=True),
    "adam_step_": adam_step,
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("change", sorted(CHANGES))
def test_every_change_is_seen(change: str, device: str) -> None:
    layer = Layer().to(device)
    first = layer.codes()
    assert layer.codes() is first
    assert same(first, fresh(layer))
    CHANGES[change](layer)
    second = layer.codes()
    assert second is not first
    assert same(second, fresh(layer)) and not same(second, first)
    assert layer.codes() is second


def test_a_backward_pass_changes_nothing() -> None:
    layer = Layer()
    first = layer.codes()
    for _ in range(2):  # gradient accumulation
        (layer.a.sum() * layer.b.sum()).backward()
    assert layer.codes() is first


@pytest.mark.gpu
def test_a_move_is_seen() -> None:
    layer = Layer()
    layer.codes()
    layer.cuda()
    assert layer.codes().packed.is_cuda and same(layer.codes(), fresh(layer))


def test_it_is_in_no_state_copy_or_pickle() -> None:
    layer = Layer()
    layer.codes()
    assert set(layer.state_dict()) == {"a", "b"}
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    for twin in (
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(buffer, weights_only=False),
    ):
        assert twin.cache is not layer.cache and twin.cache.weights is None
        assert same(twin.codes(), layer.codes())
    assert copy.copy(layer.cache).weights is None


def test_inference_mode() -> None:
    layer = Layer()
    with torch.inference_mode():
        first = layer.codes()
    assert not first.packed.is_inference() and layer.codes() is first
    with torch.inference_mode():
        layer = Layer()
        layer.a.add_(1)  # has no version counter
        assert same(layer.codes(), fresh(layer))
        layer.a.mul_(-2)
        assert same(layer.codes(), fresh(layer))


def test_transforms_and_functional_calls() -> None:
    layer = Layer()
    layer.codes()
    other = {"a": layer.a.detach() * -1, "b": layer.b.detach() + 1}
    x = torch.ones(3)
    expected = ops.quantize_weights([other["a"], other["b"]])
    got = torch.func.functional_call(layer, other, x)
    assert torch.equal(got, x * expected.weight_scale.sum() + expected.packed.sum())
    assert same(layer.codes(), fresh(layer))


def test_compiled_without_a_graph_break() -> None:
    layer = Layer()
    x = torch.randn(5)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), layer(x))
    no_grad_change(layer)
    assert torch.equal(compiled(x), layer(x))
    layer.a.data.mul_(3.0)  # not even this is stale, for a compiled forward always quantises
    layer.cache.clear()
    assert torch.equal(compiled(x), layer(x))


def test_a_compiled_optimizer_step_is_seen() -> None:
    layer = Layer()
    for p in layer.parameters():
        p.grad = torch.ones_like(p)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=torch.tensor(0.1))
    step = torch.compile(optimizer.step, backend="aot_eager")
    for _ in range(2):
        layer.codes()
        step()
        assert same(layer.codes(), fresh(layer))


def test_resident_codes_are_handed_out_unchecked() -> None:
    layer = Layer()
    codes = fresh(layer)
    no_grad_change(layer)
    with resident_weights({layer.cache: codes}):
        assert layer.codes() is codes
        with resident_weights({}):
            assert layer.codes() is not codes
    assert same(layer.codes(), fresh(layer))


def test_put_and_holds() -> None:
    layer = Layer()
    codes = fresh(layer)
    assert not layer.cache.holds([layer.a, layer.b], codes)
    layer.cache.put([layer.a, layer.b], codes)
    assert layer.cache.holds([layer.a, layer.b], codes) and layer.codes() is codes
    no_grad_change(layer)
    assert not layer.cache.holds([layer.a, layer.b], codes)


def test_caches_of_a_model_are_found_once() -> None:
    layer, other = Layer(), Layer()
    other.cache = layer.cache
    model = nn.Sequential(layer, other, Layer())
    assert weight_caches(model) == [layer.cache, model[2].cache]


@pytest.mark.gpu
def test_a_captured_forward_quantises_at_every_replay() -> None:
    layer = Layer().cuda()
    x = torch.randn(7, device="cuda")
    layer(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x)
    no_grad_change(layer)
    graph.replay()
    assert torch.equal(y, layer(x))


@pytest.mark.gpu
def test_another_stream_quantises_for_itself() -> None:
    layer = Layer().cuda()
    first = layer.codes()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        second = layer.codes()
    torch.cuda.synchronize()
    assert second is not first and same(first, second)
