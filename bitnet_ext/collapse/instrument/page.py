"""The instrument check for readers: a table, a figure, and the files that hold them with the raw numbers."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

from bitnet_ext.collapse.instrument.check import InstrumentReport
from bitnet_ext.collapse.instrument.judging import (
    BLUNT,
    DESCRIPTIVE,
    ERRORS,
    INVERTED,
    UNMEASURED,
    USABLE,
    Judgement,
)
from bitnet_ext.collapse.instrument.predictors import BLIND, DEAD, FRESH, HEALTHY, HUMAN
from bitnet_ext.collapse.instrument.scales import OF_A_STEP, Scale
from bitnet_ext.collapse.pages.figures.drawing import (
    BLACK,
    BLUE,
    GREEN,
    ORANGE,
    VERMILLION,
    full_colour_png,
    new_figure,
)
from bitnet_ext.collapse.pages.table import MISSING, Table
from bitnet_ext.collapse.results import write_atomic

# Kinds differ in colour and in marker.
_LOOKS: dict[str, tuple[str, str, str]] = {
    HEALTHY: (BLUE, "o", "healthy reference"),
    DEAD: (VERMILLION, "X", "dead network"),
    HUMAN: (GREEN, "*", "human text"),
    FRESH: (ORANGE, "s", "network before its first step"),
    BLIND: (BLACK, "D", "ignores the context"),
}
_COLUMNS = 4


def _number(value: float) -> str:
    if value == 0:
        return "0"
    size = abs(value)
    if size < 0.0005 or size >= 1e6:
        return f"{value:.1e}"
    if size >= 1000:
        return f"{value:,.0f}"
    return f"{value:.1f}" if size >= 100 else f"{value:.2f}" if size >= 1 else f"{value:.3f}"


def _range(scale: Scale) -> str:
    low = "-inf" if scale.low is None else _number(scale.low)
    return f"{low} to {'inf' if scale.high is None else _number(scale.high)}"


def _verdict(judgement: Judgement) -> str:
    if judgement.healthy_value is None or judgement.dead_value is None:
        return judgement.status
    return (
        f"{judgement.status}: {judgement.dead} {_number(judgement.dead_value)}, "
        f"{judgement.healthy} {_number(judgement.healthy_value)}"
    )


def instrument_table(report: InstrumentReport) -> Table:
    """Metrics in rows; a column for each predictor, then the better side, the attainable range and the judgement."""
    names = [row["network"] for row in report.rows]
    lines = []
    for scale, judgement in zip(report.scales, report.judgements, strict=True):
        cells = []
        for row in report.rows:
            value = row.get(scale.key)
            error = report.errors[row["network"]].get(scale.key)
            cell = MISSING if value is None else _number(value)
            # Smaller errors are rounding of the sums.
            if value is not None and error is not None and error > 1e-6 * max(1.0, abs(value)):
                cell += f" ±{_number(error)}"
            cells.append(cell)
        better = scale.better or MISSING
        lines.append([scale.label, *cells, better, _range(scale), _verdict(judgement)])
    columns = ["Metric", *names, "Better", "Attainable", "Judgement: deciding pair"]
    return Table(columns, lines, _notes(report))


def _notes(report: InstrumentReport) -> list[str]:
    facts = report.settings
    return [
        f"Text: {facts['corpus']}; {facts['positions']:,} held-out positions, {facts['random_prompts']} prompts of "
        f"random ids, {facts['texts']} generated texts of {facts['new_tokens']} tokens; "
        f"V = {facts['vocab_size']:,}, ln V = {math.log(facts['vocab_size']):.3f}; "
        f"unigram cross-entropy {facts['unigram_cross_entropy']:.3f} nats.",
        "± is a standard error: jackknife over groups of held-out rows, random prompts or generated texts; for the "
        "report's count the spread over choices of 20 prompts. Weights have none.",
        f"{INVERTED}: a dead network scores better than a healthy reference by more than {ERRORS:g} standard errors "
        f"of the difference. {BLUNT}: a dead one scores as well as a healthy one within them. {USABLE}: every dead "
        f"one scores worse. {DESCRIPTIVE}: no side is better by itself. {UNMEASURED}: a side is missing.",
        f"Needs a training step, so not in this check: {', '.join(OF_A_STEP)}.",
    ]


def instrument_markdown(report: InstrumentReport) -> str:
    """Title, table, and each metric's range with its reason and source."""
    lines = ["# Instrument check", "", instrument_table(report).markdown(), "## Ranges and sources", ""]
    for scale in report.scales:
        source = f" Source: {scale.source}." if scale.source else ""
        lines.append(f"* **{scale.label}** (`{scale.key}`): {_range(scale)}; {scale.reason}.{source}")
    lines += [f"* `{key}` (needs a training step): {text}." for key, text in OF_A_STEP.items()]
    return "\n".join(lines) + "\n"


def draw_instrument(report: InstrumentReport) -> Figure:
    """A panel for each metric that has a better side, a line in it for each predictor, bars of two standard errors."""
    panels = [
        (scale, judgement)
        for scale, judgement in zip(report.scales, report.judgements, strict=True)
        if scale.better is not None
    ]
    names = [row["network"] for row in report.rows]
    lines = math.ceil(len(panels) / _COLUMNS)
    height = 0.2 * len(names) + 0.75
    # Margins in inches, so that text has the same room whatever the number of panels.
    width, left, top, bottom = 13.0, 1.75, 0.6, 0.5
    figure = new_figure(width, top + bottom + lines * height)
    total = top + bottom + lines * height
    cell = (width - left - 0.15) / _COLUMNS
    for index, (scale, judgement) in enumerate(panels):
        line, column = divmod(index, _COLUMNS)
        box = (
            (left + column * cell) / width,
            (total - top - (line + 1) * height + 0.42) / total,
            (cell - 0.25) / width,
            (height - 0.75) / total,
        )
        _draw_panel(figure.add_axes(box), report, scale, judgement, labelled=column == 0)
    handles = [
        Line2D([], [], color=colour, marker=marker, linestyle="none", markersize=7, label=label)
        for kind, (colour, marker, label) in _LOOKS.items()
        if any(row["kind"] == kind for row in report.rows)
    ]
    figure.legend(handles=handles, loc="upper center", ncols=len(handles), frameon=False, fontsize=10)
    figure.text(
        0.5,
        0.1 / total,
        "Bars: two standard errors. Arrow: the side that is read as better. Coloured titles: a dead network beats a "
        "healthy reference, or comes within chance of it.",
        ha="center",
        fontsize=9,
    )
    return figure


def _draw_panel(
    axis: Any, report: InstrumentReport, scale: Scale, judgement: Judgement, labelled: bool
) -> None:
    names = [row["network"] for row in report.rows]
    values = [row.get(scale.key) for row in report.rows]
    for height, (row, value) in enumerate(zip(report.rows, values, strict=True)):
        if value is None:
            axis.annotate(
                "none",
                (0.01, height),
                xycoords=("axes fraction", "data"),
                va="center",
                fontsize=7,
                color="#666666",
            )
            continue
        colour, marker, _ = _LOOKS[row["kind"]]
        error = 2 * report.errors[row["network"]].get(scale.key, 0.0)
        axis.errorbar(
            value, height, xerr=error, color=colour, marker=marker, markersize=6, elinewidth=1.5, zorder=3
        )
    present = [value for value in values if value is not None]
    if present and min(present) >= 1 and max(present) / min(present) > 30:
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    axis.margins(x=0.08)
    axis.set_ylim(len(names) - 0.4, -0.6)
    axis.set_yticks(range(len(names)), names if labelled else [""] * len(names), fontsize=8.5)
    axis.tick_params(axis="x", labelsize=8)
    axis.tick_params(axis="y", length=0)
    bad = judgement.status in (INVERTED, BLUNT)
    arrow = {"higher": " →", "lower": " ←"}.get(scale.better or "", " (near human)")
    axis.set_title(
        f"{scale.label}{arrow}\n{judgement.status}",
        fontsize=9,
        loc="left",
        color=VERMILLION if bad else BLACK,
        fontweight="bold" if judgement.status == INVERTED else "normal",
    )
    axis.grid(True, color="#d9d9d9", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right", "left"]].set_visible(False)


def instrument_json(report: InstrumentReport) -> dict[str, Any]:
    """Everything in the report as JSON: settings, rows, errors, ranges, judgements."""
    return {
        "settings": report.settings,
        "rows": report.rows,
        "errors": report.errors,
        "scales": [dataclasses.asdict(scale) for scale in report.scales],
        "judgements": [dataclasses.asdict(judgement) for judgement in report.judgements],
    }


def write_instrument(report: InstrumentReport, out_dir: Path | str) -> list[Path]:
    """Writes instrument.json, instrument.md and instrument.png, each in one rename; returns their paths."""
    folder = Path(out_dir)
    numbers = json.dumps(instrument_json(report), indent=1, allow_nan=False) + "\n"
    return [
        write_atomic(folder / "instrument.json", numbers.encode()),
        write_atomic(folder / "instrument.md", instrument_markdown(report).encode()),
        write_atomic(folder / "instrument.png", full_colour_png(draw_instrument(report))),
    ]
