"""The error of all formats."""

from __future__ import annotations


class FormatError(ValueError):
    """A folder or file is not of the format, damaged, or of a newer version; the message is one sentence."""


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its type where it has none."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
