"""Tables of text: one structure as aligned text, Markdown and HTML."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from bitnet_ext.collapse.results import Spread, spread

MISSING = "–"  # noqa: RUF001 - an en dash


@dataclass(frozen=True)
class Table:
    """A table of text cells. The first column is text, the others are centred or right-aligned numbers."""

    columns: list[str]
    rows: list[list[str]]
    notes: list[str]

    def text(self) -> str:
        """Aligned columns for a terminal, with the notes below."""
        widths = [max(len(row[i]) for row in [self.columns, *self.rows]) for i in range(len(self.columns))]

        def line(cells: Sequence[str]) -> str:
            first, *rest = zip(cells, widths, strict=True)
            return "  ".join(
                [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)]
            ).rstrip()

        rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
        body = [line(self.columns), rule, *(line(row) for row in self.rows), rule]
        return "\n".join([*body, *self.notes]) + "\n"

    def markdown(self) -> str:
        """A GitHub-flavoured Markdown table, with the notes as a list below."""

        def line(cells: Sequence[str]) -> str:
            return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

        align = ["---", *["---:"] * (len(self.columns) - 1)]
        body = [line(self.columns), line(align), *(line(row) for row in self.rows)]
        notes = ["", *(f"* {note}" for note in self.notes)] if self.notes else []
        return "\n".join([*body, *notes]) + "\n"

    def html(self) -> str:
        """A `<table>` without style, every cell escaped; the notes are not in it."""
        # A no-break space keeps "@ 1k" on one line of a narrow heading.
        columns = [cell.replace("@ ", "@\N{NO-BREAK SPACE}") for cell in self.columns]
        head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in columns)
        body = "".join(
            f'<tr><th scope="row">{escape(row[0])}</th>'
            + "".join(f"<td>{_html_cell(cell)}</td>" for cell in row[1:])
            + "</tr>"
            for row in self.rows
        )
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _html_cell(cell: str) -> str:
    """A cell; a range in brackets goes on a line of its own, so that a table of many seeds stays narrow."""
    value, bracket, rest = cell.partition(" (")
    return f"{escape(value)}<br><small>{escape(bracket[1:] + rest)}</small>" if bracket else escape(cell)


def spread_cell(values: Spread | None, form: Callable[[float], str]) -> str:
    """Mean and, where they differ, smallest and largest; a dash for none."""
    if values is None:
        return MISSING
    text = form(values.mean)
    low, high = form(values.low), form(values.high)
    dash = " to " if "-" in low + high else "–"  # noqa: RUF001 - two dashes on end, or "1e-5-2e-5", cannot be read
    return text if values.count == 1 or low == high else f"{text} ({low}{dash}{high})"


def spread_text(values: Sequence[float], form: Callable[[float], str]) -> str:
    """The :func:`spread_cell` of some numbers."""
    return spread_cell(spread(values), form)
