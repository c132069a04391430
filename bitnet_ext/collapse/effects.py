"""Figures of the factorial study: curves of a block's arms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter
from numpy.typing import NDArray
from scipy import stats

from bitnet_ext.collapse.drawing import new_figure, png
from bitnet_ext.collapse.figures import BLACK, BLUE, GREEN, ORANGE, PURPLE, SKY, VERMILLION, RenderedFigure
from bitnet_ext.collapse.results import Study

_COLOURS = (VERMILLION, BLUE, GREEN, ORANGE, PURPLE, SKY)
_DASHES: tuple[Any, ...] = ("solid", (0, (5, 2)), (0, (1, 1.3)))
_FACET = 6  # arms of a panel beside the base arms: as many as there are colours that anyone can tell apart
_NATS = "nats per token"


@dataclass(frozen=True)
class Row:
    """One row of panels: a metric over a clock."""

    key: str
    label: str
    over: str = "step"
    log: bool = False
    references: bool = False  # lines of the unigram and the uniform predictor


_LOSS = Row("heldout_cross_entropy", f"held-out cross-entropy\n({_NATS})", references=True)
_CURVES = (
    _LOSS,
    Row("heldout_cross_entropy", f"held-out cross-entropy\n({_NATS})", "cumulative_lr", references=True),
    Row("mutual_information", "use of context:\nmutual information (nats)"),
    Row("unique_of_20", "unique tokens of 20\n(the report's count)"),
)
_CAUSES = (
    Row("decay_share", "share of coordinates that\nthe decay dominates"),
    Row("final_gain_mean_abs", "gain of the last norm\n(mean |w|)", "cumulative_lr"),
    Row("embedding_mean_abs", "embedding\n(mean |w|)", "cumulative_lr"),
    Row("lm_head_mean_abs", "output head\n(mean |w|)", "cumulative_lr", log=True),
)
_TERNARY = (
    Row("ternary_zero", "share of codes\nthat are 0"),
    Row("absmean_mean", "absmean of the\nternary tensors", log=True),
    Row("flip_rate", "codes changed by one step\n(share)", log=True),
)
_X = {"step": "step", "cumulative_lr": "cumulative learning rate"}


def facets(arms: Sequence[str], bases: Sequence[str]) -> list[list[str]]:
    """Arms in groups that one panel can show, each behind the base arms that it is compared with."""
    others = [arm for arm in arms if arm not in bases]
    number = max(1, math.ceil(len(others) / _FACET))
    size = math.ceil(len(others) / number) if others else 0
    groups = [others[i : i + size] for i in range(0, len(others), size)] if others else [[]]
    return [[*bases, *group] for group in groups]


def block_figures(
    study: Study, key: str, title: str, groups: Sequence[Sequence[str]]
) -> list[RenderedFigure]:
    """Curves of a block: its losses and use of context, what the decay does to the weights, and the ternary codes.

    Args:
        study: with evaluations.
        key, title: of the block.
        groups: arms of each column of panels (:func:`facets`); the first ones of a group are drawn in black.
    """
    plans = (
        (
            "curves",
            f"{title}: loss, context, and the count",
            "Mean over seeds, thin lines the seeds. The second row is over the sum of the learning rates so far: arms "
            "whose curves fall together there go through one course at different speeds. Below the unigram line a "
            "network predicts better than fixed word counts.",
            _CURVES,
        ),
        (
            "decay",
            f"{title}: what the decay does to the weights",
            "Share of the coordinates whose update the weight decay decides, and sizes of parameters. Dotted: every "
            "weight moves towards 0 by the learning rate at each step, which is what an L2 term inside Adam does to a "
            "weight whose own gradient is small (for the embedding, of normal weights).",
            _CAUSES,
        ),
        (
            "codes",
            f"{title}: ternary codes",
            "Full-precision twins have none. The quantiser does not let absmean below 1e-5 (dotted): under it every "
            "code is 0.",
            _TERNARY,
        ),
    )
    figures = []
    for name, heading, caption, rows in plans:
        present = [row for row in rows if any(_has(study, arm, row) for group in groups for arm in group)]
        if present:
            figure = _panels(study, groups, present)
            figures.append(RenderedFigure(f"{key}-{name}", heading, caption, png(figure)))
    return figures


def _has(study: Study, arm: str, row: Row) -> bool:
    return any(map(math.isfinite, study.mean_series(arm, row.key, row.over)[1]))


def _panels(study: Study, groups: Sequence[Sequence[str]], rows: Sequence[Row]) -> Figure:
    """A grid of panels: one column for each group of arms, its legend above it; a single group takes two columns."""
    single = len(groups) == 1 and len(rows) > 1
    columns = 2 if single else len(groups)
    lines = math.ceil(len(rows) / 2) if single else len(rows)
    left, right, gap_y, bottom = 0.95, 0.15, 0.62, 0.55  # inches
    gap_x, panel_w, panel_h = (0.95, 3.6, 1.9) if single else (0.25, 3.0 if columns > 1 else 5.4, 1.75)
    legend_columns = 3 if single else 1
    legend = 0.175 * math.ceil(max(len(group) for group in groups) / legend_columns) + 0.12
    width = left + right + columns * panel_w + (columns - 1) * gap_x
    height = legend + lines * panel_h + (lines - 1) * gap_y + bottom
    figure = new_figure(width, height)
    cells = (
        [(place // 2, place % 2, groups[0], row) for place, row in enumerate(rows)]
        if single
        else [(r, c, group, row) for r, row in enumerate(rows) for c, group in enumerate(groups)]
    )
    first: dict[int, Any] = {}  # of each line, whose axes the others of the line share
    for r, c, group, row in cells:
        x, y = left + c * (panel_w + gap_x), height - legend - (r + 1) * panel_h - r * gap_y
        box = (x / width, y / height, panel_w / width, panel_h / height)
        shared = None if single else first.get(r)
        axis = figure.add_axes(box, sharey=shared, sharex=shared)
        first.setdefault(r, axis)
        handles = _draw(axis, study, group, row)
        axis.set_xlabel(_X[row.over], fontsize=8, labelpad=1)
        if c == 0 or single:
            axis.set_ylabel(row.label, fontsize=8.5)
        else:
            axis.tick_params(labelleft=False)
        if r == 0 and (c == 0 or not single):
            figure.legend(
                handles=handles,
                loc="lower left",
                bbox_to_anchor=(
                    (x - 0.05) / width,
                    (height - legend) / height,
                    panel_w / width,
                    legend / height,
                ),
                ncols=legend_columns,
                frameon=False,
                fontsize=8,
                handlelength=2.6,
                labelspacing=0.25,
                borderpad=0.2,
            )
    return figure


def _draw(axis: Any, study: Study, group: Sequence[str], row: Row) -> list[Any]:
    if row.over == "step":
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axis.xaxis.set_minor_formatter(NullFormatter())
    if row.log:
        axis.set_yscale("log")
    handles = []
    bases = [arm for arm in group if arm in ("standard-lr", "adamw")]
    for index, arm in enumerate(group):
        if arm in bases:
            colour, dash, width = BLACK, _DASHES[bases.index(arm)], 2.4
        else:
            place = index - len(bases)
            colour, dash, width = _COLOURS[place % len(_COLOURS)], _DASHES[0], 1.7
        for run in study.of(arm):
            axis.plot(*run.series(row.key, row.over), color=colour, linestyle=dash, linewidth=0.5, alpha=0.35)
        line = axis.plot(
            *study.mean_series(arm, row.key, row.over), color=colour, linestyle=dash, linewidth=width
        )[0]
        line.set_label(f"{arm} ({len(study.leading(arm))} seeds)")
        handles.append(line)
    if row.references:
        lines = [("unigram", study.unigram_cross_entropy)]
        lines += [("uniform, ln V", math.log(study.vocab_size))] if study.vocab_size else []
        for name, value in lines:
            if value is not None and math.isfinite(value):
                axis.axhline(value, color="#666666", linestyle=(0, (2, 2)), linewidth=0.9, zorder=1)
                axis.annotate(
                    f"{name} {value:.2f}",
                    (0, value),
                    xycoords=("axes fraction", "data"),
                    xytext=(3, -8),
                    textcoords="offset points",
                    fontsize=7,
                    color="#444444",
                )
    if row.key in ("final_gain_mean_abs", "embedding_mean_abs") and row.over == "cumulative_lr":
        start = next((y[0] for arm in group if (y := study.mean_series(arm, row.key, row.over)[1])), None)
        if start is not None:
            clock = np.linspace(0, 4 * start, 80)
            fall = (
                _one_by_one(clock, start) if row.key == "embedding_mean_abs" else np.maximum(start - clock, 0)
            )
            axis.plot(clock, fall, color="#666666", linestyle=(0, (1, 1.5)), linewidth=1.4, zorder=1)
    if row.key == "absmean_mean":
        axis.axhline(1e-5, color="#666666", linestyle=(0, (1, 1.5)), linewidth=1.2, zorder=1)
    axis.tick_params(labelsize=8)
    axis.grid(True, which="major", color="#dddddd", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    return handles


def _one_by_one(clock: NDArray[np.float64], start: float) -> NDArray[np.float64]:
    """Mean |w| of normal weights, each moved by `clock` towards 0 and no further: E max(|w| - clock, 0)."""
    deviation = start / math.sqrt(2 / math.pi)
    t = clock / deviation
    result: NDArray[np.float64] = 2 * deviation * (stats.norm.pdf(t) - t * stats.norm.sf(t))
    return result
