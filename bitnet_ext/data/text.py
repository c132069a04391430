"""Text as documents: reading files and cutting them into documents, or into blocks of lines.

Everything streams: a text is read line by line, as often as needed, and at most one document (or two blocks)
is held in memory. Lines of plain text that are longer than a million characters are read in parts.
"""

from __future__ import annotations

import gzip
import hashlib
import itertools
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple, cast

from bitnet_ext.data.cutting import cut_text, last_safe_cut
from bitnet_ext.data.gpt2 import END_OF_TEXT

# Lines of a text (or parts of long lines), with their line breaks; None ends a document.
Lines = Iterable["str | None"]

TEXT_SUFFIXES = (".txt", ".md")
COMPRESSED_SUFFIXES = ("", ".gz", ".xz")
# "= Title =": the first line of an article in WikiText; its sections are "= = Section = =".
_WIKITEXT_TITLE = re.compile(r"= [^=].* =")
_MAX_BLOCK_CHARS = 16_384  # about 4,000 tokens: a seam between blocks is rare, a held-out block is long
_LINE_PART_CHARS = 1 << 20  # a longer line is read in parts
_SHORT_LINE_CHARS = 256  # shorter lines are never cut, however small the blocks
_SMALL_PART_CHARS = 64  # of a line that is cut


class CorpusError(ValueError):
    """A corpus that is missing, unreadable, empty or too short; the message is one sentence."""


class Document(NamedTuple):
    """A document, or a block of lines of one; its pieces are tokenised one by one, in order."""

    pieces: tuple[str, ...]
    ends: bool  # False for a block that is not the last of its document

    @property
    def num_chars(self) -> int:
        return sum(map(len, self.pieces))


@dataclass(frozen=True)
class TextSource:
    """A text to tokenise: documents on demand, and the sha256 (64 hex digits) of what they are made from.

    The sha256 covers the source's bytes and every rule that shapes the documents, so equal digests mean
    equal tokens. `separator` asks for an `<|endoftext|>` after each document.
    """

    name: str
    sha256: str
    documents: Callable[[], Iterable[Document]]
    num_chars: Callable[[], int | None]  # for a progress bar; None where it is not known
    separator: bool


def text_file_source(path: str | os.PathLike[str]) -> TextSource:
    """One UTF-8 text file (plain, .gz or .xz), whole and unchanged; `<|endoftext|>` in it ends a document."""
    path = Path(path)
    digest = hashlib.sha256(b"text file, rules 2\n" + file_sha256(path)).hexdigest()
    return TextSource(
        path.name,
        digest,
        lambda: group_documents(read_lines([path]), block_chars=_MAX_BLOCK_CHARS),
        lambda: None if path.suffix in COMPRESSED_SUFFIXES[1:] else path.stat().st_size,
        separator=True,
    )


def file_sha256(path: Path) -> bytes:
    """The sha256 (32 bytes) of a file as it lies on disk; CorpusError when it cannot be read."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise CorpusError(f"cannot read the text {path}: {error.strerror or error}") from error
    return digest.digest()


def find_text_files(folder: Path) -> list[Path]:
    """Every .txt and .md file (also packed as .gz or .xz) below `folder`, sorted, without hidden ones."""
    suffixes = tuple(text + packed for text in TEXT_SUFFIXES for packed in COMPRESSED_SUFFIXES)
    found = (path for path in folder.rglob("*") if path.name.lower().endswith(suffixes) and path.is_file())
    relative = sorted(path.relative_to(folder).as_posix() for path in found)
    return [folder / name for name in relative if not any(part.startswith(".") for part in name.split("/"))]


def read_lines(paths: Iterable[Path], *, wikitext: bool = False) -> Iterator[str | None]:
    """The lines of UTF-8 text files (plain, .gz, .xz), "\\n" at their ends; None after each document.

    A document ends with its file, at `<|endoftext|>` and, for WikiText, before each article's title.

    Raises:
        CorpusError: a file is missing, not UTF-8, or its compression is damaged.
    """
    for path in paths:
        try:
            with _open_text(path) as file:
                if wikitext:
                    yield from split_articles(file)
                else:
                    yield from _split_at_marker(_read_parts(file))
        except UnicodeDecodeError as error:
            raise CorpusError(
                f"the text {path} is not UTF-8: byte 0x{error.object[error.start]:02x} ({error.reason})"
            ) from error
        except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
            raise CorpusError(f"cannot read the text {path}: {error}") from error
        yield None


def split_articles(lines: Iterable[str]) -> Iterator[str | None]:
    """WikiText's lines with None before each article's title, `= Title =`."""
    for line in lines:
        if is_wikitext_title(line):
            yield None
        yield line


def is_wikitext_title(line: str) -> bool:
    """Whether a line is the title of an article in WikiText: `= Title =`."""
    return _WIKITEXT_TITLE.fullmatch(line.strip()) is not None


def group_documents(
    lines: Lines, *, wikitext: bool = False, block_chars: int | None = None
) -> Iterator[Document]:
    """Documents of a stream of lines; with `block_chars`, blocks of lines of about that many characters.

    Plain text is kept as it is, one piece a document; a block ends where a paragraph does (after four times
    its size, at any line), and a line that is longer than that is cut between words. WikiText is one piece a
    line, stripped, empty lines dropped. Documents of white space only are dropped.
    """
    current: list[str] = []
    before: list[str] | None = (
        None  # a finished block of the same document, kept until it is known to be the last
    )
    chars = 0
    for line in itertools.chain(lines, (None,)):
        if line is None:
            if any(not text.isspace() for text in current):
                if before is not None:
                    yield _document(before, wikitext, ends=False)
                yield _document(current, wikitext, ends=True)
            elif before is not None:
                yield _document(before + current, wikitext, ends=True)
            current, before, chars = [], None, 0
            continue
        if wikitext:
            line = line.strip()
            if not line:
                continue
        for number, part in enumerate(_cut_line(line, block_chars)):
            if block_chars is not None and chars >= block_chars:
                inside_line = number > 0 or not (wikitext or current[-1].endswith("\n"))
                paragraph_ends = wikitext or inside_line or (part.isspace() and not current[-1].isspace())
                if paragraph_ends or chars >= 4 * block_chars:
                    if before is not None:
                        yield _document(before, wikitext, ends=False)
                    current, before, chars = [], current, 0
            current.append(part)
            chars += len(part)


def _cut_line(line: str, block_chars: int | None) -> Iterable[str]:
    """A line itself, or parts of about the size of a block where it is much longer than one."""
    if block_chars is None or len(line) <= max(4 * block_chars, _SHORT_LINE_CHARS):
        return (line,)
    return cut_text(line, max(block_chars, _SMALL_PART_CHARS), patience=1)


def _document(lines: list[str], wikitext: bool, *, ends: bool) -> Document:
    return Document(tuple(lines) if wikitext else ("".join(lines),), ends)


def _open_text(path: Path) -> IO[str]:
    # utf-8-sig drops a byte-order mark; universal newlines turn "\r\n" into "\n".
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return cast(IO[str], gzip.open(path, "rt", encoding="utf-8-sig"))
    if suffix == ".xz":
        return cast(IO[str], lzma.open(path, "rt", encoding="utf-8-sig"))
    return open(path, encoding="utf-8-sig")


def _read_parts(file: IO[str]) -> Iterator[str]:
    """The lines of a file; a line of more than `_LINE_PART_CHARS` characters in parts, cut between words."""
    rest = ""
    while line := file.readline(_LINE_PART_CHARS):
        line = rest + line
        rest = ""
        if not line.endswith("\n") and len(line) >= _LINE_PART_CHARS:
            # Never inside a marker, which holds no space; without a space, before what may be the start of one.
            cut = last_safe_cut(line, len(line) // 2, len(line))
            if cut is None:
                starts = (i for i in range(len(END_OF_TEXT) - 1, 0, -1) if line.endswith(END_OF_TEXT[:i]))
                cut = len(line) - next(starts, 0)
            line, rest = line[:cut], line[cut:]
        yield line
    if rest:
        yield rest


def _split_at_marker(lines: Iterable[str]) -> Iterator[str | None]:
    for line in lines:
        if END_OF_TEXT not in line:
            yield line
            continue
        for i, part in enumerate(line.split(END_OF_TEXT)):
            if i > 0:
                yield None
            if part:
                yield part
