"""torch.library.opcheck of every registered operator: schema, fake kernel, autograd registration, AOT dispatch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bitnet_ext import _ops, ops

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
#: The CPU's products read the packed form, its attention is composed of PyTorch's operators, and it can look at a
#: scale.
CUDA_ONLY = {
    "prepacked_mm",
    "prepacked_mm_int32",
    "scale_",
    "bit_linear_grad",
    "skinny_mm_nt_",
    "skinny_mm_nn_",
    "skinny_mm_tn_",
    "short_attention",
    "short_attention_backward",
    "rotary_query_key",
    "rotate_query_key_",
    "rotary_query_key_backward",
    "quantize_grad",
    "transpose_prepacked",
    "transpose_int8",
    "int8_weight_grad",
}
#: On a GPU the kernels of the loss do it.
CPU_ONLY = {"predicted_rows_"}


def samples(device: str) -> dict[str, tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(0)
    make = lambda *shape: torch.randn(*shape, generator=generator).to(device)  # noqa: E731
    M, N, K, V = 5, 12, 37, 61
    x, weight, gain, bias = make(2, M, K), make(N, K), make(K), make(N)
    x_i8, act_scale, rstd = ops.rms_norm_quantize(x, gain)
    packed, weight_scale = ops.quantize_pack_weight(weight)
    prepacked = ops.prepack_ternary(packed, K)
    stack = ops.quantize_weights([weight])
    two_scales = torch.rand(2, device=device)
    logits, target = make(M, V), torch.tensor([3, -100, 60, 0, 9], device=device)
    padded = make(M, 64)
    count = torch.ops.bitnet_ext.count_targets(target)
    stats = torch.ops.bitnet_ext.cross_entropy_rows_(padded, V, target, None, None, 0.0, 0.0, 0.0, 0.0, 0.0)
    pair = [make(3, 4), make(7)]
    moments = [torch.zeros_like(t) for t in pair], [torch.zeros_like(t) for t in pair]
    hyper = torch.tensor([1e-3, 0.1, 0.1, 0.05], device=device)
    one = torch.ones((), device=device)
    ids = torch.tensor([3, 0, 3], device=device)
    shared = [make(16, K), weight]
    sums, latch = (
        torch.empty(1, dtype=torch.float64, device=device),
        torch.tensor([-1.0, 0, 0, 0], dtype=torch.float64, device=device),
    )
    angle = make(M, 16)
    cos, sin = torch.cat((angle.cos(),) * 2, 1), torch.cat((-angle.sin(), angle.sin()), 1)
    qkv, out, lse = make(2, M, 4 * 32), make(2, M, 2 * 32), make(2, 2, M)
    return {
        "quantize_act_int8": (x,),
        "rms_norm_quantize": (x, gain, 1e-5),
        "add_rms_norm_quantize": (x, make(2, M, K), gain, 1e-5),
        "glu_quantize": (x, make(2, M, K), "relu2", gain, 1e-5, True),
        "quantize_weight_ternary": (weight,),
        "quantize_pack_weight": (weight,),
        "quantize_weights": ([make(16, K), weight],),
        "quantize_weight_groups_": ([weight], [1], [stack.packed], [stack.weight_scale], None),
        "pack_ternary": (ops.quantize_weight_ternary(weight)[0],),
        "unpack_ternary": (packed, K),
        "dequantize_ternary": (packed, weight_scale, K, torch.bfloat16),
        "prepack_ternary": (packed, K),
        "unprepack_ternary": (prepacked, N, K),
        "prepack_int8": (ops.quantize_weight_ternary(weight)[0],),
        "dequantize_prepacked": (prepacked, weight_scale, N, K, torch.bfloat16),
        "dequantize_act": (x_i8, act_scale, torch.float32),
        "int8xint2_mm_int32": (x_i8, packed),
        "int8xint2_mm": (x_i8, act_scale, packed, two_scales, bias, [5, 7], torch.bfloat16),
        "prepacked_mm_int32": (x_i8, prepacked, N),
        "prepacked_mm": (x_i8, act_scale, prepacked, N, two_scales, bias, [5, 7], torch.bfloat16, True),
        "bit_linear": (
            x.clone().requires_grad_(),
            make(2, M, K).bfloat16().requires_grad_(),
            [w.clone().requires_grad_() for w in shared],
            *ops.quantize_weights(shared),
            make(N + 16).requires_grad_(),
            gain.clone().requires_grad_(),
            1e-5,
            True,
            None,
            0.0,
            torch.float32,
            "exact",
        ),
        "glu_bit_linear": (
            make(2, M, 2 * K).requires_grad_(),
            weight.clone().requires_grad_(),
            *ops.quantize_weights([weight]),
            bias.clone().requires_grad_(),
            gain.clone().requires_grad_(),
            1e-5,
            True,
            "silu",
            torch.float32,
            "exact",
        ),
        "glu_backward": (make(2, M, K), make(2, M, 2 * K), "relu2", gain, rstd, True),
        "rms_norm": (
            x.clone().requires_grad_(),
            make(2, M, K).bfloat16().requires_grad_(),
            gain.clone().requires_grad_(),
            1e-5,
        ),
        "quantize_grad": (
            make(M, N),
            act_scale[0],
            two_scales,
            [5, 7],
            torch.tensor([1], device=device),
            True,
            True,
        ),
        "transpose_prepacked": (prepacked, N, K),
        "transpose_int8": (x_i8[0], torch.arange(128, dtype=torch.int32, device=device) % M),
        "int8_weight_grad": (
            torch.zeros(N, 128, dtype=torch.int8, device=device),
            torch.ones(K, 128, dtype=torch.int8, device=device),
            torch.ones(N, device=device),
            torch.ones(1, device=device),
            torch.bfloat16,
        ),
        "rms_norm_backward": (make(2, M, K), x, gain, rstd, make(2, M, K), torch.bfloat16),
        "norm_pair_backward": (
            make(2, M, 40),
            make(2, M, 40),
            make(40),
            torch.rand(2, M, device=device),
            make(40),
            torch.rand(2, M, device=device),
            make(2, M, 40),
            torch.bfloat16,
        ),
        "bit_linear_grad": (
            make(M, N),
            ops.quantize_act_int8(make(M, K))[0],
            torch.rand(M, device=device),
            prepacked,
            torch.rand(1, device=device),
            [N],
            True,
            True,
            torch.bfloat16,
        ),
        "sum_of_squares": (pair,),
        "adam_step_": (
            pair,
            [make(3, 4), make(7)],
            *moments,
            hyper,
            one,
            [0, 1],
            [1, 0],
            sums,
            None,
            -1,
            0.9,
            0.95,
            1e-8,
            False,
            0,
        ),
        "adam_rows_": (
            make(5, 7),
            make(5, 7),
            make(5, 7).square(),
            [make(3, 7), make(3, 7)],
            ops.row_slots(torch.stack([ids, ids.flip(0), ids]), 5),
            torch.stack([hyper, hyper]),
            [one, one],
            ids,
            True,
            0.9,
            0.95,
            1e-8,
            False,
            0,
        ),
        "row_slots": (ids, 5),
        "sum_rows": (ids, make(3, 7), ops.row_slots(ids, 5)),
        "square_partials": (make(3, 7),),
        "clip_gradients_": (
            pair,
            torch.zeros(1, dtype=torch.int64, device=device),
            1.0,
            latch,
            ops.square_partials(pair[1]),
            1,
        ),
        "skinny_mm_nt_": (torch.zeros(M, 64, device=device), make(M, 24), make(V, 24)),
        "skinny_mm_nn_": (make(M, 24), make(M, 60), make(60, 24)),
        "skinny_mm_tn_": (make(60, 24), make(M, 60), make(M, 24), True, 0),
        "softmax_stats": (logits, target),
        "count_targets": (target,),
        "cross_entropy_rows_": (padded.clone(), V, target, count, make(V), 0.1, 1e-3, 0.1, 0.2, 20.0),
        "cross_entropy_mean": (*stats[:4], target, one, one.double(), 0.1, 1e-3, 0.1, 0.2, 1e-4),
        "probability_sums": (padded, V, target, stats[0], 20.0),
        "predicted_rows_": (padded.clone(), V, target),
        "scale_": ([make(3, 4), make(7)], one),
        "linear_cross_entropy": (
            make(M, K).requires_grad_(),
            make(V, K).requires_grad_(),
            target,
            *(0.1, 1e-3, 0.1, 0.2, 20.0, 1e-4),
            600,
            True,
            True,
        ),
        "short_attention": (qkv.clone().requires_grad_(), cos, sin, 2, 1),
        "short_attention_backward": (make(2, M, 2 * 32), qkv, cos, sin, out, lse, 2, 1),
        "rotary_query_key": (qkv, cos, sin, 2, 1),
        "rotate_query_key_": (qkv.clone(), cos, sin, 2, 1),
        "rotary_query_key_backward": (make(2, M, 2, 32), make(2, M, 1, 32), make(2, M, 1, 32), cos, sin),
    }


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", sorted(_ops._FAKES))
def test_opcheck(name: str, device: str) -> None:
    if device == "cpu" and name in CUDA_ONLY:
        pytest.skip("for CUDA")
    if device == "cuda" and name in CPU_ONLY:
        pytest.skip("for CPUs")
    torch.library.opcheck(getattr(torch.ops.bitnet_ext, name).default, samples(device)[name])


def test_every_operator_has_a_sample_and_a_fake() -> None:
    registered = {
        schema.name.split("::")[1]
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("bitnet_ext::") and not schema.name.startswith("bitnet_ext::_")
    }
    assert registered == set(_ops._FAKES) == set(samples("cpu"))
