"""GPT-2's byte-pair encoding: the right ids, and never a network."""

from __future__ import annotations

import base64
import gzip
import hashlib
import itertools
import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from bitnet_ext.data import gpt2 as tokenizer_module
from bitnet_ext.data.cutting import encode_in_parts
from bitnet_ext.data.gpt2 import (
    END_OF_TEXT,
    END_OF_TEXT_ID,
    GPT2_VOCAB_SIZE,
    VOCAB_BPE_SHA256,
    build_encoding,
    gpt2_tokenizer,
    merge_ranks,
    packaged_merge_table,
)

VOCAB_BPE_NAME = "6d1cbeee0f20b3d9449abfede4726ed8212e3aee"
ENCODER_JSON_NAME = "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6"


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fails the test at its end when a connection was tried, also where the code caught the refusal."""
    tried = []

    def refuse(*args: object, **kwargs: object) -> None:
        tried.append(args)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    yield
    assert not tried


def fill_tiktoken_cache(folder: Path) -> None:
    """The two files tiktoken would have downloaded; encoder.json is the table of ids by GPT-2's spelling of bytes."""
    folder.mkdir(parents=True)
    table = packaged_merge_table()
    (folder / VOCAB_BPE_NAME).write_bytes(table)
    printable = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    others = [b for b in range(256) if b not in printable]
    spelling = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
    ids = {"".join(spelling[b] for b in token): rank for token, rank in merge_ranks(table).items()}
    (folder / ENCODER_JSON_NAME).write_bytes(json.dumps(ids | {END_OF_TEXT: END_OF_TEXT_ID}).encode())


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("Hello world", [15496, 995]),
        (
            "The quick brown fox jumps over the lazy dog.",
            [464, 2068, 7586, 21831, 18045, 625, 262, 16931, 3290, 13],
        ),
        ("", []),
        ("\n\n", [628]),
        (" ", [220]),
    ],
)
def test_known_ids(text: str, ids: list[int]) -> None:
    tokenizer = build_encoding(packaged_merge_table())
    assert tokenizer.encode_ordinary(text) == ids
    assert tokenizer.decode(ids) == text


def test_vocabulary() -> None:
    tokenizer = gpt2_tokenizer()
    assert tokenizer.n_vocab == GPT2_VOCAB_SIZE == 50257
    assert tokenizer.eot_token == END_OF_TEXT_ID == 50256
    assert tokenizer.encode(END_OF_TEXT, allowed_special={END_OF_TEXT}) == [50256]
    assert gpt2_tokenizer() is tokenizer


def test_merge_table_is_openai_s() -> None:
    table = packaged_merge_table()
    assert hashlib.sha256(table).hexdigest() == VOCAB_BPE_SHA256
    # The ranks written as OpenAI publishes them (r50k_base.tiktoken) have the published digest.
    by_rank = sorted(merge_ranks(table).items(), key=lambda item: item[1])
    assert [rank for _, rank in by_rank] == list(range(50256))
    published = b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in by_rank)
    digest = hashlib.sha256(published).hexdigest()
    assert digest == "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"


def test_notice_goes_with_the_table() -> None:
    notice = Path(tokenizer_module.__file__).parent / "assets" / "GPT2_NOTICE.txt"
    text = notice.read_text(encoding="utf-8")
    assert "Copyright (c) 2019 OpenAI" in text and VOCAB_BPE_SHA256 in text


@pytest.mark.parametrize("cache", ["empty", "disabled", "damaged"])
@pytest.mark.usefixtures("no_network")
def test_offline_without_tiktoken_s_cache(
    cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "cache"
    if cache != "empty":
        fill_tiktoken_cache(folder)
    if cache == "damaged":
        (folder / ENCODER_JSON_NAME).write_bytes(b"{}")
    if (
        cache == "disabled"
    ):  # An empty name switches tiktoken's cache off; it does not mean the working directory.
        monkeypatch.chdir(folder)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "" if cache == "disabled" else str(folder))
    calls: list[str] = []
    monkeypatch.setattr(tiktoken, "get_encoding", calls.append)  # it would download
    assert gpt2_tokenizer.__wrapped__().encode_ordinary("Hello world") == [15496, 995]
    assert calls == []
    if cache == "damaged":  # Not ours to delete.
        assert (folder / ENCODER_JSON_NAME).read_bytes() == b"{}"


@pytest.mark.parametrize("variable", ["TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR", None])
@pytest.mark.usefixtures("no_network")
def test_tiktoken_s_own_cache_comes_first(
    variable: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "data-gym-cache"
    fill_tiktoken_cache(folder)
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR", raising=False)
    monkeypatch.delenv("DATA_GYM_CACHE_DIR", raising=False)
    if variable is None:
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    else:
        monkeypatch.setenv(variable, str(folder))
    monkeypatch.setattr("tiktoken.registry.ENCODINGS", {})  # As in a fresh process: the files must be read.
    calls = []
    get_encoding = tiktoken.get_encoding

    def record(name: str) -> tiktoken.Encoding:
        calls.append(name)
        return get_encoding(name)

    monkeypatch.setattr(tiktoken, "get_encoding", record)
    tokenizer = gpt2_tokenizer.__wrapped__()
    assert calls == ["gpt2"]
    assert tokenizer.encode_ordinary("Hello world") == [15496, 995]
    assert tokenizer._mergeable_ranks == merge_ranks(packaged_merge_table())


def test_a_broken_tiktoken_registry_falls_back_to_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise ValueError("Duplicate encoding name gpt2 in tiktoken plugin")

    monkeypatch.setattr(tokenizer_module, "_tiktoken_cache_is_whole", lambda: True)
    monkeypatch.setattr(tiktoken, "get_encoding", broken)
    assert gpt2_tokenizer.__wrapped__().encode_ordinary("Hello world") == [15496, 995]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is missing: install bitnet_ext again"),
        (b"not gzip", "is damaged .*: install bitnet_ext again"),
        (gzip.compress(b"#version: 0.2\nh e\n" * 1000)[:-20], "is damaged .*: install bitnet_ext again"),
        (gzip.compress(b"#version: 0.2\nh e\n"), "is damaged: its sha256 is"),
    ],
    ids=["missing", "not-gzip", "truncated", "other-content"],
)
def test_damaged_package_data(
    content: bytes | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "assets").mkdir()
    if content is not None:
        (tmp_path / "assets" / "gpt2_vocab.bpe.gz").write_bytes(content)
    monkeypatch.setattr(tokenizer_module.resources, "files", lambda package: tmp_path)
    with pytest.raises(RuntimeError, match=message) as error:
        packaged_merge_table()
    assert "\n" not in str(error.value)


WORDS = st.sampled_from(
    [
        " ",
        "  ",
        "\n",
        "\n\n",
        "\r\n",
        "\t",
        "a",
        "The",
        "don't",
        "'s",
        "12",
        "...",
        "é",
        "漢字",
        "\u00a0",
        "\x1c",
    ]
)


@settings(max_examples=300, deadline=None)
@given(words=st.lists(WORDS, max_size=60), part_size=st.integers(1, 40))
def test_parts_join_to_the_whole(words: list[str], part_size: int) -> None:
    text = "".join(words)
    parts = list(encode_in_parts(gpt2_tokenizer(), text, part_size))
    # A run of 16 parts without a place to cut is the one case where the ids may differ (they decode to the text).
    joined = list(itertools.chain.from_iterable(parts))
    assert gpt2_tokenizer().decode(joined) == text
    if part_size >= 20:  # 16 parts are then longer than the longest text drawn here
        assert joined == gpt2_tokenizer().encode_ordinary(text)


def test_long_text_is_encoded_in_bounded_parts() -> None:
    tokenizer = gpt2_tokenizer()
    text = "A line of words, some of them rare: Llanfairpwllgwyngyll.\n\n  Indented.\n" * 300
    parts = list(encode_in_parts(tokenizer, text, 1000))
    assert len(parts) > 15
    assert max(len(tokenizer.decode(part)) for part in parts) <= 1000
    assert list(itertools.chain.from_iterable(parts)) == tokenizer.encode_ordinary(text)


def test_text_without_any_break_is_still_cut() -> None:
    text = "漢" * 5000
    parts = list(encode_in_parts(gpt2_tokenizer(), text, 100))
    assert len(parts) > 1
    assert gpt2_tokenizer().decode(list(itertools.chain.from_iterable(parts))) == text
