"""The byte-pair encoding of GPT-2, without a network.

The encoding is a list of 50,000 merges (Radford et al. 2019, section 2.2). Ranks 0..255 are the single
bytes, rank 256 + i is the result of merge i, and 50256 is `<|endoftext|>`. The merge table lies in the
package, so that an installed bitnet_ext tokenises offline; a copy that tiktoken has already put in its own
cache is preferred.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import os
import tempfile
import zlib
from importlib import resources

import tiktoken

GPT2_VOCAB_SIZE = 50257
END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_ID = 50256
VOCAB_BPE_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
# Names the encoding in cache keys and token files.
GPT2_TOKENIZER_ID = "gpt2-" + VOCAB_BPE_SHA256[:8]

_ASSET = "gpt2_vocab.bpe.gz"
# tiktoken names a cached file by the sha1 of its address; the sha256 is of the content.
_TIKTOKEN_CACHE_FILES = (
    ("6d1cbeee0f20b3d9449abfede4726ed8212e3aee", VOCAB_BPE_SHA256),  # vocab.bpe
    (
        "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6",
        "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    ),  # encoder.json
)


@functools.lru_cache(maxsize=1)
def gpt2_tokenizer() -> tiktoken.Encoding:
    """GPT-2's byte-pair encoding: 50,257 ids, `"Hello world"` -> `[15496, 995]`, `<|endoftext|>` -> 50256.

    Never touches the network: taken from tiktoken's cache (`TIKTOKEN_CACHE_DIR`, `DATA_GYM_CACHE_DIR` or
    `data-gym-cache` in the temporary directory) when both of its files are there and whole, otherwise built
    from the merge table in this package. The ids are the same either way. The result is kept for the
    process.

    Raises:
        RuntimeError: the packaged merge table is missing or damaged.
    """
    if _tiktoken_cache_is_whole():
        try:
            return tiktoken.get_encoding("gpt2")
        except Exception:
            # A plugin of another package has broken tiktoken's registry; the packaged table does not need it.
            pass
    return build_encoding(packaged_merge_table())


def packaged_merge_table() -> bytes:
    """The bytes of GPT-2's `vocab.bpe` from this package; RuntimeError when they are missing or damaged."""
    asset = resources.files("bitnet_ext.data") / "assets" / _ASSET
    try:
        table = gzip.decompress(asset.read_bytes())
    except FileNotFoundError:
        raise RuntimeError(f"the GPT-2 merge table {asset} is missing: install bitnet_ext again") from None
    except (OSError, EOFError, zlib.error) as error:
        raise RuntimeError(
            f"the GPT-2 merge table {asset} is damaged ({error}): install bitnet_ext again"
        ) from error
    digest = hashlib.sha256(table).hexdigest()
    if digest != VOCAB_BPE_SHA256:
        raise RuntimeError(
            f"the GPT-2 merge table {asset} is damaged: its sha256 is {digest}, expected {VOCAB_BPE_SHA256}; "
            "install bitnet_ext again"
        )
    return table


def build_encoding(merge_table: bytes) -> tiktoken.Encoding:
    """A `tiktoken.Encoding` named "gpt2" from the bytes of GPT-2's `vocab.bpe`."""
    # tiktoken's list of encodings (since 0.9): the pattern that splits text into words is taken from it.
    from tiktoken_ext.openai_public import r50k_pat_str

    return tiktoken.Encoding(
        "gpt2",
        pat_str=r50k_pat_str,
        mergeable_ranks=merge_ranks(merge_table),
        special_tokens={END_OF_TEXT: END_OF_TEXT_ID},
        explicit_n_vocab=GPT2_VOCAB_SIZE,
    )


def merge_ranks(merge_table: bytes) -> dict[bytes, int]:
    """Byte string -> rank (= token id) from a `vocab.bpe`: a version line, then a merge `left right` a line.

    The file spells each byte as one printable character: the bytes that are printable in Latin-1 stand for
    themselves, the other 68 are written as U+0100, U+0101, ... in increasing order. The printable ones also
    have the first ranks, so the order of this alphabet is the order of ranks 0..255.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)) - set(printable))
    spelling = {chr(byte): bytes([byte]) for byte in printable}
    spelling.update({chr(0x100 + i): bytes([byte]) for i, byte in enumerate(others)})

    ranks = {bytes([byte]): rank for rank, byte in enumerate([*printable, *others])}
    # A symbol is spelled out once, when a merge makes it: its two halves are already known by their spelling.
    for line in merge_table.decode("utf-8").splitlines()[1:]:
        left, right = line.split(" ")
        merged = spelling[left] + spelling[right]
        spelling[left + right] = merged
        ranks[merged] = len(ranks)
    return ranks


def _tiktoken_cache_is_whole() -> bool:
    directory = os.environ.get("TIKTOKEN_CACHE_DIR", os.environ.get("DATA_GYM_CACHE_DIR"))
    if directory is None:
        directory = os.path.join(tempfile.gettempdir(), "data-gym-cache")
    if directory == "":  # tiktoken's way to switch its cache off: get_encoding would download.
        return False
    for name, sha256 in _TIKTOKEN_CACHE_FILES:
        try:
            with open(os.path.join(directory, name), "rb") as file:
                if hashlib.sha256(file.read()).hexdigest() != sha256:
                    return False
        except OSError:
            return False
    return True
