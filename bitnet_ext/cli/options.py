"""Options that several commands share, and an option for every field of TrainConfig."""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Callable, Iterable
from typing import Any

from bitnet_ext.training.config import GROUPS, TrainConfig


class HelpFormatter(argparse.HelpFormatter):
    """Wraps a paragraph; a text of several lines, such as examples, stays as it is."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if "\n" in text.strip():
            return "".join(indent + line for line in text.splitlines(keepends=True))
        return super()._fill_text(text, width, indent)


def add_device(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--device",
        default="auto",
        metavar="DEVICE",
        help="auto (the first usable GPU, else the CPU), cpu, cuda or cuda:N (default auto)",
    )


def add_tokenizer(parser: argparse._ActionsContainer, default: str = "the run's own") -> None:
    parser.add_argument(
        "--tokenizer",
        metavar="SPEC",
        help=f"gpt2, the name of a tiktoken encoding, or the path of a tokenizer.json (default: {default})",
    )


def add_switch(parser: argparse._ActionsContainer, name: str, words: str, default: Any) -> None:
    """An option --name and its opposite --no-name."""
    action = parser.add_argument(name, action=argparse.BooleanOptionalAction, help=words)
    action.default = default  # Python 3.10 would add one that is given above to the words


def flag(field: str) -> str:
    """The option of a field: warmup_steps -> --warmup-steps."""
    return "--" + field.replace("_", "-")


def add_config_options(parser: argparse.ArgumentParser, without: Iterable[str] = ()) -> None:
    """Adds an option for every field of TrainConfig, in its groups; one that is not given leaves no attribute."""
    omitted = set(without)
    for key, title in GROUPS.items():
        group = parser.add_argument_group(title)
        for field in dataclasses.fields(TrainConfig):
            if field.metadata["group"] == key and field.name not in omitted:
                _add_field(group, field)


def _add_field(group: argparse._ActionsContainer, field: dataclasses.Field[Any]) -> None:
    default = "none" if field.default is None else field.default
    if isinstance(field.default, bool):
        default = "yes" if field.default else "no"
    words = f"{field.metadata['words']} (default {default})".replace("%", "%%")
    if isinstance(field.default, bool):
        add_switch(group, flag(field.name), words, argparse.SUPPRESS)
        return
    kind = str(field.type)
    choices = field.metadata["choices"]
    metavar = None
    if choices is None:
        metavar = "N" if kind.startswith("int") else "X" if kind.startswith("float") else "WORDS"
    group.add_argument(
        flag(field.name),
        type=_reader(kind),
        choices=choices,
        metavar=metavar,
        default=argparse.SUPPRESS,
        help=words,
    )


def _reader(kind: str) -> Callable[[str], Any]:
    """Reads a field from text by its annotation; "none" where the field may be None."""
    optional = kind.endswith("None")
    base: Callable[[str], Any] = int if kind.startswith("int") else float if kind.startswith("float") else str
    accepted = {int: "a whole number", float: "a number", str: "words"}[base]  # type: ignore[index]

    def read(text: str) -> Any:
        if optional and text == "none":
            return None
        try:
            return base(text)
        except ValueError:
            more = " or none" if optional else ""
            raise argparse.ArgumentTypeError(f"must be {accepted}{more}, got {text!r}") from None

    return read


def given_config(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of TrainConfig that the command line names."""
    return {
        field.name: getattr(args, field.name)
        for field in dataclasses.fields(TrainConfig)
        if hasattr(args, field.name)
    }


def in_flags(message: str) -> str:
    """A message about fields of TrainConfig in the words of the command line."""
    fields = {field.name for field in dataclasses.fields(TrainConfig)}

    def as_flag(match: re.Match[str]) -> str:
        return flag(match[0]) if match[0] in fields and "_" in match[0] else match[0]

    message = re.sub(r"^(TrainConfig|Trainer): ", "", message)
    first = message.split(" ", 1)[0]
    if first in fields:
        message = flag(first) + message[len(first) :]
    return re.sub(r"\b[a-z][a-z0-9_]*\b", as_flag, message).replace(" or None", " or none")
