"""Cutting a long text into parts without changing its tokens.

A cut is safe before a single space between two words and after a single line break: the patterns of GPT-2's
encoding and of tiktoken's other encodings have a boundary on both sides there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import tiktoken

# tiktoken's pattern matcher gives up with a panic at a run of about a million white-space characters.
MAX_BLANKS = 1 << 19
_BLANKS = re.compile(r"\s{2,}")


def encode_in_parts(encoding: tiktoken.Encoding, text: str, part_size: int = 1 << 18) -> Iterator[list[int]]:
    """Token ids of `text` in parts of about `part_size` characters, so that a long text needs little memory.

    The concatenated parts equal `encoding.encode_ordinary(text)`, except where a text has no safe cut in 16
    parts or holds a run of more than `MAX_BLANKS` white-space characters: those are cut anywhere.
    `<|endoftext|>` inside the text is encoded as text.
    """
    for part in cut_text(text, part_size):
        for piece in _cut_blanks(part):
            yield encoding.encode_ordinary(piece)


def cut_text(text: str, part_size: int, patience: int = 16) -> Iterator[str]:
    """`text` in parts of about `part_size` characters, cut where it is safe.

    Only a run of `patience` parts without a safe cut (16: no prose) is cut anywhere.
    """
    start, length = 0, len(text)
    while length - start > part_size:
        cut = last_safe_cut(text, start + 1, start + part_size)
        end = start + part_size
        while cut is None and end < min(length, start + patience * part_size):
            cut = last_safe_cut(text, end, end + part_size)
            end += part_size
        if cut is None:
            cut = min(end, length)
        yield text[start:cut]
        start = cut
    if start < length:
        yield text[start:]


def last_safe_cut(text: str, low: int, high: int) -> int | None:
    """The last index in low..high at which `text` may be cut without changing its tokens."""
    for index in range(min(high, len(text) - 2), max(low, 2) - 1, -1):
        # Before a single space between two words: the pattern takes " word" as one piece.
        if text[index] == " " and not text[index - 1].isspace() and not text[index + 1].isspace():
            return index
        # After a single line break: a break is a piece of its own there, as at the end of a text.
        if text[index - 1] == "\n" and not text[index - 2].isspace() and not text[index].isspace():
            return index
    return None


def _cut_blanks(text: str) -> Iterator[str]:
    """`text`, cut inside runs of more than `MAX_BLANKS` white-space characters."""
    start = 0
    if len(text) > MAX_BLANKS:
        for run in _BLANKS.finditer(text):
            # The last blanks stay with the word after them, as the pattern has it.
            for cut in range(run.start() + MAX_BLANKS, run.end() - 1, MAX_BLANKS):
                yield text[start:cut]
                start = cut
    yield text[start:]
