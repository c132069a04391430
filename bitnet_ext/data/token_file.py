"""Token files: the ids of a text on disk, memory-mapped, and a cache of them keyed by content.

Layout (little endian): a header of 128 bytes, then the ids as uint16 (vocabularies up to 65,536) or uint32.

    offset  size  field
         0     8  magic "BNXTOKEN"
         8     4  format version (1)
        12     4  bytes of an id: 2 or 4
        16     8  vocab_size: every id is smaller
        24     8  number of ids
        32     8  number of documents
        40    32  sha256 that stands for the source
        72    24  name of the tokeniser, padded with zero bytes
        96    24  first bytes of the tokeniser's fingerprint; zero where it is not known
       120     4  crc32 of the ids
       124     4  crc32 of the 124 bytes before

A file is written under a temporary name, synced and renamed: a reader sees a whole file or none.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import os
import re
import secrets
import struct
import time
import warnings
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from bitnet_ext.data.gpt2 import VOCAB_BPE_SHA256
from bitnet_ext.data.text import CorpusError, TextSource, text_file_source
from bitnet_ext.data.tokenizer import Tokenizer
from bitnet_ext.data.tokenizer_files import load_tokenizer

FORMAT_VERSION = 1
Tokens = npt.NDArray[Any]  # uint16 or uint32, one dimension

_MAGIC = b"BNXTOKEN"
_HEADER = struct.Struct("<8sIIQQQ32s24s24sI")
_HEADER_BYTES = 128
_WRITE_IDS = 1 << 16  # ids gathered before a write
_CRC_BYTES = 1 << 24  # bytes read at a time by the check of an opened file
_PROGRESS_CHARS = 4_000_000  # about one second of encoding; shorter texts show no bar
_STALE_SECONDS = 86_400  # a temporary file of this age was left by a writer that was killed
_CACHE_HINT = "set BITNET_EXT_CACHE to a folder that can be written"


class TokenFileError(ValueError):
    """A token file that is damaged, or that does not fit what it is used for."""


@dataclass(frozen=True)
class TokenFile:
    """An opened token file; `tokens` is a read-only memory map [num_tokens] of uint16 or uint32."""

    path: Path
    tokens: Tokens
    vocab_size: int
    num_documents: int
    source_sha256: str
    tokenizer: str  # id of the tokeniser
    tokenizer_fingerprint: str = ""  # its first 48 hex digits; empty where the file does not say

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, verify: bool = True) -> TokenFile:
        """Map the token file at `path`.

        `verify` reads the ids once, compares their checksum and their largest with the header (about two
        seconds for 1e9 ids in the page cache); the header and the length of the file are always checked.

        Raises:
            TokenFileError: not a token file, another format version, truncated, damaged, or ids that are
                not below vocab_size.
            OSError: the file cannot be read.
        """
        path = Path(path)
        with open(path, "rb") as file:
            header = file.read(_HEADER_BYTES)
            size = os.fstat(file.fileno()).st_size
        if header[: len(_MAGIC)] != _MAGIC:
            raise TokenFileError(
                f"{path} is not a token file: it begins with {header[:8]!r}, expected {_MAGIC!r}"
            )
        if len(header) < _HEADER_BYTES:
            raise TokenFileError(
                f"token file {path} is truncated: it has {size} bytes, its header alone has {_HEADER_BYTES}"
            )
        (
            _,
            version,
            id_bytes,
            vocab_size,
            num_tokens,
            num_documents,
            sha256,
            name,
            fingerprint,
            tokens_crc,
        ) = _HEADER.unpack(header[:-4])
        if version != FORMAT_VERSION:
            raise TokenFileError(
                f"token file {path} has format version {version}, accepted is {FORMAT_VERSION}"
            )
        if zlib.crc32(header[:-4]) != int.from_bytes(header[-4:], "little") or id_bytes not in (2, 4):
            raise TokenFileError(f"token file {path} is damaged: its header does not match its checksum")
        if not 1 <= vocab_size <= 1 << 32 or (vocab_size > 1 << 16 and id_bytes == 2):
            raise TokenFileError(
                f"token file {path} is damaged: its header gives vocab_size {vocab_size} with ids of {id_bytes} bytes"
            )
        expected = _HEADER_BYTES + num_tokens * id_bytes
        if size != expected:
            state = "truncated" if size < expected else "damaged"
            raise TokenFileError(
                f"token file {path} is {state}: it has {size} bytes, its header announces "
                f"{expected} ({num_tokens} tokens)"
            )
        dtype = np.dtype("<u2" if id_bytes == 2 else "<u4")
        tokens: Tokens
        if num_tokens:
            tokens = np.memmap(path, dtype=dtype, mode="r", offset=_HEADER_BYTES, shape=(num_tokens,))
        else:  # An empty range cannot be mapped.
            tokens = np.empty(0, dtype)
            tokens.flags.writeable = False
        if verify:
            crc, highest = _crc32_and_highest(tokens)
            if crc != tokens_crc:
                raise TokenFileError(f"token file {path} is damaged: its tokens do not match their checksum")
            if highest >= vocab_size:
                raise TokenFileError(
                    f"token file {path} is damaged: it holds the id {highest}, its header gives vocab_size {vocab_size}"
                )
        return cls(
            path,
            tokens,
            vocab_size,
            num_documents,
            sha256.hex(),
            name.rstrip(b"\0").decode("ascii", "replace"),
            fingerprint.hex() if any(fingerprint) else "",
        )

    def __len__(self) -> int:
        return len(self.tokens)

    def check_vocab(self, vocab_size: int) -> None:
        """TokenFileError when a model with `vocab_size` ids cannot read these tokens; a larger one can."""
        check_vocab(vocab_size, self.vocab_size, f"token file {self.path}")


def check_vocab(model_vocab_size: int, data_vocab_size: int, what: str) -> None:
    """TokenFileError unless `model_vocab_size >= data_vocab_size`; `what` names the data in the message."""
    if model_vocab_size < data_vocab_size:
        raise TokenFileError(
            f"vocab_size of the model is {model_vocab_size}, but {what} holds ids of a vocabulary of "
            f"{data_vocab_size}: accepted is vocab_size >= {data_vocab_size}"
        )


class TokenFileWriter:
    """Writes a token file piece by piece in bounded memory; use it as a context manager.

        with TokenFileWriter(path, vocab_size=50257) as writer:
            for ids in parts:
                writer.append(ids)

    The file appears at `path` when the block ends without an exception, whole and synced to the disk; after
    an exception nothing is left behind and an earlier file at `path` is untouched. `num_documents` may be
    set until then.

    Args:
        path: where the file is to be; missing folders are made.
        vocab_size: every id must be smaller; up to 65,536 ids are stored as uint16, beyond as uint32.
        source_sha256: 64 hex digits that stand for what the tokens were made from.
        tokenizer: id of the encoding (`Tokenizer.id`), at most 24 ASCII characters.
        tokenizer_fingerprint: empty, or 48 or more hex digits, of which the first 48 are kept.

    Raises:
        ValueError: an argument out of range, or an id that is negative or not smaller than `vocab_size`.
        OSError: the file cannot be written (a full disk, a missing permission).
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        vocab_size: int,
        source_sha256: str = "00" * 32,
        tokenizer: str = "",
        tokenizer_fingerprint: str = "",
    ) -> None:
        if not 1 <= vocab_size <= 1 << 32:
            raise ValueError(f"vocab_size is {vocab_size}, accepted is 1 to {1 << 32}")
        if not re.fullmatch("[0-9a-f]{64}", source_sha256):
            raise ValueError(f"source_sha256 is {source_sha256!r}, accepted are 64 lower-case hex digits")
        if len(tokenizer) > 24 or not tokenizer.isascii():
            raise ValueError(f"tokenizer is {tokenizer!r}, accepted are at most 24 ASCII characters")
        if not re.fullmatch("([0-9a-f]{48,64})?", tokenizer_fingerprint):
            raise ValueError(
                f"tokenizer_fingerprint is {tokenizer_fingerprint!r}, accepted are 48 to 64 lower-case hex digits"
            )
        self.path = Path(path)
        self.vocab_size = vocab_size
        self.source_sha256 = source_sha256
        self.tokenizer = tokenizer
        self.tokenizer_fingerprint = tokenizer_fingerprint[:48]
        self.num_documents = 0
        self.num_tokens = 0
        self._dtype = np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")
        self._crc = 0
        self._pending: list[Tokens] = []
        self._num_pending = 0
        self._file: BinaryIO | None = None
        self._temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")

    def __enter__(self) -> TokenFileWriter:
        with self._one_sentence():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _remove_stale(self.path.parent, glob.escape(self.path.name))
            self._file = open(self._temporary, "xb")
        try:
            self._write(bytes(_HEADER_BYTES))  # The numbers are known at the end.
        except BaseException:
            self._discard()
            raise
        return self

    def append(self, ids: Sequence[int] | Tokens) -> None:
        """Add token ids: one dimension, integers in 0..vocab_size - 1."""
        block = np.asarray(ids)
        if block.size == 0:
            return
        if block.ndim != 1 or block.dtype.kind not in "iu":
            raise ValueError(
                f"ids has shape {block.shape} and dtype {block.dtype}, accepted is a row of integers"
            )
        low, high = int(block.min()), int(block.max())
        if low < 0 or high >= self.vocab_size:
            raise ValueError(
                f"ids holds {low if low < 0 else high}, accepted are ids in 0..{self.vocab_size - 1} "
                f"(vocab_size {self.vocab_size})"
            )
        self._pending.append(block.astype(self._dtype))
        self._num_pending += block.size
        if self._num_pending >= _WRITE_IDS:
            self._flush_pending()

    def __exit__(self, kind: type[BaseException] | None, error: object, traceback: object) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._discard()

    def _flush_pending(self) -> None:
        if self._pending:
            data = np.concatenate(self._pending).tobytes()
            self._crc = zlib.crc32(data, self._crc)
            self.num_tokens += self._num_pending
            self._pending, self._num_pending = [], 0
            self._write(data)

    def _finish(self) -> None:
        self._flush_pending()
        header = _HEADER.pack(
            _MAGIC,
            FORMAT_VERSION,
            self._dtype.itemsize,
            self.vocab_size,
            self.num_tokens,
            self.num_documents,
            bytes.fromhex(self.source_sha256),
            self.tokenizer.encode("ascii"),
            bytes.fromhex(self.tokenizer_fingerprint),
            self._crc,
        )
        assert self._file is not None
        with self._one_sentence():
            self._file.seek(0)
        self._write(header + zlib.crc32(header).to_bytes(4, "little"))
        with self._one_sentence():
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            os.replace(self._temporary, self.path)

    def _write(self, data: bytes) -> None:
        assert self._file is not None, "TokenFileWriter is used outside its `with` block"
        with self._one_sentence():
            self._file.write(data)

    def _discard(self) -> None:
        # After a rename there is nothing under the temporary name; closing may fail again on a full disk.
        with contextlib.suppress(OSError):
            if self._file is not None:
                self._file.close()
        with contextlib.suppress(OSError):
            self._temporary.unlink()

    @contextlib.contextmanager
    def _one_sentence(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = error.strerror or str(error)
            told = OSError(f"cannot write the token file {self.path}: {reason}; nothing was left behind")
            told.errno = error.errno
            raise told from error


def _remove_stale(folder: Path, names: str) -> None:
    """Removes what writers of token files of these names (a pattern) left that were killed a day ago or earlier."""
    limit = time.time() - _STALE_SECONDS
    for left in folder.glob(f".{names}.*.tmp"):
        with contextlib.suppress(OSError):
            if left.stat().st_mtime < limit:
                left.unlink()


def default_cache_dir() -> Path:
    """Where token files are kept.

    `$BITNET_EXT_CACHE`, else `$XDG_CACHE_HOME/bitnet_ext`, else `~/.cache/bitnet_ext`; a leading `~` is the
    home folder.

    Raises:
        OSError: the folder depends on the home folder and there is none.
    """
    if own := os.environ.get("BITNET_EXT_CACHE"):
        return _expand_home(own)
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        return _expand_home(xdg) / "bitnet_ext"
    return _expand_home("~") / ".cache" / "bitnet_ext"


def _expand_home(path: str | os.PathLike[str]) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise OSError(
            f"cannot find the cache of token files: {os.fspath(path)} needs a home folder and this user has none; "
            f"{_CACHE_HINT}"
        ) from error


def tokenize_cached(
    source: TextSource | str | os.PathLike[str],
    cache_dir: str | os.PathLike[str] | None = None,
    *,
    tokenizer: Any = "gpt2",
    progress: bool = True,
) -> TokenFile:
    """The tokens of a text, from the cache or tokenised now (GPT-2: several MB of text a second).

    The cache key is the sha256 of the text's content and rules, the tokeniser and the format version. A
    cached file that is damaged is reported with a warning and built again.

    Args:
        source: a `TextSource`, or the path of a UTF-8 text file (plain, .gz, .xz).
        cache_dir: default `default_cache_dir()`.
        tokenizer: a `Tokenizer`, or whatever `load_tokenizer` accepts.
        progress: a progress bar for texts of more than a few million characters, on a terminal only.

    Raises:
        CorpusError: the text cannot be read or tokenised.
        OSError: the token file cannot be read or written.
    """
    if not isinstance(source, TextSource):
        source = text_file_source(source)
    tokenizer = load_tokenizer(tokenizer)
    rules = tokenizer.id
    if tokenizer.fingerprint != VOCAB_BPE_SHA256:
        # GPT-2's key stays what it was before there were other tokenizers: its id says all.
        rules = f"{rules} {tokenizer.fingerprint} {tokenizer.eos_id}"
    key = hashlib.sha256(f"{source.sha256} {rules} {FORMAT_VERSION}".encode()).hexdigest()
    label = re.sub(r"[^A-Za-z0-9._-]+", "_", source.name)[:40]
    folder = default_cache_dir() if cache_dir is None else _expand_home(cache_dir)
    path = folder / f"{label}-{key[:32]}.tokens"
    try:
        cached = TokenFile.open(path)
        if _is_of(cached, source, tokenizer):
            return cached
        warnings.warn(f"token file {path} belongs to another text; it is built again", stacklevel=2)
    except FileNotFoundError:
        pass
    except NotADirectoryError:
        pass  # Told when the file is written.
    except TokenFileError as error:
        warnings.warn(f"{error}; it is built again", stacklevel=2)
    except OSError as error:
        raise _cache_error("read", path, error) from error
    _remove_stale(folder, "*.tokens")  # also of texts that nobody reads again
    try:
        _tokenize(source, tokenizer, path, progress)
        return TokenFile.open(path)
    except OSError as error:
        raise _cache_error("write", path, error) from error


def _is_of(cached: TokenFile, source: TextSource, tokenizer: Tokenizer) -> bool:
    same = (cached.source_sha256, cached.tokenizer, cached.vocab_size) == (
        source.sha256,
        tokenizer.id,
        tokenizer.vocab_size,
    )
    return same and cached.tokenizer_fingerprint in ("", tokenizer.fingerprint[:48])


def _cache_error(action: str, path: Path, error: OSError) -> OSError:
    reason = error.strerror or str(error)
    sentence = (
        str(error) if "token file" in str(error) else f"cannot {action} the token file {path}: {reason}"
    )
    told = OSError(f"{sentence}; {_CACHE_HINT}")
    told.errno = error.errno
    return told


def _tokenize(source: TextSource, tokenizer: Tokenizer, path: Path, progress: bool) -> None:
    num_chars = source.num_chars()
    silent = not progress or (num_chars is not None and num_chars < _PROGRESS_CHARS)
    with (
        # None: only where the bar can be drawn in place.
        tqdm(
            total=num_chars,
            desc=f"tokenise {source.name}",
            unit="char",
            unit_scale=True,
            disable=silent or None,
        ) as bar,
        TokenFileWriter(
            path,
            vocab_size=tokenizer.vocab_size,
            source_sha256=source.sha256,
            tokenizer=tokenizer.id,
            tokenizer_fingerprint=tokenizer.fingerprint,
        ) as writer,
    ):
        for document in source.documents():
            try:
                for piece in document.pieces:
                    for ids in tokenizer.encode_parts(piece):
                        writer.append(ids)
            except ValueError as error:  # Also an id that is not below the vocabulary's size.
                raise CorpusError(f"the text {source.name} cannot be tokenised: {error}") from error
            if document.ends and source.separator and tokenizer.eos_id is not None:
                writer.append([tokenizer.eos_id])
            writer.num_documents += 1
            bar.update(document.num_chars)


def _crc32_and_highest(tokens: Tokens) -> tuple[int, int]:
    """The checksum of the ids and the largest of them, -1 of none."""
    step = _CRC_BYTES // tokens.itemsize
    crc, highest = 0, -1
    for start in range(0, len(tokens), step):
        block = tokens[start : start + step]
        crc = zlib.crc32(block.view(np.uint8).data, crc)
        highest = max(highest, int(block.max()))
    return crc, highest
