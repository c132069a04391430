"""The command's name, its module, its errors and its exit status."""

from __future__ import annotations

import argparse
import importlib
import sys
import warnings
from collections.abc import Callable, Sequence

from bitnet_ext import __version__
from bitnet_ext.cli import options, output

EXIT_USAGE = 2
EXIT_INTERRUPTED = 130

#: Each command's line of help. The command's module has its name.
COMMANDS = {
    "info": "tell versions, devices and kernels of this installation",
    "train": "train a model on a text",
    "eval": "measure loss, perplexity and bits per byte of a model on a text",
    "generate": "continue a text with a trained model",
    "export": "write a model into a folder to hand on",
    "collapse": "run the collapse experiments and write their report; diagnose a run",
}

EPILOG = """\
examples:
  bitnet-ext train --out runs/first --model collapse-128 --steps 300
  bitnet-ext train --resume runs/first
  bitnet-ext eval runs/first
  bitnet-ext generate runs/first "The river"
  bitnet-ext export runs/first my-model
  bitnet-ext collapse diagnose runs/first

`bitnet-ext COMMAND --help` explains every option of a command.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Parses the command line and runs one command; returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    output.open_missing()
    try:
        status = _run(words)
    except SystemExit as end:  # of argparse: --help, or a usage error
        output.settle(0)
        raise end
    return output.settle(status)


def _run(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="bitnet-ext",
        description="Train, understand and run ternary (BitNet b1.58) language models.",
        epilog=EPILOG,
        formatter_class=options.HelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"bitnet_ext {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    chosen = next((word for word in words if not word.startswith("-")), None)
    for name, words_of_help in COMMANDS.items():
        command = commands.add_parser(name, help=words_of_help, formatter_class=options.HelpFormatter)
        if name == chosen:  # the others need not be read
            module = importlib.import_module(f"bitnet_ext.cli.{name}")
            module.add_arguments(command)
    args = parser.parse_args(words)
    as_usual, warnings.formatwarning = warnings.formatwarning, _warning_line(chosen == "train")
    try:
        status: int = module.run(args)
        return status
    except KeyboardInterrupt as stop:
        print(f"\n{stop or 'interrupted'}", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # whoever read the output has gone
        return 1
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USAGE
    except RuntimeError as error:
        # An operator refused something, such as a forced instruction set; any other RuntimeError is a defect.
        if not str(error).startswith("bitnet_ext"):
            raise
        print(f"error: {str(error).strip()}", file=sys.stderr)
        return EXIT_USAGE
    finally:
        warnings.formatwarning = as_usual


def _warning_line(flags: bool) -> Callable[..., str]:
    """How a warning is printed: in one line, with the options' names for those of TrainConfig's fields."""

    def line(message: Warning | str, *place: object, **more: object) -> str:
        return f"warning: {options.in_flags(str(message)) if flags else message}\n"

    return line
