"""Files of runs: JSON read with one kind of error, whole files or none written, leftovers of killed writers removed."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

#: Largest JSON file that is read; those of this package have some kilobytes.
MAX_JSON_BYTES = 1 << 28


class DamagedFileError(ValueError):
    """A file does not hold what it must hold; the message names the file."""


def read_json(path: Path, what: str, error: type[ValueError] = DamagedFileError) -> dict[str, Any]:
    """The JSON object in a file.

    Args:
        path: of the file.
        what: the file must hold, for the message, such as "the study's settings".
        error: the exception for any content that is no JSON object.

    Raises:
        error: one sentence that names the file.
        OSError: the file cannot be read, or is not there.
    """
    size = path.stat().st_size
    if size > MAX_JSON_BYTES:
        raise error(f"{path} is damaged: it must hold {what} as JSON, but it has {size} bytes")
    return parse_json(path.read_bytes(), path, what, error)


def parse_json(
    data: bytes, where: Path | str, what: str, error: type[ValueError] = DamagedFileError
) -> dict[str, Any]:
    """The JSON object in `data`; errors as of :func:`read_json`, `where` names the data in the message."""
    try:
        value = json.loads(data.decode("utf-8"))
    except RecursionError:
        reason = "it is nested too deeply"
    except UnicodeDecodeError:
        reason = "it is not UTF-8 text"
    except ValueError as problem:
        reason = str(problem)
    else:
        if isinstance(value, dict):
            return value
        reason = f"it holds {type(value).__name__}"
    # Raised here, so that no traceback of a thousand frames hangs on it.
    raise error(f"{where} is damaged: it must hold {what} as a JSON object ({reason})")


def is_plain_name(name: object) -> bool:
    """Whether `name` names an entry of a folder itself: text without separators, not "." or ".."."""
    return isinstance(name, str) and re.fullmatch(r"(?!\.{1,2}$)[^/\\\x00]+", name) is not None


def process_is_running(pid: int) -> bool:
    """Whether a process of this machine has the number."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # of another user
        return True
    return True


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


def remove_leftovers(directory: Path, sole_writer: bool = False) -> None:
    """Removes the temporary files and folders of killed writers.

    Args:
        directory: where they are.
        sole_writer: nobody else writes there now, so that no process is asked for: a number may be another
            process's by now.
    """
    for path in directory.glob(".*.tmp"):
        match = re.fullmatch(r"\..+\.(\d+)\.tmp", path.name)
        if match is None or int(match.group(1)) == os.getpid():
            continue
        if sole_writer or not process_is_running(int(match.group(1))):
            remove(path)


def hidden_name(path: Path, kind: str = "") -> Path:
    """The temporary name of a path that this process writes or removes."""
    return path.with_name(f".{path.name}{kind}.{os.getpid()}.tmp")


def discard(path: Path) -> None:
    """Removes a checkpoint so that a kill on the way leaves no half of it under its name."""
    if path.is_symlink() or not path.exists():
        path.unlink(missing_ok=True)
        return
    hidden = hidden_name(path, ".old")
    remove(hidden)
    os.rename(path, hidden)
    remove(hidden)


def remove(path: Path) -> None:
    """Removes a file or folder if it can be."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def sync_folder(path: Path) -> None:
    """Makes renames in a folder last beyond a power failure, where the system can."""
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_file(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
