"""Describes the layers of a converted model in its configuration, so that a saved model loads as the same model.

Models of transformers have a `config` that is saved with them. :func:`mark_conversion` puts a `quantization_config`
into it; ``bitnet_ext.formats.transformers`` reads it. transformers alone warns that it does not know this
quantisation.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from torch import nn

from bitnet_ext.nn.bit_linear import BitLinear
from bitnet_ext.nn.int8_linear import Int8Linear
from bitnet_ext.nn.packed_bit_linear import PackedBitLinear

QUANT_METHOD = "bitnet_ext"
MARKER_VERSION = 1


def mark_conversion(model: nn.Module) -> None:
    """Describes the converted layers of `model` in ``model.config.quantization_config``.

    Nothing happens where the model has no ``config`` with ``to_dict`` that takes new attributes, or one that
    another library has quantised.
    """
    config = getattr(model, "config", None)
    if not callable(getattr(config, "to_dict", None)):
        return
    before = getattr(config, "quantization_config", None)
    if before is not None and _method(before) != QUANT_METHOD:
        return
    try:
        config.quantization_config = describe_layers(model)  # type: ignore[union-attr]
    except AttributeError:  # frozen: a configuration that says by itself what the layers are
        return


def describe_layers(model: nn.Module) -> dict[str, Any]:
    """The marker, as JSON: quant_method, version, form ("training" or "packed") and layers.

    Each entry of layers has `names` and what these layers are: kind ("ternary", "float", "packed" or "int8"), bias,
    norm_eps (None without a norm), and for packed layers segments and the shape of the weight scale. A number in a
    name is ``*`` where every number that the model has is meant.
    """
    layers = {name: found for name, module in model.named_modules() if (found := _describe(module))}
    alike: dict[str, dict[str, Any] | None] = {}  # pattern -> what all modules of such names are
    for name, _ in model.named_modules():
        pattern, found = wildcard(name), layers.get(name)
        alike[pattern] = found if alike.setdefault(pattern, found) == found else None
    groups: dict[str, dict[str, Any]] = {}
    for name, found in layers.items():
        group = groups.setdefault(json.dumps(found), {**found, "names": []})
        shown = wildcard(name) if alike[wildcard(name)] is not None else name
        if shown not in group["names"]:
            group["names"].append(shown)
    packed = any(found["kind"] == "packed" for found in layers.values())
    return {
        "quant_method": QUANT_METHOD,
        "version": MARKER_VERSION,
        "form": "packed" if packed else "training",
        "layers": list(groups.values()),
    }


def wildcard(name: str) -> str:
    """A module's name with ``*`` for each number."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)


def marked_names(marker: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, what the layer is) of each name in a marker."""
    for group in marker["layers"]:
        for name in group["names"]:
            yield name, group


def _describe(module: nn.Module) -> dict[str, Any] | None:
    if isinstance(module, BitLinear):
        return {
            "kind": "ternary" if module.is_quantized else "float",
            "bias": module.bias is not None,
            "norm_eps": None if module.norm_weight is None else module.norm_eps,
        }
    if isinstance(module, PackedBitLinear):
        return {
            "kind": "packed",
            "bias": module.bias is not None,
            "norm_eps": None if module.norm_weight is None else module.norm_eps,
            "segments": list(module.segments),
            "scale_shape": list(module.weight_scale.shape),
        }
    if isinstance(module, Int8Linear):
        return {"kind": "int8", "bias": module.bias is not None, "norm_eps": None}
    return None


def _method(quantization_config: Any) -> Any:
    if isinstance(quantization_config, dict):
        return quantization_config.get("quant_method")
    return getattr(quantization_config, "quant_method", None)
