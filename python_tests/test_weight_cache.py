"""Codes of ternary weights: never stale, made once within frozen_weights, and found by resident_weights."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import weight_cache_processes
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from bitnet_ext import metrics, ops
from bitnet_ext.inference import generate
from bitnet_ext.models import BitNetForCausalLM, preset
from bitnet_ext.nn import (
    BitLinear,
    WeightCache,
    convert_linear,
    frozen_weights,
    resident_weights,
    weight_caches,
)

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


def through_data(layer: Layer) -> None:
    layer.b.data.copy_(layer.b.detach() * -1.5)


def through_numpy(layer: Layer) -> None:
    if layer.a.is_cuda:
        pytest.skip("NumPy sees memory of the CPU only")
    layer.a.detach().numpy()[3, 4] = 17.0


def through_dlpack(layer: Layer) -> None:
    torch.from_dlpack(layer.a.detach()).mul_(-1.5)


def two_assignments(layer: Layer) -> None:
    """The second may take the memory that the first one found in use."""
    for factor in (2.0, -1.5):
        layer.a.data = layer.a.detach() * factor
        gc.collect()


def swapped(layer: Layer) -> None:
    torch.utils.swap_tensors(layer.a, nn.Parameter(layer.a.detach() * -1.5))


def as_one_vector(layer: Layer) -> None:
    vector = parameters_to_vector(layer.parameters()).detach()
    vector_to_parameters(vector, layer.parameters())
    layer.codes()
    vector.mul_(-1.5)


def refilled(layer: Layer) -> None:
    """As FSDP2 refills a parameter."""
    values = layer.a.detach() * -1.5
    with torch.autograd._unsafe_preserve_version_counter(layer.a), torch.no_grad():
        layer.a.untyped_storage().resize_(0)
        layer.a.untyped_storage().resize_(values.numel() * values.element_size())
        layer.a.copy_(values)


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
    "data_in_place": through_data,
    "numpy": through_numpy,
    "dlpack": through_dlpack,
    "two_assignments": two_assignments,
    "swap_tensors": swapped,
    "vector": as_one_vector,
    "refill": refilled,
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("change", sorted(CHANGES))
def test_every_change_is_seen(change: str, device: str) -> None:
    layer = Layer().to(device)
    first = layer.codes()
    assert same(first, fresh(layer))
    CHANGES[change](layer)
    second = layer.codes()
    assert same(second, fresh(layer)) and not same(second, first)


@pytest.mark.parametrize("device", DEVICES)
def test_a_layer_may_be_swapped_after_a_forward(device: str) -> None:
    """As nn.Linear: nothing holds a reference to the weight."""
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        for layer in (nn.Linear(64, 64, device=device), BitLinear(64, 64, device=device)):
            for context in (torch.no_grad(), frozen_weights(layer)):
                with context, torch.no_grad():
                    layer(torch.randn(2, 64, device=device))
            layer.half()
            assert layer.weight.dtype == torch.float16
            layer.load_state_dict({name: value + 1 for name, value in layer.state_dict().items()})
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def test_the_memory_of_a_weight_is_free_after_a_forward() -> None:
    """Nothing holds the weight, with or without a block."""
    layer = BitLinear(64, 64)
    with frozen_weights(layer):
        layer(torch.randn(2, 64))
    layer(torch.randn(2, 64))
    watched = weakref.ref(layer.weight)
    layer.weight = nn.Parameter(torch.zeros(64, 64))
    gc.collect()
    assert watched() is None


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
        assert twin.cache is not layer.cache
        assert same(twin.codes(), layer.codes())
    with frozen_weights(layer):
        layer.codes()
        twin = copy.deepcopy(layer)
        no_grad_change(twin)
        assert same(twin.codes(), fresh(twin)) and not same(twin.codes(), layer.codes())
        assert pickle.loads(pickle.dumps(layer)).cache is not layer.cache
        assert copy.copy(layer.cache) is not layer.cache


def test_inference_mode() -> None:
    layer = Layer()
    with frozen_weights(layer):
        with torch.inference_mode():
            first = layer.codes()
        assert not first.packed.is_inference() and layer.codes() is first
    with torch.inference_mode():
        layer = Layer()
        layer.a.add_(1)  # has no version counter
        assert same(layer.codes(), fresh(layer))
        with frozen_weights(layer):
            assert layer.codes() is layer.codes()
        layer.a.mul_(-2)
        assert same(layer.codes(), fresh(layer))


@pytest.mark.parametrize("frozen", [True, False])
def test_transforms_and_functional_calls(frozen: bool) -> None:
    layer = Layer()
    other = {"a": layer.a.detach() * -1, "b": layer.b.detach() + 1}
    x = torch.ones(3)
    expected = ops.quantize_weights([other["a"], other["b"]])
    with frozen_weights(layer) if frozen else torch.no_grad():
        layer.codes()
        got = torch.func.functional_call(layer, other, x)
        assert torch.equal(got, x * expected.weight_scale.sum() + expected.packed.sum())
        assert same(layer.codes(), fresh(layer))


def test_compiled_without_a_graph_break() -> None:
    layer = Layer()
    x = torch.randn(5)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), layer(x))
    for change in (no_grad_change, through_data, through_numpy, new_data):
        change(layer)
        assert torch.equal(compiled(x), layer(x))
    with frozen_weights(layer):  # a compiled forward quantises within it too
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


class Counter:
    """Counts the calls of quantize_weights."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls = 0
        self._real = ops.quantize_weights
        monkeypatch.setattr(ops, "quantize_weights", self)

    def __call__(self, weights: Any) -> ops.QuantizedWeight:
        self.calls += 1
        return self._real(weights)

    def taken(self) -> int:
        """The calls since the last question."""
        calls, self.calls = self.calls, 0
        return calls


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> Counter:
    return Counter(monkeypatch)


def test_each_forward_quantises_and_a_block_once(counter: Counter) -> None:
    layer = BitLinear(64, 48, norm=True)
    x = torch.randn(3, 64)
    plain = layer(x)
    assert counter.taken() == 1
    for _ in range(2):
        layer(x).sum().backward()
    assert counter.taken() == 2
    with frozen_weights(layer):
        assert counter.taken() == 0  # not before a forward needs it
        outputs = [layer(x) for _ in range(3)]
        outputs[0].sum().backward()
    assert counter.taken() == 1 and all(torch.equal(y, plain) for y in outputs)
    layer.weight.data.neg_()
    with frozen_weights(layer):
        assert not torch.equal(layer(x), plain)
    assert counter.taken() == 1


def test_blocks_nest(counter: Counter) -> None:
    first, second = Layer(), Layer()
    model = nn.Sequential(first, second)
    with frozen_weights(model):
        codes = first.codes()
        with frozen_weights(first), frozen_weights(Layer()):
            assert first.codes() is codes
            late = second.codes()
        assert second.codes() is late
        with pytest.raises(KeyError), frozen_weights(first):
            raise KeyError
        assert first.codes() is codes
    assert counter.taken() == 2
    first.codes()
    assert counter.taken() == 1


def test_a_block_knows_what_it_made() -> None:
    layer = Layer()
    with frozen_weights(layer) as frozen:
        assert frozen.made() == []
        codes = layer.codes()
        ((cache, weights, made),) = frozen.made()
        assert cache is layer.cache and weights[0] is layer.a and weights[1] is layer.b and made is codes


@pytest.mark.parametrize(
    "change", ["no_grad", "element", "detach", "load_state_dict", "dtype", "sgd", "adamw_fused", "adam_step_"]
)
def test_a_change_within_a_block_is_told(change: str) -> None:
    layer = Layer()
    with frozen_weights(layer):
        CHANGES[change](layer)  # before the first forward
        assert same(layer.codes(), fresh(layer))
        CHANGES[change](layer) if change != "dtype" else layer.half()
        with pytest.raises(
            RuntimeError, match=r"frozen_weights: a weight of shape \(32, 24\), \(16, 24\) was changed"
        ):
            layer.codes()
        layer.cache.clear()
        assert same(layer.codes(), fresh(layer))
    assert same(layer.codes(), fresh(layer))


def test_a_step_with_other_weights_is_no_breach(counter: Counter) -> None:
    """A teacher that is frozen while its student is trained."""
    teacher, student = Layer(), Layer()
    with frozen_weights(teacher):
        for _ in range(2):
            teacher.codes()
            optimizer(torch.optim.SGD)(student)
    assert counter.taken() == 1


def test_a_block_is_of_one_thread(counter: Counter) -> None:
    layer = Layer()
    found: list[ops.QuantizedWeight] = []
    with frozen_weights(layer):
        codes = layer.codes()
        thread = threading.Thread(target=lambda: found.extend([layer.codes(), layer.codes()]))
        thread.start()
        thread.join()
        assert layer.codes() is codes
    assert counter.taken() == 3 and all(same(other, codes) and other is not codes for other in found)


def small_model() -> BitNetForCausalLM:
    return BitNetForCausalLM(preset("collapse-64", vocab_size=101, num_layers=2), seed=0)


@pytest.mark.parametrize("device", DEVICES)
def test_stacked_weights_of_a_model_are_made_once(device: str, counter: Counter) -> None:
    model = small_model().to(device)
    ids = torch.arange(8, device=device)[None]
    plain = model(ids)
    assert counter.taken() == 8  # per layer qkv, o, gate and up, down
    with frozen_weights(model):
        assert torch.equal(model(ids), plain) and torch.equal(model(ids), plain)
    assert counter.taken() == 8


@pytest.mark.parametrize("device", DEVICES)
def test_generation_quantises_once_a_call(device: str, counter: Counter) -> None:
    model = small_model().to(device)
    prompt = torch.arange(6, device=device)[None]
    first = generate(model, prompt, 12)
    assert counter.taken() == 8
    for p in model.parameters():
        p.data.mul_(-0.7)
    second = generate(model, prompt, 12)
    assert counter.taken() == 8
    assert not torch.equal(first, second) and torch.equal(second, generate(copy.deepcopy(model), prompt, 12))


def test_a_measure_quantises_once_a_call(counter: Counter) -> None:
    model = small_model()
    unigram = torch.full((101,), 1 / 101, dtype=torch.float64).log()
    text = metrics.HeldOut(
        torch.arange(4000).remainder(101).numpy(),
        unigram,
        seq_len=16,
        max_tokens=256,
        batch_rows=4,
        device=torch.device("cpu"),
    )
    before = text.measure(model).result()
    assert counter.taken() == 8
    for p in model.parameters():
        p.data.mul_(-0.7)
    assert text.measure(model).result() != before
    assert counter.taken() == 8


def test_layers_of_a_converted_model(counter: Counter) -> None:
    model = convert_linear(nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 16)))
    x = torch.randn(2, 32)
    with frozen_weights(model):
        model(x)
        model(x)
    assert counter.taken() == 2


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
def test_a_graph_captured_in_a_block_quantises_at_every_replay() -> None:
    layer = Layer().cuda()
    x = torch.randn(7, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with frozen_weights(layer):
        layer(x)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            y = layer(x)
    no_grad_change(layer)
    graph.replay()
    assert torch.equal(y, layer(x))


@pytest.mark.gpu
def test_a_replayed_graph_that_writes_weights_is_seen() -> None:
    layer = Layer().cuda()
    first = layer.codes()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad():
        layer.a.mul_(-1.5)
    layer.codes()
    graph.replay()
    assert same(layer.codes(), fresh(layer)) and not same(layer.codes(), first)


@pytest.mark.gpu
def test_another_stream_quantises_for_itself() -> None:
    layer = Layer().cuda()
    with frozen_weights(layer):
        first = layer.codes()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            second = layer.codes()
        torch.cuda.synchronize()
        assert second is not first and same(first, second) and layer.codes() is first


# --- several processes ----------------------------------------------------------------------------------------


def test_two_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Collectives into parameters, and FSDP2 with updates of one's own."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.multiprocessing.spawn(weight_cache_processes.worker, args=(str(tmp_path / "store"),), nprocs=2)
