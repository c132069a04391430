"""The settings and the text of the run that a path on the command line means. Imports torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bitnet_ext.data import CORPORA, Corpus, corpus_from_source, load_corpus
from bitnet_ext.data.tokenizer_files import tokenizer_from_record
from bitnet_ext.formats.pretrained import is_pretrained, read_config
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
        told = _exported_text(path)
        if told is None:
            raise ValueError(f"{path} does not tell its text: name it with --data")
        return load_corpus(told, tokenizer=tokenizer or "gpt2")
    return corpus_from_source(source, tokenizer=tokenizer)


def _exported_text(path: Path) -> str | None:
    """The corpus that an exported model was trained on, where it is one that everybody has."""
    if not is_pretrained(path):
        return None
    source = (read_config(path).get("about") or {}).get("source")
    name = source.get("name") if isinstance(source, dict) else None
    return name if name in CORPORA else None


def _source(state: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    source = None if state is None else state.get("source")
    return source if isinstance(source, Mapping) else None


def _tokenizer_record(source: Mapping[str, Any] | None) -> dict[str, Any] | None:
    record = None if source is None else source.get("tokenizer")
    return record if isinstance(record, dict) else None
