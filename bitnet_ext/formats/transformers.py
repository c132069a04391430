"""Converted and packed models of transformers, loaded as what they were saved as (needs the package transformers).

:func:`bitnet_ext.nn.convert_linear` and :func:`bitnet_ext.nn.pack_model` note in the configuration of a model of
transformers what they did. With this module imported, transformers reads the note::

    model.save_pretrained("out")  # converted, or packed

    import bitnet_ext.formats.transformers
    model = AutoModelForCausalLM.from_pretrained("out")

The layers are made on the meta device and the stored tensors put into them: a packed model never has float weights
in its ternary layers. Without the import transformers warns of an "unknown quantization type".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bitnet_ext.formats.errors import FormatError
from bitnet_ext.formats.tensor_files import check_values
from bitnet_ext.nn import BitLinear, Int8Linear, PackedBitLinear
from bitnet_ext.nn.convert_marker import MARKER_VERSION, QUANT_METHOD, marked_names, wildcard
from bitnet_ext.ops.packing import packed_width

try:
    from transformers.quantizers.auto import register_quantization_config, register_quantizer
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin
except ImportError as error:
    raise ImportError(
        "bitnet_ext.formats.transformers needs the package transformers: pip install 'transformers>=5.0'"
    ) from error

_KINDS = ("ternary", "float", "packed", "int8")


@register_quantization_config(QUANT_METHOD)
class BitNetExtConfig(QuantizationConfigMixin):
    """The note that conversion leaves, see :func:`bitnet_ext.nn.convert_marker.describe_layers`."""

    quant_method: Any

    def __init__(
        self, form: str = "training", layers: Any = (), version: int = MARKER_VERSION, **_: Any
    ) -> None:
        self.quant_method = QUANT_METHOD
        self.version = version
        self.form = form
        self.layers = list(layers) if isinstance(layers, list | tuple) else layers
        self.post_init()

    def post_init(self) -> None:
        """FormatError unless the note is one that this version reads."""
        if self.version != MARKER_VERSION:
            raise FormatError(
                f"quantization_config of bitnet_ext has version {self.version!r}, this version reads {MARKER_VERSION}"
            )
        for group in self.layers if isinstance(self.layers, list) else [None]:
            if (
                not isinstance(group, dict)
                or group.get("kind") not in _KINDS
                or not isinstance(group.get("names"), list)
                or not all(isinstance(name, str) for name in group["names"])
            ):
                raise FormatError(
                    f"quantization_config of bitnet_ext is damaged: layers has the entry {group!r}"
                )


@register_quantizer(QUANT_METHOD)
class BitNetExtQuantizer(HfQuantizer):
    """Puts BitLinear, PackedBitLinear and Int8Linear where the saved model has them."""

    quantization_config: Any
    requires_calibration = True  # there is nothing to load but a model that was converted before it was saved

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        marked = dict(marked_names(self.quantization_config.to_dict()))
        prefix = getattr(model, "base_model_prefix", "")
        found = set()
        for name, module in list(model.named_modules()):
            key = _find(name, marked, prefix)
            if key is not None:
                found.add(key)
                model.set_submodule(name, _slot(name, module, marked[key]))
                # A head that is no longer the embedding.
                getattr(model, "all_tied_weights_keys", {}).pop(f"{name}.weight", None)
        # Without its head a model lacks the head's name; all that it has is there.
        missing = [name for name in marked if name not in found and not _beyond(name, prefix, model)]
        if missing or not found:
            raise FormatError(
                f"quantization_config of bitnet_ext names {missing[0] if missing else 'no layer'}, "
                f"{type(model).__name__} has no linear layer of this name"
            )
        return model

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        slots = [(name, module) for name, module in model.named_modules() if isinstance(module, _Slot)]
        # transformers marks what it has loaded; a tensor that the files lack it makes up.
        marks = {
            (name, key): getattr(value, "_is_hf_initialized", False)
            for name, slot in slots
            for key, value in slot.named_buffers()
        }
        lacking = [".".join(place) for place, mark in marks.items() if not mark]
        if lacking and any(marks.values()):
            raise FormatError(f"the checkpoint is damaged: {lacking[0]} is missing")
        for name, module in slots:
            layer = module.layer(name)
            if (hook := getattr(module, "_hf_hook", None)) is not None:
                from accelerate.hooks import add_hook_to_module

                add_hook_to_module(layer, hook)
            model.set_submodule(name, layer)
        if self.quantization_config.form == "packed":
            model.requires_grad_(False)
        return model

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        raise ValueError(
            "bitnet_ext: a converted model has no dequantized form, its activations are quantized as well"
        )

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return bool(self.quantization_config.form == "training")

    @property
    def is_qat_trainable(self) -> bool:
        return self.is_trainable


class _Slot(nn.Module):
    """Takes the stored tensors of a packed or int8 layer: as plain buffers, which transformers fills."""

    def __init__(
        self, in_features: int, out_features: int, what: Mapping[str, Any], shapes: dict[str, Any]
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.what = in_features, out_features, what
        for name, (shape, dtype) in shapes.items():
            self.register_buffer(name, torch.empty(shape, dtype=dtype, device="meta"))
        # Some architectures initialise `layer.weight` by its name; what is marked so they leave alone.
        self.weight = torch.empty(0)
        self.weight._is_hf_initialized = True  # type: ignore[attr-defined]

    def layer(self, name: str) -> nn.Module:
        """The layer of the loaded tensors."""
        tensors: dict[str, Any] = dict(self.named_buffers())
        for key, value in tensors.items():
            if value.is_meta:
                raise FormatError(f"the checkpoint is damaged: {name}.{key} is missing")
        check_values(tensors, f"the checkpoint is damaged: {name}")
        if "codes" in tensors:
            return Int8Linear(self.in_features, self.out_features, **tensors).eval()
        packed = PackedBitLinear(
            self.in_features,
            self.out_features,
            **tensors,
            norm_eps=self.what["norm_eps"] or 1e-5,
            segments=tuple(self.what["segments"]),
        )
        return packed.eval()


def _slot(name: str, module: nn.Module, what: Mapping[str, Any]) -> nn.Module:
    """The empty layer, on the meta device, in the place of a linear layer of the architecture."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        raise FormatError(
            f"quantization_config of bitnet_ext names {name}, which is a {type(module).__name__}, no linear layer"
        )
    # GPT-2's Conv1D has the transposed weight.
    N, K = weight.shape if isinstance(module, nn.Linear) else weight.shape[::-1]
    bias, norm = bool(what.get("bias")), what.get("norm_eps") is not None
    try:
        if what["kind"] in ("ternary", "float"):
            layer = BitLinear(
                K,
                N,
                bias=bias,
                norm=norm,
                norm_eps=what["norm_eps"] if norm else 1e-5,
                quantization="b1.58" if what["kind"] == "ternary" else "none",
                device="meta",
                dtype=weight.dtype,
            )
            own_bias = getattr(module, "bias", None)
            if layer.bias is not None and isinstance(own_bias, Tensor):
                layer.bias = nn.Parameter(torch.empty(N, dtype=own_bias.dtype, device="meta"))
            if layer.norm_weight is not None:
                layer.norm_weight = nn.Parameter(torch.empty(K, dtype=torch.float32, device="meta"))
            return layer
        shapes: dict[str, Any] = {"codes": ((N, K), torch.int8), "weight_scale": ((N,), torch.float32)}
        if what["kind"] == "packed":
            shapes = {
                "packed": ((N, packed_width(K)), torch.uint8),
                "weight_scale": (tuple(what["scale_shape"]), torch.float32),
            }
        if bias:
            shapes["bias"] = ((N,), torch.float32)
        if norm:
            shapes["norm_weight"] = ((K,), torch.float32)
        return _Slot(K, N, what, shapes)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise FormatError(f"quantization_config of bitnet_ext is damaged at {name} ({error})") from error


def _find(name: str, marked: Mapping[str, Any], prefix: str) -> str | None:
    """The marker's name for a module: the model may have been saved with or without its head."""
    for candidate in (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")):
        for key in (candidate, wildcard(candidate)):
            if key in marked:
                return key
    return None


def _beyond(name: str, prefix: str, model: nn.Module) -> bool:
    """Whether a marked name lies outside of a base model that was saved with its head."""
    return bool(prefix) and not hasattr(model, prefix) and not name.startswith(f"{prefix}.")
