"""A held-out part of a text that training never sees."""

from __future__ import annotations

import functools
import hashlib
import math
from array import array
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from bitnet_ext.data.text import CorpusError, Document, Lines, group_documents

_MAX_BLOCK_CHARS = 16_384  # about 4,000 tokens: a seam between blocks is rare and a held-out block is long
_CLOSE = math.log(2)  # a held-out share of half to twice the fraction is right


class HeldOutSplit:
    """Divides a text into a training part and a held-out part that share no document.

    With at least 2 / fraction documents, whole documents are held out; otherwise, and where a few documents
    are so long that no choice of them has about the right size, the text is cut into blocks of whole lines,
    about 4 / fraction of them or more. Of every 1 / fraction documents (or blocks) the last is held out, so
    that the part is spread over the whole text; where that gives less than half or more than twice the
    fraction of the characters, the choice goes by characters. A repetition of an earlier one goes where the
    first went, so that no text is on both sides. Deterministic: the text and the fraction decide alone.

    Args:
        name: names the corpus in messages.
        lines: called once for each pass over the text (two to plan, one for each part).
        fraction: share of the documents to hold out, in (0, 0.5].
        wikitext: whether the lines are WikiText (see `group_documents`).
    """

    def __init__(
        self, name: str, lines: Callable[[], Lines], fraction: float, *, wikitext: bool = False
    ) -> None:
        self.name = name
        self._lines = lines
        self._fraction = check_fraction(fraction)
        self._wikitext = wikitext

    def documents(self, *, heldout: bool) -> Iterator[Document]:
        """The documents or blocks of one part, in the order of the text.

        Raises:
            CorpusError: the text is empty, or too short to hold a part of it out.
        """
        plan = self._plan
        for document, held_out in zip(self._group(plan.block_chars), plan.held_out, strict=True):
            if bool(held_out) == heldout:
                yield document

    def num_chars(self, *, heldout: bool) -> int:
        """Characters of one part."""
        return self._plan.num_chars[heldout]

    def _group(self, block_chars: int | None) -> Iterator[Document]:
        return group_documents(self._lines(), wikitext=self._wikitext, block_chars=block_chars)

    @functools.cached_property
    def _plan(self) -> _Plan:
        num_documents, num_chars = _measure(self._lines())
        if num_documents == 0:
            raise CorpusError(f"corpus {self.name!r} is empty: it holds no text")
        plans = []
        if num_documents * self._fraction >= 2:
            plans.append(self._divide(None))
        if not any(plan is not None and self._fits(plan) for plan in plans):
            plans.append(self._divide(max(1, min(_MAX_BLOCK_CHARS, int(num_chars * self._fraction / 4)))))
        found = [plan for plan in plans if plan is not None]
        if not found:
            unit = "document" if num_documents * self._fraction >= 2 else "line"
            raise CorpusError(
                f"corpus {self.name!r} is too short to hold a part of it out: "
                f"it has 1 distinct {unit}, accepted are 2 or more"
            )
        return min(found, key=lambda plan: _misfit(plan.num_chars[1], sum(plan.num_chars), self._fraction))

    def _fits(self, plan: _Plan) -> bool:
        return _misfit(plan.num_chars[1], sum(plan.num_chars), self._fraction) <= _CLOSE

    def _divide(self, block_chars: int | None) -> _Plan | None:
        """The division into documents, or blocks; None when they are all the same."""
        distinct: dict[bytes, int] = {}  # digest of a text -> its number among the distinct ones
        numbers = array("Q")
        sizes = array("Q")  # characters of each distinct text with its repetitions
        for document in self._group(block_chars):
            text = "\n".join(document.pieces).strip().encode("utf-8", "replace")
            number = distinct.setdefault(hashlib.sha256(text).digest()[:16], len(distinct))
            if number == len(sizes):
                sizes.append(0)
            sizes[number] += document.num_chars
            numbers.append(number)
        if len(distinct) < 2:
            return None
        chosen = _choose(sizes, self._fraction)
        heldout_chars = sum(sizes[number] for number in chosen)
        held_out = bytes(number in chosen for number in numbers)
        return _Plan(block_chars, held_out, (sum(sizes) - heldout_chars, heldout_chars))


def check_fraction(fraction: float) -> float:
    """`fraction` itself; ValueError unless it lies in (0, 0.5]."""
    if isinstance(fraction, bool) or not isinstance(fraction, int | float | np.number):
        raise TypeError(f"heldout_fraction is {fraction!r}, accepted is a number in (0, 0.5]")
    if not 0.0 < fraction <= 0.5:
        raise ValueError(f"heldout_fraction is {fraction!r}, accepted is a number in (0, 0.5]")
    return fraction


class _Plan(NamedTuple):
    block_chars: int | None  # None: whole documents
    held_out: bytes  # 1 for each document or block that is held out, else 0
    num_chars: tuple[int, int]  # of the training part and of the held-out part


def _choose(sizes: Sequence[int], fraction: float) -> set[int]:
    """Which of two or more texts with these numbers of characters to hold out."""
    by_count = {i for i in range(len(sizes)) if _is_held_out(i, fraction)}
    by_chars, seen, held = set(), 0, 0
    for i, size in enumerate(sizes):
        seen += size
        # Held out where that is nearer to the fraction of what was seen so far.
        if fraction * seen - held >= size / 2:
            by_chars.add(i)
            held += size

    def misfit(choice: set[int]) -> float:
        return _misfit(sum(sizes[i] for i in choice), seen, fraction)

    if by_count and misfit(by_count) <= _CLOSE:
        return by_count
    choices = [choice for choice in (by_count, by_chars) if 0 < len(choice) < len(sizes)]
    return min(choices, key=misfit) if choices else {len(sizes) - 1}


def _misfit(heldout_chars: int, num_chars: int, fraction: float) -> float:
    """How far the held-out share is from the fraction: the |log| of the ratio of their odds."""
    odds = max(heldout_chars, 1) / max(num_chars - heldout_chars, 1)
    return abs(math.log(odds * (1 - fraction) / fraction))


def _measure(lines: Lines) -> tuple[int, int]:
    """Number of documents that hold text, and characters in all, without keeping any."""
    documents = chars = 0
    has_text = False
    for line in lines:
        if line is None:
            documents += has_text
            has_text = False
        else:
            chars += len(line)
            has_text = has_text or not line.isspace()
    return documents + has_text, chars


def _is_held_out(index: int, fraction: float) -> bool:
    # The running total of held-out documents, index * fraction, passes a whole number; the small term keeps
    # 20 * 0.05 on the right side of 1.
    return int((index + 1) * fraction + 1e-9) > int(index * fraction + 1e-9)
