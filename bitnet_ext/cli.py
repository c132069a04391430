"""The ``bitnet-ext`` command: info, train, generate, collapse."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from bitnet_ext import __version__, build_info
from bitnet_ext.collapse import command as collapse_command
from bitnet_ext.data import gpt2_tokenizer, load_corpus
from bitnet_ext.inference import generate
from bitnet_ext.models import PRESETS, BitNetForCausalLM, preset
from bitnet_ext.nn import BitLinear, pack_model
from bitnet_ext.training import TrainConfig, Trainer, TrainingDivergedError, TrainingInterrupted, load_model
from bitnet_ext.training.device import resolve_device

EXIT_USAGE = 2
EXIT_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Parses the command line and runs one subcommand; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="bitnet-ext", description="Train, understand and run ternary (BitNet b1.58) language models."
    )
    parser.add_argument("--version", action="version", version=f"bitnet_ext {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    run: dict[str, Callable[[argparse.Namespace], int]] = {
        "info": _info,
        "train": _train,
        "generate": _generate,
        "collapse": collapse_command.run_command,
    }
    commands.add_parser("info", help="print facts about this installation as JSON")
    _add_train(commands.add_parser("train", help="train a model on a text"))
    _add_generate(commands.add_parser("generate", help="continue a text with a trained model"))
    collapse = commands.add_parser("collapse", help="run the collapse experiments and write their report")
    collapse_command.add_arguments(collapse)
    collapse_command.add_subcommands(collapse)
    args = parser.parse_args(argv)
    try:
        return run[args.command](args)
    except TrainingInterrupted as stop:
        print(f"\n{stop}", file=sys.stderr)
        return EXIT_INTERRUPTED
    except (ValueError, OSError, ImportError, TrainingDivergedError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USAGE
    except RuntimeError as error:
        return collapse_command.report_operator_error(error)


def _info(args: argparse.Namespace) -> int:
    print(json.dumps(build_info(), indent=1))
    return 0


# --- train ------------------------------------------------------------------------------------------------------


def _add_train(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", default="wiki-leads", metavar="NAME|PATH", help="text (default wiki-leads)")
    parser.add_argument("--model", default="collapse-256", help=f"preset: {', '.join(PRESETS)}")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the run")
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda or cuda:N")
    parser.add_argument("--resume", action="store_true", help="continue the run in --out")
    parser.add_argument("--model-seed", type=int, default=0, help="seed of the initialisation (default 0)")
    parser.add_argument(
        "--quantization", default="b1.58", help="b1.58 (default), or none for the full-precision twin"
    )
    for field in dataclasses.fields(TrainConfig):
        flag = "--" + field.name.replace("_", "-")
        shown = f"(default {field.default})"
        if isinstance(field.default, bool):
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=field.default)
        else:
            parser.add_argument(flag, type=_reader(field), default=field.default, help=shown)


def _reader(field: dataclasses.Field[Any]) -> Callable[[str], Any]:
    """Reads a TrainConfig field from text by its annotation; "none" where the field may be None."""
    kind = str(field.type)
    base: Callable[[str], Any] = int if kind.startswith("int") else float if kind.startswith("float") else str

    def read(text: str) -> Any:
        return None if text == "none" and kind.endswith("None") else base(text)

    return read


def _train(args: argparse.Namespace) -> int:
    config = TrainConfig(
        **{field.name: getattr(args, field.name) for field in dataclasses.fields(TrainConfig)}
    )
    corpus = load_corpus(args.data)
    model = BitNetForCausalLM(preset(args.model, quantization=args.quantization), seed=args.model_seed)
    corpus.check_vocab(model.config.vocab_size)
    trainer = Trainer(model, config, corpus.train, run_dir=args.out, device=args.device)
    with tqdm(total=config.steps, unit="step", dynamic_ncols=True, mininterval=0.5) as bar:

        def advance(step: int, record: dict[str, Any]) -> None:
            bar.set_postfix_str(f"loss {record['loss']:.3f}", refresh=False)
            bar.update(step - bar.n)

        trainer.fit(resume=args.resume, on_progress=advance)
    print(f"checkpoint: {args.out / 'checkpoint'}\nmetrics: {args.out / 'metrics.jsonl'}")
    return 0


# --- generate ---------------------------------------------------------------------------------------------------


def _add_generate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, help="folder of a checkpoint, or of a run")
    parser.add_argument("prompt", help="text to continue")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="default 64")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default) for the likeliest token")
    parser.add_argument("--top-k", type=int, help="sample among the K likeliest tokens")
    parser.add_argument(
        "--top-p", type=float, help="sample among the likeliest tokens of this total probability"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (default 0)")
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda or cuda:N")


def _generate(args: argparse.Namespace) -> int:
    folder = args.checkpoint
    if (folder / "checkpoint").is_dir():
        folder = folder / "checkpoint"
    device = resolve_device(args.device)
    model = load_model(folder, device)
    if any(isinstance(module, BitLinear) and module.is_quantized for module in model.modules()):
        model = pack_model(model, inplace=True)
    tokenizer = gpt2_tokenizer()
    ids = tokenizer.encode_ordinary(args.prompt)
    if not ids:
        raise ValueError("generate: prompt must hold at least one token, got an empty text")
    prompt = torch.tensor([ids], device=device)
    print(args.prompt, end="", flush=True)

    def show(token: torch.Tensor) -> None:
        print(tokenizer.decode(token.tolist()), end="", flush=True)

    generate(
        model,
        prompt,
        args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
        on_token=show,
    )
    print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
