"""Text for training: tokenizers, token files, named corpora, and batches of rows."""

from __future__ import annotations

from bitnet_ext.data.corpora import CORPORA, DEFAULT_CORPUS, Corpus, corpus_from_source, load_corpus
from bitnet_ext.data.gpt2 import END_OF_TEXT, END_OF_TEXT_ID, GPT2_VOCAB_SIZE, gpt2_tokenizer
from bitnet_ext.data.sampling import Order, RowSampler
from bitnet_ext.data.statistics import as_token_array, token_counts, unigram_log_probs
from bitnet_ext.data.text import CorpusError, TextSource, text_file_source
from bitnet_ext.data.token_file import (
    TokenFile,
    TokenFileError,
    TokenFileWriter,
    default_cache_dir,
    tokenize_cached,
)
from bitnet_ext.data.tokenizer import StreamDecoder, Tokenizer, TokenizerError
from bitnet_ext.data.tokenizer_files import load_tokenizer, save_tokenizer, tokenizer_from_record

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
    "StreamDecoder",
    "TextSource",
    "TokenFile",
    "TokenFileError",
    "TokenFileWriter",
    "Tokenizer",
    "TokenizerError",
    "as_token_array",
    "corpus_from_source",
    "default_cache_dir",
    "gpt2_tokenizer",
    "load_corpus",
    "load_tokenizer",
    "save_tokenizer",
    "text_file_source",
    "token_counts",
    "tokenize_cached",
    "tokenizer_from_record",
    "unigram_log_probs",
]
