"""Conversion of models that others wrote: what is shared, hooked, parametrised or read past the layer."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune

from bitnet_ext.nn import (
    BitLinear,
    BitMultiheadAttention,
    Int8Linear,
    PackedBitLinear,
    convert_linear,
    pack_model,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*nested_tensor.*:UserWarning")


def of(model: nn.Module, kind: type[nn.Module]) -> list[str]:
    return [name for name, m in model.named_modules(remove_duplicate=False) if isinstance(m, kind)]


# --- shared layers and weights ------------------------------------------------------------------------------


def test_a_layer_under_several_names_becomes_one_layer() -> None:
    shared, block = nn.Linear(16, 16), nn.Sequential(nn.Linear(16, 16), nn.ReLU())
    model = nn.ModuleDict({"a": nn.Sequential(shared, shared), "b": shared, "x": block, "y": block})
    convert_linear(model)
    assert not of(model, nn.Linear)
    assert model["a"][0] is model["a"][1] is model["b"] and model["x"] is model["y"] is block
    packed = pack_model(model)
    assert len(of(packed, PackedBitLinear)) == 5 and not of(packed, BitLinear)
    assert packed["a"][0] is packed["a"][1] is packed["b"] and packed["x"] is packed["y"]
    left = nn.ModuleDict({"a": nn.Linear(4, 4), "body": shared, "lm_head": shared})
    assert of(convert_linear(left), BitLinear) == ["a"]  # a layer that is the head too stays


def test_a_shared_weight_stays_shared() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    model[1].weight = model[0].weight
    convert_linear(model)
    assert model[0].weight is model[1].weight
    packed = pack_model(model)
    assert packed[0]._weight is packed[1]._weight and packed[0].bias is not packed[1].bias
    x = torch.randn(3, 16)
    assert torch.equal(packed(x), model(x))


# --- hooks, flags, attributes -------------------------------------------------------------------------------


def test_hooks_survive() -> None:
    calls: list[str] = []
    model = nn.Sequential(nn.Linear(16, 16))
    layer = model[0]
    handles = [
        layer.register_forward_hook(lambda m, a, y: calls.append(f"forward {type(m).__name__}")),
        layer.register_forward_pre_hook(lambda m, a, k: calls.append("pre"), with_kwargs=True),
        layer.register_full_backward_hook(lambda m, gi, go: calls.append("backward")),
        layer.register_state_dict_post_hook(lambda m, s, p, meta: calls.append("state_dict")),
        layer.register_load_state_dict_pre_hook(lambda m, *a: calls.append(f"load {type(m).__name__}")),
    ]
    convert_linear(model)
    model(torch.randn(2, 16, requires_grad=True)).sum().backward()
    model.load_state_dict(model.state_dict())
    assert calls == ["pre", "forward BitLinear", "backward", "state_dict", "load BitLinear"]
    calls.clear()
    pack_model(model)(torch.randn(2, 16))
    assert calls == ["pre", "forward PackedBitLinear"]
    for handle in handles:
        handle.remove()
    calls.clear()
    model(torch.randn(2, 16))
    assert not calls


def test_parameters_flags_and_attributes_are_kept() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 4, bias=False)).bfloat16().eval()
    model[0].weight.requires_grad_(False)
    model[0].register_buffer("mine", torch.ones(3))
    model[0].note = "kept"
    parameters = list(model.parameters())
    state = torch.random.get_rng_state()
    convert_linear(model)
    assert torch.equal(
        torch.random.get_rng_state(), state
    )  # nothing is drawn for weights that are thrown away
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert not model[0].training and not model[0].weight.requires_grad and model[1].weight.requires_grad
    assert model[0].note == "kept" and list(model.state_dict())[:3] == ["0.weight", "0.bias", "0.mine"]
    packed = pack_model(model)
    assert packed[0].note == "kept" and "0.mine" in packed.state_dict()
    assert packed[0].weight.dtype == torch.bfloat16
    with_norm = convert_linear(nn.Sequential(nn.Linear(16, 8)), norm=True)
    assert torch.equal(with_norm[0].norm_weight, torch.ones(16))


def test_a_forward_set_on_the_instance_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].forward = lambda x: x  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="convert_linear: 1 must not have a forward of its own"):
        convert_linear(model)
    assert not of(model, BitLinear)  # as it was
    assert of(convert_linear(model, skip=["1"]), BitLinear) == ["0"]


# --- computed weights ---------------------------------------------------------------------------------------


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight + 0.3 * weight.roll(1, 0)

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight / 2


def old_weight_norm(layer: nn.Linear) -> nn.Module:
    with pytest.warns(FutureWarning):
        return nn.utils.weight_norm(layer)


COMPUTED = {
    "prune": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "prune bias": lambda layer: prune.l1_unstructured(layer, "bias", 0.5),
    "parametrize": lambda layer: parametrize.register_parametrization(layer, "weight", Doubled()),
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "old weight_norm": old_weight_norm,
    "old spectral_norm": nn.utils.spectral_norm,
}


@pytest.mark.parametrize("kind", COMPUTED)
@pytest.mark.parametrize("inplace", [False, True])
def test_computed_weights(kind: str, inplace: bool) -> None:
    """The weight that a parametrisation computes is the one that is quantised, also after a step, also packed."""
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(nn.Sequential(nn.Linear(16, 12)).eval())
        COMPUTED[kind](models[-1][0])
    model, reference = models
    parameters = dict(model.named_parameters())
    convert_linear(model)
    assert of(model, BitLinear) == ["0"]
    assert {n: id(p) for n, p in model.named_parameters()} == {n: id(p) for n, p in parameters.items()}
    x = torch.randn(3, 16)
    for _ in range(2):
        reference(x)  # a forward pre-hook computes the weight
        plain = BitLinear(16, 12, bias=True)
        with torch.no_grad():
            plain.weight.copy_(reference[0].weight)
            plain.bias.copy_(reference[0].bias)
        y = model(x)
        torch.testing.assert_close(y, plain(x))
        y.square().sum().backward()
        trained = [p for p in model.parameters() if p.grad is not None]
        assert len(trained) == len(parameters)
        torch.optim.SGD(trained, lr=0.01).step()
        with torch.no_grad():
            for mine, other in zip(model.parameters(), reference.parameters(), strict=True):
                other.copy_(mine)
                mine.grad = None
    # The weight of the last forward is older than the parameters: packing computes it anew.
    packed = pack_model(model, inplace=inplace)
    assert set(packed.state_dict()) == {"0.packed", "0.weight_scale", "0.bias"}
    reference(x)
    with torch.no_grad():
        plain.weight.copy_(reference[0].weight)
        plain.bias.copy_(reference[0].bias)
        torch.testing.assert_close(packed(x), plain(x))


def test_a_weight_that_nobody_knows_how_to_compute_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    weight = model[0].weight.detach()
    del model[0].weight
    model[0].weight = weight
    with pytest.raises(
        ValueError, match="convert_linear: 0 must have its weight as a parameter, or by torch"
    ):
        convert_linear(model)


# --- subclasses, lazy layers, Conv1D ------------------------------------------------------------------------


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Initialised(nn.Linear):
    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.02)


def test_subclasses_and_lazy_layers() -> None:
    model = nn.Sequential(nn.Linear(4, 4), Scaled(4, 4))
    with pytest.raises(
        ValueError, match=r"1 must be an nn\.Linear, got its subclass Scaled with a forward of its"
    ):
        convert_linear(model)
    assert not of(model, BitLinear)
    assert of(convert_linear(model, skip=["1"]), BitLinear) == ["0"]
    assert isinstance(convert_linear(Initialised(4, 4, bias=False)), BitLinear)
    lazy = nn.Sequential(nn.LazyLinear(4))
    with pytest.raises(ValueError, match="0 must have a shape, got a lazy layer; run one forward first"):
        convert_linear(lazy)
    lazy(torch.ones(1, 3))
    assert of(convert_linear(lazy), BitLinear) == ["0"]


class Halved(BitLinear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 2


def test_packing_refuses_a_forward_that_it_would_lose() -> None:
    model = nn.Sequential(BitLinear(4, 4), Halved(4, 4))
    with pytest.raises(
        ValueError, match="pack_model: 1 must be a BitLinear, got its subclass Halved with a forward"
    ):
        pack_model(model, inplace=True)
    assert of(model, BitLinear) == ["0", "1"]


def test_a_pruned_head_in_int8() -> None:
    model = nn.ModuleDict({"body": BitLinear(8, 8), "lm_head": nn.Linear(8, 5)})
    prune.l1_unstructured(model["lm_head"], "weight", 0.5)
    head = pack_model(model, head="int8")["lm_head"]
    assert torch.equal(head.codes == 0, model["lm_head"].weight_mask == 0)
    assert set(head.state_dict()) == {"codes", "weight_scale", "bias"}
    head(torch.randn(2, 8))


class Conv1D(nn.Module):
    """Of the interface of transformers' layer of that name."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


def test_conv1d_is_converted() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Conv1D(12, 16), Conv1D(12, 12))
    weight, bias = model[0].weight, model[0].bias
    convert_linear(model)
    assert of(model, BitLinear) == ["0", "1"]
    assert torch.equal(model[0].weight, weight.t()) and model[0].bias is bias
    plain = BitLinear(16, 12, bias=True)
    plain.load_state_dict({"weight": weight.t().detach(), "bias": bias.detach()})
    x = torch.randn(3, 16)
    assert torch.equal(model[0](x), plain(x))
    assert len(of(pack_model(model), PackedBitLinear)) == 2


def test_gpt2_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=61, n_embd=32, n_layer=1, n_head=2, n_positions=16)
    model = transformers.GPT2LMHeadModel(config).eval()
    convert_linear(model)
    assert len(of(model, BitLinear)) == 4
    ids = torch.arange(9)[None]
    packed = pack_model(model)
    torch.testing.assert_close(packed(ids).logits, model(ids).logits)
    served = pack_model(model, head="int8")
    assert isinstance(served.lm_head, Int8Linear)
    torch.testing.assert_close(served(ids).logits, model(ids).logits, rtol=0.05, atol=0.05)


# --- modules that read a weight past the layer --------------------------------------------------------------


def encoder_layer(**settings: Any) -> nn.TransformerEncoderLayer:
    torch.manual_seed(0)
    return nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, **({"batch_first": True} | settings))


@pytest.mark.parametrize("skip", [(), ("self_attn",), ("linear1", "linear2"), ("out_proj", "linear1")])
@pytest.mark.parametrize(
    "settings", [{}, {"norm_first": True}, {"activation": "gelu"}, {"batch_first": False}]
)
def test_an_encoder_layer_is_ternary_in_every_mode(skip: tuple[str, ...], settings: dict[str, Any]) -> None:
    layer = convert_linear(encoder_layer(**settings), skip=skip)
    calls: list[str] = []
    for name in of(layer, BitLinear):
        layer.get_submodule(name).register_forward_hook(lambda m, a, y, n=name: calls.append(n))
    expected_calls = len(calls)
    x = torch.randn(2, 5, 32)
    trained = layer(x)
    expected_calls = len(calls)
    for m in layer.modules():
        m._forward_hooks.clear()  # a hook would switch the fast path off by itself
    assert expected_calls == len(of(layer, BitLinear)) > 0
    layer.eval()
    for context in (torch.no_grad(), torch.inference_mode(), torch.enable_grad()):
        with context:
            torch.testing.assert_close(layer(x), trained, rtol=1e-5, atol=1e-5)
    packed = pack_model(layer)
    with torch.no_grad():
        torch.testing.assert_close(packed(x), trained, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(copy.deepcopy(packed)(x), trained, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["linear1", "linear2"])
@pytest.mark.parametrize(
    "options", [{}, {"bias": True}, {"bias": True, "norm": True, "quantization": "none"}], ids=str
)
def test_a_layer_put_into_an_encoder_layer_by_hand_is_called(name: str, options: dict[str, Any]) -> None:
    layer = encoder_layer()
    old = getattr(layer, name)
    new = BitLinear(old.in_features, old.out_features, **options)
    setattr(layer, name, new)
    if new.norm_weight is not None:
        nn.init.uniform_(new.norm_weight, 0.5, 2.0)
    x = torch.randn(2, 5, 32)
    trained = layer(x)
    for served in (layer.eval(), copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        with torch.no_grad():
            torch.testing.assert_close(served(x), trained, rtol=1e-5, atol=1e-5)
    if new.is_quantized:
        other = encoder_layer().eval()
        other.load_state_dict(layer.state_dict(), strict=False)
        setattr(other, name, pack_model(new))
        with torch.no_grad():
            torch.testing.assert_close(other(x), trained, rtol=1e-5, atol=1e-5)


def test_a_float_layer_put_into_an_encoder_layer_leaves_the_fast_path() -> None:
    layer = encoder_layer()
    layer.linear1 = BitLinear(32, 64, bias=True, quantization="none")
    layer.linear2 = nn.Linear(64, 32)
    assert layer.activation_relu_or_gelu == 1
    attention = nn.MultiheadAttention(32, 4)
    attention.out_proj = BitLinear(32, 32, bias=True, quantization="none")


@pytest.mark.parametrize("make", [lambda: BitLinear(32, 32), lambda: pack_model(BitLinear(32, 32))])
def test_a_projection_that_attention_would_not_call_is_refused(make: Callable[[], nn.Module]) -> None:
    attention = nn.MultiheadAttention(32, 4)
    old = attention.out_proj
    for put in (lambda m: setattr(attention, "out_proj", m), lambda m: attention.add_module("out_proj", m)):
        with pytest.raises(
            ValueError, match=r"MultiheadAttention: out_proj must be an nn\.Linear, got \w*BitLi"
        ):
            put(make())
    assert attention.out_proj is old


def test_nested_tensors_are_refused_in_one_sentence() -> None:
    encoder = nn.TransformerEncoder(encoder_layer(), 1)
    layer = encoder.layers[0].linear1 = BitLinear(32, 64)
    x, padding = torch.randn(2, 3, 32), torch.tensor([[False] * 3, [False, True, True]])
    trained = encoder(x, src_key_padding_mask=padding)
    encoder.eval()
    nested = torch.nested.nested_tensor([x[0], x[1, :1]])
    with torch.no_grad():
        for call in (
            lambda: encoder(x, src_key_padding_mask=padding),
            lambda: layer(nested),
            lambda: pack_model(layer)(nested),
        ):
            with pytest.raises(ValueError, match="x must be a plain tensor, got a nested one"):
                call()
        encoder.use_nested_tensor = False
        served = encoder(x, src_key_padding_mask=padding)
    torch.testing.assert_close(served[~padding], trained[~padding], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
def test_an_encoder_and_a_decoder(causal: bool) -> None:
    torch.manual_seed(0)
    model = nn.Transformer(32, 4, 2, 2, 64, dropout=0.0, batch_first=True)
    convert_linear(model)
    assert not of(model, nn.MultiheadAttention) and not of(model, nn.Linear)
    source, target = torch.randn(2, 6, 32), torch.randn(2, 5, 32)
    padding = torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
    mask = nn.Transformer.generate_square_subsequent_mask(5) if causal else None
    arguments = {"tgt_mask": mask, "src_key_padding_mask": padding, "memory_key_padding_mask": padding}
    trained = model(source, target, **arguments)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(source, target, **arguments), trained, rtol=1e-5, atol=1e-5)
        packed = pack_model(model)
        assert not of(packed, BitLinear)
        torch.testing.assert_close(packed(source, target, **arguments), trained, rtol=1e-5, atol=1e-5)


class ReadsWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(8, 8)
        self.asks = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.asks.weight, Tensor) and x.dtype != self.asks.weight.dtype:
            x = x.to(self.asks.weight.dtype)
        return self.asks(x.to(self.asks.weight.device)) + self.project(x)

    def project(self, x: Tensor) -> Tensor:
        return F.linear(x, self.proj.weight, self.proj.bias)


def test_a_parent_that_computes_with_the_weight_is_refused() -> None:
    model = nn.ModuleDict({"block": ReadsWeight()})
    with pytest.raises(
        ValueError,
        match=r"block\.proj cannot be ternary, because ReadsWeight\.project computes with proj\.weight",
    ):
        convert_linear(model)
    assert not of(model, BitLinear)
    convert_linear(model, skip=["proj"])
    assert of(model, BitLinear) == ["block.asks"]
    x = torch.randn(2, 8)
    torch.testing.assert_close(pack_model(model)["block"](x), model["block"](x))
    # Packed without the check, the layer itself tells.
    block = ReadsWeight()
    block.proj = BitLinear(8, 8)
    with pytest.raises(TypeError, match="linear: the weight of a PackedBitLinear is packed and has no float"):
        pack_model(block)(x)


@pytest.mark.skipif(not hasattr(nn, "LinearCrossEntropyLoss"), reason="new in torch 2.13")
def test_torchs_fused_loss_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"linear cannot be ternary, because LinearCrossEntropyLoss\.forward"
    ):
        convert_linear(nn.ModuleDict({"loss": nn.LinearCrossEntropyLoss(8, 5)}))


def test_an_attention_of_a_subclass_is_refused() -> None:
    class Own(nn.MultiheadAttention):
        pass

    with pytest.raises(
        ValueError, match=r"a\.out_proj cannot be ternary, because Own\.forward computes with"
    ):
        convert_linear(nn.ModuleDict({"a": Own(8, 2), "b": nn.Linear(8, 8)}))


# --- BitMultiheadAttention ----------------------------------------------------------------------------------


def float_twin(attention: nn.MultiheadAttention) -> BitMultiheadAttention:
    """The same module with full-precision projections, to compare everything but the quantisation."""
    model = convert_linear(copy.deepcopy(attention))
    for m in model.modules():
        if isinstance(m, BitLinear):
            m.quantization = "none"
    return model


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize(
    "settings",
    [{}, {"bias": False}, {"kdim": 12, "vdim": 20}, {"add_bias_kv": True, "add_zero_attn": True}],
)
def test_attention_has_the_arithmetic_of_torch(batch_first: bool, settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(32, 4, batch_first=batch_first, **settings)
    twin = float_twin(attention)
    B, L, S = 3, 5, 7
    query = torch.randn(B, L, 32)
    key, value = torch.randn(B, S, settings.get("kdim", 32)), torch.randn(B, S, settings.get("vdim", 32))
    padding = torch.rand(B, S) > 0.7
    padding[:, 0] = False
    if not batch_first:
        query, key, value = (t.transpose(0, 1) for t in (query, key, value))
    masks: list[dict[str, Any]] = [
        {},
        {"key_padding_mask": padding},
        {"attn_mask": torch.randn(L, S)},
        {"attn_mask": (torch.rand(B * 4, L, S) > 0.8).index_fill(2, torch.tensor(0), False)},
        {"attn_mask": torch.ones(L, S).triu(1).bool(), "key_padding_mask": padding},
    ]
    if not attention.add_zero_attn:  # torch takes the hint for the mask, and hides the keys that it appends
        masks.append({"attn_mask": torch.ones(L, S).triu(1).bool(), "is_causal": True})
    for mask in masks:
        for weights in ({"need_weights": False}, {}, {"average_attn_weights": False}):
            got, got_weights = twin(query, key, value, **mask, **weights)
            expected, expected_weights = attention(query, key, value, **mask, **weights)
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
            assert (got_weights is None) == (expected_weights is None)
            if got_weights is not None:
                torch.testing.assert_close(got_weights, expected_weights, rtol=1e-5, atol=1e-5)
    one = 0 if batch_first else 1
    single = [t.select(one, 0) for t in (query, key, value)]
    for got, expected in zip(twin(*single), attention(*single), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_attention_keeps_its_values_and_takes_those_of_torch() -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(32, 4, batch_first=True)
    nn.init.normal_(attention.in_proj_bias)
    converted = convert_linear(copy.deepcopy(attention), norm=True)
    assert of(converted, BitLinear) == ["q_proj", "k_proj", "v_proj", "out_proj"]
    stacked = torch.cat([getattr(converted, f"{n}_proj").weight for n in "qkv"])
    assert torch.equal(stacked, attention.in_proj_weight)
    assert all(getattr(converted, f"{n}_proj").norm_weight is not None for n in ("q", "k", "v", "out"))
    fresh = nn.Sequential(BitMultiheadAttention(32, 4, batch_first=True))
    fresh.load_state_dict({f"0.{name}": value for name, value in attention.state_dict().items()})
    x = torch.randn(2, 5, 32)
    expected = convert_linear(copy.deepcopy(attention))(x, x, x)[0]
    assert torch.equal(fresh[0](x, x, x)[0], expected)
    buffer = io.BytesIO()
    torch.save(fresh, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)[0](x, x, x)[0], expected)
    assert (
        convert_linear(
            copy.deepcopy(nn.ModuleDict({"a": attention, "b": nn.Linear(4, 4)})), quantization="none"
        )["a"].in_proj_weight
        is not None
    )


def test_attention_is_exported_packed() -> None:
    layer = pack_model(convert_linear(encoder_layer()))
    x = torch.randn(2, 5, 32)
    exported = torch.export.export(layer, (x,)).module()
    torch.testing.assert_close(exported(x), layer(x))


def test_bad_calls_of_attention() -> None:
    attention = BitMultiheadAttention(32, 4)
    x = torch.randn(5, 2, 32)
    with pytest.raises(ValueError, match="is_causal needs attn_mask"):
        attention(x, x, x, is_causal=True)
    with pytest.raises(ValueError, match="must all have 2 or all 3 dimensions, got 3, 2 and 3"):
        attention(x, x[0], x)
    with pytest.raises(ValueError, match="embed_dim must be a multiple of num_heads"):
        BitMultiheadAttention(30, 4)
