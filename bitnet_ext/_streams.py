"""Text streams that may be closed, or lead to a full disk or a program that has ended."""

from __future__ import annotations

from typing import Any


class LenientStream:
    """A text stream whose errors are swallowed: a display that nobody can read must not end a run.

    After the first error nothing more is written.

    Args:
        stream: such as sys.stderr; None writes nothing.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        if name == "_stream":  # while it is copied
            raise AttributeError(name)
        return getattr(self._stream, name)

    @property
    def encoding(self) -> str:
        return getattr(self._stream, "encoding", None) or "ascii"

    def write(self, text: str) -> int:
        self._try("write", text)
        return len(text)

    def flush(self) -> None:
        self._try("flush")

    def isatty(self) -> bool:
        return bool(self._try("isatty"))

    def fileno(self) -> int:
        if self._stream is None:
            raise OSError("there is no stream")
        number: int = self._stream.fileno()
        return number

    def _try(self, name: str, *arguments: Any) -> Any:
        if self._stream is None:
            return None
        try:
            return getattr(self._stream, name)(*arguments)
        except UnicodeEncodeError:
            return None  # a character that the stream's encoding lacks
        except (OSError, ValueError):  # ValueError: the file is closed
            self._stream = None
            return None
