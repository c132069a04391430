"""Where a run comes from: its token stream, text, tokenizer, versions, device and command.

A checkpoint records it, and a resumed run compares it with its own.
"""

from __future__ import annotations

import hashlib
import os
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from bitnet_ext import __version__
from bitnet_ext.data import Corpus
from bitnet_ext.models import BitNetConfig, BitNetForCausalLM
from bitnet_ext.training.tensors import compiled_from

#: A fingerprint reads so many blocks of so many ids, evenly spaced; of a shorter stream all ids.
BLOCKS, BLOCK_TOKENS = 64, 4096

#: Types that a Trainer takes as its training stream.
TokenSource = NDArray[Any] | torch.Tensor | Sequence[int] | Corpus


class TokenStream(NamedTuple):
    """Token ids [n], and what is known of their text (JSON values), if anything is."""

    ids: NDArray[Any]
    source: dict[str, Any] | None


def token_stream(tokens: TokenSource) -> TokenStream:
    """The ids of an array, a memory map (which is not read), a tensor, a list, or the training part of a corpus.

    Raises:
        TypeError: `tokens` is none of them.
        ValueError: they are not integers, or not flat.
    """
    if isinstance(tokens, Corpus):
        return TokenStream(tokens.train, _source_of(tokens))
    if isinstance(tokens, str | bytes | os.PathLike):
        raise TypeError(
            f"Trainer: tokens must be token ids, got {type(tokens).__name__}; "
            "bitnet_ext.data.load_corpus(PATH) makes a corpus of a text"
        )
    if isinstance(tokens, torch.Tensor):
        ids = tokens.detach().cpu().numpy() if not tokens.is_floating_point() else None
    elif isinstance(tokens, np.ndarray):
        ids = tokens
    elif isinstance(tokens, Sequence):
        try:
            ids = np.asarray(tokens, dtype=None if len(tokens) else np.int64)
        except (ValueError, OverflowError):  # lists of unequal lengths, numbers beyond 64 bits
            ids = None
    else:
        raise TypeError(
            "Trainer: tokens must be integer ids as a numpy array, a torch tensor, a list, or a "
            f"bitnet_ext.data.Corpus, got {type(tokens).__name__}"
        )
    if ids is None or ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
        what = getattr(tokens, "dtype", None) if ids is None else ids.dtype
        shape = getattr(tokens, "shape", None) if ids is None else ids.shape
        raise ValueError(
            f"Trainer: tokens must be a flat array of integer ids, got {what or type(tokens).__name__}"
            + ("" if shape is None else f" of shape {tuple(shape)}")
        )
    return TokenStream(ids, None)


def model_to_train(model: object) -> BitNetForCausalLM:
    """The model itself, of a ``torch.compile(model)`` the module inside.

    Raises:
        TypeError: it is no BitNetForCausalLM.
    """
    inner = compiled_from(model)
    if not isinstance(inner, BitNetForCausalLM):
        raise TypeError(
            f"Trainer: model must be a BitNetForCausalLM, got {type(inner).__name__}; "
            "train other models with a loop of your own and a torch.optim optimizer"
        )
    return inner


def fingerprint(ids: NDArray[Any]) -> dict[str, Any]:
    """Length of a token stream and a SHA-256 of blocks of it, equal for equal ids in whatever integer dtype.

    At most 64 blocks of 4096 ids are read, the first and the last among them, so a memory map of any length costs
    a megabyte. A change between the blocks that keeps the length is not seen.
    """
    n, read = len(ids), BLOCKS * BLOCK_TOKENS
    digest = hashlib.sha256(f"{n}\n".encode())
    if n <= read:
        digest.update(np.asarray(ids, dtype="<i8").tobytes())
    else:
        for block in range(BLOCKS):
            start = block * (n - BLOCK_TOKENS) // (BLOCKS - 1)
            digest.update(np.asarray(ids[start : start + BLOCK_TOKENS], dtype="<i8").tobytes())
    return {"length": n, "sha256": digest.hexdigest()}


def provenance(stream: TokenStream, device: torch.device) -> dict[str, Any]:
    """The facts that a checkpoint records with settings and weights, as JSON values.

    ``tokens`` (:func:`fingerprint`), ``source`` (text, tokenizer; None where only ids were given), ``versions``,
    ``device``, ``command`` (the words of the command line) and ``created`` (when the trainer was made, UTC).
    """
    return {
        "tokens": fingerprint(stream.ids),
        "source": stream.source,
        "versions": {
            "bitnet_ext": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "device": {
            "type": device.type,
            "name": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        },
        "command": list(sys.argv),
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def check_same_run(
    saved: Mapping[str, Any], path: Path, model: BitNetConfig, record: Mapping[str, Any]
) -> None:
    """Compares a checkpoint with the run that is to go on from it: model, token stream and tokenizer.

    A field that a checkpoint of an earlier version lacks is not compared.

    Args:
        saved: state of the checkpoint. path: of the checkpoint.
        model, record: settings and :func:`provenance` of the run.

    Raises:
        ValueError: naming what differs.
    """
    before = saved.get("model_config")
    if isinstance(before, dict):
        before = BitNetConfig().to_dict() | before
        for name, value in model.to_dict().items():
            if before.get(name) != value:
                raise _differs(path, f"the model's {name} is {value!r}", repr(before.get(name)))
    tokens, now = saved.get("tokens"), record["tokens"]
    if isinstance(tokens, dict) and tokens != now:
        if tokens.get("length") != now["length"]:
            given, written = f"{now['length']:,} tokens", f"{tokens.get('length'):,} tokens"
        else:
            given = written = f"{now['length']:,} tokens"
            given = f"other {given}"
        raise _differs(
            path,
            f"the text has {given}{_named(record['source'])}",
            f"{written}{_named(saved.get('source'))}",
        )
    used, written_with = (_tokenizer_of(source) for source in (record["source"], saved.get("source")))
    if used is not None and written_with is not None and used[1] != written_with[1]:
        raise _differs(path, f"the tokenizer is {used[0]}", str(written_with[0]))


def _differs(path: Path, now: str, before: str) -> ValueError:
    return ValueError(
        f"Trainer: {now}, but {path} was written with {before}; a run is resumed with its own text and model. "
        "To begin another run with these weights use init_from (--init-from) and another folder"
    )


def _named(source: object) -> str:
    """The name of a text in brackets, where it has one."""
    name = source.get("name") if isinstance(source, dict) else None
    return f" ({name})" if isinstance(name, str) else ""


def _tokenizer_of(source: object) -> tuple[str, object] | None:
    """Name of a source's tokenizer, and what tells it from others; None where none is recorded."""
    record = source.get("tokenizer") if isinstance(source, dict) else None
    if isinstance(record, dict):
        return str(record.get("name")), record.get("fingerprint") or record
    return None if record is None else (str(record), record)


def _source_of(corpus: Corpus) -> dict[str, Any]:
    source = getattr(corpus, "source", None)
    if callable(source):
        record: dict[str, Any] = source()
        return record
    return {"name": corpus.name, "tokenizer": corpus.tokenizer, "fingerprint": corpus.fingerprint}
