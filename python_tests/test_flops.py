"""FlopCounterMode counts a ternary model like its full-precision twin."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from bitnet_ext import ops
from bitnet_ext.models import BitNetForCausalLM, preset
from bitnet_ext.nn import BitLinear

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu), "meta"]


def _count(module: nn.Module, *inputs: torch.Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        module(*inputs).float().square().sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backward", ["exact", "int8"])
def test_a_layer_counts_as_linear(device: str, backward: str) -> None:
    x = torch.randn(
        2, 64, 64, device=device, requires_grad=True
    )  # 128 tokens: whole stages of the int8 kernels
    plain = _count(nn.Linear(64, 48, device=device), x)
    assert plain == 3 * 2 * 128 * 64 * 48
    if device == "meta" and backward == "int8":
        pytest.skip("no product runs there")
    assert _count(BitLinear(64, 48, norm=True, device=device, backward=backward), x) == plain


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_model_counts_as_its_twin(device: str) -> None:
    ids = torch.randint(0, 100, (2, 16), device=device)
    counts = []
    for quantization in ("b1.58", "none"):
        model = BitNetForCausalLM(preset("collapse-64", vocab_size=101, quantization=quantization)).to(device)
        counts.append(_count(model, ids))
    assert counts[0] == counts[1] > 0


def test_the_products_count() -> None:
    x, w = torch.randn(5, 24), torch.randn(16, 24)
    x_i8, scale = ops.quantize_act_int8(x)
    packed, weight_scale = ops.quantize_pack_weight(w)
    target = torch.zeros(5, dtype=torch.int64)
    calls = {
        "int8xint2_mm": lambda: ops.int8xint2_mm(x_i8, scale, packed, weight_scale),
        "int8xint2_mm int32": lambda: ops.int8xint2_mm(x_i8, None, packed, out_dtype=torch.int32),
        "int8_mm": lambda: ops.int8_mm(x_i8, scale, *ops.quantize_rows_int8(w)),
        "glu_bit_linear": lambda: ops.glu_bit_linear(torch.randn(5, 48), w, "silu"),
        "linear_cross_entropy": lambda: ops.linear_cross_entropy(x, w, target),
    }
    for name, call in calls.items():
        with FlopCounterMode(display=False) as counter:
            call()
        assert counter.get_total_flops() == 2 * 5 * 16 * 24, name


def test_the_formulas_come_with_the_counter_whichever_is_imported_first() -> None:
    check = "assert torch.ops.bitnet_ext.bit_linear in flop_counter.flop_registry"
    for imports in ("import bitnet_ext; ", ""):
        code = (
            f"import sys, torch; {imports}"
            "assert 'torch.utils.flop_counter' not in sys.modules; "
            f"from torch.utils import flop_counter; import bitnet_ext; {check}"
        )
        subprocess.run([sys.executable, "-c", code], check=True)
