"""``bitnet-ext generate``: continue a text with a trained model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from bitnet_ext.cli.options import add_device, add_tokenizer

EPILOG = """\
examples:
  bitnet-ext generate runs/first "The river"
  bitnet-ext generate runs/first "The river" --temperature 0
  bitnet-ext generate runs/first "The river" --max-new-tokens 200 --seed 3
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Continues a text with a trained model, whose weights are packed first."
    parser.epilog = EPILOG
    parser.add_argument(
        "model", type=Path, metavar="PATH", help="folder of a run, of a checkpoint, or of an exported model"
    )
    parser.add_argument("prompt", metavar="TEXT", help="text to continue")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="default 64")
    choice = parser.add_argument_group("choice of each token")
    choice.add_argument(
        "--temperature",
        type=float,
        default=0.8,
        metavar="X",
        help="divisor of the logits; 0 for the likeliest token, which makes small models repeat themselves (default "
        "0.8)",
    )
    choice.add_argument(
        "--top-p",
        type=float,
        default=0.95,
        metavar="X",
        help="sample among the likeliest tokens of this total probability (default 0.95)",
    )
    choice.add_argument(
        "--top-k", type=int, metavar="N", help="sample among the N likeliest tokens (default all)"
    )
    choice.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the sampling (default 0)")
    add_tokenizer(parser)
    add_device(parser)


def run(args: argparse.Namespace) -> int:
    import torch

    from bitnet_ext.data.tokenizer import StreamDecoder
    from bitnet_ext.inference import generate
    from bitnet_ext.training.device import resolve_device

    device = resolve_device(args.device)
    model, tokenizer = load(args.model, args.tokenizer, device)
    ids = tokenizer.encode(args.prompt)
    if not ids:
        raise ValueError("generate: TEXT must hold at least one token, got an empty text")
    decoder = StreamDecoder(tokenizer, ids)
    print(args.prompt, end="", flush=True)
    generate(
        model,
        torch.tensor([ids], device=device),
        args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
        eos_id=tokenizer.eos_id,
        on_token=lambda token: print(
            "" if token.item() == tokenizer.eos_id else decoder.push(int(token)), end="", flush=True
        ),
    )
    print(decoder.flush())
    return 0


def load(path: Path, tokenizer: str | None, device: Any, pack: bool = True) -> tuple[Any, Any]:
    """The model at a path, packed where it is ternary, and its tokenizer."""
    from bitnet_ext.data.tokenizer import TokenizerError
    from bitnet_ext.formats import load_model
    from bitnet_ext.nn import BitLinear, pack_model

    model, found = load_model(path, device, tokenizer=tokenizer)
    if found is None:
        raise TokenizerError(f"{path} does not tell its tokenizer: name it with --tokenizer")
    if pack and any(isinstance(module, BitLinear) and module.is_quantized for module in model.modules()):
        model = pack_model(model, inplace=True)
    return model, found
