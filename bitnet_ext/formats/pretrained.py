"""A model in a folder to hand on: config.json, model.safetensors and the tokenizer's files.

config.json::

    format          "bitnet_ext"
    format_version  1
    model_type      "bitnet_ext", so that other programs refuse the folder
    model           the fields of BitNetConfig
    form            "packed" or "training"
    head            "keep" or "int8"
    segments        rows of segments by name, for packed layers that have several weight scales
    shared          name -> first name of the same tensor, where tensors have several names
    files           bytes and sha256 of each tensor file
    versions, about where the model comes from

Tensors have the names of ``state_dict``: a packed layer has ``packed`` uint8 [N, ceil(K / 4)] (docs/packing.md) and
``weight_scale`` float32. Nothing is unpickled.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitnet_ext._load import build_info
from bitnet_ext.data.hf_tokenizer import TOKENIZER_JSON
from bitnet_ext.data.tokenizer_files import RECORD_FILE, save_tokenizer
from bitnet_ext.formats import skeleton
from bitnet_ext.formats.errors import FormatError
from bitnet_ext.formats.tensor_files import (
    INDEX_FILE,
    TENSOR_FILE,
    TensorReader,
    check_files,
    check_values,
    new_folder,
    read_json,
    write_json,
    write_tensors,
)
from bitnet_ext.models import BitNetForCausalLM
from bitnet_ext.models.transformer import rotary_table
from bitnet_ext.nn import BitLinear, Int8Linear, PackedBitLinear

CONFIG_FILE = "config.json"
FORMAT, FORMAT_VERSION = "bitnet_ext", 1
#: A model above this size is written in several files.
MAX_SHARD_BYTES = 5 * 10**9
FORMS, HEADS = ("packed", "training"), ("keep", "int8")
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_OWN_FILES = (CONFIG_FILE, TENSOR_FILE, INDEX_FILE, TOKENIZER_JSON, RECORD_FILE, "tokenizer_config.json")


def save_pretrained(
    model: nn.Module,
    folder: str | os.PathLike[str],
    tokenizer: Any = None,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    about: Mapping[str, Any] | None = None,
) -> Path:
    """Writes a model into a folder, from which :func:`from_pretrained` reads it.

    The folder appears whole or not at all. One that holds a model already is replaced.

    Args:
        model: a BitNetForCausalLM in training form or packed, on any device and in any float dtype.
        folder: new, empty, or with a saved model.
        tokenizer: a Tokenizer, or whatever :func:`bitnet_ext.data.load_tokenizer` accepts; None writes none.
        max_shard_bytes: tensors beyond this size go into several files.
        about: JSON values about the model's origin, kept in config.json.

    Returns:
        the folder.

    Raises:
        TypeError: the model is of another class.
        ValueError: some of its layers are packed and others not.
        OSError: the folder cannot be written, or holds other files.
    """
    plain = _unwrapped(model)
    if max_shard_bytes < 1:
        raise ValueError(f"save_pretrained: max_shard_bytes must be >= 1, got {max_shard_bytes}")
    config = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "model_type": FORMAT,
        "architectures": [type(plain).__name__],
        "model": plain.config.to_dict(),
        "form": _form(plain),
        "head": "int8" if isinstance(plain.lm_head, Int8Linear) else "keep",
        "dtype": str(plain.embed_tokens.weight.dtype).removeprefix("torch."),
        "segments": {
            name: list(module.segments)
            for name, module in _named_modules(plain)
            if isinstance(module, PackedBitLinear) and module.segments
        },
        "versions": {key: build_info()[key] for key in ("version", "torch")},
        "about": dict(about or {}),
    }
    folder = Path(folder)
    existing = folder / CONFIG_FILE
    own = [path.name for path in folder.glob("model-*-of-*.safetensors")] if existing.is_file() else []
    _check_described(plain, config)
    with new_folder(folder, (*_OWN_FILES, *own)) as temporary:
        shared: dict[str, str] = {}
        config["files"] = write_tensors(temporary, _distinct(plain, shared), max_shard_bytes)
        config["shared"] = shared
        if tokenizer is not None:
            save_tokenizer(tokenizer, temporary)
        write_json(temporary / CONFIG_FILE, config)
    return folder


def from_pretrained(
    folder: str | os.PathLike[str],
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    *,
    verify: bool = True,
) -> BitNetForCausalLM:
    """The model of a folder that :func:`save_pretrained` wrote, in eval mode.

    Its logits are those of the saved model, bit for bit on the same device. Tensors are read one layer at a time
    from a memory map of the file onto the device, so that there is one copy of the model; the ternary layers of
    a packed model never have float weights.

    Args:
        folder: of the model.
        device: of the model.
        dtype: of the parameters; packed layers, an int8 head and the rotary table keep what they have. None: as
            saved.
        verify: also compares each file's sha256 (about a second per GB).

    Raises:
        FormatError: the folder holds no such model, or is damaged; one sentence.
    """
    folder = Path(folder)
    config = read_config(folder)
    if dtype is not None and dtype not in _FLOATS:
        raise TypeError(f"from_pretrained: dtype must be float32, bfloat16 or float16, got {dtype}")
    check_files(folder, config["files"], hashes=verify)
    device = torch.device(device)
    with TensorReader(folder, device) as reader:
        model = skeleton.build(
            config["model"],
            packed=config["form"] == "packed",
            head=config["head"],
            segments=config["segments"],
            stored={**dict.fromkeys(config["shared"], None), **reader.info},
            where=folder,
        )
        _check_tensors(model, reader, config["shared"])
        _read_tensors(model, reader, dtype)
    model.cos, model.sin = (table.to(device) for table in rotary_table(model.config))
    _share(model, config["shared"], folder)
    return (model.requires_grad_(False) if config["form"] == "packed" else model).eval()


def is_pretrained(folder: Path) -> bool:
    """Whether a folder holds a model that :func:`save_pretrained` wrote."""
    try:
        return read_json(folder / CONFIG_FILE).get("format") == FORMAT
    except FormatError:
        return False


def read_config(folder: Path) -> dict[str, Any]:
    """The checked config.json of a folder; FormatError when it is none of this format."""
    path = folder / CONFIG_FILE
    if not path.is_file():
        missing = "there is no such folder" if not folder.is_dir() else f"it has no {CONFIG_FILE}"
        raise FormatError(f"{folder} holds no model: {missing}")
    config = read_json(path)
    if config.get("format") != FORMAT:
        kind = config.get("model_type")
        hint = (
            f": it is a model of transformers (model_type {kind!r}), load it with transformers after "
            "import bitnet_ext.formats.transformers"
            if isinstance(kind, str)
            else ""
        )
        raise FormatError(f"{path} is not of the format {FORMAT!r}{hint}")
    version = config.get("format_version")
    if version != FORMAT_VERSION:
        raise FormatError(f"{path} has format version {version!r}, this version reads {FORMAT_VERSION}")
    for key in ("model", "files"):
        if not isinstance(config.get(key), dict):
            raise FormatError(f"{path} is damaged: {key!r} must be an object")
    for key in ("segments", "shared"):
        if not isinstance(config.setdefault(key, {}), dict):
            raise FormatError(f"{path} is damaged: {key!r} must be an object")
    for key, accepted in (("form", FORMS), ("head", HEADS)):
        if config.get(key) not in accepted:
            raise FormatError(f"{path} is damaged: {key!r} is {config.get(key)!r}, accepted are {accepted}")
    return config


# --- writing ----------------------------------------------------------------------------------------------------


def _unwrapped(model: nn.Module) -> BitNetForCausalLM:
    """The model itself, without torch.compile or DistributedDataParallel around it."""
    plain = getattr(model, "_orig_mod", model)
    if isinstance(plain, nn.parallel.DistributedDataParallel | nn.DataParallel):
        plain = plain.module
    if not isinstance(plain, BitNetForCausalLM):
        raise TypeError(
            f"save_pretrained: model is a {type(plain).__name__}, accepted is a BitNetForCausalLM; a model of "
            "transformers has a save_pretrained of its own, see bitnet_ext.formats.transformers"
        )
    return plain


def _check_described(model: BitNetForCausalLM, config: Mapping[str, Any]) -> None:
    """ValueError where the model has more or other tensors than its configuration says, as with adapters."""
    own = skeleton.tensor_infos(_named_modules(model))
    described = skeleton.build(
        config["model"],
        packed=config["form"] == "packed",
        head=config["head"],
        segments=config["segments"],
        stored=own,
        where="save_pretrained",
    )
    expected = {name: tuple(value.shape) for name, value in described.state_dict().items()}
    for name in sorted(expected.keys() | own.keys()):
        found = own[name].shape if name in own else None
        if found != expected.get(name):
            raise ValueError(
                f"save_pretrained: the model has {name} of shape {found}, by its configuration it is "
                f"{expected.get(name)}: remove adapters, parametrizations and layers of your own first"
            )


def _form(model: BitNetForCausalLM) -> str:
    packed = sum(isinstance(module, PackedBitLinear) for module in model.modules())
    ternary = sum(isinstance(module, BitLinear) and module.is_quantized for module in model.modules())
    if packed and ternary:
        raise ValueError(
            f"save_pretrained: {packed} layers of the model are packed and {ternary} are not; pack_model packs all"
        )
    return "packed" if packed else "training"


def _named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules by name, also those that have several; blocks compiled one by one under their plain names."""
    for name, module in model.named_modules(remove_duplicate=False):
        yield name.replace("_orig_mod.", "").removesuffix("._orig_mod"), module


def _distinct(model: nn.Module, shared: dict[str, str]) -> Iterator[tuple[str, Tensor]]:
    """The entries of the state_dict, each tensor once and made when it is asked for.

    On CUDA the packed form of a layer is a copy: of one layer at a time. `shared` gets the further names.
    """
    modules: dict[int, str] = {}
    memory: dict[tuple[Any, ...], str] = {}
    for prefix, module in _named_modules(model):
        if next(module.children(), None) is not None or (modules.get(id(module)) == prefix):
            continue
        first_prefix = modules.setdefault(id(module), prefix)
        for key, value in module.state_dict(keep_vars=True).items():
            name, first = f"{prefix}.{key}", f"{first_prefix}.{key}"
            held = module._parameters.get(key, module._buffers.get(key, _device_form(module)))
            if held is not None and held.numel() and not held.is_meta:
                identity = (held.device, held.data_ptr(), held.dtype, held.shape, held.stride())
                first = memory.setdefault(identity, first)
            if name != first:
                shared[name] = shared.get(first, first)
            else:
                yield name, value


def _device_form(module: nn.Module) -> Tensor | None:
    """The weights of a packed or int8 layer as they are in memory."""
    if not isinstance(module, PackedBitLinear | Int8Linear):
        return None
    return module._buffers[next(iter(module._non_persistent_buffers_set))]


# --- reading ----------------------------------------------------------------------------------------------------


def _check_tensors(model: BitNetForCausalLM, reader: TensorReader, shared: Mapping[str, Any]) -> None:
    """FormatError unless the stored tensors are those of the model by name, shape and dtype."""
    where, stored = reader.folder, reader.info
    expected = {name: value for name, value in model.state_dict().items() if name not in shared}
    for name, value in expected.items():
        if name not in stored:
            raise FormatError(f"{where} is damaged: {name} is missing")
        info = stored[name]
        if info.shape != tuple(value.shape):
            raise FormatError(
                f"{where} is damaged: {name} has shape {list(info.shape)}, by the configuration it is "
                f"{list(value.shape)}"
            )
        exact = not value.is_floating_point() or name.endswith(".weight_scale")
        accepted = (value.dtype,) if exact else _FLOATS
        if info.dtype not in accepted:
            raise FormatError(f"{where} is damaged: {name} is {info.dtype}, accepted is {accepted[0]}")
    unknown = sorted(stored.keys() - expected.keys())
    if unknown:
        raise FormatError(f"{where} is damaged: {unknown[0]} is not a tensor of the model")


def _read_tensors(model: BitNetForCausalLM, reader: TensorReader, dtype: torch.dtype | None) -> None:
    """Puts the stored tensors into the model, one module at a time."""
    modules: dict[str, list[str]] = {}
    for name in reader.info:
        modules.setdefault(name.rpartition(".")[0], []).append(name)
    for prefix, names in modules.items():
        module = model.get_submodule(prefix)
        tensors = {name.rpartition(".")[2]: reader.get(name) for name in names}
        check_values(tensors, f"{reader.folder} is damaged: {prefix}")
        module.load_state_dict(tensors, strict=False, assign=True)
        if dtype is not None:
            module.to(dtype)


def _share(model: nn.Module, shared: Mapping[str, Any], where: object) -> None:
    """Makes the tensor of each further name the one of its first name."""
    for name, first in shared.items():
        try:
            (prefix, _, key), (first_prefix, _, first_key) = name.rpartition("."), str(first).rpartition(".")
            module, holder = model.get_submodule(prefix), model.get_submodule(first_prefix)
            if key in ("packed", "codes"):  # made from the weights in the device's form
                key = first_key = next(iter(holder._non_persistent_buffers_set))
            setattr(module, key, getattr(holder, first_key))
        except (AttributeError, TypeError) as error:
            raise FormatError(
                f"{where} is damaged: {name} shares {first!r}, which the model lacks"
            ) from error
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        if value.is_meta:
            raise FormatError(f"{where} is damaged: {name} is missing")
