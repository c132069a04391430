"""Tokenizers other than GPT-2's: by name, from a tokenizer.json, as an object; saved, recorded, and in a corpus."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiktoken

from bitnet_ext.data import gpt2
from bitnet_ext.data.corpora import corpus_from_source, load_corpus
from bitnet_ext.data.cutting import MAX_BLANKS
from bitnet_ext.data.text import CorpusError
from bitnet_ext.data.tokenizer import (
    ObjectTokenizer,
    StreamDecoder,
    TiktokenTokenizer,
    Tokenizer,
    TokenizerError,
)
from bitnet_ext.data.tokenizer_files import load_tokenizer, save_tokenizer, tokenizer_from_record

TEXT = "The river runs.\nA stone, a cloud; an engine of paper: naïve 漢字 👩‍🚀 done.\n\n  Indented <|endoftext|>.\n"


class Characters:
    """A tokenizer of a beginner: one id a character."""

    def __init__(self, alphabet: str) -> None:
        self.alphabet = alphabet
        self.vocab_size = len(alphabet)

    def encode(self, text: str) -> list[int]:
        return [self.alphabet.index(c) for c in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(self.alphabet[i] for i in ids)


def small_encoding(name: str = "tiny", pattern: str = r"\s?\w+|\s+|\W") -> tiktoken.Encoding:
    """Bytes and one merge, with a gap before the special token."""
    ranks = {bytes([i]): i for i in range(256)} | {b"th": 256}
    return tiktoken.Encoding(
        name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 260}
    )


def hf_json(**changes: Any) -> str:
    """A word-level tokenizer.json with a normaliser, a Metaspace decoder, truncation and padding."""
    tokenizers = pytest.importorskip("tokenizers")
    words = ["<unk>", "<s>", "</s>", "▁the", "▁river", "▁runs", "▁a", "▁stone", "."]
    library = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, "<unk>"))
    library.normalizer = tokenizers.normalizers.Lowercase()
    library.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [tokenizers.pre_tokenizers.Metaspace(), tokenizers.pre_tokenizers.Punctuation()]
    )
    library.decoder = tokenizers.decoders.Metaspace()
    library.add_special_tokens(["<s>", "</s>", "<pad>"])
    library.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    library.enable_truncation(4)
    library.enable_padding(pad_id=9, pad_token="<pad>", length=4)
    content = json.loads(library.to_str())
    return json.dumps(content | changes)


def byte_bpe_json() -> str:
    """A byte-level BPE tokenizer.json without an end-of-text token."""
    tokenizers = pytest.importorskip("tokenizers")
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    library.train_from_iterator([TEXT * 20], trainer)
    return str(library.to_str())


@pytest.fixture(params=["gpt2", "tiktoken", "object", "word-level", "byte-level"])
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> Tokenizer:
    if request.param in ("word-level", "byte-level"):
        folder = tmp_path / "hf"
        folder.mkdir()
        (folder / "tokenizer.json").write_text(
            hf_json() if request.param == "word-level" else byte_bpe_json()
        )
        return load_tokenizer(folder)
    made = {
        "gpt2": "gpt2",
        "tiktoken": small_encoding(),
        "object": Characters("".join(sorted(set(TEXT)))),
    }
    return load_tokenizer(made[request.param])


def test_the_interface(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(TEXT)
    assert ids and all(type(i) is int and 0 <= i < tokenizer.vocab_size for i in ids)
    assert [i for part in tokenizer.encode_parts(TEXT) for i in part] == ids
    # Special tokens are not recognised in a text.
    assert tokenizer.eos_id is None or tokenizer.eos_id not in ids
    if tokenizer.name != "hf" or tokenizer.vocab_size > 100:
        assert tokenizer.decode(ids) == TEXT == tokenizer.decode(np.array(ids))
    assert tokenizer.encode("") == [] and tokenizer.decode([]) == ""
    assert len(tokenizer.fingerprint) == 64 and len(tokenizer.id) <= 24
    assert load_tokenizer(tokenizer) is tokenizer
    json.dumps(tokenizer.record())
    # Ids that a padded vocabulary has and the tokenizer does not.
    assert tokenizer.decode([ids[0], tokenizer.vocab_size, -1]).endswith("\ufffd\ufffd")
    for wrong in (5, None, b"text", ["text"]):
        with pytest.raises(TypeError, match=r"Tokenizer\.encode: text is .*, accepted is str"):
            tokenizer.encode(wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"ids holds 'a', accepted is a row of integers"):
        tokenizer.decode("abc")  # type: ignore[arg-type]


@pytest.mark.parametrize("context", [0, 3])
def test_text_of_one_token_after_the_other(tokenizer: Tokenizer, context: int) -> None:
    ids = tokenizer.encode(TEXT * 3)
    decoder = StreamDecoder(tokenizer, ids[:context])
    parts = [decoder.push(i) for i in ids[context:]] + [decoder.flush()]
    assert tokenizer.decode(ids[:context]) + "".join(parts) == tokenizer.decode(ids)
    assert sum(map(bool, parts)) > len(ids) / 4  # as they come, not all at the end
    half = StreamDecoder(tokenizer, ids[:context])
    assert half.push(ids[context]) + half.flush() == tokenizer.decode(ids[: context + 1]).removeprefix(
        tokenizer.decode(ids[:context])
    )


def test_an_incomplete_character_does_not_hold_back_the_rest() -> None:
    decoder = StreamDecoder(load_tokenizer("gpt2"))
    broken = load_tokenizer("gpt2").encode("漢")[0]
    parts = [decoder.push(broken) for _ in range(40)]
    assert sum(map(len, parts)) >= 30


def test_save_and_load(tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    save_tokenizer(tokenizer, folder)
    assert not [name for name in os.listdir(folder) if name.endswith(".tmp")]
    if isinstance(tokenizer, ObjectTokenizer) or tokenizer.name == "tiny":
        with pytest.raises(TokenizerError, match="give it as tokenizer="):
            load_tokenizer(folder)
        return
    again = load_tokenizer(folder)
    assert again.encode(TEXT) == tokenizer.encode(TEXT)
    same = ("name", "vocab_size", "eos_id", "fingerprint", "kind")
    assert [getattr(again, key) for key in same] == [getattr(tokenizer, key) for key in same]
    assert load_tokenizer(folder / "bitnet_tokenizer.json").fingerprint == tokenizer.fingerprint


def test_record(tokenizer: Tokenizer) -> None:
    record = json.loads(json.dumps(tokenizer.record()))
    if isinstance(tokenizer, ObjectTokenizer) or tokenizer.name == "tiny":
        with pytest.raises(TokenizerError, match="give it as tokenizer="):
            tokenizer_from_record(record)
        return
    again = tokenizer_from_record(record)
    assert again.encode(TEXT) == tokenizer.encode(TEXT) and again.record() == record
    with pytest.raises(TokenizerError, match=r"fingerprint|sha256"):
        tokenizer_from_record({**record, "fingerprint": "0" * 64})


@pytest.mark.parametrize("record", [{}, None, {"kind": "tiktoken"}, {"kind": "pickle", "name": "x"}, [1]])
def test_damaged_records(record: Any) -> None:
    with pytest.raises(TokenizerError, match="record"):
        tokenizer_from_record(record)


def test_damaged_records_of_a_tokenizer_json(tmp_path: Path) -> None:
    record = load_tokenizer(write(tmp_path / "a" / "tokenizer.json", hf_json())).record()
    bad = record["content"][:-8] + "!!!!" + record["content"][-4:]
    for content in ("", bad, record["content"][:40], 5):
        with pytest.raises(TokenizerError, match="is damaged"):
            tokenizer_from_record({**record, "content": content})
    del record["content"]
    with pytest.raises(TokenizerError, match="does not hold its content"):
        tokenizer_from_record(record)
    with pytest.raises(TokenizerError, match=r"holds no tokenizer\.json"):
        tokenizer_from_record(record, folder=tmp_path)
    assert tokenizer_from_record(record, folder=tmp_path / "a").vocab_size == 10


def write(path: Path, content: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(content)
    return path


# ---- tiktoken --------------------------------------------------------------------------------------------------------


def test_gpt2_by_name_and_as_an_encoding() -> None:
    named = load_tokenizer()
    assert (named.name, named.vocab_size, named.eos_id) == ("gpt2", 50257, 50256)
    assert named.fingerprint == gpt2.VOCAB_BPE_SHA256 and named.id == gpt2.GPT2_TOKENIZER_ID
    copy = gpt2.build_encoding(gpt2.packaged_merge_table())
    assert load_tokenizer(copy).fingerprint == named.fingerprint
    other = tiktoken.Encoding(
        "gpt2",
        pat_str=copy._pat_str,
        mergeable_ranks=copy._mergeable_ranks,
        special_tokens={"<|endoftext|>": 50256, "<|pad|>": 50257},
    )
    assert load_tokenizer(other).fingerprint != named.fingerprint


def test_an_encoding_of_one_s_own() -> None:
    tokenizer = load_tokenizer(small_encoding())
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (261, 260)
    assert tokenizer.encode("the") == [256, 101]
    assert tokenizer.decode([256, 258, 101]) == "th\ufffde"  # 258 is in a gap
    fingerprints = {tokenizer.fingerprint, load_tokenizer(small_encoding(pattern=r"\s?\w+|\W")).fingerprint}
    fingerprints |= {load_tokenizer(small_encoding(name="other")).fingerprint}
    assert len(fingerprints) == 2  # the name decides nothing


def test_a_named_encoding_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(name: str) -> None:
        raise ConnectionError("Couldn't reach the server\nwith many lines")

    monkeypatch.setattr(tiktoken, "get_encoding", unreachable)
    with pytest.raises(
        TokenizerError,
        match=r"'cl100k_base' could not be loaded over the network \(Couldn't reach the server\)",
    ) as error:
        load_tokenizer("cl100k_base")
    assert "\n" not in str(error.value)


def test_a_named_encoding(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made = small_encoding("cl100k_base")
    monkeypatch.setattr(tiktoken, "get_encoding", {"cl100k_base": made}.__getitem__)
    tokenizer = load_tokenizer("cl100k_base")
    assert isinstance(tokenizer, TiktokenTokenizer) and tokenizer.encoding is made
    save_tokenizer(tokenizer, tmp_path)
    assert load_tokenizer(tmp_path).fingerprint == tokenizer.fingerprint
    # Another release of the encoding under the same name.
    other = small_encoding("cl100k_base", r"\w+|\W")
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: other)
    with pytest.raises(TokenizerError, match="is not the one that was recorded"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("pattern", [gpt2.gpt2_tokenizer()._pat_str, r"\w+|\s*[\r\n]|\s+(?!\S)|\s+|[^\s\w]+"])
def test_a_run_of_blanks_never_ends_in_a_panic(pattern: str) -> None:
    tokenizer = load_tokenizer(small_encoding(pattern=pattern))
    for text in (
        "x" + " " * 1_100_000 + "y",
        " \t" * 600_000 + "y",
        "a\n" + " " * (2 * MAX_BLANKS + 1) + "b",
        " " * (MAX_BLANKS + 1),
    ):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_panic_is_told_in_one_sentence() -> None:
    class PanicException(BaseException):
        """As pyo3's: not an Exception."""

    class Panicking(Characters):
        def encode(self, text: str) -> list[int]:
            raise PanicException("index out of bounds\nnote: run with RUST_BACKTRACE=1")

        def decode(self, ids: list[int]) -> str:
            raise PanicException("index out of bounds")

    tokenizer = ObjectTokenizer(Panicking("ab"), name="mine")
    for call in (lambda: tokenizer.encode("a"), lambda: tokenizer.decode([0])):
        with pytest.raises(TokenizerError, match=r"'mine' cannot .* \(PanicException: index out of bounds\)"):
            call()

    class Interrupted(Characters):
        def encode(self, text: str) -> list[int]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ObjectTokenizer(Interrupted("ab")).encode("a")


# ---- tokenizer.json ------------------------------------------------------------------------------------------------


def test_a_tokenizer_json(tmp_path: Path) -> None:
    path = write(tmp_path / "words" / "tokenizer.json", hf_json())
    for spec in (path, str(path), path.parent):
        tokenizer = load_tokenizer(spec)
        assert (tokenizer.name, tokenizer.kind, tokenizer.vocab_size) == ("words", "tokenizers", 10)
        # Not <s> and </s>, not four ids, and "</s>" in a text is unknown words.
        assert tokenizer.encode("The river runs. A stone.") == [3, 4, 5, 8, 6, 7, 8]
        assert 2 not in tokenizer.encode("the </s>")
        assert tokenizer.decode([3, 4, 5]) == "the river runs"
        assert tokenizer.eos_id == 2
    library = pytest.importorskip("tokenizers").Tokenizer.from_str(hf_json())
    assert load_tokenizer(library).encode("the river") == [3, 4]
    assert library.encode("the").ids == [1, 3, 2, 9]  # the user's own object is as it was


def test_which_token_ends_a_text(tmp_path: Path) -> None:
    path = write(tmp_path / "tokenizer.json", hf_json())
    assert load_tokenizer(path).eos_id == 2  # "</s>"
    write(tmp_path / "config.json", '{"eos_token_id": [9, 2]}')
    assert load_tokenizer(path).eos_id == 9
    write(tmp_path / "tokenizer_config.json", '{"eos_token": {"content": "<s>"}}')
    assert load_tokenizer(path).eos_id == 1
    write(tmp_path / "tokenizer_config.json", "{damaged")
    assert load_tokenizer(path).eos_id == 9
    assert load_tokenizer(path, eos_token="<pad>").eos_id == 9
    with pytest.raises(TokenizerError, match="eos_token is '<none>', which is no token"):
        load_tokenizer(path, eos_token="<none>")
    save_tokenizer(load_tokenizer(path, eos_token="<s>"), tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").eos_id == 1
    assert json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())["eos_token"] == "<s>"
    none = load_tokenizer(write(tmp_path / "bytes" / "tokenizer.json", byte_bpe_json()))
    assert none.eos_id is None


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", "{", r"is no tokenizer\.json"),
        ("tokenizer.json", "{}", r"is no tokenizer\.json"),
        ("tokenizer.json", "[1]", r"is no tokenizer\.json"),
        ("other.json", '{"model": 3}', r"is no tokenizer\.json"),
        ("bitnet_tokenizer.json", "{", "cannot read the tokenizer"),
        ("bitnet_tokenizer.json", "[]", "is damaged: it must hold a JSON object"),
        ("spiece.model", "x", "is a .model file"),
        ("vocab", "x", "is a nameless file"),
    ],
)
def test_damaged_files(name: str, content: str, message: str, tmp_path: Path) -> None:
    if name in ("tokenizer.json", "other.json"):
        pytest.importorskip("tokenizers")
    with pytest.raises(TokenizerError, match=message) as error:
        load_tokenizer(write(tmp_path / name, content))
    assert "\n" not in str(error.value)


def test_without_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "tokenizer.json", "{}")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(
        TokenizerError, match=r"needs the package tokenizers: pip install 'tokenizers>=0\.20'"
    ):
        load_tokenizer(path)


@pytest.mark.parametrize("spec", ["no-such", "no/such/folder", "nothing.json", "", "a\0b"])
def test_unknown_names(spec: str) -> None:
    with pytest.raises(TokenizerError, match=r"accepted are|is no path|holds no tokenizer") as error:
        load_tokenizer(spec)
    assert "\n" not in str(error.value)


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"holds no tokenizer: tokenizer\.json or"):
        load_tokenizer(tmp_path)


# ---- objects -------------------------------------------------------------------------------------------------------


def test_fingerprints_of_objects() -> None:
    first, second = load_tokenizer(Characters("abc")), load_tokenizer(Characters("abc"))
    assert first.fingerprint == second.fingerprint != load_tokenizer(Characters("acb")).fingerprint
    stated = Characters("abc")
    stated.fingerprint = "ab" * 32  # type: ignore[attr-defined]
    assert load_tokenizer(stated).fingerprint == "ab" * 32


@pytest.mark.parametrize("spec", [3, None, b"gpt2", ["gpt2"], {"a": 1}, object(), Characters, str.encode])
def test_what_is_no_tokenizer(spec: Any) -> None:
    with pytest.raises(TypeError, match=r"tokenizer is .* accepted are 'gpt2'"):
        load_tokenizer(spec)


def test_an_object_without_a_vocabulary_size() -> None:
    made = Characters("abc")
    del made.vocab_size
    with pytest.raises(TypeError, match="without an attribute vocab_size"):
        load_tokenizer(made)


def test_an_end_beyond_the_vocabulary() -> None:
    made = Characters("abc")
    made.eos_id = 3  # type: ignore[attr-defined]
    with pytest.raises(TokenizerError, match=r"eos_id is 3, accepted is 0\.\.2"):
        load_tokenizer(made)


# ---- in a corpus ---------------------------------------------------------------------------------------------------


def corpus_text() -> str:
    return "".join(f"The river runs {n}.\n{TEXT.replace('<|endoftext|>', 'x')}" for n in range(200))


def test_a_corpus(tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = corpus_text()
    given: Any = tokenizer
    if isinstance(tokenizer, ObjectTokenizer):
        given = Characters("".join(sorted(set(text))))
    path = write(tmp_path / "text.txt", text)
    corpus = load_corpus(path, tokenizer=given, cache_dir=tmp_path / "cache")
    used = corpus.tokenizer
    assert used is not None and corpus.vocab_size == used.vocab_size
    assert corpus.train.dtype == np.uint16
    if used.vocab_size > 100 or isinstance(used, ObjectTokenizer):
        decoded = used.decode(corpus.train[corpus.train != (-1 if used.eos_id is None else used.eos_id)])
        assert decoded.startswith("The river runs 0.\n") and all(
            line in text for line in decoded.splitlines()
        )
    assert (used.eos_id is not None) == (used.eos_id in corpus.train[-1:])
    source = json.loads(json.dumps(corpus.source()))
    assert source["num_tokens"] == corpus.num_tokens and source["fingerprint"] == corpus.fingerprint
    # By its own account, from another folder.
    monkeypatch.chdir(tmp_path / "cache")
    recorded = not (isinstance(used, ObjectTokenizer) or used.name == "tiny")
    again = corpus_from_source(source, tokenizer=None if recorded else given, cache_dir=tmp_path / "cache")
    np.testing.assert_array_equal(again.train, corpus.train)
    assert again.fingerprint == corpus.fingerprint
    path.write_text(text + "More.\n")
    if not isinstance(used, ObjectTokenizer):
        with pytest.raises(
            CorpusError, match="has other tokens than before: its text or tokenizer has changed"
        ):
            corpus_from_source(source, tokenizer=None if recorded else given, cache_dir=tmp_path / "cache")


def test_tokenizers_do_not_share_a_cache(tmp_path: Path) -> None:
    path = write(tmp_path / "text.txt", corpus_text())
    encodings = ["gpt2", small_encoding(), small_encoding(pattern=r"\w+|\W")]
    loaded = [load_corpus(path, tokenizer=each, cache_dir=tmp_path / "cache") for each in encodings]
    assert len({corpus.fingerprint for corpus in loaded}) == 3
    assert len(os.listdir(tmp_path / "cache")) == 6
    again = [load_corpus(path, tokenizer=each, cache_dir=tmp_path / "cache") for each in encodings]
    assert len(os.listdir(tmp_path / "cache")) == 6
    for first, second in zip(loaded, again, strict=True):
        np.testing.assert_array_equal(first.train, second.train)


def test_a_large_vocabulary_is_stored_in_four_bytes(tmp_path: Path) -> None:
    made = Characters("".join(chr(0x4E00 + i) for i in range(200)))
    made.vocab_size = 70_000
    text = "\n".join("".join(chr(0x4E00 + (7 * i * j) % 199) for i in range(40)) for j in range(50))
    made.alphabet += "\n"
    corpus = load_corpus(
        write(tmp_path / "text.txt", text), tokenizer=made, cache_dir=tmp_path, progress=False
    )
    assert corpus.train.dtype == np.uint32


@pytest.mark.parametrize("fault", ["unknown character", "id beyond", "no row"])
def test_a_text_that_cannot_be_tokenised(fault: str, tmp_path: Path) -> None:
    text = corpus_text()
    made: Any = Characters("".join(sorted(set(text))))
    if fault == "unknown character":
        made = Characters("".join(sorted(set(text) - {"漢"})))
    elif fault == "id beyond":
        made.vocab_size -= 1
    else:
        made.encode = lambda text: [[1, 2]]
    with pytest.raises(CorpusError, match=r"the text text\.txt-train cannot be tokenised: ") as error:
        load_corpus(write(tmp_path / "text.txt", text), tokenizer=made, cache_dir=tmp_path / "cache")
    assert "\n" not in str(error.value) and os.listdir(tmp_path / "cache") == []


def test_separators_need_an_end_token(tmp_path: Path) -> None:
    path = write(tmp_path / "text.txt", corpus_text())
    made = Characters("".join(sorted(set(corpus_text()))))
    with pytest.raises(ValueError, match="document_separator is True, but tokenizer 'Characters' has no id"):
        load_corpus(path, tokenizer=made, cache_dir=tmp_path, document_separator=True)


@pytest.mark.parametrize("source", [{}, {"name": "x", "settings": {}}, {"settings": None}])
def test_sources_that_do_not_say_how_to_load(source: dict[str, Any]) -> None:
    with pytest.raises(CorpusError, match="was not made by load_corpus"):
        corpus_from_source(source)


def test_the_tokenizer_of_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    write(tmp_path / "tokenizer.json", hf_json())
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"), eos_token="</s>", unk_token="<unk>"
    )
    tokenizer = load_tokenizer(fast)
    assert tokenizer.kind == "tokenizers" and tokenizer.eos_id == 2
    assert tokenizer.encode("the river") == [3, 4]
    # And the other way: what save_tokenizer wrote is a tokenizer of transformers.
    save_tokenizer(tokenizer, tmp_path / "saved")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert again("the river", add_special_tokens=False)["input_ids"] == [3, 4] and again.eos_token == "</s>"
