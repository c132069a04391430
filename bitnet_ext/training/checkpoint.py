"""Checkpoints: safetensors for numbers, JSON for the rest, made visible by one rename.

``<dir>/step-00000500/`` holds model.safetensors, optimizer.safetensors (in a full checkpoint) and
state.json with the size and SHA-256 of each file; ``<dir>/latest.json`` names the newest. Nothing is
unpickled.

A writer may be killed at any point: a folder is written under a hidden name and renamed, latest.json is replaced, and
only then older folders go; the folder that latest.json names is never touched. The next writer removes what a killed
one left.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from bitnet_ext._files import (
    discard,
    hidden_name,
    is_plain_name,
    read_json,
    remove,
    remove_leftovers,
    sync_folder,
    write_file,
    write_text_atomic,
)
from bitnet_ext.models import BitNetConfig, BitNetForCausalLM
from bitnet_ext.models.transformer import rotary_table
from bitnet_ext.training.tensors import plain_name, plain_names, share_parameters, shared_names, to_store

FORMAT = 1
MODEL_FILE, OPTIMIZER_FILE = "model.safetensors", "optimizer.safetensors"
#: Longest sequence that a checkpoint's model may be made for: its rotary table has so many rows.
MAX_POSITIONS = 1 << 22


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged, or of another model."""


@dataclass
class Checkpoint:
    """The content of a checkpoint folder.

    Attributes:
        path: the folder.
        step: after which it was written.
        model: parameters by name. Names of one shared parameter have the same tensor object.
        optimizer: moments by name; empty in a weights-only checkpoint.
        state: settings of the model and the run, and where the run comes from.
    """

    path: Path
    step: int
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]


# --- writing --------------------------------------------------------------------------------------------------


def write_checkpoint(
    directory: Path,
    step: int,
    model: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    state: dict[str, Any],
    keep_older: bool = False,
    sole_writer: bool = False,
) -> Path:
    """Writes ``step-<step>``, points latest.json to it, and removes older checkpoints unless `keep_older`.

    Where latest.json names a checkpoint of this step already, the new one is ``step-<step>.2``.

    Args:
        directory: of the checkpoints.
        step: after which the tensors were taken.
        model, optimizer: tensors by name. One that has several names is stored once.
        state: JSON values.
        keep_older: also keeps the folder's name: an existing checkpoint of the step is replaced.
        sole_writer: see :func:`remove_leftovers`.

    Returns:
        the checkpoint's folder.

    Raises:
        OSError: when the disk is full, say; the checkpoint before is kept and named by latest.json.
    """
    directory.mkdir(parents=True, exist_ok=True)
    remove_leftovers(directory, sole_writer)
    name = _free_name(directory, step, keep_older)
    temporary = hidden_name(directory / name)
    try:
        remove(temporary)
        temporary.mkdir()
        files, shared = {}, {}
        for file, tensors in ((MODEL_FILE, model), (OPTIMIZER_FILE, optimizer)):
            if tensors:
                data, further = to_store(plain_names(tensors))
                write_file(temporary / file, safetensors.torch.save(data))
                files[file] = _fingerprint(temporary / file)
                if further:
                    shared[file] = further
        content = {"format": FORMAT, "step": step, "files": files, "state": state}
        if shared:
            content["shared"] = shared
        write_file(temporary / "state.json", json.dumps(content, indent=1).encode())
        final = directory / name
        discard(final)
        os.rename(temporary, final)
        sync_folder(directory)
        write_text_atomic(directory / "latest.json", json.dumps({"checkpoint": final.name}))
        sync_folder(directory)
    except (OSError, safetensors.SafetensorError) as error:
        remove(temporary)
        raise OSError(
            f"could not write the checkpoint of step {step} to {directory} ({error}); the one before is kept"
        ) from error
    except BaseException:
        remove(temporary)
        raise
    for old in directory.glob("step-*"):
        if old != final and not keep_older:
            discard(old)
    return final


def _free_name(directory: Path, step: int, keep_older: bool) -> str:
    """A name for the checkpoint of a step that latest.json does not point to."""
    name = f"step-{step:08d}"
    if keep_older:
        return name
    try:
        newest = latest_checkpoint(directory)
    except CheckpointError:
        newest = None  # a damaged pointer names nothing
    return f"{name}.2" if newest == directory / name else name


# --- finding and reading -----------------------------------------------------------------------------------------


def latest_checkpoint(directory: Path) -> Path | None:
    """The newest checkpoint's folder, or None when there is none.

    Raises:
        CheckpointError: latest.json is damaged, or names something outside the folder.
    """
    pointer = directory / "latest.json"
    if not pointer.is_file():
        return None
    name = read_json(pointer, "the name of a checkpoint", CheckpointError).get("checkpoint")
    if not is_plain_name(name):
        raise CheckpointError(
            f'{pointer} is damaged: "checkpoint" must be the name of a folder beside it, got {_short(name)}'
        )
    return directory / str(name)


def resolve_checkpoint(path: Path | str) -> Path:
    """The folder of the checkpoint that a path means.

    Args:
        path: a checkpoint's folder (with state.json), a folder of checkpoints (with latest.json), or the
            folder of a run (with checkpoint/latest.json); may be a link to one.

    Raises:
        CheckpointError: the path is none of them; a latest.json is damaged.
    """
    path = Path(path)
    if (path / "state.json").is_file():
        return path
    for folder in (path, path / "checkpoint"):
        newest = latest_checkpoint(folder)
        if newest is not None:
            if not (newest / "state.json").is_file():
                raise CheckpointError(f"{folder / 'latest.json'} names {newest}, which has no state.json")
            return newest
    if not path.exists():
        raise CheckpointError(f"{path} holds no checkpoint: there is no such folder")
    hint = (
        "; a saved model is loaded by bitnet_ext.formats.load_model"
        if (path / "config.json").is_file()
        else ""
    )
    raise CheckpointError(
        f"{path} holds no checkpoint: it must be the folder of a run, of checkpoints (with latest.json) or of "
        f"one checkpoint (with state.json){hint}"
    )


def read_state(path: Path) -> dict[str, Any]:
    """The checked content of the state.json of a checkpoint's folder: format, step, files, state, shared.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    file = path / "state.json"
    try:
        content = read_json(file, "a checkpoint's step, files and state", CheckpointError)
    except FileNotFoundError as error:
        raise CheckpointError(f"checkpoint {path} has no state.json") from error
    for key, kind in (("format", int), ("step", int), ("files", dict), ("state", dict)):
        if not isinstance(content.get(key), kind) or isinstance(content[key], bool):
            raise CheckpointError(
                f"checkpoint {path}: state.json is damaged: {key!r} must be {kind.__name__}, "
                f"got {_short(content.get(key))}"
            )
    if content["format"] != FORMAT:
        raise CheckpointError(
            f"checkpoint {path} has format {content['format']}; this version reads format {FORMAT}"
        )
    if content["step"] < 0:
        raise CheckpointError(f"checkpoint {path}: state.json is damaged: step is {content['step']}")
    for name, expected in content["files"].items():
        if name not in (MODEL_FILE, OPTIMIZER_FILE):
            raise CheckpointError(
                f"checkpoint {path}: state.json is damaged: it names the file {_short(name)}; a checkpoint has "
                f"{MODEL_FILE} and {OPTIMIZER_FILE}"
            )
        if not isinstance(expected, dict) or not {"bytes", "sha256"} <= expected.keys():
            raise CheckpointError(
                f"checkpoint {path}: state.json is damaged: {name} must have bytes and sha256, "
                f"got {_short(expected)}"
            )
    shared = content.setdefault("shared", {})
    if not isinstance(shared, dict) or not all(isinstance(names, dict) for names in shared.values()):
        raise CheckpointError(f"checkpoint {path}: state.json is damaged: 'shared' is {_short(shared)}")
    return content


def read_checkpoint(path: Path | str) -> Checkpoint:
    """Reads the checkpoint that a path means (:func:`resolve_checkpoint`), checking every file's hash.

    Raises:
        CheckpointError: naming the file that is missing, cut or changed.
    """
    path = resolve_checkpoint(path)
    content = read_state(path)
    tensors: dict[str, dict[str, Tensor]] = {MODEL_FILE: {}, OPTIMIZER_FILE: {}}
    for name, expected in content["files"].items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"checkpoint {path}: {name} is missing")
        size = file.stat().st_size
        if size != expected["bytes"]:
            raise CheckpointError(
                f"checkpoint {path}: {name} has {size} bytes, {_short(expected['bytes'])} were written"
            )
        if _fingerprint(file) != expected:
            raise CheckpointError(f"checkpoint {path}: {name} does not match its SHA-256, it was changed")
        try:
            tensors[name] = plain_names(safetensors.torch.load_file(file))
        except (safetensors.SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
            raise CheckpointError(
                f"checkpoint {path}: {name} is no safetensors file ({_first_line(error)})"
            ) from error
        for further, first in content["shared"].get(name, {}).items():
            if not isinstance(first, str) or first not in tensors[name]:
                raise CheckpointError(
                    f"checkpoint {path}: state.json is damaged: {further} shares {_short(first)}, which {name} lacks"
                )
            tensors[name][further] = tensors[name][first]
    return Checkpoint(path, content["step"], tensors[MODEL_FILE], tensors[OPTIMIZER_FILE], content["state"])


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


# --- models ------------------------------------------------------------------------------------------------------


def load_model(path: Path | str, device: torch.device | str = "cpu") -> BitNetForCausalLM:
    """The trained model of a run: of its newest checkpoint, or of a certain one.

    Parameters that were shared when the checkpoint was written are shared in the model.

    Args:
        path: a run's folder, a folder of checkpoints, or a checkpoint's folder (:func:`resolve_checkpoint`).
        device: of the model.

    Raises:
        CheckpointError: there is no checkpoint, it is damaged, or of another kind of model.
    """
    checkpoint = read_checkpoint(path)
    config = _config_of(checkpoint)
    try:
        with torch.device("meta"):  # nothing is allocated there and no random number drawn
            model = BitNetForCausalLM(config)
    except (RuntimeError, ArithmeticError, TypeError) as error:  # sizes beyond 2^63, say
        raise CheckpointError(
            f"checkpoint {checkpoint.path}: model_config of state.json makes no model ({_first_line(error)})"
        ) from error
    _check_weights(model, checkpoint)
    model.to_empty(device=device)
    share_parameters(model, shared_names(checkpoint.model))
    load_weights(model, checkpoint)
    cos, sin = rotary_table(config)
    model.cos, model.sin = cos.to(device), sin.to(device)
    return model


def _config_of(checkpoint: Checkpoint) -> BitNetConfig:
    """The model's settings, once they are known to be those of the tensors and so of a size that there is."""
    path = checkpoint.path
    values = checkpoint.state.get("model_config")
    if values is None:
        raise CheckpointError(f"checkpoint {path} holds no BitNetConfig: it is of another model")
    try:
        config = BitNetConfig.from_dict(values)
    except (ValueError, TypeError) as error:
        raise CheckpointError(
            f"checkpoint {path}: model_config of state.json is damaged ({error})"
        ) from error
    layers = {name.split(".")[1] for name in checkpoint.model if name.startswith("layers.")}
    if config.num_layers != len(layers):
        raise CheckpointError(
            f"checkpoint {path}: state.json says num_layers {config.num_layers}, {MODEL_FILE} has {len(layers)}"
        )
    embedding = checkpoint.model.get("embed_tokens.weight")
    found = None if embedding is None else tuple(embedding.shape)
    if found != (config.vocab_size, config.hidden_size):
        raise CheckpointError(
            f"checkpoint {path}: embed_tokens.weight must be {(config.vocab_size, config.hidden_size)} by the "
            f"vocab_size and hidden_size of state.json, {MODEL_FILE} has {found or 'nothing'}"
        )
    if config.max_seq_len > MAX_POSITIONS:
        raise CheckpointError(
            f"checkpoint {path}: max_seq_len of state.json must be at most {MAX_POSITIONS}, "
            f"got {config.max_seq_len}"
        )
    return config


def load_weights(model: torch.nn.Module, checkpoint: Checkpoint) -> None:
    """Copies a checkpoint's weights into `model`; names, shapes and shared parameters must agree.

    Raises:
        CheckpointError: naming the first tensor that does not fit; the model is as it was.
    """
    _check_weights(model, checkpoint)
    own = model.state_dict()
    for name, first in shared_names(own).items():
        name, first = plain_name(name), plain_name(first)
        a, b = checkpoint.model[name], checkpoint.model[first]
        if a is not b and not torch.equal(a, b):
            raise CheckpointError(
                f"checkpoint {checkpoint.path}: the model's {name} and {first} are one tensor, the checkpoint "
                "has two with different values"
            )
    model.load_state_dict({name: checkpoint.model[plain_name(name)] for name in own})


def _check_weights(model: torch.nn.Module, checkpoint: Checkpoint) -> None:
    own = plain_names(model.state_dict())
    for name, value in own.items():
        found = checkpoint.model.get(name)
        if found is None or found.shape != value.shape:
            what = "nothing" if found is None else tuple(found.shape)
            raise CheckpointError(
                f"checkpoint {checkpoint.path}: the model's {name} has shape {tuple(value.shape)}, "
                f"the checkpoint has {what}"
            )
        if found.is_floating_point() != value.is_floating_point():
            raise CheckpointError(
                f"checkpoint {checkpoint.path}: the model's {name} is {value.dtype}, the checkpoint has {found.dtype}"
            )
    unknown = sorted(checkpoint.model.keys() - own.keys())
    if unknown:
        raise CheckpointError(
            f"checkpoint {checkpoint.path} has {unknown[0]}"
            f"{f' and {len(unknown) - 1} more tensors' if len(unknown) > 1 else ''}, which the model has not"
        )


def _fingerprint(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": _sha256(file)}


def _sha256(file: Any) -> str:
    digest = hashlib.sha256()
    while chunk := file.read(1 << 22):
        digest.update(chunk)
    return digest.hexdigest()
