"""Prompts of every accepted form as one padded batch, and its continuations in the form of the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


class TextCoder(Protocol):
    """The part of a tokenizer that prompts need; :func:`bitnet_ext.data.load_tokenizer` gives one."""

    def encode(self, text: str, /) -> list[int]: ...

    def decode(self, ids: Any, /) -> str: ...


#: Token ids int64 [B, T]; a text; or a list of texts or of rows of ids, which may differ in length.
Prompt = Tensor | str | Sequence[str] | Sequence[Sequence[int] | Tensor]


@dataclass(frozen=True)
class PaddedPrompts:
    """Prompts of different lengths that end in the same column.

    Attributes:
        ids: int64 [B, T]; the first entries of a shorter row are 0 and mean nothing.
        padding: int64 [B], how many these are; None when there are none.
    """

    ids: Tensor
    padding: Tensor | None

    def rows(self, tokens: Tensor) -> list[Tensor]:
        """Rows of int64 [B, T + new] without their padding."""
        skipped = [0] * len(tokens) if self.padding is None else self.padding.tolist()
        return [row[start:] for row, start in zip(tokens, skipped, strict=True)]


def pad_prompts(rows: Sequence[Sequence[int] | Tensor], device: torch.device) -> PaddedPrompts:
    """Rows of ids, padded on the left.

    Raises:
        ValueError: there is no row, or one is empty or holds something else than integers.
    """
    tensors = []
    for index, row in enumerate(rows):
        tensor = row if isinstance(row, Tensor) else _row(row)
        if tensor is None or tensor.dim() != 1 or tensor.numel() == 0 or not _is_integer(tensor):
            raise ValueError(
                "generate: prompt must be ids int64 [B, T], a text, or a list of texts or of rows of ids with at least "
                f"one id each; row {index} is {_short(row)}"
            )
        tensors.append(tensor.to(device=device, dtype=torch.int64))
    if not tensors:
        raise ValueError("generate: prompt must hold at least one row, got an empty list")
    longest = max(map(len, tensors))
    padding = [longest - len(row) for row in tensors]
    ids = torch.zeros(len(tensors), longest, dtype=torch.int64, device=device)
    for index, row in enumerate(tensors):
        ids[index, padding[index] :] = row
    return PaddedPrompts(ids, torch.tensor(padding, device=device) if any(padding) else None)


def from_attention_mask(ids: Tensor, attention_mask: Tensor) -> PaddedPrompts:
    """Ids [B, T] that are padded on the left, where `attention_mask` [B, T] is 0.

    Raises:
        ValueError: the mask has another shape, or zeros behind a one.
    """
    if attention_mask.shape != ids.shape:
        raise ValueError(
            f"generate: attention_mask must have the shape of prompt, {list(ids.shape)}, "
            f"got {list(attention_mask.shape)}"
        )
    kept = attention_mask.to(device=ids.device, dtype=torch.bool)
    padding = (~kept).sum(1)
    columns = torch.arange(ids.shape[1], device=ids.device)
    if not torch.equal(kept, columns >= padding[:, None]) or bool((padding == ids.shape[1]).any()):
        raise ValueError(
            "generate: attention_mask must be 0 before the first token of a row and 1 from there to its end: "
            "pad on the left"
        )
    return PaddedPrompts(ids.masked_fill(~kept, 0), padding if bool(padding.any()) else None)


def encode_texts(texts: Sequence[str], tokenizer: TextCoder | None) -> list[list[int]]:
    """Ids of each text.

    Raises:
        ValueError: there is no tokenizer, or a text is empty.
    """
    if tokenizer is None:
        raise ValueError(
            "generate: a prompt of text needs tokenizer=, such as bitnet_ext.data.load_tokenizer('gpt2')"
        )
    encode = getattr(tokenizer, "encode_ordinary", tokenizer.encode)  # of tiktoken: without special tokens
    rows = [list(getattr(ids := encode(text), "ids", ids)) for text in texts]
    for text, row in zip(texts, rows, strict=True):
        if not row:
            raise ValueError(f"generate: prompt must hold at least one token, got the text {text!r}")
    return rows


def _row(values: Any) -> Tensor | None:
    try:
        return torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError):
        return None


def _is_integer(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
