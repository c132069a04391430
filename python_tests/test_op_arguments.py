"""Every public operator with arguments that it cannot take, and on the meta device."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bitnet_ext import ops

M, N, K, V, T = 3, 16, 24, 11, 5


def _samples() -> dict[str, dict[str, Any]]:
    """Arguments that each public function takes on the CPU."""
    generator = torch.Generator().manual_seed(0)
    make = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    x, weight, gain, bias = make(M, K), make(N, K), make(K), make(N)
    x_i8, act_scale = ops.quantize_act_int8(x)
    codes, weight_scale = ops.quantize_weight_ternary(weight)
    packed = ops.pack_ternary(codes)
    prepacked = ops.prepack_ternary(packed, K)
    rstd = ops.rms_norm_quantize(x, None)[2]
    int8_weight, int8_scale = ops.quantize_rows_int8(weight)
    angle = make(T, 4)
    cos, sin = torch.cat((angle.cos(),) * 2, 1), torch.cat((-angle.sin(), angle.sin()), 1)
    ids = torch.tensor([3, 0, 3, 1, 2])
    slots = ops.row_slots(ids, V)
    hyper, one = torch.tensor([1e-3, 0.1, 0.1, 0.05]), torch.ones(())
    lists = {name: [make(4, 6).abs(), make(7).abs()] for name in ("params", "grads", "exp_avg", "exp_avg_sq")}
    latch = torch.tensor([-1.0, 0, 0, 0], dtype=torch.float64)
    target = torch.tensor([1, -100, 10, 0, 4])
    norm = {"norm_weight": gain, "norm_eps": 1e-5}
    grads = {
        "grad_y": make(M, N),
        "x_i8": x_i8,
        "act_scale": act_scale,
        "packed": packed,
        "weight_scale": weight_scale.reshape(1),
        "segments": [N],
        "need_input": True,
        "need_weight": True,
        "weight_dtype": torch.float32,
    }
    quantized = ops.quantize_weights([weight])
    return {
        "abs_sums_like": {"weights": [weight]},
        "adam_rows_": {
            **{name: make(V, 6).abs() for name in ("param", "exp_avg", "exp_avg_sq")},
            "grads": [make(T, 6)],
            "slots": slots[None].expand(2, V).contiguous(),
            "hyper": hyper[None],
            "grad_scales": [one],
            "ids": ids,
            "decoupled": True,
        },
        "adam_step_": {**lists, "hyper": hyper, "grad_scale": one, "decoupled": True, "decay": [True, False]},
        "add_bit_linear": {"x": x, "delta": make(M, K), "weight": weight, "bias": bias, **norm},
        "add_rms_norm": {"x": x, "delta": make(M, K), "gain": gain, "eps": 1e-5},
        "add_rms_norm_quantize": {"x": x, "residual": make(M, K), "gain": gain, "eps": 1e-5},
        "bit_linear": {
            "x": x,
            "weight": weight,
            "bias": bias,
            **norm,
            "first_norm": (gain, 1e-5),
            "out_dtype": torch.bfloat16,
            "backward": "exact",
            "quantized": quantized,
        },
        "can_stack": {"weights": [weight]},
        "clip_gradients_": {
            "grads": lists["grads"],
            "step": torch.zeros(1, dtype=torch.int64),
            "max_norm": 1.0,
            "latch": latch,
            "known": (1, ops.square_partials(lists["grads"][1])),
        },
        "dequantize_act": {"x_i8": x_i8, "act_scale": act_scale, "dtype": torch.bfloat16},
        "dequantize_prepacked": {
            "prepacked": prepacked,
            "weight_scale": weight_scale,
            "N": N,
            "K": K,
            "dtype": torch.bfloat16,
        },
        "dequantize_ternary": {
            "packed": packed,
            "weight_scale": weight_scale,
            "K": K,
            "dtype": torch.float32,
        },
        "exact_grads_small": {**grads, "packed": prepacked},
        "glu_bit_linear": {
            "gate_up": make(M, 2 * K),
            "weight": weight,
            "activation": "relu2",
            "bias": bias,
            **norm,
            "quantized": quantized,
        },
        "glu_quantize": {"gate": x, "up": make(M, K), "activation": "silu", "gain": gain, "eps": 1e-5},
        "int8_grads": {**grads, "seed": torch.tensor([1])},
        "int8_mm": {
            "x_i8": x_i8,
            "x_scale": act_scale,
            "weight": int8_weight,
            "weight_scale": int8_scale,
            "bias": bias,
            "out_dtype": torch.float32,
        },
        "int8xint2_mm": {
            "x_i8": x_i8,
            "x_scale": act_scale,
            "weight": packed,
            "weight_scale": weight_scale.reshape(1),
            "bias": bias,
            "segments": [N],
            "out_dtype": torch.float32,
        },
        "linear_cross_entropy": {
            "hidden": make(T, 8),
            "weight": make(V, 8),
            "target": target,
            "label_smoothing": 0.1,
            "z_loss": 1e-3,
            "entropy_weight": 0.1,
            "diversity_weight": 0.1,
            "logit_softcap": 10.0,
            "output_l2": 1e-3,
            "chunk_bytes": 1000,
        },
        "pack_ternary": {"codes": codes},
        "logits_buffer": {"rows": T, "V": V, "dtype": torch.float32, "device": "cpu"},
        "logits_in": {
            "buffer": ops.logits_buffer(T, V, dtype=torch.float32, device="cpu"),
            "hidden": make(T, 8),
            "head": make(V, 8),
        },
        "predicted_rows_": {"logits": make(T, 64), "V": V, "target": target},
        "predict_rows": {
            "hidden": make(T, 8),
            "head": make(V, 8),
            "target": target,
            "buffer": ops.logits_buffer(T, V, dtype=torch.float32, device="cpu"),
        },
        "predicts_rows": {"hidden": make(T, 8)},
        "prefers_skinny_mm": {"product": "nt", "T": 16, "H": 32},
        "prefers_small_grad": {"M": M, "N": N, "K": K, "dtype": torch.float32},
        "prepack_int8": {"codes": int8_weight},
        "prepack_ternary": {"packed": packed, "K": K},
        "quantize_act_int8": {"x": x},
        "quantize_pack_weight": {"w": weight},
        "quantize_rows_int8": {"w": weight},
        "quantize_weight_groups_": {"groups": [[weight]], "targets": [quantized], "abs_sums": None},
        "quantize_weight_ternary": {"w": weight},
        "quantize_weights": {"weights": [weight]},
        "rms_norm": {"x": x, "gain": gain, "eps": 1e-5},
        "rms_norm_backward": {"grad_y": make(M, K), "x": x, "gain": gain, "rstd": rstd, "grad_residual": x},
        "rms_norm_quantize": {"x": x, "gain": gain, "eps": 1e-5},
        "rotary_attention": {
            "qkv": make(2, T, 32),
            "cos": cos,
            "sin": sin,
            "num_heads": 2,
            "num_kv_heads": 1,
        },
        "row_slots": {"ids": ids, "V": V},
        "skinny_mm_nn": {"grad": make(T, V), "weight": make(V, 8)},
        "skinny_mm_nt": {"hidden": make(T, 8), "weight": make(V, 8)},
        "skinny_mm_tn": {"grad": make(T, V), "hidden": make(T, 8)},
        "softmax_stats": {"logits": make(T, V), "target": target},
        "square_partials": {"tensor": x},
        "sum_of_squares": {"tensors": [x]},
        "sum_rows": {"ids": ids, "rows": make(T, 6), "slots": slots},
        "unpack_ternary": {"packed": packed, "K": K},
        "unprepack_ternary": {"prepacked": prepacked, "N": N, "K": K},
    }


SAMPLES = _samples()
GPU_ONLY = {"exact_grads_small"}


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, ops.QuantizedWeight):
        return ops.QuantizedWeight(*map(_copy, value))
    return type(value)(map(_copy, value)) if isinstance(value, (list, tuple)) else value


def _to_meta(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to("meta")
    if isinstance(value, ops.QuantizedWeight):
        return ops.QuantizedWeight(*map(_to_meta, value))
    return type(value)(map(_to_meta, value)) if isinstance(value, (list, tuple)) else value


def _call(name: str, arguments: dict[str, Any]) -> Any:
    return getattr(ops, name)(**arguments)


def test_every_public_function_has_a_sample() -> None:
    functions = {
        name for name in ops.__all__ if inspect.isfunction(getattr(ops, name)) and not name.endswith("_ref")
    }
    assert functions == set(SAMPLES)


#: What takes the place of an argument, by its kind. Whether it is accepted depends on the operator.
BAD: dict[str, Callable[[Any], Any]] = {
    "none": lambda value: None,
    "text": lambda value: "text",
    "number": lambda value: -7,
    "float": lambda value: float("nan"),
    "list": lambda value: [],
    "list of none": lambda value: [None],
    "list of text": lambda value: ["text"],
    "dictionary": lambda value: {},
    "scalar tensor": lambda value: torch.tensor(1.0),
    "float64": lambda value: torch.ones(M, K, dtype=torch.float64),
    "bool": lambda value: torch.ones(M, K, dtype=torch.bool),
    "complex": lambda value: torch.ones(M, K, dtype=torch.complex64),
    "five dimensions": lambda value: torch.ones(1, 1, 1, 2, 3),
    "vector": lambda value: torch.ones(13),
    "empty": lambda value: torch.ones(0, 0),
    "sparse": lambda value: torch.ones(M, K).to_sparse(),
    "other dtype": lambda value: value.to(torch.int16) if isinstance(value, Tensor) else torch.int16,
    "other shape": lambda value: value.unsqueeze(0) if isinstance(value, Tensor) else (1, 2, 3),
    "one row more": lambda value: _one_row_more(value),
    "meta": lambda value: _to_meta(value) if isinstance(value, (Tensor, list, tuple)) else 10**30,
    "flat list": lambda value: [value] * 2 if isinstance(value, Tensor) else [torch.ones(2), torch.ones(3)],
}


def _one_row_more(value: Any) -> Any:
    return torch.cat((value, value[:1])) if isinstance(value, Tensor) and value.dim() else [[1]]


@pytest.mark.parametrize("name", sorted(SAMPLES))
def test_bad_arguments_are_named_in_one_sentence(name: str) -> None:
    """Every argument in turn is replaced by everything in BAD: the call works, or one sentence names the argument."""
    faults = []
    for argument in SAMPLES[name]:
        for kind, bad in BAD.items():
            arguments = {key: _copy(value) for key, value in SAMPLES[name].items()}
            arguments[argument] = bad(arguments[argument])
            try:
                _call(name, arguments)
            except (TypeError, ValueError, RuntimeError) as error:
                text = str(error)
                if not text.startswith((f"{name}: ", f"bitnet_ext.{name}: ")) or "\n" in text:
                    faults.append(f"{argument} = {kind}: {type(error).__name__}: {text[:150]!r}")
                elif not any(key in text for key in SAMPLES[name]):
                    faults.append(f"{argument} = {kind}: names no argument: {text[:150]!r}")
            except Exception as error:
                faults.append(f"{argument} = {kind}: {type(error).__name__}: {str(error)[:150]!r}")
    assert not faults, f"{len(faults)} of {name}:\n" + "\n".join(faults)


def _shapes(value: Any) -> Any:
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype, value.is_contiguous()
    return [_shapes(v) for v in value] if isinstance(value, (list, tuple)) else value


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", sorted(set(SAMPLES) - GPU_ONLY))
def test_meta_gives_the_shapes_and_dtypes_of_the_cpu(name: str, autocast: bool) -> None:
    if autocast and name not in (
        "bit_linear",
        "add_bit_linear",
        "glu_bit_linear",
        "linear_cross_entropy",
        "rms_norm",
    ):
        pytest.skip("not affected by autocast")
    arguments = {key: _copy(value) for key, value in SAMPLES[name].items()}
    if autocast:
        arguments.pop("out_dtype", None)
    meta = {key: _to_meta(value) for key, value in arguments.items()}
    on_meta = None
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        on_meta = _call(name, meta)  # no autocast there, as for nn.Linear
    on_cpu = _call(name, arguments)
    assert _shapes(on_meta) == _shapes(on_cpu)
