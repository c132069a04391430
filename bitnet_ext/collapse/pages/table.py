"""The report's comparison table, from one structure as aligned text, Markdown and HTML."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from bitnet_ext.collapse.results.files import Run, Spread, Study, milestones, require_evaluations, spread
from bitnet_ext.collapse.results.status import CONTEXT_NATS, find_fall, is_alive
from bitnet_ext.collapse.verdicts.findings import count, nats

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


def recovery(run: Run) -> str | None:
    """The report's rule for one run: `yes`, `no`, or `no fall`; None without counts.

    A fall is an evaluation at which unique-of-20 is at most half of its initial value; a recovery is a
    later one at which it is at least half again.
    """
    if not any(row.get("unique_of_20") is not None for row in run.evals):
        return None
    fall = find_fall(run.evals)
    return "no fall" if fall is None else "no" if fall.rise_step is None else "yes"


def alive(run: Run) -> str | None:
    """`yes` when held-out cross-entropy ends below the unigram's with mutual information above 0.1, else
    `no`.
    """
    verdict = is_alive(run.evals[-1]) if run.evals else None
    return None if verdict is None else "yes" if verdict else "no"


def _number(values: Spread | None, form: Callable[[float], str]) -> str:
    if values is None:
        return MISSING
    text = form(values.mean)
    low, high = form(values.low), form(values.high)
    dash = " to " if "-" in low + high else "–"  # noqa: RUF001 - two dashes on end, or "1e-5-2e-5", cannot be read
    return text if values.count == 1 or low == high else f"{text} ({low}{dash}{high})"


def spread_text(values: Sequence[float], form: Callable[[float], str]) -> str:
    """Mean and, where they differ, smallest and largest of some numbers; a dash for none."""
    return _number(spread(values), form)


def _votes(answers: Sequence[str | None]) -> str:
    present = [answer for answer in answers if answer is not None]
    if not present:
        return MISSING
    kinds = sorted(set(present), key=lambda kind: (-present.count(kind), kind))
    if len(kinds) == 1:
        return kinds[0]
    return ", ".join(f"{kind} {present.count(kind)}/{len(present)}" for kind in kinds)


def _short(step: int) -> str:
    return f"{step // 1000}k" if step >= 1000 and step % 1000 == 0 else f"{step:,}"


def comparison_table(study: Study) -> Table:
    """The table of the original report with three columns that it lacked: held-out loss, context use, alive.

    Columns: Training, Tokens and Loss at two steps (1k and 4k, or what is nearest; the header says which),
    Recovery?, held-out cross-entropy, mutual information at the last evaluation, alive?. Over several seeds
    a cell is the mean with the smallest and largest value in brackets.

    Raises:
        ValueError: for a study without any evaluation.
    """
    require_evaluations(study)
    first, second = milestones(study)
    columns = [
        "Training",
        f"Tokens @ {_short(first)}",
        f"Tokens @ {_short(second)}",
        f"Loss @ {_short(first)}",
        f"Loss @ {_short(second)}",
        "Recovery?",
        "Held-out CE",
        "Context use",
        "Alive?",
    ]
    rows = []
    for arm in study.measured_arms:
        runs = study.leading(arm)

        def at(key: str, step: int, form: Callable[[float], str], runs: Sequence[Run] = tuple(runs)) -> str:
            cell = _number(spread(run.value_at(key, step) for run in runs), form)
            nearest = runs[0].nearest(step)
            if nearest is not None and nearest["step"] != step and cell != MISSING:
                cell += f" @ {_short(int(nearest['step']))}"
            return cell

        rows.append(
            [
                arm,
                at("unique_of_20", first, count),
                at("unique_of_20", second, count),
                at(_loss_key(runs), first, nats),
                at(_loss_key(runs), second, nats),
                _votes([recovery(run) for run in runs]),
                _number(spread(run.final("heldout_cross_entropy") for run in runs), nats),
                _number(spread(run.final("mutual_information") for run in runs), nats),
                _votes([alive(run) for run in runs]),
            ]
        )
    return Table(columns, rows, _notes(study))


def _loss_key(runs: Sequence[Run]) -> str:
    plain = any(run.final("train_cross_entropy") is not None for run in runs)
    return "train_cross_entropy" if plain else "train_loss"


def _notes(study: Study) -> list[str]:
    notes = [
        "Tokens: distinct greedy predictions for 20 prompts of random token ids; 20 is the maximum.",
        "Loss: plain cross-entropy on the training batches since the evaluation before, in nats.",
        "Recovery?: tokens fell to half of the initial count or less, and later rose to at least half again.",
        "Held-out CE (nats) and context use (mutual information, nats) are those of the last evaluation.",
        "Alive?: held-out cross-entropy is below the unigram's"
        + (f" ({nats(study.unigram_cross_entropy)})" if study.unigram_cross_entropy is not None else "")
        + f" and mutual information is above {CONTEXT_NATS}.",
    ]
    if max(len(study.leading(arm)) for arm in study.measured_arms) > 1:
        notes.append("Cells: mean over seeds (smallest–largest).")  # noqa: RUF001
    else:
        notes.append("One seed an arm: no spread.")
    unfinished = study.unfinished
    if unfinished:
        each = ", ".join(unfinished_text(*entry) for entry in unfinished)
        notes.append(f"Not finished: {each}.")
    return notes


def unfinished_text(arm: str, seed: int, last_step: int, planned: int | None) -> str:
    """One unfinished run in words."""
    if last_step < 0:
        return f"{arm} seed {seed} (no evaluation yet)"
    return f"{arm} seed {seed} (at step {last_step:,}" + (f" of {planned:,})" if planned is not None else ")")
