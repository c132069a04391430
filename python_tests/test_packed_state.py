"""Packed layers refuse what no ternary weight has, and take shapes alone on the meta device."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from bitnet_ext import ops
from bitnet_ext.models import BitNetConfig, BitNetForCausalLM
from bitnet_ext.nn import BitLinear, Int8Linear, PackedBitLinear, pack_model


def model_and_state(K: int = 66) -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = pack_model(nn.Sequential(BitLinear(K, 48, bias=True, norm=True)))
    return model, {name: value.clone() for name, value in model.state_dict().items()}


FAULTS = [
    (
        "0.packed",
        lambda t: t.fill_(255),
        "0.packed must hold ternary codes stored as 0, 1 or 2, got a stored value of 3",
    ),
    ("0.packed", lambda t: t.view(-1)[-2:-1].fill_(0b01110101), "got a stored value of 3"),
    (
        "0.packed",
        lambda t: t[:, -1].fill_(0),
        r"0.packed must end each row with codes of 0 .* in_features = 66",
    ),
    ("0.packed", lambda t: t.float(), r"0.packed must be uint8 of shape \(48, 17\), got torch.float32"),
    ("0.weight_scale", lambda t: t.fill_(float("nan")), "0.weight_scale must be finite and >= 0"),
    ("0.weight_scale", lambda t: t.fill_(float("inf")), "0.weight_scale must be finite and >= 0"),
    ("0.weight_scale", lambda t: t.fill_(-1), "0.weight_scale must be finite and >= 0"),
    ("0.weight_scale", lambda t: t.to(torch.int32), "0.weight_scale must be float32, got torch.int32"),
]


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize(("name", "damage", "match"), FAULTS)
def test_damaged_states_are_refused(name: str, damage: object, match: str, assign: bool) -> None:
    model, state = model_and_state()
    before = copy.deepcopy(model.state_dict())
    value = damage(state[name])  # type: ignore[operator]
    state[name] = value if value.shape == state[name].shape else state[name]
    with pytest.raises(RuntimeError, match=match):
        model.load_state_dict(state, assign=assign)
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[key])


def test_a_rounded_state_becomes_float32() -> None:
    model, state = model_and_state()
    rounded = {k: v.bfloat16() if v.is_floating_point() else v for k, v in state.items()}
    for assign in (False, True):
        model.load_state_dict(rounded, assign=assign)
        assert all(v.dtype == torch.float32 for k, v in model.state_dict().items() if k != "0.packed")
        model(torch.randn(2, 66))


def test_a_state_of_the_training_form_is_told() -> None:
    model, _ = model_and_state()
    with pytest.raises(
        RuntimeError, match=r"0\.weight is a weight of the training form; load it before pack_model"
    ):
        model.load_state_dict(nn.Sequential(BitLinear(66, 48, bias=True, norm=True)).state_dict())


def test_bad_arguments() -> None:
    packed, scale = ops.quantize_pack_weight(torch.randn(6, 10))
    build = lambda **changed: PackedBitLinear(  # noqa: E731
        **({"in_features": 10, "out_features": 6, "packed": packed, "weight_scale": scale} | changed)
    )
    build()
    for changed, match in (
        ({"packed": packed[:, 1:]}, r"packed must be uint8 of shape \(6, 3\)"),
        ({"packed": torch.full_like(packed, 255)}, "got a stored value of 3"),
        ({"packed": packed & 0x0F}, "must end each row with codes of 0"),
        ({"weight_scale": scale.half()}, r"weight_scale must be float32, got torch\.float16"),
        ({"weight_scale": torch.ones(2)}, "weight_scale must have 1 or 6 elements, got 2"),
        ({"weight_scale": torch.ones(3), "segments": (2, 4)}, "weight_scale must have 2 elements, got 3"),
        ({"weight_scale": -scale}, "weight_scale must be finite and >= 0"),
        ({"bias": torch.zeros(5)}, r"bias must be float32 of shape \(6,\)"),
        ({"norm_weight": torch.ones(6)}, r"norm_weight must be float32 of shape \(10,\)"),
    ):
        with pytest.raises(ValueError, match=match):
            build(**changed)
    head = Int8Linear.from_linear(nn.Linear(4, 3))
    with pytest.raises(ValueError, match="weight_scale must be finite and >= 0"):
        Int8Linear(4, 3, head.codes, -head.weight_scale)
    state = head.state_dict()
    with pytest.raises(RuntimeError, match="weight_scale must be finite and >= 0"):
        head.load_state_dict(state | {"weight_scale": state["weight_scale"] * float("nan")})
    assert torch.isfinite(head.weight_scale).all()


CONFIG = BitNetConfig(
    vocab_size=67, hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=1, intermediate_size=48
)


@pytest.mark.parametrize("head", ["keep", "int8"])
@pytest.mark.parametrize("way", ["assign", "to_empty"])
def test_a_model_packed_on_meta_takes_a_packed_state(head: str, way: str) -> None:
    source = pack_model(BitNetForCausalLM(CONFIG, seed=0), head=head)
    with torch.device("meta"):
        skeleton = BitNetForCausalLM(CONFIG)
    model = pack_model(skeleton, inplace=True, head=head)
    for key, value in model.state_dict().items():
        expected = source.state_dict()[key]
        assert value.is_meta and value.shape == expected.shape and value.dtype == expected.dtype, key
    if way == "to_empty":
        model.to_empty(device="cpu")
    model.load_state_dict(source.state_dict(), assign=way == "assign")
    model.cos, model.sin = source.cos, source.sin  # tables, which no state_dict holds
    ids = torch.arange(9)[None]
    assert torch.equal(model(ids), source(ids))


def test_packed_layers_give_shapes_on_meta() -> None:
    layer = pack_model(BitLinear(66, 48, norm=True).to("meta"))
    head = Int8Linear.from_linear(nn.Linear(48, 7, device="meta"))
    for x in (torch.empty(2, 3, 66, device="meta"), torch.empty(2, 3, 66, device="meta", requires_grad=True)):
        y = head(layer(x))
        assert y.is_meta and y.shape == (2, 3, 7) and y.dtype == torch.float32
        assert y.requires_grad == x.requires_grad


@pytest.mark.parametrize("norm", [False, True])
def test_the_training_form_gives_shapes_on_meta(norm: bool) -> None:
    layer = BitLinear(66, 48, norm=norm, device="meta")
    x = torch.empty(2, 3, 66, device="meta", requires_grad=True)
    y = layer(x)
    assert y.is_meta and y.shape == (2, 3, 48) and y.dtype == torch.float32
    y.sum().backward()
    assert x.grad.shape == x.shape and layer.weight.grad.shape == (48, 66)
    with torch.device("meta"):
        model = BitNetForCausalLM(CONFIG)
    assert model(torch.zeros(2, 9, dtype=torch.int64, device="meta")).shape == (2, 9, CONFIG.vocab_size)


def test_the_float_weight_of_a_packed_layer() -> None:
    """Shape, dtype and device can be asked for; whatever computes with the values gets one sentence."""
    layers = PackedBitLinear.from_bit_linear(BitLinear(10, 6)), Int8Linear.from_linear(nn.Linear(10, 6))
    for layer in layers:
        weight = layer.weight
        assert weight.shape == (6, 10) and weight.dtype == torch.float32 and weight.device.type == "cpu"
        assert layer.bfloat16().weight.dtype == torch.bfloat16
        assert weight.numel() == 60 and not isinstance(weight, Tensor)
        name = type(layer).__name__
        with pytest.raises(
            TypeError, match=rf"linear: the weight of a {name} is packed and has no float values"
        ):
            nn.functional.linear(torch.ones(1, 10), layer.weight)
        with pytest.raises(AttributeError, match=rf"t: the weight of a {name} is packed"):
            layer.weight.t()
        assert copy.deepcopy(layer).weight.shape == (6, 10)
