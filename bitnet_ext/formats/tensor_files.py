"""Tensors in safetensors files: written in shards, read one by one from a memory map."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import secrets
import shutil
import stat
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from bitnet_ext import _files as files
from bitnet_ext.formats.errors import FormatError, first_line

TENSOR_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_STALE_SECONDS = 86_400
_CHECK_BYTES = 1 << 24  # of packed codes, looked at at a time
#: Names of dtypes in the header of a safetensors file.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def write_tensors(
    folder: Path, tensors: Iterable[tuple[str, Tensor]], max_shard_bytes: int
) -> dict[str, dict[str, Any]]:
    """Writes tensors into `folder`: model.safetensors, or shards with an index where they are larger than a shard.

    Only one shard's tensors are held at a time.

    Returns:
        for each file its "bytes" and "sha256".
    """
    shards: list[dict[str, int]] = []  # names and sizes of each shard
    pending: dict[str, Tensor] = {}
    size = 0

    def flush() -> None:
        nonlocal pending, size
        path = folder / f"shard-{len(shards)}"
        path.touch()
        mode = stat.S_IMODE(path.stat().st_mode)  # by the umask; safetensors makes files for their owner only
        safetensors.torch.save_file(pending, path, metadata={"format": "pt"})
        path.chmod(mode)
        _sync(path)
        shards.append({name: value.nbytes for name, value in pending.items()})
        pending, size = {}, 0

    for name, value in tensors:
        if pending and size + value.nbytes > max_shard_bytes:
            flush()
        # A copy of its own where a tensor is a part of larger memory: a file holds what is named only.
        value = value.detach().cpu().contiguous()
        pending[name] = value if value.nbytes == value.untyped_storage().nbytes() else value.clone()
        size += value.nbytes
    flush()

    names = [TENSOR_FILE]
    if len(shards) > 1:
        names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        index = {
            "metadata": {"total_size": sum(sum(shard.values()) for shard in shards)},
            "weight_map": {
                name: file for file, shard in zip(names, shards, strict=True) for name in sorted(shard)
            },
        }
        write_json(folder / INDEX_FILE, index)
    for i, file in enumerate(names):
        os.rename(folder / f"shard-{i}", folder / file)
    return {
        file: {"bytes": (folder / file).stat().st_size, "sha256": sha256(folder / file)} for file in names
    }


class TensorInfo(NamedTuple):
    """Shape and dtype of a stored tensor, and its file."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    file: str


class TensorReader:
    """The tensors of a folder, by name; a context manager.

    Args:
        folder: with model.safetensors, or the index of shards.
        device: where tensors are read to.

    Raises:
        FormatError: a file is missing or damaged.
    """

    def __init__(self, folder: Path, device: torch.device | str = "cpu") -> None:
        self.folder = folder
        self._device = str(device)
        self._stack = contextlib.ExitStack()
        self._files: dict[str, Any] = {}
        self.info: dict[str, TensorInfo] = {}

    def __enter__(self) -> TensorReader:
        try:
            expected = self._index()
            for file in sorted({TENSOR_FILE} if expected is None else set(expected.values())):
                self._open(file)
            if expected is not None:
                self._check_index(expected)
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def get(self, name: str) -> Tensor:
        """One tensor, on the device."""
        info = self.info[name]
        try:
            tensor: Tensor = self._files[info.file].get_tensor(name)
        except safetensors.SafetensorError as error:
            raise FormatError(
                f"{self.folder / info.file} is damaged: {name} ({first_line(error)})"
            ) from error
        return tensor

    def _index(self) -> dict[str, str] | None:
        """File of each tensor by the index; None without an index."""
        path = self.folder / INDEX_FILE
        if not path.exists():
            return None
        weight_map = read_json(path).get("weight_map")
        if not isinstance(weight_map, dict) or not all(map(files.is_plain_name, weight_map.values())):
            raise FormatError(f"{path} is damaged: weight_map must give a file of the folder for each tensor")
        return weight_map

    def _open(self, file: str) -> None:
        path = self.folder / file
        if not path.is_file():
            raise FormatError(f"{self.folder} holds no {file}")
        try:
            opened = self._stack.enter_context(
                safetensors.safe_open(path, framework="pt", device=self._device)
            )
            for name in sorted(opened.keys()):
                if name in self.info:
                    raise FormatError(f"{self.folder} holds {name} in {self.info[name].file} and in {file}")
                part = opened.get_slice(name)
                dtype = DTYPES.get(part.get_dtype())
                if dtype is None:
                    raise FormatError(f"{path} holds {name} as {part.get_dtype()}, which is not supported")
                self.info[name] = TensorInfo(tuple(part.get_shape()), dtype, file)
        except (safetensors.SafetensorError, OSError) as error:
            raise FormatError(
                f"{path} is damaged: it is no whole safetensors file ({first_line(error)})"
            ) from error
        self._files[file] = opened

    def _check_index(self, expected: Mapping[str, str]) -> None:
        for name, file in expected.items():
            if name not in self.info or self.info[name].file != file:
                raise FormatError(
                    f"{self.folder} is damaged: {file} does not hold {name}, which {INDEX_FILE} names"
                )


def check_files(folder: Path, written: Mapping[str, Any], *, hashes: bool) -> None:
    """FormatError where a file is missing, or of another size or (with `hashes`) content than was written."""
    for name, expected in written.items():
        if not files.is_plain_name(name) or not isinstance(expected, dict):
            raise FormatError(f"{folder} is damaged: its config.json names the file {name!r}")
        path = folder / name
        if not path.is_file():
            raise FormatError(f"{folder} holds no {name}")
        size = path.stat().st_size
        if size != expected.get("bytes"):
            raise FormatError(f"{path} is damaged: it has {size} bytes, {expected.get('bytes')} were written")
        if hashes and sha256(path) != expected.get("sha256"):
            raise FormatError(f"{path} is damaged: it does not match its sha256, it was changed")


def check_values(tensors: Mapping[str, Tensor], where: str) -> None:
    """FormatError where a layer's ``packed`` holds the code 3, or its ``weight_scale`` no positive number."""
    packed, scale = tensors.get("packed"), tensors.get("weight_scale")
    if packed is not None:
        rows = max(1, _CHECK_BYTES // max(1, packed.shape[1]))
        for part in packed.split(rows):
            if bool((part & (part >> 1) & 0x55).any()):
                raise FormatError(f"{where}.packed holds the code 3, accepted are 0, 1 and 2")
    if scale is not None and not bool((torch.isfinite(scale) & (scale > 0)).all()):
        raise FormatError(f"{where}.weight_scale holds a value that is not positive and finite")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; FormatError when it is something else."""
    try:
        return files.read_json(path, "settings", FormatError)
    except OSError as error:
        raise FormatError(f"cannot read {path}: {first_line(error)}") from error


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON object, synced."""
    files.write_file(path, (json.dumps(content, indent=1) + "\n").encode())


def sha256(path: Path) -> str:
    """The sha256 of a file, 64 hex digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


@contextlib.contextmanager
def new_folder(final: Path, known: Iterable[str]) -> Iterator[Path]:
    """A temporary folder that becomes `final` when the block ends without an exception.

    An existing `final` is replaced where it is empty or holds files of the `known` names only; after an
    exception it is as it was.

    Raises:
        FileExistsError: `final` is a file, or holds other files.
        OSError: the folder cannot be written.
    """
    final = Path(os.path.abspath(final))
    if final.exists() and not final.is_dir():
        raise FileExistsError(f"{final} is a file: give the name of a folder")
    others = sorted(set(os.listdir(final)) - set(known)) if final.is_dir() else []
    if others:
        raise FileExistsError(
            f"{final} holds {others[0]}, which no model has: give a new folder, or one with a saved model only"
        )
    for left in final.parent.glob(f".{glob.escape(final.name)}.*.tmp"):  # of writers that were killed
        with contextlib.suppress(OSError):
            if left.stat().st_mtime < time.time() - _STALE_SECONDS:
                shutil.rmtree(left, ignore_errors=True)
    mark = f"{os.getpid()}-{secrets.token_hex(4)}"
    temporary, old = (final.with_name(f".{final.name}.{mark}.{end}") for end in ("tmp", "old"))
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        yield temporary
        if final.exists():
            os.rename(final, old)
        try:
            os.rename(temporary, final)
        except OSError:
            if old.exists():
                os.rename(old, final)
            raise
        files.sync_folder(final.parent)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, safetensors.SafetensorError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise OSError(f"cannot write the model to {final}: {reason}; nothing was left behind") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
