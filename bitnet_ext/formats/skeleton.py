"""A model without weights, on the meta device, in the form that a folder describes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bitnet_ext.formats.errors import FormatError, first_line
from bitnet_ext.formats.tensor_files import TensorInfo
from bitnet_ext.models import BitNetConfig, BitNetForCausalLM
from bitnet_ext.nn import BitLinear, Int8Linear, PackedBitLinear
from bitnet_ext.ops.packing import packed_width

#: Most positions of a rotary table, which is allocated by max_seq_len alone.
MAX_POSITIONS = 1 << 22


def build(
    values: Mapping[str, Any],
    *,
    packed: bool,
    head: str,
    segments: Mapping[str, Any],
    stored: Mapping[str, TensorInfo | None],
    where: object,
) -> BitNetForCausalLM:
    """The model of a configuration, on the meta device; its state_dict has the names and shapes to load.

    Args:
        values: of BitNetConfig.
        packed: ternary layers are PackedBitLinear.
        head: "int8" for an Int8Linear as the output head, "keep" for that of the configuration.
        segments: rows of the segments of packed layers that have several weight scales, by name.
        stored: the tensors there are, None for further names of one; sizes that they contradict are refused
            before anything is built.
        where: names the folder in messages.

    Raises:
        FormatError: the configuration is damaged, or is not that of the tensors.
    """
    try:
        config = BitNetConfig.from_dict(dict(values))
    except (ValueError, TypeError) as error:
        raise FormatError(f"{where}: the model's configuration is damaged ({first_line(error)})") from error
    layers = {name.split(".")[1] for name in stored if name.startswith("layers.") and name.count(".") > 1}
    if len(layers) != config.num_layers:
        raise FormatError(
            f"{where}: its configuration says num_layers {config.num_layers}, its tensors are of {len(layers)}"
        )
    if config.max_seq_len > MAX_POSITIONS:
        raise FormatError(
            f"{where}: max_seq_len is {config.max_seq_len}, accepted is at most {MAX_POSITIONS}"
        )
    try:
        with torch.device("meta"):
            model = BitNetForCausalLM(config)
            if packed:
                _pack(model, segments, stored, where)
            if head == "int8":
                model.lm_head = _int8_head(config)  # type: ignore[assignment]
    except (RuntimeError, ArithmeticError, TypeError) as error:  # Sizes beyond 2^63, say.
        raise FormatError(f"{where}: its configuration makes no model ({first_line(error)})") from error
    return model


def _pack(
    model: nn.Module, segments: Mapping[str, Any], stored: Mapping[str, TensorInfo | None], where: object
) -> None:
    for name, layer in list(model.named_modules()):
        if isinstance(layer, BitLinear) and layer.is_quantized:
            parts = _segments(segments.get(name, ()), layer.out_features, f"{where}: segments of {name}")
            scale = stored.get(f"{name}.weight_scale")
            shape = () if scale is None else scale.shape
            if shape not in ((), (1,), (layer.out_features,)) and not (parts and shape == (len(parts),)):
                raise FormatError(
                    f"{where}: {name}.weight_scale has shape {shape}, accepted are one value, "
                    f"{layer.out_features} and one for each of {len(parts)} segments"
                )
            model.set_submodule(name, packed_like(layer, scale_shape=shape, segments=parts))


def packed_like(
    layer: BitLinear, *, scale_shape: tuple[int, ...] = (), segments: tuple[int, ...] = ()
) -> PackedBitLinear:
    """A PackedBitLinear of a layer's shape on the meta device."""

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    N, K = layer.out_features, layer.in_features
    return PackedBitLinear(
        K,
        N,
        empty(N, packed_width(K), dtype=torch.uint8),
        empty(*scale_shape),
        None if layer.bias is None else empty(N),
        None if layer.norm_weight is None else empty(K),
        layer.norm_eps,
        segments,
    )


def tensor_infos(modules: Iterable[tuple[str, nn.Module]]) -> dict[str, TensorInfo]:
    """Shape and dtype of each entry of the state_dict of modules by name, without making the entries."""
    infos = {}
    for prefix, module in modules:
        found = {
            key: (tuple(value.shape), value.dtype)
            for key, value in (*module._parameters.items(), *module._buffers.items())
            if value is not None and key not in module._non_persistent_buffers_set
        }
        if isinstance(module, PackedBitLinear):
            found["packed"] = ((module.out_features, packed_width(module.in_features)), torch.uint8)
        elif isinstance(module, Int8Linear):
            found["codes"] = ((module.out_features, module.in_features), torch.int8)
        for key, (shape, dtype) in found.items():
            infos[f"{prefix}.{key}" if prefix else key] = TensorInfo(shape, dtype, "")
    return infos


def _segments(value: Any, out_features: int, where: str) -> tuple[int, ...]:
    if not isinstance(value, list | tuple) or not all(isinstance(n, int) and n > 0 for n in value):
        raise FormatError(f"{where} is {value!r}, accepted are numbers of rows")
    if value and sum(value) != out_features:
        raise FormatError(f"{where} has {sum(value)} rows, accepted are {out_features}")
    return tuple(value)


def _int8_head(config: BitNetConfig) -> Int8Linear:
    V, H = config.vocab_size, config.hidden_size
    return Int8Linear(
        H, V, torch.empty(V, H, dtype=torch.int8, device="meta"), torch.empty(V, device="meta"), None
    )
