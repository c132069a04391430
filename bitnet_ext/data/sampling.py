"""Rows of consecutive tokens in batches, as a pure function of the step number.

A row is seq_len + 1 consecutive tokens: inputs `row[:-1]`, targets `row[1:]`. Row r of a stream begins at
token r * (seq_len + 1); rows do not overlap. Batches have no state: resuming a run needs nothing but its
step.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from bitnet_ext.data.statistics import as_token_array

Order = Literal["sequential", "shuffled"]
_MAX_SEED = (1 << 64) - 1  # the key of Philox is two 64-bit words: the seed and the epoch


class RowSampler:
    """Batches of rows from a token stream.

    Position p = step * batch_size + b of a run takes row p mod num_rows ("sequential", the order of the
    text: batch 4 with seq_len 31 is 128 consecutive tokens a step) or row permutation_e[p mod num_rows]
    ("shuffled"), where the permutation of epoch e = p div num_rows comes from Philox (Salmon et al. 2011)
    with the key (seed, e) and is the same on every machine. An epoch holds each row once, and a batch may
    span two epochs.

    Args:
        tokens: integers [num_tokens], see `as_token_array`; of a memory map only the rows asked for are read.
        batch_size: rows of the global batch, over all ranks.
        seq_len: inputs of a row, 1 or more.
        order: "sequential" or "shuffled".
        seed: of the shuffled order, 0..2^64 - 1.
        rank, world_size: this process takes rows rank * local_batch to (rank + 1) * local_batch - 1 of each
            global batch, local_batch = batch_size / world_size.

    Raises:
        TypeError: `tokens` is not a row of integers.
        ValueError: an argument is out of range, `batch_size` is not a multiple of `world_size`, or there are
            fewer than seq_len + 1 tokens.
    """

    def __init__(
        self,
        tokens: Any,
        *,
        batch_size: int,
        seq_len: int,
        order: Order = "sequential",
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        tokens = as_token_array(tokens)
        for name, value in (("batch_size", batch_size), ("seq_len", seq_len), ("world_size", world_size)):
            if value < 1:
                raise ValueError(f"{name} is {value}, accepted is 1 or more")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank is {rank}, accepted is 0..{world_size - 1} (world_size {world_size})")
        if batch_size % world_size:
            raise ValueError(
                f"batch_size is {batch_size}, accepted are multiples of world_size {world_size}: "
                "each process takes an equal part"
            )
        if order not in ("sequential", "shuffled"):
            raise ValueError(f"order is {order!r}, accepted are 'sequential' and 'shuffled'")
        if not 0 <= seed <= _MAX_SEED:
            raise ValueError(f"seed is {seed}, accepted is 0..{_MAX_SEED}")
        if len(tokens) < seq_len + 1:
            raise ValueError(
                f"tokens holds {len(tokens)} tokens, a row of seq_len {seq_len} needs at least {seq_len + 1}"
            )
        self.batch_size = batch_size
        self.seq_len = seq_len
        self.order: Order = order
        self.seed = seed
        self.num_rows = len(tokens) // (seq_len + 1)
        self.local_batch = batch_size // world_size
        self._first = rank * self.local_batch
        self._rows = tokens[: self.num_rows * (seq_len + 1)].reshape(self.num_rows, seq_len + 1)
        self._permutation: tuple[int, npt.NDArray[np.int64]] | None = None

    @property
    def steps_per_epoch(self) -> float:
        """Steps in which every row is seen once; need not be whole."""
        return self.num_rows / self.batch_size

    def epoch(self, step: int) -> int:
        """The epoch of the first row of the global batch of `step`."""
        return step * self.batch_size // self.num_rows

    def batch(self, step: int) -> npt.NDArray[np.int64]:
        """This rank's rows of one step (counted from 0): int64 [local_batch, seq_len + 1]."""
        return self.batches(step, 1)[0]

    def batches(self, start: int, count: int) -> npt.NDArray[np.int64]:
        """This rank's rows of steps start .. start + count - 1: int64 [count, local_batch, seq_len + 1].

        ValueError when `start` or `count` is negative.
        """
        rows: npt.NDArray[np.int64] = self._rows[self.row_indices(start, count)].astype(np.int64)
        return rows

    def row_indices(self, start: int, count: int) -> npt.NDArray[np.int64]:
        """The rows that `batches` gathers: int64 [count, local_batch]."""
        for name, value in (("start", start), ("count", count)):
            if value < 0:
                raise ValueError(f"{name} is {value}, accepted is 0 or more")
        steps = np.arange(start, start + count, dtype=np.int64)
        positions = steps[:, None] * self.batch_size + np.arange(self._first, self._first + self.local_batch)
        epochs, indices = np.divmod(positions, self.num_rows)
        if self.order == "shuffled":
            for epoch in np.unique(epochs):
                here = epochs == epoch
                indices[here] = self._epoch_permutation(int(epoch))[indices[here]]
        return indices

    def _epoch_permutation(self, epoch: int) -> npt.NDArray[np.int64]:
        if self._permutation is None or self._permutation[0] != epoch:
            # Sorting raw 64-bit words, not Generator.permutation: numpy promises that a bit generator's raw
            # stream never changes, but not how its Generator uses it. A resumed run may meet a newer numpy.
            philox = np.random.Philox(key=np.array([self.seed, epoch], np.uint64))
            self._permutation = (epoch, np.argsort(philox.random_raw(self.num_rows), kind="stable"))
        return self._permutation[1]
