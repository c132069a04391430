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

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Stores [B, heads, T, head_dim] at the current position; returns all keys and values up to it."""
        end = self.length + key.shape[2]
        if end > self.max_seq_len:
            raise ValueError(f"KVCache: room for {self.max_seq_len} tokens, but {end} are needed")
        self.keys[layer][:, :, self.length : end] = key
        self.values[layer][:, :, self.length : end] = value
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]
