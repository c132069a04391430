"""Text for training: GPT-2's tokeniser offline, token files, named corpora, and batches of rows."""

from __future__ import annotations

from bitnet_ext.data.corpora import CORPORA, DEFAULT_CORPUS, Corpus, load_corpus
from bitnet_ext.data.sampling import Order, RowSampler
from bitnet_ext.data.statistics import token_counts, unigram_log_probs
from bitnet_ext.data.text import CorpusError, TextSource, text_file_source
from bitnet_ext.data.token_file import (
    TokenFile,
    TokenFileError,
    TokenFileWriter,
    default_cache_dir,
    tokenize_cached,
)
from bitnet_ext.data.tokenizer import (
    END_OF_TEXT,
    END_OF_TEXT_ID,
    GPT2_VOCAB_SIZE,
    gpt2_tokenizer,
)

__all__ = [
    "CORPORA",
    "DEFAULT_CORPUS",
    "END_OF_TEXT",
    "END_OF_TEXT_ID",
    "GPT2_VOCAB_SIZE",
    "Corpus",
    "CorpusError",
    "Order",
    "RowSampler",
    "TextSource",
    "TokenFile",
    "TokenFileError",
    "TokenFileWriter",
    "default_cache_dir",
    "gpt2_tokenizer",
    "load_corpus",
    "text_file_source",
    "token_counts",
    "tokenize_cached",
    "unigram_log_probs",
]
