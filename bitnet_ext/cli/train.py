"""``bitnet-ext train``: train a model on a text, or go on with a run."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitnet_ext.cli import output
from bitnet_ext.cli.options import (
    add_config_options,
    add_device,
    add_switch,
    add_tokenizer,
    flag,
    given_config,
    in_flags,
)
from bitnet_ext.models.config import PRESETS, QUANTIZATIONS
from bitnet_ext.training.config import TrainConfig

if TYPE_CHECKING:
    from bitnet_ext.cli.checkpoint import InitialWeights

EPILOG = """\
examples:
  bitnet-ext train --out runs/first --model collapse-128 --steps 300
  bitnet-ext train --out runs/mine --data my_text.txt --steps 2000 --eval-interval 100
  bitnet-ext train --resume runs/mine
  bitnet-ext train --out runs/tuned --init-from runs/mine --data other.txt --lr 3e-4 --steps 500
  torchrun --nproc-per-node 2 -m bitnet_ext.cli train --out runs/two --steps 1000
"""

DEFAULT_MODEL = "collapse-256"
DEFAULT_DATA = "wiki-leads"
_SUPPRESS: Any = argparse.SUPPRESS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Trains a ternary language model, or its full-precision twin, on a text. Ctrl-C ends the run after a "
        "checkpoint; --resume goes on with it."
    )
    parser.usage = "bitnet-ext train --out DIR [options]\n       bitnet-ext train --resume DIR"
    parser.epilog = EPILOG
    run = parser.add_argument_group("run")
    run.add_argument("--out", type=Path, metavar="DIR", help="folder of the new run")
    run.add_argument(
        "--resume",
        nargs="?",
        const=True,
        metavar="DIR",
        help="go on with the run in DIR (or in --out) from its newest checkpoint; model, text, tokenizer and settings "
        "are the run's own",
    )
    run.add_argument(
        "--init-from",
        type=Path,
        metavar="PATH",
        help="begin with the weights of another run, a checkpoint or a model that was exported with --no-packed "
        "(fine-tuning): at step 0, with a schedule of its own; network and tokenizer are those of PATH",
    )
    add_device(run)
    add_switch(
        run,
        "--progress",
        "show a header and a bar on a terminal, lines elsewhere (default yes)",
        True,
    )
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data",
        metavar="NAME|PATH",
        help=f"text: wiki-leads, wikitext-2, or the path of a text file or folder (default {DEFAULT_DATA}); a 20th "
        "is held out",
    )
    add_tokenizer(data, "gpt2")
    data.add_argument(
        "--document-masks",
        action="store_true",
        default=_SUPPRESS,
        help="attention does not cross from one document into the next (default: it does)",
    )
    model = parser.add_argument_group("model")
    model.add_argument(
        "--model",
        choices=PRESETS,
        metavar="PRESET",
        help=f"network: {', '.join(PRESETS)} (default {DEFAULT_MODEL})",
    )
    model.add_argument(
        "--quantization",
        choices=QUANTIZATIONS,
        help="b1.58, or none for the full-precision twin (default b1.58)",
    )
    model.add_argument("--model-seed", type=int, metavar="N", help="seed of the initial weights (default 0)")
    add_config_options(parser, without=("document_separator",))


def run(args: argparse.Namespace) -> int:
    """Trains as `args` say; returns the exit status."""
    out, resuming = _folder(args)
    with output.unbreakable():
        try:
            return _train(args, out, resuming)
        except (ValueError, OSError) as error:
            print(f"error: {in_flags(str(error))}", file=sys.stderr)
            return output.EXIT_USAGE
        except RuntimeError as error:
            from bitnet_ext.training import TrainingDivergedError

            if not isinstance(error, TrainingDivergedError):
                raise
            print(f"error: {error}", file=sys.stderr)
            return output.EXIT_USAGE


def _folder(args: argparse.Namespace) -> tuple[Path, bool]:
    """The run's folder, and whether it is resumed."""
    if args.resume is None:
        if args.out is None:
            raise ValueError(
                "train: name the folder of the run with --out DIR, or go on with one: --resume DIR"
            )
        return args.out, False
    if args.resume is True:
        if args.out is None:
            raise ValueError("train: --resume needs the folder of the run: --resume DIR")
        return args.out, True
    resumed = Path(args.resume)
    if args.out is not None and args.out != resumed:
        raise ValueError(
            f"train: --resume {args.resume} and --out {args.out} name two folders; a run goes on in its own"
        )
    return resumed, True


def _train(args: argparse.Namespace, out: Path, resuming: bool) -> int:
    from bitnet_ext.training import Trainer, TrainingInterrupted

    if resuming and args.init_from is not None:
        raise ValueError("train: --init-from begins a run, --resume goes on with one: give one of them")
    if not resuming:
        _refuse_existing(out)
    state = _resumed_state(args, out) if resuming else None
    start = None if args.init_from is None else _initial(args)
    corpus, model, config = _begin(args, start) if state is None else _again(args, out, state)
    trainer = Trainer(
        model,
        config,
        corpus,
        run_dir=out,
        device=args.device,
        init_from=None if start is None else start.weights,
    )
    program = "bitnet-ext"
    if trainer.world.size > 1:
        program = f"torchrun --nproc-per-node {trainer.world.size} -m bitnet_ext.cli"
    again = f"{program} train --resume {shlex.quote(str(out))}"
    if args.device != "auto":
        again += f" --device {args.device}"
    try:
        trainer.fit(resume=resuming, progress=args.progress)
    except TrainingInterrupted:
        if trainer.world.is_main:
            print(
                f"\nstopped after step {trainer.step} of {config.steps}. To go on: {again}", file=sys.stderr
            )
        return 130
    if trainer.world.is_main:
        if state is not None and state.get("finished"):
            print(f"the run is complete: {trainer.step} of {config.steps} steps were made before")
        _say_next(out, config)
    return 0


def _begin(args: argparse.Namespace, start: InitialWeights | None) -> tuple[Any, Any, TrainConfig]:
    """Text, model and settings of a new run."""
    config = TrainConfig(**given_config(args))  # before anything is loaded: it may be refused
    from bitnet_ext.data import load_corpus
    from bitnet_ext.models import BitNetForCausalLM, preset
    from bitnet_ext.training.device import resolve_device

    resolve_device(args.device)
    network = None if start is None else start.network
    tokenizer = args.tokenizer
    if tokenizer is None:
        tokenizer = "gpt2" if start is None else start.tokenizer
    corpus = load_corpus(DEFAULT_DATA if args.data is None else args.data, tokenizer=tokenizer)
    if network is None:
        # A vocabulary that is larger than the preset's is the tokenizer's.
        overrides = {"quantization": args.quantization or "b1.58"}
        network = preset(args.model or DEFAULT_MODEL, **overrides)
        if args.tokenizer is not None:
            network = preset(args.model or DEFAULT_MODEL, **overrides, vocab_size=corpus.vocab_size)
    corpus.check_vocab(network.vocab_size)
    if hasattr(args, "document_masks"):
        config = _with_masks(config, corpus)
    return corpus, BitNetForCausalLM(network, seed=args.model_seed or 0), config


def _initial(args: argparse.Namespace) -> InitialWeights:
    """The model that --init-from names. The options of the model must not contradict it."""
    import dataclasses

    from bitnet_ext.cli.checkpoint import initial_weights

    for name in ("model", "model_seed"):
        if getattr(args, name) is not None:
            raise ValueError(f"train: {flag(name)} has no meaning with --init-from, whose network is taken")
    start = initial_weights(args.init_from)
    if args.quantization is None:
        return start
    return start._replace(network=dataclasses.replace(start.network, quantization=args.quantization))


def _with_masks(config: TrainConfig, corpus: Any) -> TrainConfig:
    import dataclasses

    separator = None if corpus.tokenizer is None else corpus.tokenizer.eos_id
    if separator is None:
        raise ValueError("train: --document-masks needs a tokenizer with an id that ends a text")
    if not (corpus.train[: 1 << 20] == separator).any():
        raise ValueError(
            f"train: --document-masks: the text {corpus.name!r} has no token {separator} between documents"
        )
    return dataclasses.replace(config, document_separator=int(separator))


def _refuse_existing(out: Path) -> None:
    if (out / "metrics.jsonl").exists() or (out / "checkpoint" / "latest.json").exists():
        raise FileExistsError(
            f"{out} already holds a run: go on with it by `bitnet-ext train --resume {shlex.quote(str(out))}`, or "
            "choose another --out"
        )


def _resumed_state(args: argparse.Namespace, out: Path) -> dict[str, Any] | None:
    """The state of the run to go on with; None for one in --out that has no checkpoint yet, which begins anew."""
    from bitnet_ext.cli.checkpoint import run_state
    from bitnet_ext.formats.pretrained import is_pretrained

    state = run_state(out)
    if state is None and is_pretrained(out):
        raise ValueError(
            f"train: {out} is an exported model, which is no run to go on with; --init-from {out} begins a run with "
            "its weights"
        )
    if state is None and args.resume is not True:
        raise ValueError(f"train: {out} holds no checkpoint to go on from; --out {out} begins a run")
    return state


def _again(args: argparse.Namespace, out: Path, state: dict[str, Any]) -> tuple[Any, Any, TrainConfig]:
    """Text, model and settings of the run in `out`."""
    from bitnet_ext.cli.checkpoint import corpus_of
    from bitnet_ext.models import BitNetConfig, BitNetForCausalLM, preset
    from bitnet_ext.training.trainer import FREE_ON_RESUME

    saved, network = state.get("train_config"), state.get("model_config")
    if not isinstance(saved, dict) or not isinstance(network, dict):
        raise ValueError(f"{out} does not tell its settings: it is of another program")
    known = TrainConfig.from_dict(saved)
    given = given_config(args)
    if hasattr(args, "document_masks") and known.document_separator is None:
        raise ValueError(f"train: --document-masks is given, but the run in {out} has none")
    for name, value in given.items():
        if name not in FREE_ON_RESUME and getattr(known, name) != value:
            raise ValueError(
                f"train: {flag(name)} is {_shown(value)}, but the run in {out} has {_shown(getattr(known, name))}; it "
                "goes on with its own settings (--init-from begins another run with its weights)"
            )
    config = BitNetConfig.from_dict(network)
    if args.quantization not in (None, config.quantization):
        raise ValueError(
            f"train: --quantization is {args.quantization}, but the run in {out} has {config.quantization}"
        )
    if args.model is not None:
        wanted = preset(args.model, vocab_size=config.vocab_size, quantization=config.quantization)
        if wanted != config:
            raise ValueError(f"train: --model {args.model} is not the network of the run in {out}")
    corpus = corpus_of(state, out, args.data, args.tokenizer)
    free = {name: value for name, value in given.items() if name in FREE_ON_RESUME}
    settings = TrainConfig.from_dict(known.to_dict() | free)
    return corpus, BitNetForCausalLM(config, seed=0), settings


def _shown(value: Any) -> str:
    return "none" if value is None else str(value)


def _say_next(out: Path, config: TrainConfig) -> None:
    folder = shlex.quote(str(out))
    print(f"metrics     {out / 'metrics.jsonl'}")
    if config.final_checkpoint == "none":
        return
    print(f"checkpoint  {out / 'checkpoint'}")
    print("next:")
    for command in (f'generate {folder} "The"', f"eval {folder}", f"collapse diagnose {folder}"):
        print(f"  bitnet-ext {command}")
