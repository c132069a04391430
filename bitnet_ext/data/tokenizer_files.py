"""Tokenizers by name, from a file, a folder or a record; and into a folder."""

from __future__ import annotations

import copy
import json
import os
import secrets
from pathlib import Path
from typing import Any

import tiktoken

from bitnet_ext.data.gpt2 import gpt2_tokenizer
from bitnet_ext.data.hf_tokenizer import TOKENIZER_JSON, HuggingFaceTokenizer
from bitnet_ext.data.tokenizer import ObjectTokenizer, TiktokenTokenizer, Tokenizer, TokenizerError

#: The file that names a folder's tokenizer; not tokenizer.json, which other programs read as their own.
RECORD_FILE = "bitnet_tokenizer.json"

_ACCEPTED = (
    "accepted are 'gpt2', the name of a tiktoken encoding, the path of a tokenizer.json or of a folder with one, "
    "and an object with encode and decode"
)


def load_tokenizer(spec: Any = "gpt2", *, eos_token: str | None = None) -> Tokenizer:
    """A tokenizer by name or path, or of an object.

    Args:
        spec: one of

            - "gpt2": GPT-2's byte-pair encoding, which is in this package;
            - the name of another tiktoken encoding, such as "cl100k_base": from tiktoken's cache, or from the
              network;
            - the path of a tokenizer.json of the library `tokenizers`, or of a folder with one (a downloaded
              Hugging Face model; needs `pip install tokenizers`), or of a folder that `save_tokenizer` wrote;
            - a `tiktoken.Encoding`, a `tokenizers.Tokenizer`, a tokenizer of transformers, or any object with
              `encode(text) -> ids`, `decode(ids) -> str` and a vocabulary size;
            - a `Tokenizer`, which is returned.
        eos_token: the special token that ends a text, where nothing else says.

    Raises:
        TokenizerError (a ValueError): unknown, missing, damaged, or not to be had without a network.
        TypeError: `spec` is of another type.
    """
    tokenizer = _load(spec)
    if eos_token is not None:
        tokenizer = copy.copy(tokenizer)
        tokenizer.eos_id = _token_id(tokenizer, eos_token)
    return tokenizer


def _load(spec: Any) -> Tokenizer:
    if isinstance(spec, Tokenizer):
        return spec
    if isinstance(spec, tiktoken.Encoding):
        return TiktokenTokenizer(spec)
    if isinstance(spec, str | os.PathLike):
        return _by_name(os.fspath(spec))
    # A fast tokenizer of transformers holds one of the library tokenizers.
    inner = getattr(spec, "backend_tokenizer", spec)
    if type(inner).__module__.partition(".")[0] == "tokenizers" and hasattr(inner, "to_str"):
        eos_id = getattr(spec, "eos_token_id", None)
        name = Path(str(getattr(spec, "name_or_path", "") or TOKENIZER_JSON)).name
        return HuggingFaceTokenizer(inner.to_str(), name=name, eos_id=eos_id)
    if spec is None or isinstance(spec, bool | int | float | bytes | list | tuple | dict | set):
        raise TypeError(f"tokenizer is {type(spec).__name__}, {_ACCEPTED}")
    return ObjectTokenizer(spec)


def _by_name(name: Any) -> Tokenizer:
    if not isinstance(name, str):
        raise TypeError(f"tokenizer is {type(name).__name__}, {_ACCEPTED}")
    if name == "gpt2":
        return TiktokenTokenizer()
    path = Path(name).expanduser() if name.startswith("~/") else Path(name)
    try:
        if path.is_dir():
            return _from_folder(path)
        if path.is_file():
            return _from_file(path)
    except OSError as error:
        raise TokenizerError(f"cannot read the tokenizer {name!r}: {error.strerror or error}") from error
    except ValueError as error:
        if isinstance(error, TokenizerError):
            raise
        raise TokenizerError(f"tokenizer {name!r} is no path ({error})") from error
    if name in tiktoken.list_encoding_names():
        return _tiktoken_by_name(name)
    known = ", ".join(map(repr, tiktoken.list_encoding_names()))
    raise TokenizerError(f"tokenizer {name!r} is unknown: {_ACCEPTED}; tiktoken knows {known}")


def _tiktoken_by_name(name: str) -> TiktokenTokenizer:
    try:
        return TiktokenTokenizer(gpt2_tokenizer() if name == "gpt2" else tiktoken.get_encoding(name))
    except Exception as error:  # Each transport has errors of its own.
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise TokenizerError(
            f"tokenizer {name!r} could not be loaded over the network ({reason}): set TIKTOKEN_CACHE_DIR to a folder "
            "in which tiktoken has it, or give 'gpt2', which needs no network"
        ) from error


def _from_folder(folder: Path) -> Tokenizer:
    if (folder / RECORD_FILE).is_file():
        return tokenizer_from_record(_read_record(folder / RECORD_FILE), folder=folder)
    if (folder / TOKENIZER_JSON).is_file():
        return HuggingFaceTokenizer.from_file(folder / TOKENIZER_JSON)
    raise TokenizerError(
        f"the folder {str(folder)!r} holds no tokenizer: {TOKENIZER_JSON} or {RECORD_FILE} is needed"
    )


def _from_file(path: Path) -> Tokenizer:
    if path.name == RECORD_FILE:
        return tokenizer_from_record(_read_record(path), folder=path.parent)
    if path.suffix != ".json":
        raise TokenizerError(
            f"tokenizer {str(path)!r} is a {path.suffix or 'nameless'} file, {_ACCEPTED} (a sentencepiece model is "
            "converted by transformers.AutoTokenizer.from_pretrained(...).save_pretrained(...))"
        )
    name = path.absolute().parent.name if path.name == TOKENIZER_JSON else path.stem
    return HuggingFaceTokenizer.from_file(path, name=name)


def _read_record(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TokenizerError(f"cannot read the tokenizer {path}: {error}") from error
    if not isinstance(content, dict):
        raise TokenizerError(f"the tokenizer {path} is damaged: it must hold a JSON object")
    return content


def tokenizer_from_record(
    record: dict[str, Any], *, folder: str | os.PathLike[str] | None = None
) -> Tokenizer:
    """The tokenizer that gave a record (`Tokenizer.record`), as a checkpoint holds it.

    Args:
        record: the dictionary.
        folder: where tokenizer.json lies, for a record without its content.

    Raises:
        TokenizerError: the record is damaged, of an object of the user's own, or what it names has changed.
    """
    if not isinstance(record, dict):
        raise TokenizerError(f"record is {type(record).__name__}, accepted is what Tokenizer.record() gives")
    kind, name = record.get("kind"), record.get("name")
    if kind == "tokenizers":
        return HuggingFaceTokenizer.from_record(record, None if folder is None else Path(folder))
    if kind == "object":
        raise TokenizerError(
            f"tokenizer {name!r} is an object of whoever trained the model and not in its files: give it as tokenizer="
        )
    if kind != "tiktoken" or not isinstance(name, str):
        raise TokenizerError(f"the record of a tokenizer is damaged: its kind is {kind!r}, its name {name!r}")
    if name not in tiktoken.list_encoding_names():
        raise TokenizerError(
            f"tokenizer {name!r} is no encoding of the installed tiktoken: give it as tokenizer="
        )
    tokenizer = _tiktoken_by_name(name)
    if tokenizer.fingerprint != record.get("fingerprint"):
        raise TokenizerError(
            f"tokenizer {name!r} is not the one that was recorded: its fingerprint is {tokenizer.fingerprint[:8]}, "
            f"expected {str(record.get('fingerprint'))[:8]}"
        )
    eos_id = record.get("eos_id")
    tokenizer.eos_id = eos_id if isinstance(eos_id, int) else None
    return tokenizer


def save_tokenizer(tokenizer: Any, folder: str | os.PathLike[str]) -> None:
    """Writes a tokenizer into a folder, from which `load_tokenizer(folder)` reads it.

    The folder gets a small bitnet_tokenizer.json, and the tokenizer.json where the tokenizer is one of the
    library `tokenizers`. Of an object of the user's own only the name is written.

    Raises:
        OSError: the files cannot be written.
    """
    tokenizer = load_tokenizer(tokenizer)
    folder = Path(folder)
    record = tokenizer.record()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if isinstance(tokenizer, HuggingFaceTokenizer):
            del record["content"]
            _write_atomic(folder / TOKENIZER_JSON, tokenizer.content)
            if not (folder / "tokenizer_config.json").exists():
                config = {"tokenizer_class": "PreTrainedTokenizerFast"}
                if tokenizer.eos_id is not None:
                    config["eos_token"] = tokenizer.tokenizer.id_to_token(tokenizer.eos_id)
                _write_atomic(folder / "tokenizer_config.json", json.dumps(config, indent=1))
        _write_atomic(folder / RECORD_FILE, json.dumps(record, indent=1))
    except OSError as error:
        raise OSError(f"cannot write the tokenizer to {folder}: {error.strerror or error}") from error


def _write_atomic(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _token_id(tokenizer: Tokenizer, token: str) -> int:
    found = None
    if isinstance(tokenizer, HuggingFaceTokenizer):
        found = tokenizer.tokenizer.token_to_id(token)
    elif isinstance(tokenizer, TiktokenTokenizer):
        found = tokenizer.encoding._special_tokens.get(token)
    if found is None:
        ids = tokenizer.encode(token)
        found = ids[0] if len(ids) == 1 else None
    if found is None:
        raise TokenizerError(f"eos_token is {token!r}, which is no token of {tokenizer.name!r}")
    return int(found)
