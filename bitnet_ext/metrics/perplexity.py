"""Loss, perplexity and bits per byte of any causal language model on a stream of tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from bitnet_ext.metrics.distribution import heldout_rows
from bitnet_ext.metrics.evaluation import evaluation_mode

#: Context of each prediction at most, where none is said.
SEQ_LEN = 256
#: Logits that are held at once, in numbers: 128 rows of GPT-2's vocabulary.
_LOGITS = 128 * 50_257


class Decoder(Protocol):
    """The part of a tokenizer that bits per byte need. The id `eos_id`, if there is one, stands for no text."""

    def decode(self, ids: Any, /) -> str: ...


def evaluate(
    model: nn.Module | Callable[[Tensor], Any],
    tokens: NDArray[Any] | Tensor,
    *,
    seq_len: int | None = None,
    batch_size: int | None = None,
    max_tokens: int | None = None,
    tokenizer: Decoder | None = None,
    num_bytes: int | None = None,
    document_separator: int | None = None,
    device: torch.device | str | None = None,
) -> dict[str, float | int]:
    """How well a model predicts a text.

    The text is cut into rows of `seq_len` predictions without overlap, so that every token but the first is predicted
    once, from the up to `seq_len` tokens before it in its row. Results of different `seq_len` cannot be compared.

    Args:
        model: a :class:`bitnet_ext.models.BitNetForCausalLM`, trained or packed, or any callable from ids int64 [B, T]
            to logits [B, T, V] or to an object with such `.logits` (a Hugging Face model). A module is in eval mode
            meanwhile.
        tokens: ids, one dimension, any integer dtype, at least two.
        seq_len: default 256, or the model's `config.max_seq_len` if that is smaller.
        batch_size: rows of a call; default 4096 predictions' worth.
        max_tokens: evaluate about so many predictions in whole rows, spread evenly over the text; default all.
        tokenizer: decodes ids to text; with it the result has bits per byte.
        num_bytes: UTF-8 bytes of all of `tokens` but the first, instead of a tokenizer; not with max_tokens.
        document_separator: of a model that was trained with it (``TrainConfig.document_separator``).
        device: of the inputs; default that of the model's first parameter or buffer, else the CPU.

    Returns:
        ``cross_entropy``: mean -ln p(token), nats. ``perplexity``: its exp. ``tokens``: predictions.
        ``bits_per_byte``: total -log2 p(token) over the UTF-8 bytes of these tokens, with `tokenizer` or `num_bytes`;
        it can be compared between tokenizers.

    Raises:
        ValueError: an argument is out of range, or an id does not fit the model's vocabulary.
    """
    ids = _checked(tokens)
    limit = _max_seq_len(model)
    if seq_len is None:
        seq_len = SEQ_LEN if limit is None else min(SEQ_LEN, limit)
    if seq_len < 1 or (limit is not None and seq_len > limit):
        accepted = "1 or more" if limit is None else f"1..{limit} (the model's max_seq_len)"
        raise ValueError(f"evaluate: seq_len must be {accepted}, got {seq_len}")
    for name, value in (("batch_size", batch_size), ("max_tokens", max_tokens), ("num_bytes", num_bytes)):
        if value is not None and value < 1:
            raise ValueError(f"evaluate: {name} must be 1 or more, got {value}")
    if num_bytes is not None and (max_tokens is not None or tokenizer is not None):
        raise ValueError(
            "evaluate: num_bytes is of the whole text: give neither max_tokens nor tokenizer with it"
        )
    if batch_size is None:
        batch_size = max(1, 4096 // seq_len)
    place = _device(model) if device is None else torch.device(device)

    total = torch.zeros((), dtype=torch.float64, device=place)
    count = text_bytes = 0
    with evaluation_mode(model) if isinstance(model, nn.Module) else nullcontext(), torch.no_grad():
        for rows in _batches(ids, seq_len, batch_size, max_tokens):
            batch = torch.from_numpy(rows).to(place)
            inputs, targets = batch[:, :-1], batch[:, 1:].reshape(-1)
            total += _sum_of_losses(model, inputs.contiguous(), targets, document_separator)
            count += targets.numel()
            if tokenizer is not None:
                text_bytes += sum(_bytes_of(row[1:], tokenizer) for row in rows)
    cross_entropy = float(total) / count
    result: dict[str, float | int] = {
        "cross_entropy": cross_entropy,
        "perplexity": perplexity(cross_entropy),
        "tokens": count,
    }
    text_bytes = num_bytes or text_bytes
    if text_bytes:
        result["bits_per_byte"] = cross_entropy * count / math.log(2) / text_bytes
    return result


def perplexity(cross_entropy: float) -> float:
    """exp of a mean loss in nats; infinite where that is beyond a float."""
    try:
        return math.exp(cross_entropy)
    except OverflowError:
        return math.inf


def _bytes_of(ids: NDArray[np.int64], tokenizer: Decoder) -> int:
    """UTF-8 bytes of the text of ids; a character that is cut off at an end counts as three."""
    eos_id = getattr(tokenizer, "eos_id", None)
    kept = ids if eos_id is None else ids[ids != eos_id]
    return len(tokenizer.decode(kept.tolist()).encode())


def _checked(tokens: NDArray[Any] | Tensor) -> NDArray[Any]:
    if hasattr(tokens, "heldout"):
        raise TypeError(
            "evaluate: tokens must be token ids, got a corpus: give its part, such as corpus.heldout"
        )
    ids = tokens.detach().cpu().numpy() if isinstance(tokens, Tensor) else np.asarray(tokens)
    if ids.ndim != 1 or ids.dtype.kind not in "iu" or len(ids) < 2:
        raise ValueError(
            f"evaluate: tokens must be one dimension of at least 2 integer ids, got {ids.dtype} of shape {ids.shape}"
        )
    return ids


def _batches(
    ids: NDArray[Any], seq_len: int, batch_size: int, max_tokens: int | None
) -> Iterator[NDArray[np.int64]]:
    """Rows int64 [<= batch_size, <= seq_len + 1]; a shorter row at the end of the text comes alone."""
    predictions = len(ids) - 1
    if max_tokens is not None and max_tokens < predictions and predictions >= seq_len:
        rows = heldout_rows(ids, seq_len, max_tokens)
        yield from (rows[i : i + batch_size] for i in range(0, len(rows), batch_size))
        return
    whole, rest = divmod(predictions, seq_len)
    for first in range(0, whole, batch_size):
        starts = np.arange(first, min(first + batch_size, whole)) * seq_len
        yield ids[starts[:, None] + np.arange(seq_len + 1)].astype(np.int64)
    if rest:
        yield ids[None, whole * seq_len :].astype(np.int64)


def _sum_of_losses(model: Any, inputs: Tensor, targets: Tensor, separator: int | None) -> Tensor:
    """Sum of -ln p(target), float64 [], of inputs int64 [B, T] and targets int64 [B T]."""
    if hasattr(model, "hidden_states") and hasattr(model, "logits"):
        # The head's product by parts: [B, T, V] of a batch may be gigabytes.
        documents = {} if separator is None else {"documents": model.document_numbers(inputs, separator)}
        hidden = model.hidden_states(inputs, **documents).flatten(0, 1)
        vocab_size = int(model.config.vocab_size)
        _check_ids(targets, vocab_size)
        part = max(1, _LOGITS // vocab_size)
        sums = [
            _losses(model.logits(hidden[i : i + part]), targets[i : i + part])
            for i in range(0, len(targets), part)
        ]
        return torch.stack(sums).sum()
    if separator is not None:
        raise ValueError("evaluate: document_separator needs a BitNetForCausalLM")
    out = model(inputs)
    logits = getattr(out, "logits", out)
    if not isinstance(logits, Tensor) or logits.shape[:-1] != inputs.shape:
        found = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(
            f"evaluate: model must give logits [B, T, V] of ids [B, T] = {list(inputs.shape)}, got {found}"
        )
    _check_ids(targets, logits.shape[-1])
    return _losses(logits.flatten(0, 1), targets)


def _losses(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), targets, reduction="none").double().sum()


def _check_ids(targets: Tensor, vocab_size: int) -> None:
    highest, lowest = int(targets.max()), int(targets.min())
    if lowest < 0 or highest >= vocab_size:
        raise ValueError(
            f"evaluate: tokens must be in 0..{vocab_size - 1} (the model's vocabulary), "
            f"got id {lowest if lowest < 0 else highest}"
        )


def _max_seq_len(model: Any) -> int | None:
    config = getattr(model, "config", None)
    limit = getattr(config, "max_seq_len", None) or getattr(config, "max_position_embeddings", None)
    return limit if isinstance(limit, int) else None


def _device(model: Any) -> torch.device:
    if isinstance(model, nn.Module):
        for tensor in (*model.parameters(), *model.buffers()):
            return tensor.device
    return torch.device("cpu")
