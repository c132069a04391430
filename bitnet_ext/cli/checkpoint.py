"""Settings, text and weights of the run or model that a path on the command line means. Imports torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from bitnet_ext.data import CORPORA, Corpus, corpus_from_source, load_corpus
from bitnet_ext.data.tokenizer_files import RECORD_FILE, load_tokenizer, tokenizer_from_record
from bitnet_ext.formats.pretrained import from_pretrained, is_pretrained, read_config
from bitnet_ext.models import BitNetConfig
from bitnet_ext.training.checkpoint import Checkpoint, CheckpointError, read_state, resolve_checkpoint


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


class InitialWeights(NamedTuple):
    """With what a run begins that takes over the weights of a model (--init-from)."""

    network: BitNetConfig
    weights: Checkpoint | Path
    tokenizer: Any


def initial_weights(path: Path) -> InitialWeights:
    """Network, weights and tokenizer of a run, of a checkpoint, or of a model exported in training form.

    Raises:
        ValueError: the path holds none of them, or a packed model, which has no weights to train.
    """
    if is_pretrained(path):
        if read_config(path)["form"] == "packed":
            raise ValueError(
                f"train: --init-from {path} is a packed model, which has no weights to train: name the run that it was "
                "exported from, or export that with --no-packed"
            )
        model = from_pretrained(path)
        weights = Checkpoint(path, 0, model.state_dict(), {}, {})
        return InitialWeights(model.config, weights, _own_tokenizer(None, path))
    folder = resolve_checkpoint(path)
    state = read_state(folder)["state"]
    config = state.get("model_config")
    if not isinstance(config, dict):
        raise CheckpointError(f"checkpoint {folder} holds no BitNetConfig: it is of another model")
    return InitialWeights(BitNetConfig.from_dict(config), folder, _own_tokenizer(_source(state), folder))


def training_numbers(state: Mapping[str, Any] | None, path: Path) -> dict[str, int]:
    """The settings of the training, where they are integers, that a checkpoint or an exported model tells."""
    told = _about(path).get("training") if state is None else state.get("train_config")
    return {k: v for k, v in told.items() if isinstance(v, int)} if isinstance(told, Mapping) else {}


def corpus_of(state: Mapping[str, Any] | None, path: Path, data: str | None, tokenizer: str | None) -> Corpus:
    """The text that the command line names, else that of the model at `path`, in the ids of its tokenizer.

    Args:
        state: of the run's checkpoint; None for an exported model.
        data, tokenizer: of the command line, or None for those of the model.

    Raises:
        ValueError: neither names a text; the run's text has changed or is gone.
    """
    source = _source(state)
    if data is None and source is not None:
        return corpus_from_source(source, tokenizer=tokenizer)
    text = _exported_text(path) if data is None else data
    if text is None:
        raise ValueError(f"{path} does not tell its text: name it with --data")
    return load_corpus(text, tokenizer=_own_tokenizer(source, path) if tokenizer is None else tokenizer)


def _exported_text(path: Path) -> str | None:
    """The corpus that an exported model was trained on, where it is one that everybody has."""
    source = _about(path).get("source")
    name = source.get("name") if isinstance(source, dict) else None
    return name if name in CORPORA else None


def _about(path: Path) -> Mapping[str, Any]:
    about = read_config(path).get("about") if is_pretrained(path) else None
    return about if isinstance(about, Mapping) else {}


def _source(state: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    source = None if state is None else state.get("source")
    return source if isinstance(source, Mapping) else None


def _own_tokenizer(source: Mapping[str, Any] | None, path: Path) -> Any:
    """The tokenizer of the checkpoint or of the exported model; GPT-2's where none is recorded."""
    record = None if source is None else source.get("tokenizer")
    if isinstance(record, dict):
        return tokenizer_from_record(record)
    return load_tokenizer(path if (path / RECORD_FILE).is_file() else "gpt2")
