"""tokenizer.json files of the Hugging Face library `tokenizers` (an extra)."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import importlib
import json
import zlib
from pathlib import Path
from typing import Any

from bitnet_ext.data.tokenizer import Tokenizer, TokenizerError, check_eos, is_failure

TOKENIZER_JSON = "tokenizer.json"
# Files in the folder of a tokenizer.json that say which token ends a text.
_CONFIG_FILES = ("tokenizer_config.json", "special_tokens_map.json")
_ID_FILES = ("generation_config.json", "config.json")
# Names of that token where no file says.
_EOS_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]")


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer of the library `tokenizers`.

    Special tokens are neither added nor recognised in a text; truncation and padding are switched off.

    Args:
        content: the text of a tokenizer.json. The fingerprint is its sha256.
        name: for people.
        eos_id: the id that ends a text. None: that of a special token with a usual name, if there is one.

    Raises:
        TokenizerError: the library is missing, or the content is damaged.
    """

    kind = "tokenizers"

    def __init__(self, content: str, *, name: str = TOKENIZER_JSON, eos_id: int | None = None) -> None:
        library = _library()
        try:
            self.tokenizer = library.Tokenizer.from_str(content)
        except BaseException as error:
            if not is_failure(error):
                raise
            reason = str(error).partition("\n")[0]
            raise TokenizerError(f"tokenizer {name!r} is no tokenizer.json ({reason})") from error
        # Settings of whoever saved the file: they would cut a text after 512 ids, say.
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.tokenizer.encode_special_tokens = True
        self.content = content
        self.name = name
        self.vocab_size = 1 + max(self.tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        if self.vocab_size < 1:
            raise TokenizerError(f"tokenizer {name!r} has no tokens")
        if eos_id is None:
            found = map(self.tokenizer.token_to_id, _EOS_NAMES)
            eos_id = next((i for i in found if i is not None), None)
        self.eos_id = check_eos(eos_id, self.vocab_size, name)
        self.fingerprint = hashlib.sha256(content.encode()).hexdigest()
        self._packed: str | None = None

    @classmethod
    def from_file(cls, path: Path, *, name: str | None = None) -> HuggingFaceTokenizer:
        """Reads a tokenizer.json; other files of its folder say which token ends a text.

        Raises:
            TokenizerError: the file is missing, unreadable or damaged.
        """
        try:
            content = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise TokenizerError(f"cannot read the tokenizer {path}: {reason}") from error
        tokenizer = cls(content, name=name or path.absolute().parent.name or path.name)
        stated = _stated_eos(path.parent, tokenizer.tokenizer)
        if stated is not None:
            tokenizer.eos_id = check_eos(stated, tokenizer.vocab_size, tokenizer.name)
        return tokenizer

    @classmethod
    def from_record(cls, record: dict[str, Any], folder: Path | None = None) -> HuggingFaceTokenizer:
        """The tokenizer of a record, whose content lies in the record or in `folder`/tokenizer.json.

        Raises:
            TokenizerError: the content is missing, damaged, or not the one that was recorded.
        """
        name = str(record.get("name", TOKENIZER_JSON))
        packed = record.get("content")
        try:
            if packed is not None:
                content = zlib.decompress(base64.b64decode(packed, validate=True)).decode("utf-8")
            elif folder is not None:
                content = (folder / TOKENIZER_JSON).read_text(encoding="utf-8")
            else:
                raise TokenizerError(f"the record of tokenizer {name!r} does not hold its content")
        except FileNotFoundError as error:
            raise TokenizerError(
                f"tokenizer {name!r} is missing: {folder} holds no {TOKENIZER_JSON}"
            ) from error
        except (OSError, ValueError, TypeError, zlib.error) as error:
            if isinstance(error, TokenizerError):
                raise
            raise TokenizerError(f"the record of tokenizer {name!r} is damaged ({error})") from error
        if hashlib.sha256(content.encode()).hexdigest() != record.get("fingerprint"):
            raise TokenizerError(
                f"tokenizer {name!r} is damaged: its content does not match the sha256 of its record"
            )
        eos_id = record.get("eos_id")
        tokenizer = cls(content, name=name, eos_id=eos_id)
        tokenizer.eos_id = eos_id  # also None
        return tokenizer

    def record(self) -> dict[str, Any]:
        """With the content (zlib, base64): a checkpoint needs no other file."""
        if self._packed is None:
            self._packed = base64.b64encode(zlib.compress(self.content.encode())).decode("ascii")
        return {**super().record(), "content": self._packed}

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=False))

    def _knows(self, token: int) -> bool:
        return 0 <= token < self.vocab_size and self.tokenizer.id_to_token(token) is not None


def _library() -> Any:
    try:
        return importlib.import_module("tokenizers")
    except ImportError as error:
        raise TokenizerError(
            "a tokenizer.json needs the package tokenizers: pip install 'tokenizers>=0.20'"
        ) from error


def _stated_eos(folder: Path, tokenizer: Any) -> int | None:
    for name in _CONFIG_FILES:
        token = _read_json(folder / name).get("eos_token")
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str) and (found := tokenizer.token_to_id(token)) is not None:
            return int(found)
    for name in _ID_FILES:
        value = _read_json(folder / name).get("eos_token_id")
        value = value[0] if isinstance(value, list) and value else value
        if isinstance(value, int) and tokenizer.id_to_token(value) is not None:
            return value
    return None


def _read_json(path: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict):
            return content
    return {}
