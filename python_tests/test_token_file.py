"""Token files: round trip, damage, vocabulary, a full disk, and the content-hash cache."""

from __future__ import annotations

import builtins
import errno
import gzip
import lzma
import os
import tracemalloc
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitnet_ext.data import token_file
from bitnet_ext.data.gpt2 import END_OF_TEXT_ID, gpt2_tokenizer
from bitnet_ext.data.text import CorpusError, Document, TextSource
from bitnet_ext.data.token_file import (
    TokenFile,
    TokenFileError,
    TokenFileWriter,
    default_cache_dir,
    tokenize_cached,
)

HEADER = 128


def write(path: Path, ids: Any, vocab_size: int = 1000, **kwargs: Any) -> TokenFile:
    with TokenFileWriter(path, vocab_size=vocab_size, **kwargs) as writer:
        writer.append(ids)
    return TokenFile.open(path)


@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(50257, "<u2"), (65536, "<u2"), (65537, "<u4"), (200_000, "<u4")]
)
def test_round_trip(vocab_size: int, dtype: str, tmp_path: Path) -> None:
    ids = np.random.default_rng(0).integers(0, vocab_size, 200_001)
    ids[-1] = vocab_size - 1
    path = tmp_path / "new" / "folder" / "a.tokens"
    with TokenFileWriter(path, vocab_size=vocab_size, source_sha256="ab" * 32, tokenizer="gpt2-x") as writer:
        for start in range(0, len(ids), 777):
            writer.append(ids[start : start + 777].tolist())
            writer.append([])
        writer.num_documents = 7
    opened = TokenFile.open(path)
    assert opened.tokens.dtype == np.dtype(dtype)
    assert isinstance(opened.tokens, np.memmap)
    np.testing.assert_array_equal(opened.tokens, ids)
    assert (len(opened), opened.vocab_size, opened.num_documents) == (len(ids), vocab_size, 7)
    assert (opened.source_sha256, opened.tokenizer) == ("ab" * 32, "gpt2-x")
    assert os.listdir(path.parent) == ["a.tokens"]
    assert path.stat().st_size == HEADER + len(ids) * np.dtype(dtype).itemsize


def test_tokens_are_read_only(tmp_path: Path) -> None:
    for ids in ([1, 2, 3], []):
        tokens = write(tmp_path / "a.tokens", ids).tokens
        assert len(tokens) == len(ids) and not tokens.flags.writeable
    with pytest.raises(ValueError, match="read-only"):
        write(tmp_path / "a.tokens", [1, 2, 3]).tokens[0] = 5


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x10
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: os.truncate(path, 0), "is not a token file: it begins with b''"),
        (lambda path: os.truncate(path, 50), "is truncated: it has 50 bytes, its header alone has 128"),
        (
            lambda path: os.truncate(path, HEADER),
            r"is truncated: it has 128 bytes, its header announces 2128",
        ),
        (
            lambda path: os.truncate(path, HEADER + 1999),
            r"is truncated: .* 2127 bytes, .* 2128 \(1000 tokens\)",
        ),
        (lambda path: os.truncate(path, HEADER + 2002), "is damaged: it has 2130 bytes"),
        (lambda path: flip(path, 0), "is not a token file"),
        (lambda path: flip(path, 8), "has format version 17, accepted is 1"),
        (lambda path: flip(path, 16), "is damaged: its header does not match its checksum"),
        (lambda path: flip(path, 41), "is damaged: its header does not match its checksum"),
        (lambda path: flip(path, HEADER + 1000), "is damaged: its tokens do not match their checksum"),
        (
            lambda path: path.write_text("just some text\n" * 100),
            "is not a token file: it begins with b'just som'",
        ),
    ],
    ids=[
        "empty",
        "header-cut",
        "no-tokens",
        "tail-cut",
        "tail-added",
        "magic",
        "version",
        "vocab",
        "sha256",
        "token",
        "text",
    ],
)
def test_damage_is_told_in_one_sentence(damage: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.tokens"
    write(path, np.arange(1000))
    damage(path)
    with pytest.raises(TokenFileError, match=message) as error:
        TokenFile.open(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def rewrite_header(path: Path, offset: int, value: bytes) -> None:
    """Other header content with a checksum that agrees."""
    data = bytearray(path.read_bytes())
    data[offset : offset + len(value)] = value
    data[124:128] = zlib.crc32(bytes(data[:124])).to_bytes(4, "little")
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("offset", "value", "message"),
    [
        (16, (5).to_bytes(8, "little"), "is damaged: it holds the id 96, its header gives vocab_size 5"),
        (16, (96).to_bytes(8, "little"), "is damaged: it holds the id 96, its header gives vocab_size 96"),
        (16, bytes(8), "is damaged: its header gives vocab_size 0"),
        (16, (1 << 40).to_bytes(8, "little"), "is damaged: its header gives vocab_size 1099511627776"),
        (16, (70_000).to_bytes(8, "little"), "vocab_size 70000 with ids of 2 bytes"),
        (12, (4).to_bytes(4, "little"), r"is truncated: it has 134 bytes, its header announces 140"),
        (24, (1 << 62).to_bytes(8, "little"), "is truncated: it has 134 bytes"),
    ],
)
def test_content_that_contradicts_its_header(offset: int, value: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.tokens"
    write(path, [1, 96, 3], vocab_size=97)
    rewrite_header(path, offset, value)
    with pytest.raises(TokenFileError, match=message):
        TokenFile.open(path)


def test_the_largest_id_of_a_long_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.tokens"
    monkeypatch.setattr(token_file, "_CRC_BYTES", 1000)
    ids = np.arange(5000) % 90
    for place in (0, 499, 500, 4999):
        write(path, np.where(np.arange(5000) == place, 95, ids), vocab_size=97)
        rewrite_header(path, 16, (95).to_bytes(8, "little"))
        with pytest.raises(TokenFileError, match="it holds the id 95"):
            TokenFile.open(path)


def test_verify_false_skips_only_the_tokens(tmp_path: Path) -> None:
    path = tmp_path / "a.tokens"
    write(path, np.arange(1000))
    flip(path, HEADER)
    assert TokenFile.open(path, verify=False).tokens[0] == 0x10


def test_vocabulary_that_does_not_fit(tmp_path: Path) -> None:
    tokens = write(tmp_path / "a.tokens", [1, 2], vocab_size=1000)
    tokens.check_vocab(1000)
    tokens.check_vocab(1024)
    with pytest.raises(
        ValueError, match=r"vocab_size of the model is 999, but token file .*a\.tokens holds .* >= 1000"
    ):
        tokens.check_vocab(999)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([5, 1000], r"ids holds 1000, accepted are ids in 0\.\.999"),
        ([-1, 5], "ids holds -1"),
        ([70_000], "ids holds 70000"),
        ([0.5], "dtype float64, accepted is a row of integers"),
        ([[1, 2]], r"shape \(1, 2\)"),
    ],
)
def test_bad_ids_leave_nothing(ids: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        write(tmp_path / "a.tokens", ids)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"vocab_size": 0}, "vocab_size is 0, accepted is 1 to"),
        ({"source_sha256": "xyz"}, "source_sha256 is 'xyz', accepted are 64"),
        ({"tokenizer": "x" * 25}, "accepted are at most 24 ASCII characters"),
    ],
)
def test_bad_arguments(kwargs: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        TokenFileWriter(tmp_path / "a", **{"vocab_size": 10, **kwargs})


def test_an_exception_keeps_the_earlier_file(tmp_path: Path) -> None:
    path = tmp_path / "a.tokens"
    write(path, [1, 2, 3])
    with pytest.raises(KeyboardInterrupt), TokenFileWriter(path, vocab_size=10) as writer:
        writer.append([4] * 100_000)
        raise KeyboardInterrupt
    assert TokenFile.open(path).tokens.tolist() == [1, 2, 3]
    assert os.listdir(tmp_path) == ["a.tokens"]


class FullDisk:
    """A file whose writes fail once `room` bytes are used."""

    def __init__(self, file: Any, room: int) -> None:
        self.file, self.room = file, room

    def write(self, data: bytes) -> int:
        self.room -= len(data)
        if self.room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


@pytest.mark.parametrize("room", [0, 500, 150_000], ids=["header", "end", "middle"])
def test_full_disk(room: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.tokens"

    def open_on_full_disk(name: Any, mode: str = "r", **kwargs: Any) -> Any:
        file = builtins.open(name, mode, **kwargs)  # noqa: SIM115
        return FullDisk(file, room) if "x" in mode else file

    monkeypatch.setattr(token_file, "open", open_on_full_disk, raising=False)
    with (
        pytest.raises(
            OSError, match=r"cannot write the token file .*a\.tokens: No space left on device"
        ) as error,
        TokenFileWriter(path, vocab_size=50257) as writer,
    ):
        for _ in range(1000):
            writer.append([7] * 300)
    assert error.value.errno == errno.ENOSPC and "\n" not in str(error.value)
    assert os.listdir(tmp_path) == []


def test_full_disk_at_the_sync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(token_file.os, "fsync", fail)
    with pytest.raises(OSError, match="No space left on device"):
        write(tmp_path / "a.tokens", [1, 2, 3])
    assert os.listdir(tmp_path) == []


def test_unwritable_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match=r"cannot write the token file .*: (Not a directory|File exists)"):
        write(tmp_path / "file" / "a.tokens", [1])


def test_default_cache_dir(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BITNET_EXT_CACHE", "/own")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache_dir() == Path("/own")
    monkeypatch.delenv("BITNET_EXT_CACHE")
    assert default_cache_dir() == Path("/xdg/bitnet_ext")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache_dir() == tmp_path / ".cache" / "bitnet_ext"


@pytest.mark.parametrize("variable", ["BITNET_EXT_CACHE", "XDG_CACHE_HOME"])
def test_the_home_folder_in_the_name_of_the_cache(
    variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("BITNET_EXT_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv(variable, "~/tokens")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)
    expected = tmp_path / "home" / "tokens" / ("" if variable == "BITNET_EXT_CACHE" else "bitnet_ext")
    assert default_cache_dir() == expected
    assert tokenize_cached("text.txt").path.parent == expected
    assert tokenize_cached("text.txt", "~/other").path.parent == tmp_path / "home" / "other"
    assert not (tmp_path / "~").exists()


@pytest.mark.parametrize("cache", [None, "~nobody-of-this-name/tokens"])
def test_no_home_folder(cache: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_entry(*args: object) -> None:
        raise KeyError("uid not found")

    for name in ("HOME", "BITNET_EXT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    if cache is not None:
        monkeypatch.setenv("BITNET_EXT_CACHE", cache)
    monkeypatch.setattr("pwd.getpwuid", no_entry)
    (tmp_path / "text.txt").write_text(TEXT)
    with pytest.raises(OSError, match=r"needs a home folder .* set BITNET_EXT_CACHE to a folder") as error:
        tokenize_cached(tmp_path / "text.txt")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("place", ["file", "below a file", "no permission"])
def test_a_cache_that_cannot_be_written(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    cache = tmp_path / "cache"
    if place == "no permission":  # A simulation: the tests may run as a user who may do everything.

        def refuse(self: Path, *args: object, **kwargs: object) -> None:
            raise PermissionError(errno.EACCES, "Permission denied", str(self))

        monkeypatch.setattr(Path, "mkdir", refuse)
    else:
        cache.write_text("in the way")
        cache = cache / "deeper" if place == "below a file" else cache
    monkeypatch.setenv("BITNET_EXT_CACHE", str(cache))
    with pytest.raises(
        OSError, match=r"cannot write the token file .*; set BITNET_EXT_CACHE to a folder"
    ) as error:
        tokenize_cached(tmp_path / "text.txt")
    assert error.value.errno and "\n" not in str(error.value)


def test_a_cached_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text.txt").write_text(TEXT)

    def refuse(path: Path, **kwargs: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(TokenFile, "open", refuse)
    with pytest.raises(
        OSError, match=r"cannot read the token file .*: Permission denied; set BITNET_EXT_CACHE"
    ):
        tokenize_cached(tmp_path / "text.txt", tmp_path / "cache")


def test_what_a_killed_writer_left_is_removed_after_a_day(tmp_path: Path) -> None:
    old, new, other = (tmp_path / f".{name}.1-ab.tmp" for name in ("a.tokens", "b.tokens", "c.tokens"))
    for path in (old, new, other):
        path.write_bytes(b"half")
    for path in (old, other):
        os.utime(path, (1, 1))
    for name in ("a.tokens", "b.tokens"):
        write(tmp_path / name, [1])
    assert (old.exists(), new.exists(), other.exists()) == (False, True, True)


def test_the_cache_is_freed_of_what_killed_writers_of_other_texts_left(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    old, new = (
        cache / ".gone.txt-train-12ab.tokens.1-ab.tmp",
        cache / ".gone.txt-heldout-12ab.tokens.1-ab.tmp",
    )
    foreign = cache / ".notes.1-ab.tmp"
    for path in (old, new, foreign):
        path.write_bytes(b"half")
    for path in (old, foreign):
        os.utime(path, (1, 1))
    (tmp_path / "text.txt").write_text("A text.")
    tokenize_cached(tmp_path / "text.txt", cache)
    assert (old.exists(), new.exists(), foreign.exists()) == (False, True, True)


TEXT = "One line.\n\n  A second paragraph, indented;\nthe end of it.\n" * 50


@pytest.mark.parametrize("suffix", [".txt", ".gz", ".xz"])
def test_tokenize_a_file(suffix: str, tmp_path: Path) -> None:
    data = TEXT.encode()
    pack = {".txt": bytes, ".gz": gzip.compress, ".xz": lzma.compress}[suffix]
    path = tmp_path / f"text{suffix}"
    path.write_bytes(pack(data))
    tokens = tokenize_cached(path, tmp_path / "cache")
    assert tokens.tokens.tolist() == [*gpt2_tokenizer().encode_ordinary(TEXT), END_OF_TEXT_ID]
    assert tokens.vocab_size == 50257 and tokens.tokens.dtype == np.uint16


def test_the_cache_is_used_and_follows_the_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, cache = tmp_path / "text.txt", tmp_path / "cache"
    path.write_text(TEXT)
    first = tokenize_cached(path, cache)
    (tmp_path / "copy").mkdir()
    copy = tmp_path / "copy" / "text.txt"
    copy.write_text(TEXT)
    with monkeypatch.context() as patch:
        patch.setattr(token_file, "_tokenize", lambda *args: pytest.fail("tokenised again"))
        assert tokenize_cached(path, cache).path == first.path
        assert tokenize_cached(str(copy), cache).path == first.path  # the content decides, not the place
    path.write_text(TEXT + "More.\n")
    second = tokenize_cached(path, cache)
    assert second.path != first.path and len(second) > len(first)
    monkeypatch.setattr(token_file, "FORMAT_VERSION", 2)
    assert tokenize_cached(copy, cache).path not in (first.path, second.path)


@pytest.mark.parametrize("damage", ["truncated", "changed", "other"])
def test_a_damaged_cache_is_built_again(damage: str, tmp_path: Path) -> None:
    path, cache = tmp_path / "text.txt", tmp_path / "cache"
    path.write_text(TEXT)
    first = tokenize_cached(path, cache)
    expected = first.tokens.tolist()
    if damage == "truncated":
        os.truncate(first.path, 500)
    elif damage == "changed":
        flip(first.path, 500)
    else:
        write(first.path, [1, 2, 3])
    with pytest.warns(UserWarning, match="it is built again") as told:
        again = tokenize_cached(path, cache)
    assert len(told) == 1 and str(first.path) in str(told[0].message)
    assert again.tokens.tolist() == expected
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenize_cached(path, cache)
    assert os.listdir(cache) == [first.path.name]


def test_an_error_while_reading_leaves_no_file(tmp_path: Path) -> None:
    path, cache = tmp_path / "text.xz", tmp_path / "cache"
    path.write_bytes(lzma.compress(os.urandom(100_000).hex().encode())[:-5000])
    with pytest.raises(CorpusError, match=r"cannot read the text .*text\.xz"):
        tokenize_cached(path, cache)
    assert os.listdir(cache) == []


def test_memory_does_not_grow_with_the_text(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("Words of a long text that goes on and on, without an end in sight.\n" * 40_000)
    gpt2_tokenizer()
    tracemalloc.start()
    try:
        tokens = tokenize_cached(path, tmp_path / "cache")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # Held at once, the 2.7 MB of text and the list of its 680,000 ids would be 30 MB.
    assert len(tokens) > 600_000
    assert peak < 3_000_000


def test_a_source_of_documents(tmp_path: Path) -> None:
    documents = [Document(("One", " two"), True), Document(("half ",), False), Document(("half",), True)]
    encode = gpt2_tokenizer().encode_ordinary
    for separator in (True, False):
        source = TextSource(
            "demo/with a name", f"{separator:064x}", lambda: documents, lambda: None, separator
        )
        tokens = tokenize_cached(source, tmp_path)
        end = [END_OF_TEXT_ID] * separator
        expected = [*encode("One"), *encode(" two"), *end, *encode("half "), *encode("half"), *end]
        assert tokens.tokens.tolist() == expected
        assert tokens.num_documents == 3 and tokens.source_sha256 == source.sha256
