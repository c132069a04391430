"""Modules that read the ``weight`` of a child and so go past the child's forward.

After a conversion such a module would compute in full precision, without a word. PyTorch's own are handled by name. Of
others the bytecode of ``forward``, and of the methods that it calls, is searched for ``self.child.weight``.
"""

from __future__ import annotations

import dis
import types
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from bitnet_ext.nn.attention import BitMultiheadAttention
from bitnet_ext.nn.bit_linear import BitLinear
from bitnet_ext.nn.int8_linear import Int8Linear
from bitnet_ext.nn.packed_bit_linear import PackedBitLinear
from bitnet_ext.nn.replace import Replacement

#: Attributes that may be read from a weight without computing with it.
_HARMLESS = {
    "dtype",
    "device",
    "shape",
    "size",
    "numel",
    "dim",
    "ndim",
    "is_cuda",
    "is_meta",
    "requires_grad",
}
_ATTRIBUTE = ("LOAD_ATTR", "LOAD_METHOD")


def check_readers(op: str, names: dict[nn.Module, str], replacements: Iterable[Replacement]) -> None:
    """Refuses a plan by which a parent would compute with the latent weight of a ternary layer.

    Args:
        op: for the message.
        names: of the modules in the tree.
        replacements: the plan.

    Raises:
        ValueError: in one sentence, which names the layer.
    """
    reads: dict[type[nn.Module], dict[str, str]] = {}
    for r in replacements:
        forward = type(r.parent).forward
        if forward in (nn.TransformerEncoderLayer.forward, nn.TransformerEncoder.forward):
            continue  # see switch_off_fast_paths
        cls = type(r.parent)
        if cls not in reads:
            reads[cls] = weight_reads(cls)
        method = reads[cls].get(r.child_name)
        if method is not None:
            parent = names.get(r.parent, "")
            name = f"{parent}.{r.child_name}" if parent else r.child_name
            raise ValueError(
                f"{op}: {name} cannot be ternary, because {cls.__name__}.{method} computes with "
                f"{r.child_name}.weight itself and would stay in full precision; name it in skip= to leave it"
            )


def switch_off_fast_paths(model: nn.Module) -> None:
    """Has PyTorch's encoder layers call their children, where these are not the nn.Linear of PyTorch any more.

    In eval mode without gradients they would hand the weights to one fused operator in full precision.
    """
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and not _is_float(module):
            module.activation_relu_or_gelu = 0  # read only to choose the fast path
        elif isinstance(module, nn.TransformerEncoder) and not all(_is_float(m) for m in module.layers):
            module.use_nested_tensor = False  # only the fast path takes nested tensors


def guard_registration() -> None:
    """Has every assignment of a layer of this package to a PyTorch module that reads its weight looked at.

    ``encoder_layer.linear1 = BitLinear(...)`` switches off the encoder layer's fast path. ``attention.out_proj =
    BitLinear(...)`` is a ValueError, because ``nn.MultiheadAttention`` always reads the weight itself.
    """
    register_module_module_registration_hook(_look_at)


def _look_at(parent: nn.Module, name: str, child: nn.Module | None) -> None:
    if not isinstance(parent, nn.TransformerEncoderLayer | nn.MultiheadAttention) or not _needs_a_call(child):
        return
    if isinstance(parent, nn.TransformerEncoderLayer):
        parent.activation_relu_or_gelu = 0
    elif name == "out_proj" and type(parent).forward is nn.MultiheadAttention.forward:
        raise ValueError(
            f"nn.MultiheadAttention: out_proj must be an nn.Linear, got {type(child).__name__}, whose weight would be "
            "used in full precision; take bitnet_ext.nn.BitMultiheadAttention, or convert_linear"
        )


def _needs_a_call(module: nn.Module | None) -> bool:
    """Whether a layer computes another thing than the product with its weight."""
    if isinstance(module, BitLinear):
        return module.is_quantized or module.norm_weight is not None
    return isinstance(module, PackedBitLinear | Int8Linear | BitMultiheadAttention)


def _is_float(layer: nn.Module) -> bool:
    return all(
        isinstance(getattr(layer, name, None), nn.Linear) for name in ("linear1", "linear2")
    ) and isinstance(getattr(layer, "self_attn", None), nn.MultiheadAttention)


def weight_reads(cls: type[nn.Module]) -> dict[str, str]:
    """The children whose weight the forward of a class computes with, and the method that does it."""
    found: dict[str, str] = {}
    seen: set[str] = set()
    todo = ["forward"]
    while todo:
        name = todo.pop()
        function = _function(getattr(cls, name, None))
        if name in seen or function is None or (hasattr(nn.Module, name) and name != "forward"):
            continue
        seen.add(name)
        reads, calls = _scan(function)
        for child in reads:
            found.setdefault(child, name)
        todo.extend(calls)
    return found


def _function(value: Any) -> types.FunctionType | None:
    value = getattr(value, "__wrapped__", value)
    return value if isinstance(value, types.FunctionType) else None


def _scan(function: Callable[..., Any]) -> tuple[list[str], list[str]]:
    """Children whose weight a method computes with, and all attributes of self that it reads."""
    code = function.__code__
    reads: list[str] = []
    attributes: list[str] = []
    if code.co_argcount == 0:
        return reads, attributes
    own_name = code.co_varnames[0]
    steps = list(dis.get_instructions(function))
    for i, step in enumerate(steps[:-1]):
        name = steps[i + 1]
        if not _loads(step, own_name) or name.opname not in _ATTRIBUTE:
            continue
        attributes.append(str(name.argval))
        after = [s.argval for s in steps[i + 2 : i + 4]]
        before = [s.argval for s in steps[max(0, i - 2) : i]]
        if after[:1] == ["weight"] and after[1:] and after[1] not in _HARMLESS and "isinstance" not in before:
            reads.append(str(name.argval))
    return reads, attributes


def _loads(step: dis.Instruction, name: str) -> bool:
    """Whether the last that an instruction puts on the stack is this local variable."""
    value = step.argval[-1] if isinstance(step.argval, tuple) and step.argval else step.argval
    return step.opname.startswith(("LOAD_FAST", "STORE_FAST_LOAD_FAST", "LOAD_DEREF")) and value == name
