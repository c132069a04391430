"""Checkpoints: safetensors for numbers, JSON for the rest, made visible by one rename.

``<dir>/step-00000500/`` holds model.safetensors, optimizer.safetensors (in a full checkpoint) and
state.json with the size and SHA-256 of each file; ``<dir>/latest.json`` names the newest. Nothing is
unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from bitnet_ext.models import BitNetConfig, BitNetForCausalLM

FORMAT = 1


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged, or of another model."""


@dataclass
class Checkpoint:
    """What :func:`read_checkpoint` returns; `optimizer` is empty in a weights-only checkpoint."""

    path: Path
    step: int
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]


def write_text_atomic(path: Path, text: str) -> None:
    """Replaces a file in one rename, after its bytes are on disk."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(f"could not write {path} ({error.strerror}); the file there before is kept") from error


def write_checkpoint(
    directory: Path,
    step: int,
    model: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    state: dict[str, Any],
    keep_older: bool = False,
) -> Path:
    """Writes ``step-<step>`` under a temporary name, renames it, points latest.json to it, drops older ones (unless
    `keep_older`).

    Raises:
        OSError: when the disk is full, say; the checkpoint before is kept and named by latest.json.
    """
    directory.mkdir(parents=True, exist_ok=True)
    final = directory / f"step-{step:08d}"
    temporary = directory / f".{final.name}.{os.getpid()}.tmp"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        files = {}
        for name, tensors in (("model.safetensors", model), ("optimizer.safetensors", optimizer)):
            if tensors:
                data = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
                _write(temporary / name, safetensors.torch.save(data))
                files[name] = _fingerprint(temporary / name)
        content = {"format": FORMAT, "step": step, "files": files, "state": state}
        _write(temporary / "state.json", json.dumps(content, indent=1).encode())
        if final.exists():  # left by a run that was killed between rename and pointer
            shutil.rmtree(final)
        os.rename(temporary, final)
        write_text_atomic(directory / "latest.json", json.dumps({"checkpoint": final.name}))
    except (OSError, safetensors.SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise OSError(
            f"could not write the checkpoint of step {step} to {directory} ({error}); the one before is kept"
        ) from error
    for old in directory.glob("step-*"):
        if old != final and not keep_older:
            shutil.rmtree(old, ignore_errors=True)
    return final


def latest_checkpoint(directory: Path) -> Path | None:
    """The newest checkpoint's folder, or None when there is none."""
    pointer = directory / "latest.json"
    if not pointer.is_file():
        return None
    try:
        name = json.loads(pointer.read_text())["checkpoint"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{pointer} is damaged: it must name a checkpoint as JSON") from error
    return directory / name


def read_checkpoint(path: Path) -> Checkpoint:
    """Reads a checkpoint folder (or the newest one below a folder of them), checking every file's hash.

    Raises:
        CheckpointError: naming the file that is missing, cut or changed.
    """
    path = Path(path)
    if not (path / "state.json").is_file():
        newest = latest_checkpoint(path)
        if newest is None:
            raise CheckpointError(f"{path} holds no checkpoint: a state.json or latest.json is needed")
        path = newest
    try:
        content = json.loads((path / "state.json").read_text())
        version, step, files, state = (content[key] for key in ("format", "step", "files", "state"))
    except FileNotFoundError as error:
        raise CheckpointError(f"checkpoint {path} has no state.json") from error
    except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"checkpoint {path}: state.json is damaged") from error
    if version != FORMAT:
        raise CheckpointError(f"checkpoint {path} has format {version}; this version reads format {FORMAT}")
    tensors: dict[str, dict[str, Tensor]] = {"model.safetensors": {}, "optimizer.safetensors": {}}
    for name, expected in files.items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"checkpoint {path}: {name} is missing")
        size = file.stat().st_size
        if size != expected["bytes"]:
            raise CheckpointError(
                f"checkpoint {path}: {name} has {size} bytes, {expected['bytes']} were written"
            )
        if _fingerprint(file) != expected:
            raise CheckpointError(f"checkpoint {path}: {name} does not match its SHA-256, it was changed")
        tensors[name] = safetensors.torch.load_file(file)
    return Checkpoint(path, step, tensors["model.safetensors"], tensors["optimizer.safetensors"], state)


def load_model(path: Path | str, device: torch.device | str = "cpu") -> BitNetForCausalLM:
    """The trained model of a checkpoint folder (or of the newest one below a folder of them)."""
    checkpoint = read_checkpoint(Path(path))
    config = checkpoint.state.get("model_config")
    if config is None:
        raise CheckpointError(f"checkpoint {checkpoint.path} holds no BitNetConfig: it is of another model")
    model = BitNetForCausalLM(BitNetConfig.from_dict(config))
    load_weights(model, checkpoint)
    return model.to(device)


def load_weights(model: torch.nn.Module, checkpoint: Checkpoint) -> None:
    """Copies a checkpoint's weights into `model`; shapes and names must agree."""
    own = model.state_dict()
    for name, value in own.items():
        if name not in checkpoint.model or checkpoint.model[name].shape != value.shape:
            found = tuple(checkpoint.model[name].shape) if name in checkpoint.model else "nothing"
            raise CheckpointError(
                f"checkpoint {checkpoint.path}: the model's {name} has shape {tuple(value.shape)}, "
                f"the checkpoint has {found}"
            )
    model.load_state_dict(checkpoint.model)


def _write(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _fingerprint(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": _sha256(file)}


def _sha256(file: Any) -> str:
    digest = hashlib.sha256()
    while chunk := file.read(1 << 22):
        digest.update(chunk)
    return digest.hexdigest()
