"""What a converted model's configuration says of its layers, with a stand-in for the configuration of transformers."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn

from bitnet_ext.models import BitNetForCausalLM, preset
from bitnet_ext.nn import BitLinear, convert_linear, pack_model
from bitnet_ext.nn.convert_marker import describe_layers, mark_conversion, marked_names, wildcard


class Config:
    """As far as conversion looks at a configuration of transformers."""

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


class Block(nn.Module):
    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.up = nn.Linear(8, 12, bias=bias)
        self.down = nn.Linear(12, 8)


class Network(nn.Module):
    def __init__(self, config: Any, blocks: int = 3) -> None:
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleList(Block(bias=i == 2) for i in range(blocks))
        self.lm_head = nn.Linear(8, 16, bias=False)


def test_a_converted_model_says_what_was_converted() -> None:
    model = convert_linear(Network(Config()))
    marker = json.loads(json.dumps(model.config.to_dict()["quantization_config"]))
    assert {key: marker[key] for key in ("quant_method", "version", "form")} == {
        "quant_method": "bitnet_ext",
        "version": 1,
        "form": "training",
    }
    # The third block's `up` has a bias, so that these names are not all alike.
    assert marker["layers"] == [
        {"kind": "ternary", "bias": False, "norm_eps": None, "names": ["blocks.0.up", "blocks.1.up"]},
        {"kind": "ternary", "bias": True, "norm_eps": None, "names": ["blocks.*.down", "blocks.2.up"]},
    ]


def test_a_packed_model_says_so_and_the_original_does_not() -> None:
    model = convert_linear(Network(Config()), norm=True, skip=("down", "lm_head"))
    packed = pack_model(model, head="int8")
    assert model.config.quantization_config["form"] == "training"
    marker = packed.config.quantization_config
    assert marker["form"] == "packed"
    found = dict(marked_names(marker))
    assert found["blocks.0.up"]["kind"] == "packed" and found["blocks.0.up"]["norm_eps"] == 1e-5
    assert found["blocks.0.up"]["scale_shape"] == [] and found["lm_head"]["kind"] == "int8"
    assert not [name for name in found if "down" in name]


def test_a_second_conversion_adds_to_the_first() -> None:
    model = convert_linear(Network(Config()), skip=("down", "lm_head"))
    convert_linear(model, norm=True, quantization="none")
    kinds = {name: (what["kind"], what["norm_eps"]) for name, what in marked_names(describe_layers(model))}
    assert kinds == {
        "blocks.0.up": ("ternary", None),
        "blocks.1.up": ("ternary", None),
        "blocks.2.up": ("ternary", None),
        "blocks.*.down": ("float", 1e-5),
    }


def test_models_without_such_a_configuration() -> None:
    for config in (None, "a text", {"hidden_size": 8}, object()):
        convert_linear(Network(config))
    # One of this package says by itself what its layers are.
    model = pack_model(BitNetForCausalLM(preset("collapse-64", vocab_size=50), seed=0))
    assert not hasattr(model.config, "quantization_config")


@pytest.mark.parametrize("other", [{"quant_method": "gptq"}, type("Gptq", (), {"quant_method": "gptq"})()])
def test_the_note_of_another_library_stays(other: Any) -> None:
    config = Config()
    config.quantization_config = other  # type: ignore[attr-defined]
    convert_linear(Network(config))
    assert config.quantization_config is other  # type: ignore[attr-defined]


def test_names_with_numbers() -> None:
    assert wildcard("model.layers.12.q_proj") == "model.layers.*.q_proj"
    assert wildcard("h.0.mlp.1") == "h.*.mlp.*" and wildcard("12") == "*"
    assert wildcard("fc1.w2v") == "fc1.w2v"


def test_unconverted_layers_of_like_names_are_not_meant() -> None:
    model = Network(Config())
    model.blocks[0].up = BitLinear(8, 12)
    model.blocks[1].up = BitLinear(8, 12)  # not blocks.2.up
    mark_conversion(model)
    assert [name for name, _ in marked_names(model.config.quantization_config)] == [
        "blocks.0.up",
        "blocks.1.up",
    ]
    assert not torch.is_grad_enabled() or model.blocks[0].up.weight.requires_grad
