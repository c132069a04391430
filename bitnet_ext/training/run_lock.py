"""One process trains into a folder at a time.

The lock is a ``flock`` on ``run.lock`` in the folder, which the kernel drops when the process ends, however it ends: a
file left by a killed process locks nothing. Where the filesystem knows no locks, the existence of ``run.owner`` is the
lock: one whose process has ended on this machine is replaced, one of another machine has to be removed by hand.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bitnet_ext._files import DamagedFileError, parse_json, process_is_running
from bitnet_ext.training.distributed import World, in_main_process

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

LOCK, OWNER = "run.lock", "run.owner"
#: Errors of flock on a filesystem without locks.
_NO_LOCKS = frozenset((errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL))
#: Seconds that a file may be without its holder's name, and how often it is looked at.
_NAMING, _LOOKS = 0.5, 10


class RunInUseError(OSError):
    """Another process trains into the folder."""


class RunLock:
    """The right to write into a folder, from :meth:`acquire` to :meth:`release`.

    Args:
        folder: made when it is not there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / LOCK
        self._handle: int | None = None
        self._by_name = False  # the filesystem has no locks
        self._made_folder = False

    def acquire(self) -> None:
        """Takes the lock.

        Raises:
            RunInUseError: another process, or another trainer of this process, has it; the message names it.
            OSError: the folder cannot be written.
        """
        self._made_folder = not self.folder.exists()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            while not self._try_to_lock():
                pass
        except RunInUseError:
            raise
        except OSError as error:
            raise OSError(
                f"{self.folder} cannot be the folder of a run: {error.strerror} ({self.path})"
            ) from error

    def release(self) -> None:
        """Gives the lock back; the file goes, and so does a folder that :meth:`acquire` made and nobody filled."""
        if self._handle is None:
            return
        handle, self._handle = self._handle, None
        _held.discard(self)
        with contextlib.suppress(OSError):
            self.path.unlink()  # while it is locked: who waits for it sees that the file is another one
        if fcntl is not None and not self._by_name:
            with contextlib.suppress(OSError):
                fcntl.flock(handle, fcntl.LOCK_UN)  # also for a child process that has the handle
        os.close(handle)
        if self._made_folder:
            with contextlib.suppress(OSError):
                self.folder.rmdir()

    def _try_to_lock(self) -> bool:
        """False when the file was removed or replaced meanwhile."""
        if fcntl is None or self._by_name:
            return self._create()
        handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(handle)
            if error.errno in _NO_LOCKS:
                with contextlib.suppress(OSError):
                    self.path.unlink()
                return self._create()
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise self._in_use(self._read_holder()) from None
            raise
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(handle), os.stat(self.path)):
                self._hold(handle)
                return True
        os.close(handle)
        return False

    def _create(self) -> bool:
        """The lock of a filesystem without locks."""
        self._by_name, self.path = True, self.folder / OWNER
        try:
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            holder = self._read_holder()
            if not _is_gone(holder):
                raise self._in_use(holder, f"; remove {self.path} if that process has ended") from None
            aside = self.path.with_name(f".{OWNER}.{os.getpid()}.tmp")
            with contextlib.suppress(OSError):
                os.rename(self.path, aside)
                aside.unlink()
            return False
        self._hold(handle)
        return True

    def _hold(self, handle: int) -> None:
        record = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
            "process_started": _start_of(os.getpid()),
        }
        with contextlib.suppress(OSError):  # a full disk: the lock holds without a name
            os.ftruncate(handle, 0)
            os.pwrite(handle, json.dumps(record).encode(), 0)
        self._handle = handle
        _held.add(self)

    def _read_holder(self) -> dict[str, Any]:
        for _ in range(_LOOKS):
            with contextlib.suppress(OSError, DamagedFileError):
                holder = parse_json(self.path.read_bytes(), self.path, "the process that trains")
                if isinstance(holder.get("pid"), int):
                    return holder
            time.sleep(_NAMING / _LOOKS)
        return {}

    def _in_use(self, holder: dict[str, Any], hint: str = "") -> RunInUseError:
        if holder:
            who = f"process {holder['pid']} on {holder.get('host')} since {holder.get('since')}"
        else:
            who = "another process"
        return RunInUseError(f"{self.folder} is being trained by {who}{hint}")


@contextlib.contextmanager
def locked_run(folder: Path | None, world: World) -> Iterator[None]:
    """Within it this run, which may have several processes, alone writes into the folder; None for no folder.

    Raises:
        RunInUseError: in every process of the run.
    """
    lock = None if folder is None else RunLock(folder)
    if lock is not None:
        in_main_process(world, lock.acquire)
    try:
        yield
    finally:
        if lock is not None:
            lock.release()


def _is_gone(holder: dict[str, Any]) -> bool:
    """Whether the process was of this machine and has ended, also when its number is another one's by now."""
    if holder.get("host") != socket.gethostname():
        return False
    if not process_is_running(holder["pid"]):
        return True
    started, now = holder.get("process_started"), _start_of(holder["pid"])
    return started is not None and now is not None and started != now


def _start_of(pid: int) -> str | None:
    """When a process began, in ticks of the kernel; None where the system does not say."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
        return text.rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


#: Locks of this process. A forked child closes its handles: it must not hold a lock that outlives the trainer.
_held: weakref.WeakSet[RunLock] = weakref.WeakSet()


def _forget_locks() -> None:
    for lock in list(_held):
        if lock._handle is not None:
            os.close(lock._handle)
            lock._handle = None
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_locks)
