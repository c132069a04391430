"""The prepacked layout: its formula, conversions on both devices, and the layer that keeps its weights in it."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from bitnet_ext import ops
from bitnet_ext.models import BitNetConfig, BitNetForCausalLM
from bitnet_ext.nn import BitLinear, Int8Linear, PackedBitLinear, pack_model
from bitnet_ext.ops.packing import prepacked_codes_ref, prepacked_shape

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NS = [1, 15, 16, 17, 37, 256]
KS = [1, 3, 127, 128, 129, 255, 257, 1000, 2560]
raw = torch.ops.bitnet_ext


def random_codes(N: int, K: int, device: str = "cpu", low: int = -1, high: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * N + K)
    return torch.randint(low, high, (N, K), generator=generator, dtype=torch.int8).to(device)


def shifted(t: Tensor, elements: int) -> Tensor:
    """A contiguous copy of `t` that starts `elements` elements into its storage."""
    view = torch.empty(t.numel() + elements, dtype=t.dtype, device=t.device)[elements:].view(t.shape)
    return view.copy_(t)


def poison(like: Tensor) -> None:
    """Fills memory and frees it, so that the next result of this size starts as garbage."""
    block = torch.full_like(like.contiguous().view(-1).view(torch.uint8), 0xC5)
    del block


def formula(N: int, K: int) -> Any:
    """(block row, block column, lane, step, register, byte, row, column) of every weight: csrc/prepacked.h, word for
    word."""
    for n in range(N):
        for k in range(K):
            for register in range(4):
                row, column = n % 16 - 8 * (register % 2), k % 32 - 16 * (register // 2)
                if 0 <= row < 8 and 0 <= column < 16:
                    lane = 4 * row + column // 4
                    yield n // 16, k // 128, lane, k % 128 // 32, register, column % 4, n, k


# --- the layout ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("N", "K"), [(1, 1), (15, 3), (16, 128), (17, 127), (37, 129), (33, 300)])
def test_the_references_follow_the_formula(N: int, K: int) -> None:
    codes, wide = random_codes(N, K), random_codes(N, K, low=-128, high=128)
    words = torch.zeros(prepacked_shape(N, K), dtype=torch.int64)
    quads = torch.zeros(-(-N // 16), -(-K // 128), 4, 32, 4, 4, dtype=torch.int8)
    places = 0
    for block_row, block_col, lane, step, j, i, n, k in formula(N, K):
        pair = {0: 0b00, 1: 0b01, -1: 0b11}[int(codes[n, k])]
        words[block_row, block_col, lane, step] |= pair << (8 * i + 6 - 2 * j)
        quads[block_row, block_col, step, lane, j, i] = wide[n, k]
        places += 1
    assert places == N * K
    expected = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
    assert torch.equal(ops.prepack_ternary_ref(ops.pack_ternary(codes), K), expected)
    assert torch.equal(ops.prepack_int8_ref(wide), quads.view(torch.int32).squeeze(-1))


def test_one_shift_and_one_mask_give_a_register() -> None:
    """What the products do with a word: register j holds its four weights times 64."""
    codes = random_codes(16, 128)
    words = ops.prepack_ternary(ops.pack_ternary(codes), 128).view(32, 4).to(torch.int64)
    for j in range(4):
        register = ((words << 2 * j) & 0xC0C0C0C0).to(torch.uint32).view(torch.int8).view(32, 4, 4)
        for _, _, lane, step, at, i, n, k in formula(16, 128):
            if at == j:
                assert register[lane, step, i] == 64 * codes[n, k]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("K", KS)
@pytest.mark.parametrize("N", NS)
def test_round_trip(device: str, N: int, K: int) -> None:
    codes = random_codes(N, K, device)
    packed = ops.pack_ternary(codes)
    expected = ops.prepack_ternary_ref(packed, K)
    assert expected.dtype == torch.int32 and expected.shape == prepacked_shape(N, K)
    assert torch.equal(prepacked_codes_ref(expected, N, K), codes)
    assert torch.equal(ops.unprepack_ternary_ref(expected, N, K), packed)
    for shift in (0, 1, 4, 8):
        poison(expected)
        assert torch.equal(ops.prepack_ternary(shifted(packed, shift), K), expected)
        poison(packed)
        assert torch.equal(ops.unprepack_ternary(shifted(expected, shift), N, K), packed)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("K", KS)
@pytest.mark.parametrize("N", NS)
def test_int8(device: str, N: int, K: int) -> None:
    codes = random_codes(N, K, device, -128, 128)
    expected = ops.prepack_int8_ref(codes)
    assert expected.shape == (*prepacked_shape(N, K)[:2], 4, 32, 4)
    for shift in (0, 1, 2, 4):
        poison(expected)
        assert torch.equal(ops.prepack_int8(shifted(codes, shift)), expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("K", KS)
@pytest.mark.parametrize("N", [1, 17, 37, 256])
def test_dequantize(device: str, N: int, K: int, dtype: torch.dtype) -> None:
    codes = random_codes(N, K, device)
    packed = ops.pack_ternary(codes)
    prepacked = ops.prepack_ternary(packed, K)
    for scale in (torch.tensor(0.37, device=device), torch.linspace(-0.5, 1.5, N, device=device)):
        expected = (codes.float() * scale.view(-1, 1)).to(dtype)
        assert torch.equal(ops.dequantize_prepacked_ref(prepacked, scale, N, K, dtype), expected)
        for shift in (0, 1):
            poison(expected)
            got = ops.dequantize_prepacked(shifted(prepacked, shift), scale, N, K, dtype)
            assert got.dtype == dtype and torch.equal(got, expected)
        assert torch.equal(ops.dequantize_ternary(packed, scale, K, dtype), expected)


@pytest.mark.parametrize("device", DEVICES)
def test_a_nan_scale_reaches_its_row_and_no_other(device: str) -> None:
    scale = torch.ones(20, device=device)
    scale[17] = float("nan")
    prepacked = ops.prepack_ternary(ops.pack_ternary(random_codes(20, 300, device)), 300)
    for dtype in DTYPES:
        nan = ops.dequantize_prepacked(prepacked, scale, 20, 300, dtype).isnan()
        assert nan[17].all() and not nan[:17].any() and not nan[18:].any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("K", [1, 2, 3, 126, 254])
def test_bits_beyond_the_last_column_do_not_count(device: str, K: int) -> None:
    packed = ops.pack_ternary(random_codes(18, K, device))
    expected = ops.prepack_ternary(packed, K)
    damaged = packed.clone()
    damaged[:, -1] ^= 0b10 << 2 * (K % 4)  # 01 -> 11 just behind the last code
    if K % 4:
        assert not torch.equal(damaged, packed)
        assert torch.equal(ops.prepack_ternary(damaged, K), expected)
        assert torch.equal(ops.prepack_ternary_ref(damaged, K), expected)
    garbage = expected.clone()
    garbage[-1, -1, -1] = 0x55555555  # row 15 and columns near 127, beyond N = 18 and K
    assert torch.equal(ops.unprepack_ternary(garbage, 18, K), packed)


def test_invalid_values_on_the_cpu() -> None:
    packed = ops.pack_ternary(random_codes(2, 8))
    packed[1, 1] |= 0b11
    with pytest.raises(RuntimeError, match=r"prepack_ternary: packed holds the invalid stored value 3"):
        ops.prepack_ternary(packed, 8)
    prepacked = torch.full(prepacked_shape(2, 8), -0x55555556, dtype=torch.int32)  # 0xAAAAAAAA
    assert ops.unprepack_ternary(prepacked, 2, 8).tolist() == [[255, 255], [255, 255]]
    with pytest.raises(RuntimeError, match=r"dequantize_prepacked: .* invalid stored value 3"):
        ops.dequantize_prepacked(prepacked, torch.ones(()), 2, 8)


def test_bad_arguments() -> None:
    packed = ops.pack_ternary(random_codes(20, 9))
    prepacked = ops.prepack_ternary(packed, 9)
    one = torch.ones(())
    for call, error, match in (
        (lambda: ops.prepack_ternary(packed, 13), ValueError, r"packed must have ceil\(K / 4\) = 4 columns"),
        (lambda: ops.prepack_ternary(packed.int(), 9), TypeError, "packed must be of dtype uint8"),
        (lambda: ops.unprepack_ternary(packed, 20, 9), TypeError, "prepacked must be of dtype int32"),
        (lambda: ops.unprepack_ternary(prepacked, 33, 9), ValueError, r"must have shape \(3, 1, 32, 4\)"),
        (lambda: ops.unprepack_ternary(prepacked, 20, 129), ValueError, "N = 20, K = 129"),
        (lambda: ops.unprepack_ternary(prepacked, 0, 9), ValueError, "out_features >= 1"),
        (lambda: ops.prepack_int8(packed), TypeError, "codes must be of dtype int8"),
        (lambda: ops.prepack_int8(torch.zeros(0, 3, dtype=torch.int8)), ValueError, "rows"),
        (lambda: ops.dequantize_prepacked(prepacked, torch.ones(3), 20, 9), ValueError, "1 or N = 20"),
        (lambda: ops.dequantize_prepacked(prepacked, one, 20, 9, torch.int8), TypeError, "dtype must be"),
    ):
        with pytest.raises(error, match=match):
            call()


@pytest.mark.parametrize("device", DEVICES)
def test_bad_arguments_of_the_operators(device: str) -> None:
    packed = ops.pack_ternary(random_codes(20, 9, device))
    prepacked = raw.prepack_ternary(packed, 9)
    one = torch.ones((), device=device)
    for call, match in (
        (lambda: raw.prepack_ternary(packed, 13), r"prepack_ternary: packed must have shape \[N, 4\]"),
        (lambda: raw.unprepack_ternary(prepacked, 33, 9), r"prepacked must have shape \[3, 1, 32, 4\] for N = 33"),
        (lambda: raw.unprepack_ternary(prepacked.float(), 20, 9), "prepacked must be int32; got float32"),
        (lambda: raw.unprepack_ternary(prepacked.mT, 20, 9), "prepacked must be contiguous"),
        (lambda: raw.unprepack_ternary(prepacked, 20, 0), "N and K must be >= 1; got 20 and 0"),
        (lambda: raw.prepack_int8(packed), "codes must be int8; got uint8"),
        (lambda: raw.dequantize_prepacked(prepacked, one.repeat(3), 20, 9, torch.float32), "1 or N = 20"),
        (lambda: raw.dequantize_prepacked(prepacked, one, 20, 9, torch.int32), "dtype must be float32"),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match=match):
            call()


# --- what only the GPU does ---------------------------------------------------------------------------------


@pytest.mark.gpu
def test_invalid_values_on_the_gpu_count_as_one() -> None:
    every_byte = torch.arange(256, device="cuda").to(torch.uint8).view(4, 64)
    for K in (256, 253):
        prepacked = raw.prepack_ternary(every_byte, K)
        assert torch.equal(prepacked, ops.prepack_ternary_ref(every_byte, K))
        assert torch.equal(prepacked_codes_ref(prepacked, 4, K), raw.unpack_ternary(every_byte, K))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("K", KS)
@pytest.mark.parametrize("N", NS)
def test_quantised_straight_into_blocks(N: int, K: int, dtype: torch.dtype) -> None:
    """quantize_weights gives what quantising, packing and prepacking one after the other gives."""
    generator = torch.Generator(device="cuda").manual_seed(N + K)
    weight = (torch.randn(N, K, generator=generator, device="cuda") * 0.02).to(dtype)
    packed, scale = ops.quantize_pack_weight(weight)
    expected = ops.prepack_ternary_ref(packed, K)
    for shift in (0, 1, 2):
        poison(expected)
        codes, weight_scale = raw.quantize_weights([shifted(weight, shift)])
        assert torch.equal(codes, expected) and torch.equal(weight_scale, scale.reshape(1))


@pytest.mark.gpu
def test_more_blocks_than_one_wave() -> None:
    """Matrices that the grids walk over more than once, or in more than 65,535 rows of blocks."""
    weight = torch.randn(4096, 10112, device="cuda")  # 20,224 blocks of 16 x 128, five quarters of a wave
    packed, scale = ops.quantize_pack_weight(weight)
    codes, weight_scale = raw.quantize_weights([weight])
    assert torch.equal(codes, ops.prepack_ternary(packed, 10112))
    assert torch.equal(weight_scale, scale.reshape(1))
    N = 16 * 65535 + 21
    packed = ops.pack_ternary_ref(random_codes(N, 8, "cuda"))
    prepacked = ops.prepack_ternary(packed, 8)
    assert torch.equal(ops.unprepack_ternary(prepacked, N, 8), packed)
    expected = ops.dequantize_ternary(packed, scale, 8, torch.bfloat16)
    assert torch.equal(ops.dequantize_prepacked(prepacked, scale, N, 8, torch.bfloat16), expected)


@pytest.mark.gpu
def test_products_of_prepacked_weights() -> None:
    for M, N, K in ((1, 37, 257), (3, 256, 512), (40, 129, 1000), (200, 272, 384)):
        x, act_scale = random_codes(M, K, "cuda", -128, 128), torch.rand(M, device="cuda") + 0.1
        packed = ops.pack_ternary(random_codes(N, K, "cuda"))
        weight = ops.prepack_ternary(packed, K)
        form = {"weight": weight, "out_features": N}
        expected = ops.int8xint2_mm(x, None, packed, out_dtype=torch.int32)
        assert torch.equal(ops.int8xint2_mm(x, None, **form, out_dtype=torch.int32), expected)
        assert torch.equal(ops.int8xint2_mm_ref(x, None, **form, out_dtype=torch.int32), expected)
        scale, bias = torch.rand(2, device="cuda"), torch.randn(N, device="cuda")
        options: dict[str, Any] = dict(bias=bias, segments=[N - 3, 3], out_dtype=torch.bfloat16)
        expected = ops.int8xint2_mm_ref(x, act_scale, packed, scale, **options)
        for constant in (False, True):
            got = ops.int8xint2_mm(
                x, act_scale, weight_scale=scale, **form, **options, weight_is_constant=constant
            )
            assert torch.equal(got, expected)


# --- the layer ----------------------------------------------------------------------------------------------


class KeepsPrepacked(PackedBitLinear):
    """Has the form of CUDA on the CPU too, so that its bookkeeping is tested where there is no GPU."""

    def _device_form(self, weight: Tensor) -> Tensor:
        return ops.prepack_ternary(weight, self.in_features) if weight.dtype == torch.uint8 else weight


LAYERS = [
    pytest.param(PackedBitLinear, "cpu", id="cpu"),
    pytest.param(KeepsPrepacked, "cpu", id="prepacked"),
    pytest.param(PackedBitLinear, "cuda", id="cuda", marks=pytest.mark.gpu),
]


def make_layer(
    cls: type[PackedBitLinear] = PackedBitLinear, device: str = "cpu", seed: int = 0
) -> PackedBitLinear:
    torch.manual_seed(seed)
    return cls.from_bit_linear(BitLinear(257, 65, bias=True, norm=True)).to(device)


def assert_same_weights(layer: PackedBitLinear, packed: Tensor) -> None:
    assert layer.packed.dtype == torch.uint8
    assert torch.equal(layer.packed.cpu(), packed.cpu())
    if type(layer) is PackedBitLinear:
        assert layer._weight.dtype == (torch.int32 if layer._weight.is_cuda else torch.uint8)
    assert [name for name, _ in layer.named_buffers()] == ["_weight", "weight_scale", "bias", "norm_weight"]


@pytest.mark.parametrize(("cls", "device"), LAYERS)
def test_state_dict_holds_the_packed_form(cls: type[PackedBitLinear], device: str) -> None:
    layer, other = make_layer(cls, device), make_layer(cls, device, seed=1)
    packed = layer.packed.clone()
    state = nn.Sequential(layer).state_dict()
    assert list(state) == ["0.packed", "0.weight_scale", "0.bias", "0.norm_weight"]
    assert state["0.packed"].dtype == torch.uint8 and state["0.packed"].shape == (65, 65)
    assert torch.equal(state["0.packed"], packed)
    assert not torch.equal(other.packed, packed)

    address = other._weight.data_ptr()
    result = nn.Sequential(other).load_state_dict({k: v.cpu() for k, v in state.items()})
    assert not result.missing_keys and not result.unexpected_keys
    assert_same_weights(other, packed)
    assert other._weight.data_ptr() == address  # in place: a captured graph goes on with the new weights
    for name in ("weight_scale", "bias", "norm_weight"):
        assert torch.equal(getattr(other, name), getattr(layer, name))

    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    fresh = make_layer(cls, device, seed=2)
    fresh.load_state_dict(torch.load(buffer, weights_only=True), assign=True)
    assert_same_weights(fresh, packed)


@pytest.mark.parametrize(("cls", "device"), LAYERS)
def test_state_dicts_that_do_not_fit(cls: type[PackedBitLinear], device: str) -> None:
    layer = make_layer(cls, device)
    packed, state = layer.packed.clone(), layer.state_dict()
    rest = {name: value for name, value in state.items() if name != "packed"}
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "packed"'):
        layer.load_state_dict(rest)
    assert layer.load_state_dict(rest, strict=False).missing_keys == ["packed"]
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "weight"'):
        layer.load_state_dict(state | {"weight": state["packed"]})
    with pytest.raises(RuntimeError, match="size mismatch for packed"):
        layer.load_state_dict(state | {"packed": state["packed"][:, 1:]})
    assert_same_weights(layer, packed)


@pytest.mark.parametrize(("cls", "device"), LAYERS)
def test_copies_and_casts(cls: type[PackedBitLinear], device: str) -> None:
    layer = make_layer(cls, device)
    packed, scale = layer.packed.clone(), layer.weight_scale.clone()
    twin = copy.deepcopy(layer)
    twin.load_state_dict(make_layer(cls, device, seed=1).state_dict())
    assert_same_weights(layer, packed)  # a deep copy shares nothing
    for cast in (layer.bfloat16(), layer.half(), layer.double(), layer.to(torch.bfloat16)):
        assert cast.weight_scale.dtype == cast.bias.dtype == cast.norm_weight.dtype == torch.float32
        assert torch.equal(cast.weight_scale, scale)
        assert_same_weights(cast, packed)


@pytest.mark.parametrize(("cls", "device"), LAYERS)
def test_meta_device(cls: type[PackedBitLinear], device: str) -> None:
    state = make_layer(cls, device).state_dict()
    layer = make_layer(cls, device, seed=1).to("meta")
    assert layer.packed.device.type == "meta" and layer.packed.shape == (65, 65)
    assert layer.state_dict()["packed"].device.type == "meta"
    layer.load_state_dict(state, assign=True)
    assert_same_weights(layer, state["packed"])
    layer = make_layer(cls, device, seed=1).to("meta").to_empty(device=device)
    layer.load_state_dict(state)
    assert_same_weights(layer, state["packed"])


def test_a_pickled_layer_takes_the_form_of_its_new_device() -> None:
    """As torch.load(map_location="cpu") of a layer that was saved on CUDA: its prepacked weights come to the CPU."""
    layer = make_layer()
    packed = layer.packed.clone()
    layer._buffers["_weight"] = ops.prepack_ternary(packed, 257)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    assert_same_weights(torch.load(buffer, weights_only=False), packed)


def test_the_form_follows_the_device() -> None:
    """Shapes only, with fake tensors; test_moves has the values."""
    with FakeTensorMode():
        layer = PackedBitLinear(257, 65, torch.empty(65, 65, dtype=torch.uint8), torch.empty(()))
        assert layer._weight.dtype == torch.uint8
        layer.to_empty(device="cuda")
        assert layer._weight.dtype == torch.int32 and layer._weight.shape == prepacked_shape(65, 257)
        assert layer.packed.shape == (65, 65) and layer.packed.dtype == torch.uint8
        y = layer(torch.empty(2, 3, 257, dtype=torch.bfloat16, device="cuda"))
        assert y.shape == (2, 3, 65) and y.dtype == torch.bfloat16 and y.is_cuda
        direct = PackedBitLinear(257, 65, layer.packed, layer.weight_scale)
        assert direct._weight.dtype == torch.int32
        for device in ("cpu", "meta"):
            direct.to_empty(device=device)
            assert direct._weight.dtype == torch.uint8 and direct._weight.shape == (65, 65)


@pytest.mark.gpu
def test_moves() -> None:
    layer = make_layer()
    packed = layer.packed.clone()
    x = torch.randn(3, 257)
    expected = layer(x)
    moves: tuple[dict[str, Any], ...] = (
        {"device": "cuda"},
        {"device": "cuda", "dtype": torch.bfloat16},
        {"device": "cpu"},
        {"device": "cuda", "non_blocking": True},
    )
    for move in moves:
        layer = layer.to(**move)
        assert_same_weights(layer, packed)
    assert_same_weights(layer.cpu(), packed)
    assert torch.equal(layer(x), expected)
    assert_same_weights(layer.cuda(), packed)
    y = layer(x.cuda())
    torch.testing.assert_close(y.cpu(), expected)
    assert_same_weights(copy.deepcopy(layer), packed)
    direct = PackedBitLinear(
        257, 65, packed.cuda(), *(t.cuda() for t in (layer.weight_scale, layer.bias, layer.norm_weight))
    )
    assert_same_weights(direct, packed)
    assert torch.equal(direct(x.cuda()), y)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    for location in ("cpu", "cuda"):
        buffer.seek(0)
        loaded = torch.load(buffer, weights_only=False, map_location=location)
        assert_same_weights(loaded, packed)
        torch.testing.assert_close(loaded(x.to(location)).cpu(), expected)
    on_cpu = make_layer(seed=3)
    on_cpu.load_state_dict(layer.state_dict())  # from CUDA to the CPU
    assert_same_weights(on_cpu, packed)
    assert torch.equal(on_cpu(x), expected)
    on_cpu.load_state_dict(layer.state_dict(), assign=True)  # the layer is where its tensors are
    assert_same_weights(on_cpu, packed)
    assert torch.equal(on_cpu(x.cuda()), y)


@pytest.mark.gpu
def test_load_state_dict_under_a_captured_graph() -> None:
    layer, other = make_layer(device="cuda"), make_layer(device="cuda", seed=1)
    x = torch.randn(3, 257, device="cuda")
    expected = other(x)
    layer(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x)
    layer.load_state_dict(other.state_dict())
    graph.replay()
    assert torch.equal(y, expected)


@pytest.mark.parametrize("device", DEVICES)
def test_compile_without_graph_breaks(device: str) -> None:
    layer = make_layer(device=device)
    x = torch.randn(2, 3, 257, device=device)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), layer(x))


# --- the head of a packed model -----------------------------------------------------------------------------


def small_model(**settings: Any) -> BitNetForCausalLM:
    config = dict(
        vocab_size=211,
        hidden_size=48,
        num_layers=1,
        num_heads=3,
        num_kv_heads=3,
        intermediate_size=100,
        max_seq_len=64,
    )
    return BitNetForCausalLM(BitNetConfig(**(config | {"tie_embeddings": False} | settings)), seed=0)


def test_int8_head() -> None:
    model = small_model()
    packed = pack_model(model, head="int8")
    assert isinstance(packed.lm_head, Int8Linear) and not packed.training
    assert type(model.lm_head) is nn.Linear  # the original is left as it was
    assert type(pack_model(model).lm_head) is nn.Linear
    x = torch.randn(5, 48)
    torch.testing.assert_close(packed.lm_head(x), model.lm_head(x), rtol=0.05, atol=0.05)
    assert pack_model(model, inplace=True, head="int8") is model and isinstance(model.lm_head, Int8Linear)


def test_int8_head_of_a_tied_model() -> None:
    """It is a layer of its own; the embedding stays in float."""
    model = small_model(tie_embeddings=True)
    packed = pack_model(model, head="int8")
    assert isinstance(packed.lm_head, Int8Linear) and model.lm_head is None
    assert packed.embed_tokens.weight.dtype == torch.float32
    assert torch.equal(packed.lm_head.codes, Int8Linear.from_weight(model.embed_tokens.weight).codes)
    ids = torch.arange(9)[None]
    torch.testing.assert_close(packed(ids), pack_model(model)(ids), rtol=0.05, atol=0.05)


def test_int8_head_that_is_not_there() -> None:
    model = nn.Sequential(BitLinear(4, 4))
    with pytest.raises(
        ValueError, match=r"head 'int8' needs an nn\.Linear named lm_head, or an embedding .*, Sequential has"
    ):
        pack_model(model, inplace=True, head="int8")
    assert any(isinstance(m, BitLinear) for m in model.modules())  # refused before anything was replaced
    with pytest.raises(ValueError, match=r"head must be one of \('keep', 'int8'\), got 'fp4'"):
        pack_model(model, head="fp4")
