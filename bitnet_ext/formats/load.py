"""One door to all models on disk: runs, checkpoints and folders to hand on."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bitnet_ext.data.gpt2 import GPT2_VOCAB_SIZE
from bitnet_ext.data.tokenizer import Tokenizer, TokenizerError
from bitnet_ext.data.tokenizer_files import RECORD_FILE, load_tokenizer, tokenizer_from_record
from bitnet_ext.formats.errors import FormatError
from bitnet_ext.formats.pretrained import from_pretrained, is_pretrained, read_config, save_pretrained
from bitnet_ext.formats.tensor_files import read_json
from bitnet_ext.models import BitNetForCausalLM
from bitnet_ext.nn import PackedBitLinear, pack_model
from bitnet_ext.training.checkpoint import CheckpointError, read_state, resolve_checkpoint
from bitnet_ext.training.checkpoint import load_model as load_checkpoint

#: GPT-2's vocabulary, also padded to a multiple of 64: what a checkpoint without a record of its tokenizer has.
_GPT2_SIZES = range(GPT2_VOCAB_SIZE, 50304 + 1)


# Facts about a run's text, without its path on the machine that trained the model.
_TOLD = ("name", "description", "fingerprint", "num_tokens", "vocab_size")


# The settings with which a run's loss was measured.
_EVALUATED_WITH = ("seq_len", "document_separator")


class LoadedModel(NamedTuple):
    """A model and its tokenizer; None where nothing says which it is."""

    model: BitNetForCausalLM
    tokenizer: Tokenizer | None


def load_model(
    path: str | os.PathLike[str],
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    *,
    tokenizer: Any = None,
) -> LoadedModel:
    """The model on disk that a path means, with the tokenizer that it was trained with.

    Args:
        path: the folder of a run, of checkpoints, of one checkpoint, or one that :func:`save_pretrained` wrote.
        device: of the model.
        dtype: of its parameters; None as they were saved.
        tokenizer: replaces the one that the folder names, which is needed where that is an object of the user's
            own; whatever :func:`bitnet_ext.data.load_tokenizer` accepts.

    Returns:
        (model, tokenizer): the model in training form or packed, as it was saved; the tokenizer None where the
        folder does not say which it is, or where it is an object of the user's own.

    Raises:
        ValueError: nothing of this kind is there, or it is damaged: FormatError, CheckpointError, TokenizerError.
    """
    path = Path(path)
    if is_pretrained(path):
        model = from_pretrained(path, device, dtype)
    else:
        path = _checkpoint_folder(path)
        model = load_checkpoint(path, device)
        if dtype is not None:
            model.to(dtype)
    return LoadedModel(model, _tokenizer(path, model.config.vocab_size, tokenizer))


def export(
    run: str | os.PathLike[str],
    out: str | os.PathLike[str],
    packed: bool = True,
    head: str = "keep",
    *,
    dtype: torch.dtype | None = None,
    tokenizer: Any = None,
) -> Path:
    """Writes the model of a run into a folder to hand on, see :func:`save_pretrained`.

    Args:
        run: whatever :func:`load_model` accepts.
        out: the new folder.
        packed: packs the ternary layers (2 bits per weight); otherwise the folder can be trained further.
        head: "keep", or "int8" for an output head of half the bytes of bfloat16, see :func:`pack_model`.
        dtype: of what is not packed: embedding, norms and head; None as in the run. Layers are packed from the
            weights as the run has them.
        tokenizer: as in :func:`load_model`.

    Returns:
        `out`.

    Raises:
        ValueError: the run holds no model, or `packed` and `head` do not fit it.
        OSError: the folder cannot be written.
    """
    model, found = load_model(run, tokenizer=tokenizer)
    about = _origin(Path(run))
    is_packed = any(isinstance(module, PackedBitLinear) for module in model.modules())
    if is_packed and (not packed or head != "keep"):
        raise ValueError(
            f"export: {os.fspath(run)} is packed already; accepted is packed=True with head='keep', as it is"
        )
    if not packed and head != "keep":
        raise ValueError(f"export: head is {head!r}, which needs packed=True")
    if packed and not is_packed:
        model = pack_model(model, inplace=True, head=head)
    if dtype is not None:
        model.to(dtype)
    return save_pretrained(model, out, found, about=about)


def _checkpoint_folder(path: Path) -> Path:
    """The checkpoint's folder that a path means."""
    try:
        return resolve_checkpoint(path)
    except CheckpointError as error:
        if any((folder / "latest.json").exists() for folder in (path, path / "checkpoint")):
            raise
        config = path / "config.json"
        if config.is_file() and "model_type" in read_json(config):
            read_config(path)  # says which program's model it is
        if not path.is_dir():
            raise FormatError(f"{path} holds no model: there is no such folder") from error
        raise FormatError(
            f"{path} holds no model: accepted are the folder of a run, of checkpoints (with latest.json), of one "
            "checkpoint (with state.json), and one that save_pretrained wrote (with config.json)"
        ) from error


def _tokenizer(folder: Path, vocab_size: int, given: Any) -> Tokenizer | None:
    found: Tokenizer | None = None
    if given is not None:
        found = load_tokenizer(given)
    elif (folder / RECORD_FILE).is_file():
        found = _unless_object(folder / RECORD_FILE)
    elif (folder / "state.json").is_file():
        source = read_state(folder)["state"].get("source")
        record = source.get("tokenizer") if isinstance(source, dict) else None
        if record is not None:
            is_object = isinstance(record, dict) and record.get("kind") == "object"
            found = None if is_object else tokenizer_from_record(record)
        elif source is None and vocab_size in _GPT2_SIZES:
            found = load_tokenizer("gpt2")  # the only one there was before checkpoints named it
    if found is not None and found.vocab_size > vocab_size:
        raise TokenizerError(
            f"tokenizer {found.name!r} has {found.vocab_size} ids, the model in {folder} has vocab_size {vocab_size}"
        )
    return found


def _unless_object(path: Path) -> Tokenizer | None:
    try:
        kind = json.loads(path.read_text(encoding="utf-8"))["kind"]
    except (OSError, ValueError, KeyError, TypeError):
        kind = None  # load_tokenizer says what is wrong
    return None if kind == "object" else load_tokenizer(path)


def _origin(run: Path) -> dict[str, Any]:
    """Step, context and text of a checkpoint, and what a folder says about itself."""
    if is_pretrained(run):
        return dict(read_config(run).get("about") or {})
    folder = _checkpoint_folder(run)
    content = read_state(folder)
    about: dict[str, Any] = {"step": content["step"]}
    settings, source = (content["state"].get(key) for key in ("train_config", "source"))
    if isinstance(settings, dict):
        about["training"] = {key: settings[key] for key in _EVALUATED_WITH if key in settings}
    if isinstance(source, dict):
        about["source"] = {key: source[key] for key in _TOLD if key in source}
    return about
