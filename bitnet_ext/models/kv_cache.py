"""Keys and values of the tokens seen so far, for decoding one token at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from bitnet_ext.models.config import BitNetConfig


class KVCache:
    """Preallocated keys and values: per layer [batch, num_kv_heads, max_seq_len, head_dim].

    Args:
        config: of the model.
        batch_size: sequences decoded together.
        max_seq_len: room for prompt and new tokens; by default the config's.

    Attributes:
        length: positions that hold a token.
        padding: int64 [batch], how many of the first positions of each sequence hold none; None for no padding.
    """

    def __init__(
        self,
        config: BitNetConfig,
        batch_size: int,
        max_seq_len: int | None = None,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.max_seq_len = config.max_seq_len if max_seq_len is None else max_seq_len
        if not 1 <= self.max_seq_len <= config.max_seq_len:
            raise ValueError(
                f"KVCache: max_seq_len must be in 1..{config.max_seq_len} (the model's), got {max_seq_len}"
            )
        shape = (batch_size, config.num_kv_heads, self.max_seq_len, config.head_dim)
        self.keys = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.num_layers)]
        self.values = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.num_layers)]
        self.length = 0
        self.padding: Tensor | None = None

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Stores [B, heads, T, head_dim] at the current position; returns all keys and values up to it."""
        end = self.length + key.shape[2]
        if end > self.max_seq_len:
            raise ValueError(f"KVCache: room for {self.max_seq_len} tokens, but {end} are needed")
        self.keys[layer][:, :, self.length : end] = key
        self.values[layer][:, :, self.length : end] = value
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]

    def rows(self, table: Tensor, T: int) -> Tensor:
        """The rows of a table of positions that belong to the next T tokens."""
        return table[self.length : self.length + T]

    def mask(self, T: int) -> Tensor | None:
        """Which of the keys that :meth:`append` returns the next T tokens see, bool [T, keys], with padding
        [batch, 1, T, keys]; None for what causal attention of T queries with as many keys, or of one query with all
        keys, does by itself.
        """
        if self.padding is None and (self.length == 0 or T == 1):
            return None
        positions = torch.arange(self.length + T, device=self.keys[0].device)
        return self._without_padding(positions, positions[self.length :])

    def _without_padding(self, keys: Tensor, queries: Tensor) -> Tensor:
        """The mask of positions; a position of padding sees itself, since a row of nothing would be NaN."""
        causal = keys[None, :] <= queries[:, None]
        if self.padding is None:
            return causal
        real = (keys >= self.padding[:, None])[:, None, None]
        return causal & (real | (keys[None, :] == queries[:, None]))

    def advance(self, T: int) -> None:
        """Counts the T tokens that every layer has appended."""
        self.length += T


class SteadyKVCache(KVCache):
    """A :class:`KVCache` whose position is a number on the device: every token is the same work on the same memory, so
    that decoding one can be captured in a CUDA graph and replayed.

    ``length`` counts on the host what the calls of Python have added; whoever replays counts on.
    """

    def __init__(
        self,
        config: BitNetConfig,
        batch_size: int,
        max_seq_len: int | None = None,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(config, batch_size, max_seq_len, device=device, dtype=dtype)
        self._positions = torch.arange(self.max_seq_len, device=device)
        self._position = torch.zeros((), dtype=torch.int64, device=device)

    def _next(self, T: int) -> Tensor:
        return self._position + self._positions[:T]

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Stores [B, heads, T, head_dim] at the current position; returns all room there is."""
        T = key.shape[2]
        if self.length + T > self.max_seq_len:
            raise ValueError(f"KVCache: room for {self.max_seq_len} tokens, but {self.length + T} are needed")
        keys, values = self.keys[layer], self.values[layer]
        keys.index_copy_(2, self._next(T), key.to(keys.dtype))
        values.index_copy_(2, self._next(T), value.to(values.dtype))
        return keys, values

    def rows(self, table: Tensor, T: int) -> Tensor:
        return table.index_select(0, self._next(T))

    def mask(self, T: int) -> Tensor | None:
        return self._without_padding(self._positions, self._next(T))

    def advance(self, T: int) -> None:
        self.length += T
        self._position += T
