"""The metrics file of a run: one JSON object a line, cut back to the checkpoint on resume."""

from __future__ import annotations

import contextlib
import json
import math
import os
from pathlib import Path
from typing import Any


class MetricsLog:
    """Appends lines to ``metrics.jsonl``; each is in the file before the call returns.

    NaN and infinities are written as null: the file stays standard JSON.

    Args:
        path: of the file.
        keep_bytes: how much of an existing file to keep (what the checkpoint had seen); 0 starts anew.
        tensorboard_dir: where to write scalars as well, or None.
    """

    def __init__(self, path: Path, keep_bytes: int = 0, tensorboard_dir: Path | None = None) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab") as file:
            if file.tell() < keep_bytes:
                raise ValueError(
                    f"{path} has {file.tell()} bytes, but the checkpoint was written after {keep_bytes}: "
                    "it was cut or replaced since"
                )
            file.truncate(keep_bytes)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115  (held for the run)
        self._writer: Any = None
        if tensorboard_dir is not None:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise ImportError(
                    "TrainConfig: tensorboard=True needs the package tensorboard: pip install tensorboard"
                ) from error
            self._writer = SummaryWriter(str(tensorboard_dir))

    def write(self, kind: str, record: dict[str, Any]) -> None:
        clean = {key: _json_value(value) for key, value in record.items()}
        line = json.dumps({"kind": kind, **clean}, allow_nan=False)
        try:
            self._file.write(line + "\n")
            self._file.flush()
        except OSError as error:
            raise OSError(
                f"could not write metrics to {self.path} ({error.strerror}); the last checkpoint is kept, "
                "so the run can be resumed"
            ) from error
        if self._writer is not None:
            for key, value in clean.items():
                if key != "step" and isinstance(value, int | float) and value is not None:
                    self._writer.add_scalar(f"{kind}/{key}", value, record["step"])

    def position(self) -> int:
        """Bytes written so far, on disk."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return self.path.stat().st_size

    def close(self) -> None:
        # Every line was flushed when it was written; what cannot be flushed now was reported then.
        with contextlib.suppress(OSError):
            self._file.close()
        if self._writer is not None:
            self._writer.close()


def _json_value(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
