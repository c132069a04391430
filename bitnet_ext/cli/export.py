"""``bitnet-ext export``: write the model of a run into a folder to hand on."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from bitnet_ext.cli.options import add_switch, add_tokenizer

EPILOG = """\
examples:
  bitnet-ext export runs/first my-model
  bitnet-ext generate my-model "The river"
  bitnet-ext export runs/first my-model --head int8 --dtype bfloat16
  bitnet-ext export runs/first my-weights --no-packed

The folder holds model.safetensors, config.json and the tokenizer. In Python:
bitnet_ext.formats.load_model("my-model") gives model and tokenizer.
"""

DTYPES = ("float32", "bfloat16", "float16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Writes the model of a run into a folder to hand on, with its tokenizer and without the state of its "
        "optimiser."
    )
    parser.epilog = EPILOG
    parser.add_argument("model", type=Path, metavar="PATH", help="folder of a run or of a checkpoint")
    parser.add_argument("out", type=Path, metavar="OUT", help="the new folder")
    add_switch(
        parser,
        "--packed",
        "store ternary layers in 2 bits per weight, for inference; otherwise in full precision, to train further "
        "(default yes)",
        True,
    )
    parser.add_argument(
        "--head",
        choices=("keep", "int8"),
        default="keep",
        help="output head as it is, or int8: half the bytes of bfloat16, logits about 1 %% off (default keep)",
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="of what is not packed: embedding, norms and head (default: as in the run)",
    )
    add_tokenizer(parser)


def run(args: argparse.Namespace) -> int:
    import torch

    from bitnet_ext.formats import export

    dtype = None if args.dtype is None else getattr(torch, args.dtype)
    out = export(args.model, args.out, args.packed, args.head, dtype=dtype, tokenizer=args.tokenizer)
    size = sum(file.stat().st_size for file in out.iterdir() if file.is_file())
    print(f"{out}: {', '.join(sorted(file.name for file in out.iterdir()))}; {size / 1e6:.1f} MB")
    print(f'next:\n  bitnet-ext generate {shlex.quote(str(out))} "The"')
    return 0
