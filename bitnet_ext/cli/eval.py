"""``bitnet-ext eval``: loss, perplexity and bits per byte of a model on a text."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from bitnet_ext.cli.options import add_device, add_switch, add_tokenizer

EPILOG = """\
examples:
  bitnet-ext eval runs/first
  bitnet-ext eval runs/first --data my_text.txt
  bitnet-ext eval runs/first/snapshots/step-00000500 --json

Perplexities can be compared between models with one tokenizer and one --seq-len; bits per byte between
tokenizers too.
"""

DEFAULT_TOKENS = 65536


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Measures how well a model predicts the held-out part of a text: mean loss in nats per token, perplexity, bits "
        "per byte, and beside it the loss of fixed word counts (the unigram of the training text)."
    )
    parser.epilog = EPILOG
    parser.add_argument(
        "model", type=Path, metavar="PATH", help="folder of a run, of a checkpoint, or of an exported model"
    )
    parser.add_argument(
        "--data",
        metavar="NAME|PATH",
        help="text: wiki-leads, wikitext-2, or the path of a text file or folder (default: the run's own)",
    )
    add_tokenizer(parser)
    parser.add_argument(
        "--seq-len", type=int, metavar="N", help="predictions in a row (default: those of the run's training)"
    )
    parser.add_argument(
        "--tokens",
        type=int,
        default=DEFAULT_TOKENS,
        metavar="N",
        help=f"most predictions, spread evenly over the held-out part; 0 for all (default {DEFAULT_TOKENS})",
    )
    add_switch(
        parser,
        "--pack",
        "evaluate the packed form, whose results are equal (default yes)",
        True,
    )
    add_device(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    from bitnet_ext import metrics
    from bitnet_ext.cli.checkpoint import corpus_of, run_state, training_numbers
    from bitnet_ext.cli.generate import load
    from bitnet_ext.data import unigram_log_probs
    from bitnet_ext.training.device import resolve_device

    if args.tokens < 0:
        raise ValueError(f"eval: --tokens must be 0 or more, got {args.tokens}")
    state = run_state(args.model)
    device = resolve_device(args.device)
    model, tokenizer = load(args.model, args.tokenizer, device, pack=args.pack)
    corpus = corpus_of(state, args.model, args.data, args.tokenizer)
    corpus.check_vocab(model.config.vocab_size)
    settings = training_numbers(state, args.model)
    seq_len = args.seq_len or min(settings.get("seq_len", 256), model.config.max_seq_len)
    predictions = min(args.tokens or len(corpus.heldout), len(corpus.heldout) - 1)
    if not args.json:
        print(f"{'text':14} {corpus.name}, held-out part: {predictions:,} of {len(corpus.heldout):,} tokens")
        sys.stdout.flush()
    found = metrics.evaluate(
        model,
        corpus.heldout,
        seq_len=seq_len,
        max_tokens=args.tokens or None,
        tokenizer=tokenizer,
        document_separator=settings.get("document_separator"),
    )
    counts = unigram_log_probs(corpus.train, model.config.vocab_size)
    unigram = -float(counts[corpus.heldout[1:].astype("int64")].mean())
    if args.json:
        names = {"text": corpus.name, "seq_len": seq_len, **found, "unigram_cross_entropy": unigram}
        print(json.dumps(names, indent=1))
        return 0
    lines = [
        ("context", f"up to {seq_len} tokens"),
        ("loss", f"{found['cross_entropy']:.4f} nats per token"),
        ("perplexity", f"{found['perplexity']:.5g}"),
    ]
    if "bits_per_byte" in found:
        lines.append(("bits per byte", f"{found['bits_per_byte']:.4f}"))
    lines.append(
        (
            "word counts",
            f"{unigram:.4f} nats per token, by the unigram of the training part: a model should be below",
        )
    )
    for title, words in lines:
        print(f"{title:14} {words}")
    return 0
