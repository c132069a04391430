"""The model, text and tokenizer that a path on the command line means. Imports torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bitnet_ext.data import Corpus, corpus_from_source, load_corpus, load_tokenizer
from bitnet_ext.data.tokenizer import Tokenizer, TokenizerError
from bitnet_ext.data.tokenizer_files import tokenizer_from_record
from bitnet_ext.training.checkpoint import CheckpointError, read_state, resolve_checkpoint


def run_state(path: Path) -> dict[str, Any] | None:
    """The state of the checkpoint that a path means; None where it means none (an exported model, say).

    Raises:
        CheckpointError: the checkpoint is damaged.
    """
    try:
        folder = resolve_checkpoint(path)
    except CheckpointError:
        if (path / "checkpoint").exists() or (path / "latest.json").exists():
            raise
        return None
    state: dict[str, Any] = read_state(folder)["state"]
    return state


def corpus_of(state: Mapping[str, Any] | None, path: Path, data: str | None, tokenizer: str | None) -> Corpus:
    """The text that the command line names, else that of the run at `path`.

    Args:
        state: of the run's checkpoint. data, tokenizer: of the command line, or None.

    Raises:
        ValueError: neither names a text; the run's text has changed or is gone.
    """
    source = _source(state)
    if tokenizer is None and data is not None:
        record = _tokenizer_record(source)
        chosen: Any = "gpt2" if record is None else tokenizer_from_record(record)
        return load_corpus(data, tokenizer=chosen)
    if data is not None:
        return load_corpus(data, tokenizer=tokenizer)
    if source is None:
        raise ValueError(f"{path} does not tell its text: name it with --data")
    return corpus_from_source(source, tokenizer=tokenizer)


def tokenizer_of(state: Mapping[str, Any] | None, path: Path, vocab_size: int, spec: str | None) -> Tokenizer:
    """The tokenizer that the command line names, else that of the run, else GPT-2's where the vocabulary has its size.

    Raises:
        ValueError: there is none.
    """
    if spec is not None:
        return load_tokenizer(spec)
    record = _tokenizer_record(_source(state))
    if record is not None:
        return tokenizer_from_record(record)
    gpt2 = load_tokenizer("gpt2")
    if vocab_size < gpt2.vocab_size:
        raise TokenizerError(f"{path} does not tell its tokenizer: name it with --tokenizer")
    return gpt2


def _source(state: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    source = None if state is None else state.get("source")
    return source if isinstance(source, Mapping) else None


def _tokenizer_record(source: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    record = None if source is None else source.get("tokenizer")
    return record if isinstance(record, Mapping) else None
