"""Conversion of whole models: nn.Linear -> BitLinear for training, BitLinear -> PackedBitLinear to run."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import TypeVar, cast

from torch import nn

from bitnet_ext.nn.bit_linear import BitLinear
from bitnet_ext.nn.convert_marker import mark_conversion
from bitnet_ext.nn.int8_linear import Int8Linear
from bitnet_ext.nn.packed_bit_linear import PackedBitLinear

ModuleT = TypeVar("ModuleT", bound=nn.Module)

#: "keep": the output head stays in its precision. "int8": it becomes an :class:`Int8Linear`.
HEADS = ("keep", "int8")


def convert_linear(
    model: ModuleT, *, skip: Iterable[str] = ("lm_head",), quantization: str = "b1.58", norm: bool = False
) -> ModuleT:
    """Replaces, in place, every ``nn.Linear`` of `model` by a :class:`BitLinear` that shares its parameters.

    Args:
        model: any module; itself returned. A model that is an nn.Linear is returned as a BitLinear.
        skip: names of layers to leave (the last part of the dotted name, or the whole), by default the
            output head, which BitNet b1.58 keeps in full precision.
        quantization: of the new layers.
        norm: gives each new layer an RMSNorm of its own, as the b1.58 FAQ advises for a model whose blocks
            have no norm before their products.

    Raises:
        ValueError: when there is no layer to convert.
    """
    skipped = set(skip)

    def build(name: str, module: nn.Module) -> nn.Module | None:
        if type(module) is not nn.Linear or name in skipped or name.rsplit(".", 1)[-1] in skipped:
            return None
        layer = BitLinear(
            module.in_features,
            module.out_features,
            bias=module.bias is not None,
            norm=norm,
            quantization=quantization,
            device=module.weight.device,
            dtype=module.weight.dtype,
        )
        layer.weight = cast(nn.Parameter, module.weight)
        if module.bias is not None:
            layer.bias = module.bias
        return layer

    model, count = _replace(model, build)
    if count == 0:
        raise ValueError(
            f"convert_linear: model must hold an nn.Linear outside skip = {sorted(skipped)}, "
            f"{type(model).__name__} has none"
        )
    mark_conversion(model)
    return model


def pack_model(model: ModuleT, *, inplace: bool = False, head: str = "keep") -> ModuleT:
    """Replaces every quantised :class:`BitLinear` by a :class:`PackedBitLinear`, for inference.

    The packed model's logits are the training forward's, bit for bit on one device, unless `head` changes them.
    Other parameters are kept; nothing requires a gradient afterwards.

    Args:
        inplace: changes `model` itself, otherwise a copy.
        head: "keep", or "int8" to replace the output head too, the ``nn.Linear`` named ``lm_head``, by an
            :class:`Int8Linear`: half the bytes of bfloat16, at logits that are about 1 % off. A head that is tied
            to the embedding and so has no layer of its own cannot be replaced.

    Raises:
        ValueError: when the model has no quantised BitLinear, or one with NaN or Inf weights; with
            ``head="int8"`` also when it has no ``nn.Linear`` named ``lm_head``.
    """
    if head not in HEADS:
        raise ValueError(f"pack_model: head must be one of {HEADS}, got {head!r}")
    if head == "int8" and not any(_is_head(name, module) for name, module in model.named_modules()):
        raise ValueError(
            f"pack_model: head 'int8' needs an nn.Linear named lm_head, {type(model).__name__} has none "
            "(a head tied to the embedding has no layer of its own)"
        )

    def build(name: str, module: nn.Module) -> nn.Module | None:
        if isinstance(module, BitLinear) and module.is_quantized:
            return PackedBitLinear.from_bit_linear(module)
        return None

    def build_head(name: str, module: nn.Module) -> nn.Module | None:
        return Int8Linear.from_linear(cast(nn.Linear, module)) if _is_head(name, module) else None

    model, count = _replace(model if inplace else copy.deepcopy(model), build)
    if count == 0:
        raise ValueError(
            f"pack_model: model must hold a quantised BitLinear, {type(model).__name__} has none"
        )
    if head == "int8":
        model, _ = _replace(model, build_head)
    mark_conversion(model)
    return model.requires_grad_(False).eval()


def _is_head(name: str, module: nn.Module) -> bool:
    return type(module) is nn.Linear and name.rsplit(".", 1)[-1] == "lm_head"


def _replace(model: ModuleT, build: Callable[[str, nn.Module], nn.Module | None]) -> tuple[ModuleT, int]:
    root = build("", model)
    if root is not None:
        return root, 1  # type: ignore[return-value]
    count = 0
    for name, module in list(model.named_modules()):
        for child_name, child in list(module.named_children()):
            full_name = f"{name}.{child_name}" if name else child_name
            new = build(full_name, child)
            if new is not None:
                new.train(child.training)
                setattr(module, child_name, new)
                count += 1
    return model, count
