"""The transformer: sizes, twins, packing, caching, generation, conversion of foreign models."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch.nn import functional as F

from bitnet_ext.inference import generate
from bitnet_ext.models import PRESETS, BitNetConfig, BitNetForCausalLM, KVCache, preset
from bitnet_ext.models.transformer import rotary_table
from bitnet_ext.nn import BitLinear, PackedBitLinear, convert_linear, pack_model
from bitnet_ext.testing.twin import TwinModel

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SMALL = preset("collapse-64", vocab_size=211)
GROUPED = BitNetConfig(
    vocab_size=211,
    hidden_size=48,
    num_layers=2,
    num_heads=6,
    num_kv_heads=2,
    intermediate_size=100,
    max_seq_len=64,
    activation="silu",
    tie_embeddings=True,
)


def ids(*shape: int, device: str = "cpu", vocab: int = 211) -> torch.Tensor:
    return torch.randint(0, vocab, shape, generator=torch.Generator().manual_seed(1)).to(device)


def test_the_report_network_has_the_report_sizes() -> None:
    with torch.device("meta"):
        counts = BitNetForCausalLM(preset("collapse-256")).num_parameters()
    assert counts == {"total": 28_360_448, "ternary": 2_621_440, "embedding": 25_731_584, "gains": 7_424}


def test_2b4t_sizes() -> None:
    with torch.device("meta"):
        counts = BitNetForCausalLM(preset("bitnet-b1.58-2b-4t")).num_parameters()
    per_layer = 2 * 2560 * 2560 + 2 * 2560 * 640 + 3 * 2560 * 6912
    assert counts["ternary"] == 30 * per_layer == 2_084_044_800
    assert counts["embedding"] == 128256 * 2560


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_preset_builds(name: str) -> None:
    with torch.device("meta"):
        model = BitNetForCausalLM(preset(name))
    assert model.num_parameters()["ternary"] > 0


@pytest.mark.parametrize("config", [SMALL, GROUPED], ids=["collapse", "grouped"])
def test_twins_share_their_initialisation(config: BitNetConfig) -> None:
    ternary = BitNetForCausalLM(config, seed=3)
    twin = BitNetForCausalLM(dataclasses.replace(config, quantization="none"), seed=3)
    other = BitNetForCausalLM(config, seed=4)
    for (name, p), (twin_name, q) in zip(ternary.named_parameters(), twin.named_parameters(), strict=True):
        assert name == twin_name and torch.equal(p, q)
    assert not torch.equal(ternary.embed_tokens.weight, other.embed_tokens.weight)
    assert not torch.equal(ternary(ids(1, 8)), twin(ids(1, 8)))
    assert twin.num_parameters()["ternary"] == 0


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("config", [SMALL, GROUPED], ids=["collapse", "grouped"])
def test_packed_logits_equal_training_logits(config: BitNetConfig, device: str) -> None:
    model = BitNetForCausalLM(config, seed=0).to(device)
    packed = pack_model(model)
    assert any(isinstance(m, PackedBitLinear) for m in packed.modules())
    assert not any(isinstance(m, BitLinear) for m in packed.modules())
    assert any(isinstance(m, BitLinear) for m in model.modules())  # the original is left as it was
    assert torch.equal(packed(ids(3, 17, device=device)), model(ids(3, 17, device=device)))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("config", [SMALL, GROUPED], ids=["collapse", "grouped"])
@pytest.mark.parametrize("mode", ["autocast", "bfloat16"])
def test_packed_logits_equal_training_logits_in_16_bits(config: BitNetConfig, device: str, mode: str) -> None:
    model = BitNetForCausalLM(config, seed=0).to(device)
    if mode == "bfloat16":
        model = model.bfloat16()
    packed = pack_model(model)
    tokens = ids(3, 17, device=device)
    with torch.no_grad(), torch.autocast(device, dtype=torch.bfloat16, enabled=mode == "autocast"):
        assert torch.equal(packed(tokens), model(tokens))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("config", [SMALL, GROUPED], ids=["collapse", "grouped"])
@pytest.mark.parametrize("autocast", [False, True])
def test_training_under_compile_equals_eager(config: BitNetConfig, device: str, autocast: bool) -> None:
    model = BitNetForCausalLM(config, seed=0).to(device)
    tokens = ids(2, 9, device=device)
    results = []
    # aot_eager traces forward and backward whole without needing a compiler on the machine.
    for function in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        with torch.autocast(device, dtype=torch.bfloat16, enabled=autocast):
            logits = function(tokens)
        logits.float().square().mean().backward()
        results.append([logits.detach(), *(p.grad.clone() for p in model.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("config", [SMALL, GROUPED], ids=["collapse", "grouped"])
def test_gradients_are_those_of_the_plain_network(config: BitNetConfig, device: str) -> None:
    """Fake quantisation in plain PyTorch differs by the rounding of a few activations, no more."""
    model = BitNetForCausalLM(config, seed=0).to(device)
    twin = TwinModel(config).to(device).load_from(model)
    tokens = ids(2, 16, device=device)
    for network in (model, twin):
        logits = network(tokens)
        F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    for name, parameter in model.named_parameters():
        name = name.replace("_proj.norm_weight", "_norm.weight")
        expected = twin.get_parameter(name).grad
        similarity = F.cosine_similarity(parameter.grad.flatten(), expected.flatten(), dim=0)
        assert similarity > 0.99, (name, similarity)


@pytest.mark.parametrize("config", [SMALL, GROUPED], ids=["collapse", "grouped"])
def test_the_future_does_not_leak(config: BitNetConfig) -> None:
    model = BitNetForCausalLM(config, seed=0)
    tokens = ids(2, 12)
    changed = tokens.clone()
    changed[:, 8:] = (changed[:, 8:] + 1) % 211
    assert torch.equal(model(tokens)[:, :8], model(changed)[:, :8])
    assert not torch.equal(model(tokens)[:, 8:], model(changed)[:, 8:])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("config", [SMALL, GROUPED], ids=["collapse", "grouped"])
def test_cache_equals_whole_forward(config: BitNetConfig, device: str) -> None:
    model = BitNetForCausalLM(dataclasses.replace(config, quantization="none"), seed=0).to(device).eval()
    tokens = ids(2, 15, device=device)
    cache = KVCache(config, 2, 15, device=device)
    with torch.no_grad():
        whole = model(tokens)
        parts = [model(tokens[:, a:b], cache) for a, b in ((0, 6), (6, 7), (7, 12), (12, 15))]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="room for 15 tokens"):
        model(tokens[:, :1], cache)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("packed", [False, True])
def test_generate(device: str, packed: bool) -> None:
    model = BitNetForCausalLM(GROUPED, seed=0).to(device)
    if packed:
        model = pack_model(model)
    prompt = ids(3, 5, device=device)
    greedy = generate(model, prompt, 7)
    assert greedy.shape == (3, 12) and torch.equal(greedy[:, :5], prompt)
    assert torch.equal(greedy, generate(model, prompt, 7))
    sampled = generate(model, prompt, 7, temperature=1.0, top_k=20, top_p=0.9, seed=5)
    assert torch.equal(sampled, generate(model, prompt, 7, temperature=1.0, top_k=20, top_p=0.9, seed=5))
    assert torch.equal(generate(model, prompt, 7, temperature=1.0, top_k=1), greedy)
    assert torch.equal(generate(model, prompt, 0), prompt)
    seen: list[torch.Tensor] = []
    eos = int(greedy[0, 5])
    ended = generate(model, prompt[:1], 7, eos_id=eos, on_token=seen.append)
    assert ended.shape == (1, 6) and len(seen) == 1


def test_generate_keeps_the_mode_and_refuses_bad_input() -> None:
    model = BitNetForCausalLM(GROUPED, seed=0).train()
    generate(model, ids(1, 3), 1)
    assert model.training
    for arguments, match in (
        ({"prompt": ids(3)}, "prompt must be int64"),
        ({"max_new_tokens": 100}, "max_seq_len is 64"),
        ({"temperature": -1.0}, "temperature must be >= 0"),
        ({"top_p": 0.0}, "top_p must be in"),
        ({"top_k": 0}, "top_k must be >= 1"),
        ({"prompt": torch.full((1, 2), 211)}, r"ids in 0\.\.210"),
    ):
        call = {"prompt": ids(1, 3), "max_new_tokens": 2} | arguments
        with pytest.raises(ValueError, match=match):
            generate(model, call.pop("prompt"), call.pop("max_new_tokens"), **call)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("quantization", ["b1.58", "none"])
def test_a_model_cast_to_bfloat16_runs(device: str, quantization: str) -> None:
    model = BitNetForCausalLM(dataclasses.replace(GROUPED, quantization=quantization), seed=0).to(device)
    expected = model(ids(2, 9, device=device))
    if quantization == "b1.58":
        packed = pack_model(model).bfloat16()
        layer, original = (m.layers[0].attention.o_proj for m in (packed, pack_model(model)))
        assert torch.equal(layer.weight_scale, original.weight_scale)  # the ternary weights are not rounded
        assert torch.equal(layer.norm_weight, original.norm_weight)
        assert packed(ids(2, 9, device=device)).dtype == torch.bfloat16
    cast = model.bfloat16()(ids(2, 9, device=device))
    assert cast.dtype == torch.bfloat16
    similarity = torch.nn.functional.cosine_similarity(cast.float().flatten(), expected.flatten(), dim=0)
    assert similarity > (0.99 if quantization == "none" else 0.8)  # bf16 latents move some codes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_cast_leaves_the_rotary_table_exact(dtype: torch.dtype) -> None:
    model = BitNetForCausalLM(GROUPED, seed=0)
    cos, sin = rotary_table(model.config)
    inside = torch.nn.Sequential(copy.deepcopy(model)).to(dtype)[0]
    for cast in (copy.deepcopy(model).to(dtype), copy.deepcopy(model).to("cpu", dtype), inside):
        assert cast.embed_tokens.weight.dtype == dtype
        assert torch.equal(cast.cos, cos) and torch.equal(cast.sin, sin) and cast.cos.dtype == torch.float32
    moved = copy.deepcopy(model).to("meta", dtype)
    assert moved.cos.is_meta and moved.sin.is_meta and moved.cos.dtype == torch.float32


def test_convert_and_pack_a_foreign_model() -> None:
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.0)
    model = torch.nn.ModuleDict({"encoder": layer, "lm_head": torch.nn.Linear(32, 50)})
    weight = layer.linear1.weight
    convert_linear(model, skip=("lm_head", "out_proj"))
    assert isinstance(layer.linear1, BitLinear) and layer.linear1.weight is weight
    assert type(model["lm_head"]) is torch.nn.Linear
    x = torch.randn(2, 5, 32)
    layer.train()  # the eval fast path of torch reads the weights itself
    expected = layer(x)
    expected.sum().backward()
    assert weight.grad is not None
    packed = pack_model(model)
    packed["encoder"].train()
    # Close, not equal: torch's attention takes another path for weights without a gradient.
    torch.testing.assert_close(packed["encoder"](x), expected)
    assert torch.equal(packed["encoder"].linear1(x), layer.linear1(x))
    assert isinstance(convert_linear(torch.nn.Linear(4, 4)), BitLinear)
    with pytest.raises(ValueError, match=r"must hold an nn\.Linear"):
        convert_linear(torch.nn.ReLU())
    with pytest.raises(ValueError, match="must hold a quantised BitLinear"):
        pack_model(torch.nn.Linear(3, 3))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("packed", [False, True])
def test_tracing_is_refused_in_one_sentence(packed: bool) -> None:
    for module, x in ((BitNetForCausalLM(GROUPED, seed=0), ids(1, 5)), (BitLinear(32, 8), torch.ones(2, 32))):
        with pytest.raises(RuntimeError, match=r"torch\.jit\.trace .* not supported; use torch\.export"):
            torch.jit.trace(pack_model(module) if packed else module, x)


def test_packing_refuses_nan() -> None:
    layer = BitLinear(8, 8)
    with torch.no_grad():
        layer.weight[2, 3] = float("nan")
    with pytest.raises(ValueError, match="holds NaN or Inf"):
        pack_model(torch.nn.Sequential(layer))


def test_a_packed_model_survives_its_state_dict() -> None:
    model = BitNetForCausalLM(GROUPED, seed=0)
    packed, other = pack_model(model), pack_model(BitNetForCausalLM(GROUPED, seed=1))
    other.load_state_dict(packed.state_dict())
    assert torch.equal(other(ids(1, 9)), packed(ids(1, 9)))
    ternary = model.num_parameters()["ternary"]
    stored = sum(m.packed.numel() for m in packed.modules() if isinstance(m, PackedBitLinear))
    assert stored == ternary / 4


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"hidden_size": 50, "num_heads": 4}, "multiple of 2"),
        ({"num_heads": 4, "num_kv_heads": 3}, "multiple of num_kv_heads"),
        ({"vocab_size": 0}, "vocab_size must be an integer >= 1"),
        ({"quantization": "int4"}, "quantization must be one of"),
        ({"activation": "gelu"}, "activation must be one of"),
    ],
)
def test_bad_configurations(settings: dict[str, object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        BitNetConfig(**settings)  # type: ignore[arg-type]


def test_bad_names_and_inputs() -> None:
    with pytest.raises(ValueError, match="name must be one of"):
        preset("bitnet-9000b")
    with pytest.raises(ValueError, match="unknown fields"):
        preset("collapse-64", widht=3)
    with pytest.raises(ValueError, match="unknown fields"):
        BitNetConfig.from_dict({"depth": 3})
    model = BitNetForCausalLM(GROUPED, seed=0)
    with pytest.raises(ValueError, match="input_ids must be int64"):
        model(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="max_seq_len = 64"):
        model(ids(1, 65))
