"""Converted and packed models of transformers: saved by transformers and loaded as what they were."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from bitnet_ext.formats import FormatError
from bitnet_ext.nn import BitLinear, Int8Linear, PackedBitLinear, convert_linear, pack_model
from bitnet_ext.nn.convert_marker import mark_conversion

transformers = pytest.importorskip("transformers", minversion="5.0")
bitnet_transformers = pytest.importorskip("bitnet_ext.formats.transformers")

IDS = torch.arange(20).reshape(2, 10)
SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 50,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def llama(dtype: torch.dtype = torch.float32, folder: Path | None = None, **changes: Any) -> Any:
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SIZES, **changes}))
    if dtype != torch.float32:
        # By its own loading: a cast would also round the rotary table of transformers.
        assert folder is not None
        model.save_pretrained(folder)
        model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=dtype)
    return model.eval()


def qwen(**changes: Any) -> Any:
    torch.manual_seed(0)
    return transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(**{**SIZES, "head_dim": 24, **changes})
    ).eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(IDS)[0]


def reload(model: Any, folder: Path, **kwargs: Any) -> Any:
    model.save_pretrained(folder)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **kwargs)


def kinds(model: nn.Module) -> list[type[nn.Module]]:
    return [type(module) for module in model.modules()]


@pytest.mark.parametrize("form", ["training", "packed", "int8"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm", [False, True])
def test_round_trip(form: str, tied: bool, dtype: torch.dtype, norm: bool, tmp_path: Path) -> None:
    made = llama(dtype, tmp_path / "float", tie_word_embeddings=tied, attention_bias=True)
    model = convert_linear(made, norm=norm)
    if form != "training":
        model = pack_model(model, head="int8" if form == "int8" else "keep")
    loaded = reload(model, tmp_path / "model")
    assert torch.equal(logits(loaded), logits(model))
    assert kinds(loaded) == kinds(model)
    own, again = model.state_dict(), loaded.state_dict()
    assert own.keys() == again.keys()
    assert all(torch.equal(value, again[name]) for name, value in own.items())
    # And again, from what was loaded; and packed after loading.
    assert torch.equal(logits(reload(loaded, tmp_path / "again")), logits(model))
    if form == "training":
        packed = reload(pack_model(loaded), tmp_path / "packed")
        assert torch.equal(logits(packed), logits(model))
        assert isinstance(packed.model.layers[0].mlp.up_proj, PackedBitLinear)


def test_other_architectures_and_options(tmp_path: Path) -> None:
    model = convert_linear(qwen(), skip=("lm_head", "model.layers.1.mlp.up_proj", "v_proj"))
    loaded = reload(model, tmp_path / "qwen")
    assert torch.equal(logits(loaded), logits(model)) and kinds(loaded) == kinds(model)
    assert type(loaded.model.layers[1].mlp.up_proj) is nn.Linear
    assert type(loaded.model.layers[0].mlp.up_proj) is BitLinear
    # Other norm_eps, one layer more later, and full precision.
    convert_linear(model, skip=("lm_head", "v_proj"), norm=True)
    convert_linear(model, quantization="none")
    model.model.layers[0].mlp.up_proj.norm_eps = 1e-3
    mark_conversion(model)
    loaded = reload(model, tmp_path / "mixed")
    assert torch.equal(logits(loaded), logits(model)) and kinds(loaded) == kinds(model)


def test_gpt2_whose_layers_are_transposed(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=97, n_positions=16, n_embd=24, n_layer=2, n_head=2)
    ).eval()
    for name, module in list(model.named_modules()):
        if type(module).__name__ == "Conv1D":
            layer = BitLinear(*module.weight.shape, bias=True)
            layer.weight = nn.Parameter(module.weight.detach().t().contiguous())
            layer.bias = module.bias
            model.set_submodule(name, layer)
    mark_conversion(model)
    loaded = reload(model, tmp_path / "training")
    assert torch.equal(logits(loaded), logits(model)) and kinds(loaded) == kinds(model)
    packed = pack_model(model)
    assert torch.equal(logits(reload(packed, tmp_path / "packed")), logits(packed))


def test_the_model_without_its_head(tmp_path: Path) -> None:
    model = pack_model(convert_linear(llama()), head="int8")
    model.save_pretrained(tmp_path / "model")
    base = transformers.AutoModel.from_pretrained(tmp_path / "model")
    assert isinstance(base.layers[1].mlp.up_proj, PackedBitLinear)
    assert torch.equal(logits(base), logits(model.model))


def test_no_float_weights_of_packed_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # in this thread, which is watched
    model = pack_model(convert_linear(llama(vocab_size=8)))
    model.save_pretrained(tmp_path)
    made = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.is_floating_point() and not result.is_meta:
                made.append(tuple(result.shape))
            return result

    with Watch():
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not {(50, 32), (32, 50), (32, 32), (16, 32)} & set(made)


def test_another_dtype_keeps_scales_and_codes(tmp_path: Path) -> None:
    model = pack_model(convert_linear(llama()))
    loaded = reload(model, tmp_path, dtype=torch.bfloat16)
    layer, own = loaded.model.layers[0].mlp.up_proj, model.model.layers[0].mlp.up_proj
    assert layer.weight_scale.dtype == torch.float32 and torch.equal(layer.weight_scale, own.weight_scale)
    assert torch.equal(layer.packed, own.packed)
    assert loaded.model.embed_tokens.weight.dtype == torch.bfloat16


def test_a_loaded_model_trains_and_a_packed_one_does_not(tmp_path: Path) -> None:
    model = convert_linear(llama())
    loaded = reload(model, tmp_path / "training")
    for each in (model, loaded):
        each.train()
        optimizer = torch.optim.SGD(each.parameters(), lr=0.1)
        each(IDS, labels=IDS).loss.backward()
        optimizer.step()
        each.eval()
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.hf_quantizer.is_trainable and loaded.hf_quantizer.is_qat_trainable
    packed = reload(pack_model(loaded), tmp_path / "packed")
    assert not packed.hf_quantizer.is_trainable
    assert not any(parameter.requires_grad for parameter in packed.parameters())
    out = packed.generate(IDS, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert out.shape == (2, 13)


def test_shards(tmp_path: Path) -> None:
    model = pack_model(convert_linear(llama(num_hidden_layers=3)), head="int8")
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert torch.equal(logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


def edit(folder: Path, change: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q: q.update(version=2), "has version 2, this version reads 1"),
        (lambda q: q.update(layers="all"), "is damaged: layers has the entry None"),
        (lambda q: q.update(layers=[3]), "is damaged: layers has the entry 3"),
        (lambda q: q["layers"][0].update(kind="quaternary"), "is damaged: layers has the entry"),
        (lambda q: q["layers"][0].update(names="x"), "is damaged: layers has the entry"),
        (lambda q: q["layers"][0].update(names=["model.norm"]), "names model.norm, which is a LlamaRMSNorm"),
        (
            lambda q: q["layers"][0]["names"].append("model.layers.7.q"),
            r"names model\.layers\.7\.q, LlamaForCausalLM",
        ),
        (lambda q: q["layers"].clear(), "names no layer"),
        (lambda q: q["layers"][0].pop("scale_shape"), "is damaged at model.layers.0"),
        (lambda q: q["layers"][0].update(segments=[1, 2]), r"segments|weight_scale must have 2 elements"),
    ],
)
def test_damaged_notes(change: Any, message: str, tmp_path: Path) -> None:
    pack_model(convert_linear(llama())).save_pretrained(tmp_path)
    edit(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
        logits(loaded)


@pytest.mark.parametrize("damage", ["packed", "weight_scale", "code", "scale"])
def test_damaged_tensors(damage: str, tmp_path: Path) -> None:
    pack_model(convert_linear(llama())).save_pretrained(tmp_path)
    path, layer = tmp_path / "model.safetensors", "model.layers.0.mlp.up_proj"
    tensors = {name: value.clone() for name, value in safetensors.torch.load_file(path).items()}
    if damage == "code":
        tensors[f"{layer}.packed"][0, 0] = 3
    elif damage == "scale":
        tensors[f"{layer}.weight_scale"].fill_(float("inf"))
    else:
        del tensors[f"{layer}.{damage}"]
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(FormatError, match=r"the checkpoint is damaged: model\.layers\.0\.mlp\.up_proj"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


def test_without_the_import_transformers_warns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What a user sees who forgot the import; should transformers refuse one day, this test says so."""
    convert_linear(llama()).save_pretrained(tmp_path)
    auto = transformers.quantizers.auto
    monkeypatch.delitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "bitnet_ext")
    monkeypatch.delitem(auto.AUTO_QUANTIZER_MAPPING, "bitnet_ext")
    logger = logging.getLogger("transformers")
    monkeypatch.setattr(logger, "propagate", True)
    with caplog.at_level(logging.WARNING, logger="transformers"):
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert "Unknown quantization type, got bitnet_ext" in caplog.text
    assert type(loaded.model.layers[0].mlp.up_proj) is nn.Linear


def test_there_is_no_dequantized_form(tmp_path: Path) -> None:
    loaded = reload(pack_model(convert_linear(llama()), head="int8"), tmp_path)
    assert isinstance(loaded.lm_head, Int8Linear)
    with pytest.raises(ValueError, match="has no dequantized form"):
        loaded.dequantize()
    with pytest.raises(ValueError, match="pre-quantized"):
        llama().save_pretrained(tmp_path / "float")
        transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "float", quantization_config=bitnet_transformers.BitNetExtConfig()
        )
