"""What the benchmark scripts share: their options, how they end and where their file goes."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from bitnet_ext.testing.bench import device_name, slug

EXIT_WRONG_RESULT = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130


class WrongResultError(RuntimeError):
    """What was to be timed does not give the exact product within its rounding."""


def positive(text: str) -> int:
    """Type of an option: an integer >= 1."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer >= 1, got {text!r}")
    return int(text)


def positive_number(text: str) -> float:
    """Type of an option: a number > 0."""
    with contextlib.suppress(ValueError):
        if 0 < float(text) < float("inf"):
            return float(text)
    raise argparse.ArgumentTypeError(f"must be a number > 0, got {text!r}")


def sizes(form: str, example: str) -> Callable[[str], tuple[int, ...]]:
    """Type of an option whose value is sizes joined by x, in the order of `form`, such as NxK."""
    count = form.count("x") + 1
    pattern = "x".join([r"([1-9]\d*)"] * count)

    def read(text: str) -> tuple[int, ...]:
        found = re.fullmatch(pattern, text)
        if not found:
            raise argparse.ArgumentTypeError(f"a shape is {form}, such as {example}, got {text!r}")
        return tuple(int(size) for size in found.groups())

    return read


def add_common_options(parser: argparse.ArgumentParser, repeats: int) -> None:
    """--kernel, --gemlite, --repeats, --json and --quick."""
    parser.add_argument(
        "--kernel",
        metavar="NAME",
        help="kernel that ours has to use (BITNET_EXT_KERNEL; default: its choice)",
    )
    parser.add_argument(
        "--gemlite",
        action="store_true",
        help="also time gemlite's A8W158, where installed (tunes for minutes)",
    )
    parser.add_argument(
        "--repeats", type=positive, help=f"blocks of each variant (default: {repeats}, 2 with --quick)"
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="result file (default: bench/results/...)")
    parser.add_argument("--quick", action="store_true", help="one small shape, to see that it runs")


def kernel_variable(args: argparse.Namespace) -> dict[str, str]:
    """What --kernel asks for, as an environment variable."""
    return {"BITNET_EXT_KERNEL": args.kernel} if args.kernel else {}


def library_variables() -> dict[str, str]:
    """Environment variables that change what the library does, for the result file."""
    return {name: value for name, value in sorted(os.environ.items()) if name.startswith("BITNET_EXT_")}


@contextlib.contextmanager
def environment_variables(values: Mapping[str, str]) -> Iterator[None]:
    """Sets variables of this process, for libraries that read them at each call, and puts the old ones back."""
    old = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in old.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def result_path(json: Path | None, folder: Path, name: str, facts: Mapping[str, Any], quick: bool) -> Path:
    """`json` if given, otherwise results/NAME-DEVICE.json in the scripts' folder."""
    return json or folder / "results" / f"{name}-{slug(device_name(facts))}{'-quick' if quick else ''}.json"


def exit_status(run: Callable[[], None]) -> int:
    """Runs a script's work and turns the two ways in which it may break off into a sentence and an exit status."""
    try:
        run()
    except WrongResultError as error:
        print(f"wrong result: {error}", file=sys.stderr)
        return EXIT_WRONG_RESULT
    except KeyboardInterrupt:
        print("\ninterrupted: nothing was written", file=sys.stderr)
        return EXIT_INTERRUPTED
    return 0


def run_on_cuda(name: str, parse: Callable[[], Any], run: Callable[[Any, torch.device], None]) -> int:
    """Reads the options, then runs on the current GPU; returns the exit status."""
    args = parse()
    if not torch.cuda.is_available():
        print(f"{name} times CUDA kernels and needs an NVIDIA GPU, PyTorch sees none here", file=sys.stderr)
        return EXIT_USAGE
    device = torch.device("cuda", torch.cuda.current_device())
    return exit_status(lambda: run(args, device))
