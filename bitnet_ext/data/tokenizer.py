"""Tokenizers behind one small interface: GPT-2 and tiktoken's encodings, and objects with `encode` and `decode`.

`bitnet_ext.data.hf_tokenizer` has the tokenizer.json files of the Hugging Face library;
`bitnet_ext.data.tokenizer_files` loads and saves all kinds.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

import tiktoken

from bitnet_ext.data.cutting import cut_text, encode_in_parts
from bitnet_ext.data.gpt2 import (
    GPT2_VOCAB_SIZE,
    VOCAB_BPE_SHA256,
    gpt2_tokenizer,
    merge_ranks,
    packaged_merge_table,
)

# Longer documents are cut for the tokenizers whose rules are unknown here.
_MAX_DOCUMENT_CHARS = 1 << 20
_REPLACEMENT = "\ufffd"


class TokenizerError(ValueError):
    """A tokenizer that is missing, damaged or cannot do what is asked; the message is one sentence."""


class Tokenizer(ABC):
    """Text to token ids and back.

    Attributes:
        name: for people; two tokenizers may share it.
        vocab_size: every id is smaller.
        eos_id: the id that ends a text, None when the tokenizer has none.
        fingerprint: 64 hex digits, equal for tokenizers that give equal ids.
        kind: "tiktoken", "tokenizers" (the library of Hugging Face) or "object".
    """

    kind: ClassVar[str]
    name: str
    vocab_size: int
    eos_id: int | None
    fingerprint: str

    @property
    def id(self) -> str:
        """At most 24 ASCII characters: the name and the first 8 digits of the fingerprint."""
        return f"{re.sub('[^A-Za-z0-9._-]+', '_', self.name)[:15]}-{self.fingerprint[:8]}"

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without special tokens: `<|endoftext|>` in it is encoded as text.

        Raises:
            TypeError: `text` is not a str.
            TokenizerError: the tokenizer cannot encode it.
        """
        if not isinstance(text, str):
            raise TypeError(f"Tokenizer.encode: text is {type(text).__name__}, accepted is str")
        return [i for part in self.encode_parts(text) for i in part]

    def encode_parts(self, text: str) -> Iterator[list[int]]:
        """The ids of `encode` in parts, so that a long text needs little memory."""
        with self._one_sentence("encode"):
            yield from self._encode_parts(text)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids; an id that the tokenizer does not know gives U+FFFD.

        A model may predict such ids where its vocabulary is padded.

        Raises:
            TypeError: `ids` is not a row of integers.
        """
        known: list[int] = []
        for value in ids.tolist() if hasattr(ids, "tolist") else ids:
            if not hasattr(value, "__index__"):
                raise TypeError(f"Tokenizer.decode: ids holds {value!r}, accepted is a row of integers")
            known.append(int(value))
        with self._one_sentence("decode"):
            if all(map(self._knows, known)):
                return self._decode(known)
            return "".join(self._decode([i]) if self._knows(i) else _REPLACEMENT for i in known)

    def record(self) -> dict[str, Any]:
        """The input of `tokenizer_from_record`, as JSON: a checkpoint keeps it."""
        return {
            "kind": self.kind,
            "name": self.name,
            "vocab_size": self.vocab_size,
            "eos_id": self.eos_id,
            "fingerprint": self.fingerprint,
        }

    def _encode_parts(self, text: str) -> Iterator[list[int]]:
        for part in cut_text(text, _MAX_DOCUMENT_CHARS):
            yield self._encode(part)

    @abstractmethod
    def _encode(self, text: str) -> list[int]: ...

    @abstractmethod
    def _decode(self, ids: list[int]) -> str: ...

    def _knows(self, token: int) -> bool:
        return 0 <= token < self.vocab_size

    @contextlib.contextmanager
    def _one_sentence(self, action: str) -> Iterator[None]:
        try:
            yield
        except TokenizerError:
            raise
        except BaseException as error:
            if is_failure(error):
                reason = str(error).partition("\n")[0] or "no reason given"
                raise TokenizerError(
                    f"tokenizer {self.name!r} cannot {action} this ({type(error).__name__}: {reason})"
                ) from error
            raise

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name!r}, {self.vocab_size} ids, {self.fingerprint[:8]}>"


class TiktokenTokenizer(Tokenizer):
    """A `tiktoken.Encoding`, by default GPT-2's.

    Args:
        encoding: any encoding. Only those that tiktoken knows by name can be found again from a record.
    """

    kind = "tiktoken"

    def __init__(self, encoding: tiktoken.Encoding | None = None) -> None:
        encoding = gpt2_tokenizer() if encoding is None else encoding
        self.encoding = encoding
        self.name = encoding.name
        self.vocab_size = encoding.n_vocab
        # None without the token: tiktoken's property looks it up by name.
        self.eos_id = encoding._special_tokens.get("<|endoftext|>")
        self.fingerprint = _tiktoken_fingerprint(encoding)

    def _encode(self, text: str) -> list[int]:
        return [i for part in self._encode_parts(text) for i in part]

    def _encode_parts(self, text: str) -> Iterator[list[int]]:
        return encode_in_parts(self.encoding, text)

    def _decode(self, ids: list[int]) -> str:
        return self.encoding.decode(ids)

    def _knows(self, token: int) -> bool:
        return 0 <= token < self.vocab_size and token in self._known

    @functools.cached_property
    def _known(self) -> frozenset[int] | range:
        ids = {*self.encoding._mergeable_ranks.values(), *self.encoding._special_tokens.values()}
        return range(self.vocab_size) if len(ids) == self.vocab_size else frozenset(ids)


def _tiktoken_fingerprint(encoding: tiktoken.Encoding) -> str:
    """GPT-2's is the sha256 of its merge table; of others, of the pattern, the special tokens and the ranks."""
    ranks, special = encoding._mergeable_ranks, encoding._special_tokens
    if encoding is gpt2_tokenizer() or (
        encoding.name == "gpt2"
        and encoding.n_vocab == GPT2_VOCAB_SIZE
        and encoding._pat_str == gpt2_tokenizer()._pat_str
        and special == gpt2_tokenizer()._special_tokens
        and ranks == merge_ranks(packaged_merge_table())
    ):
        return VOCAB_BPE_SHA256
    digest = hashlib.sha256(f"tiktoken 1\n{encoding._pat_str}\n".encode())
    for name, rank in sorted(special.items()):
        digest.update(f"{rank} {name}\n".encode())
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        digest.update(b"%d %d " % (rank, len(token)) + token)
    return digest.hexdigest()


class ObjectTokenizer(Tokenizer):
    """Any object with `encode(text) -> ids` and `decode(ids) -> str`.

    The size of its vocabulary is taken from `vocab_size`, `n_vocab`, `get_vocab_size()` or `len()`, the largest
    of them. The fingerprint is its attribute `fingerprint`, else a digest of its class and of the text of each
    id. A checkpoint cannot hold it: whoever loads the model has to give it again.

    Args:
        tokenizer: the object. name: default the class's name. eos_id: default its `eos_id` or `eos_token_id`.

    Raises:
        TypeError: it lacks a method or a vocabulary size.
    """

    kind = "object"

    def __init__(self, tokenizer: Any, *, name: str | None = None, eos_id: int | None = None) -> None:
        for method in ("encode", "decode"):
            if isinstance(tokenizer, type) or not callable(getattr(tokenizer, method, None)):
                raise TypeError(
                    f"tokenizer is {_type_name(tokenizer)} without a method {method}: accepted are 'gpt2', the name "
                    "of a tiktoken encoding, the path of a tokenizer.json, and an object with encode and decode"
                )
        self.wrapped = tokenizer
        own_name = getattr(tokenizer, "name", None)
        self.name = name or (own_name if isinstance(own_name, str) and own_name else type(tokenizer).__name__)
        self.vocab_size = _vocab_size(tokenizer)
        if eos_id is None:
            eos_id = next(
                (
                    value
                    for key in ("eos_id", "eos_token_id")
                    if isinstance(value := getattr(tokenizer, key, None), int)
                ),
                None,
            )
        self.eos_id = check_eos(eos_id, self.vocab_size, self.name)
        # Tokenizers of transformers add special tokens unless told not to.
        plain = type(tokenizer).__module__.split(".")[0] in ("transformers", "transformers_modules")
        self._options: dict[str, Any] = {"add_special_tokens": False} if plain else {}
        own = getattr(tokenizer, "fingerprint", None)
        self.fingerprint = str(own) if is_sha256(own) else self._digest()

    def _digest(self) -> str:
        kind = type(self.wrapped)
        digest = hashlib.sha256(
            f"object 1 {kind.__module__}.{kind.__qualname__} {self.vocab_size}\n".encode()
        )
        for token in range(self.vocab_size):
            try:
                text = str(self.wrapped.decode([token]))
            except BaseException as error:
                if not is_failure(error):
                    raise
                text = f"\0{type(error).__name__}"
            digest.update(text.encode("utf-8", "replace") + b"\0")
        return digest.hexdigest()

    def _encode(self, text: str) -> list[int]:
        ids = self.wrapped.encode(text, **self._options)
        ids = getattr(ids, "ids", ids)
        return [int(i) for i in (ids.tolist() if hasattr(ids, "tolist") else ids)]

    def _decode(self, ids: list[int]) -> str:
        return str(self.wrapped.decode(ids))


def _vocab_size(tokenizer: Any) -> int:
    found = []
    for key in ("vocab_size", "n_vocab", "get_vocab_size", "__len__"):
        value = getattr(tokenizer, key, None)
        with contextlib.suppress(Exception):
            found.append(int(value() if callable(value) else value))  # type: ignore[arg-type]
    size = max(found, default=0)
    if not 1 <= size <= 1 << 32:
        raise TypeError(
            f"tokenizer is {_type_name(tokenizer)} without an attribute vocab_size, which says how many ids it has"
        )
    return size


def check_eos(eos_id: int | None, vocab_size: int, name: str) -> int | None:
    """`eos_id` itself; TokenizerError when it lies outside the vocabulary."""
    if eos_id is not None and not 0 <= eos_id < vocab_size:
        raise TokenizerError(
            f"tokenizer {name!r}: eos_id is {eos_id}, accepted is 0..{vocab_size - 1} (vocab_size {vocab_size})"
        )
    return eos_id


def is_failure(error: BaseException) -> bool:
    """Whether a library failed: an Exception, or the panic of a Rust library, which is none."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def is_sha256(value: object) -> bool:
    """Whether a value is 64 lower-case hex digits."""
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def _type_name(value: object) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else f"a {type(value).__name__}"


class StreamDecoder:
    """Text of tokens that come one at a time.

    A token may be half a character, and some tokenizers drop the space of the first token of a text: the text
    of a token depends on those before it.

        decoder = StreamDecoder(tokenizer, prompt_ids)
        for token in ...:
            print(decoder.push(token), end="")
        print(decoder.flush())

    Args:
        tokenizer: of the tokens.
        context: the tokens before the first; their text is not given out.
    """

    _CONTEXT = 8  # tokens that are decoded again for the ones after them

    def __init__(self, tokenizer: Tokenizer, context: Iterable[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._ids = list(context)[-self._CONTEXT :]
        self._given = len(self._ids)  # the first tokens, whose text was given out

    def push(self, token: int) -> str:
        """Text that `token` completes; empty while a character is incomplete."""
        self._ids.append(int(token))
        return self._take(final=False)

    def flush(self) -> str:
        """The rest at the end, with U+FFFD for an incomplete character."""
        return self._take(final=True)

    def _take(self, *, final: bool) -> str:
        before = self._tokenizer.decode(self._ids[: self._given])
        text = self._tokenizer.decode(self._ids)
        # A character has at most a few tokens: what is still incomplete after these is no character.
        incomplete = text.endswith(_REPLACEMENT) and len(self._ids) - self._given < self._CONTEXT
        if incomplete and not final:
            return ""
        self._ids = self._ids[-self._CONTEXT :]
        self._given = len(self._ids)
        return text[len(before) :]
