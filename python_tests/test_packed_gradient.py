"""Gradients through packed layers: those of the training form, to the input, the bias and the norm's gain."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from bitnet_ext import ops
from bitnet_ext.models import BitNetConfig, BitNetForCausalLM
from bitnet_ext.nn import BitLinear, Int8Linear, PackedBitLinear, pack_model
from bitnet_ext.ops.packed_linear import _SLAB_WEIGHTS, _int8_input_grad, packed_linear

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm", [True, False])
def test_gradients_are_those_of_the_training_form(device: str, dtype: torch.dtype, norm: bool) -> None:
    torch.manual_seed(0)
    layer = BitLinear(257, 65, bias=True, norm=norm).to(device)
    packed = PackedBitLinear.from_bit_linear(layer)
    for buffer in (packed.bias, packed.norm_weight):
        if buffer is not None:
            buffer.requires_grad_()
    data, grad = torch.randn(3, 5, 257, device=device, dtype=dtype), torch.randn(3, 5, 65, device=device)
    results = []
    for module in (layer, packed):
        x = data.clone().requires_grad_()
        y = module(x)
        y.backward(grad.to(dtype))
        gain = None if module.norm_weight is None else module.norm_weight.grad
        results.append((y.detach(), x.grad, module.bias.grad, gain))
    for got, expected in zip(*results, strict=True):
        assert (got is None) == (expected is None)
        assert got is None or torch.equal(got, expected)
    with torch.no_grad():
        assert torch.equal(packed(data), results[0][0])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bias", [True, False])
def test_scales_of_rows_and_of_segments(device: str, bias: bool) -> None:
    torch.manual_seed(0)
    N, K = 12, 37
    codes = torch.randint(-1, 2, (N, K), dtype=torch.int8)
    add = torch.randn(N, device=device) if bias else None
    for scale, segments in ((torch.rand(N), ()), (torch.rand(2), (5, 7))):
        layer = PackedBitLinear(
            K, N, ops.pack_ternary(codes).to(device), scale.to(device), add, segments=segments
        )
        rows = scale if not segments else scale.repeat_interleave(torch.tensor(segments))
        weight = codes * rows[:, None]
        x = torch.randn(4, K, device=device)
        served = layer(x)
        x.requires_grad_()
        y = layer(x)
        assert torch.equal(y, served)
        grad = torch.randn(4, N)
        y.backward(grad.to(device))
        torch.testing.assert_close(x.grad.cpu(), grad @ weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
def test_autocast(device: str) -> None:
    torch.manual_seed(0)
    layer = BitLinear(64, 32, norm=True).to(device)
    results = []
    for module in (layer, PackedBitLinear.from_bit_linear(layer)):
        x = torch.linspace(-1, 2, 8 * 64, device=device).view(8, 64).requires_grad_()
        with torch.autocast(device, dtype=torch.bfloat16):
            y = module(x)
        assert y.dtype == torch.bfloat16
        y.float().square().sum().backward()
        assert x.grad is not None and x.grad.dtype == torch.float32
        results.append(x.grad)
    assert torch.equal(*results)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bias", [True, False])
def test_int8_layer(device: str, bias: bool) -> None:
    torch.manual_seed(0)
    head = Int8Linear.from_linear(nn.Linear(37, 130, bias=bias).to(device))
    if head.bias is not None:
        head.bias.requires_grad_()
    x = torch.randn(2, 3, 37, device=device)
    with torch.no_grad():
        served = head(x)
    x.requires_grad_()
    y = head(x)
    assert torch.equal(y, served)
    grad = torch.randn(2, 3, 130, device=device)
    y.backward(grad)
    weight = head.codes.double() * head.weight_scale.double()[:, None]
    torch.testing.assert_close(x.grad.double(), grad.double() @ weight, rtol=1e-5, atol=1e-6)
    if head.bias is not None:
        torch.testing.assert_close(head.bias.grad, grad.sum((0, 1)))


def test_int8_weights_are_widened_in_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    codes, scale = torch.randint(-127, 128, (50, 9), dtype=torch.int8), torch.rand(50)
    grad = torch.randn(4, 50)
    whole = _int8_input_grad(grad, codes, scale, 9)
    assert codes.numel() <= _SLAB_WEIGHTS
    monkeypatch.setattr("bitnet_ext.ops.packed_linear._SLAB_WEIGHTS", 9 * 7)
    torch.testing.assert_close(_int8_input_grad(grad, codes, scale, 9), whole, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["packed", "int8"])
def test_compile_fullgraph_equals_eager(device: str, kind: str) -> None:
    torch.manual_seed(0)
    layer: nn.Module
    if kind == "packed":
        layer = PackedBitLinear.from_bit_linear(BitLinear(48, 24, bias=True, norm=True).to(device))
    else:
        layer = Int8Linear.from_linear(nn.Linear(48, 24).to(device))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    results = []
    for module in (layer, compiled):
        x = torch.linspace(-1, 2, 5 * 48, device=device).view(5, 48).requires_grad_()
        y = module(x)
        y.square().sum().backward()
        results.append((y.detach(), x.grad))
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1])


def test_export_and_copies() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), BitLinear(32, 48, norm=True), nn.ReLU())
    model.add_module("lm_head", nn.Linear(48, 20))
    packed = pack_model(model, head="int8")
    x = torch.randn(3, 32)
    expected = packed(x)
    assert torch.equal(torch.export.export(packed, (x,)).module()(x), expected)
    assert torch.equal(copy.deepcopy(packed)(x), expected)


class LoRA(nn.Module):
    """A base layer and a low-rank part that trains."""

    def __init__(self, base: nn.Module, rank: int = 4) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def add_lora(model: nn.Module) -> nn.Module:
    torch.manual_seed(5)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if name in ("o_proj", "lm_head") and not isinstance(parent, LoRA):
                setattr(parent, name, LoRA(child))
    return model


@pytest.mark.parametrize(
    "settings", [{}, {"pre_linear_norm": True}, {"activation": "silu", "sub_norm": False}]
)
def test_lora_on_a_packed_model(settings: dict[str, object]) -> None:
    """The low-rank parts of a packed model get the gradients of the training form, and learn."""
    config = BitNetConfig(
        vocab_size=67,
        hidden_size=32,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        intermediate_size=48,
        **settings,
    )
    base = BitNetForCausalLM(config, seed=0)
    model, packed = add_lora(copy.deepcopy(base)), add_lora(pack_model(base))
    ids = torch.randint(0, 67, (2, 9), generator=torch.Generator().manual_seed(1))

    def loss_of(m: nn.Module) -> Tensor:
        return nn.functional.cross_entropy(m(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())

    for m in (model, packed):
        m.embed_tokens.weight.requires_grad_()
        m.final_norm.weight.requires_grad_()
        m.layers[0].attention_norm.weight.requires_grad_()
        loss_of(m).backward()
    expected = dict(model.named_parameters())
    trained = [name for name, p in packed.named_parameters() if p.requires_grad]
    assert len(trained) == 9  # three low-rank pairs, the embedding and two norms
    for name in trained:
        got = dict(packed.named_parameters())[name].grad
        torch.testing.assert_close(
            got, expected[name].grad, rtol=1e-4, atol=1e-6, msg=lambda s, n=name: f"{n}: {s}"
        )
    optimizer = torch.optim.Adam([p for p in packed.parameters() if p.requires_grad], lr=1e-2)
    first = loss_of(packed).item()
    for _ in range(8):
        optimizer.zero_grad()
        loss = loss_of(packed)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.9 * first


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device: str) -> None:
    """The training operators with a stand-in for the latent weight, of which they read only the shape."""
    torch.manual_seed(0)
    layer = PackedBitLinear.from_bit_linear(BitLinear(37, 12, bias=True, norm=True).to(device))
    x = torch.randn(2, 5, 2 * 37, device=device, requires_grad=True)
    latent = x.new_empty((1, 1)).expand(12, 37)
    weight = (layer._weight, layer.weight_scale.reshape(1), layer.bias, layer.norm_weight, 1e-5, True)
    check = torch.library.opcheck
    ends = (None, 0.0, torch.float32, "exact")
    half = x[..., :37].detach().clone().requires_grad_()
    check(torch.ops.bitnet_ext.bit_linear.default, (half, None, [latent], *weight, *ends))
    check(torch.ops.bitnet_ext.glu_bit_linear.default, (x, latent, *weight, "relu2", torch.float32, "exact"))


def test_no_graph_without_need() -> None:
    layer = PackedBitLinear.from_bit_linear(BitLinear(16, 8))
    x = torch.randn(2, 16)
    assert not layer(x).requires_grad
    with torch.no_grad():
        assert not layer(x.requires_grad_()).requires_grad
    y = packed_linear(
        x, layer.packed, layer.weight_scale, out_features=8, bias=torch.zeros(8), out_dtype=torch.float32
    )
    assert y.requires_grad and torch.equal(y, layer(x))
