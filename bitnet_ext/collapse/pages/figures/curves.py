"""Figures of the factorial study: curves of a block's arms."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy import stats

from bitnet_ext.collapse.pages.figures.drawing import (
    BLACK,
    BLUE,
    GREEN,
    ORANGE,
    PURPLE,
    SKY,
    VERMILLION,
    RenderedFigure,
    new_figure,
    png,
    step_axis,
)
from bitnet_ext.collapse.results import Study

_COLOURS = (VERMILLION, BLUE, GREEN, ORANGE, PURPLE, SKY)
_DASHED = (0, (5, 2))
_FACET = 6  # arms of a panel beside the base arms: as many as there are colours that anyone can tell apart
_COLUMNS = 3  # of panels side by side: more would be too small to read on a page
_NATS = "nats per token"
_SOFT, _DOTTED = "#666666", (0, (1, 1.2))
_FALLS = ("final_gain_mean_abs", "embedding_mean_abs")  # for which a prediction is drawn


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
_X = {"step": "step", "cumulative_lr": "cumulative learning rate τ"}


#: Arms that belong into one panel together: name of the group, and what their names match. The first that fits counts.
_KINDS = (
    ("recovery", r"from-(\d+)-.*"),
    ("remedy", r"(smoothing|entropy|diversity|head-l2)-.*-(?:l2|adamw)"),
    ("tensors", r"l2-(only|not)-.*"),
    ("precision", r"(fp)-.*"),
    ("sgd", r"(sgd)-.*"),
    ("rate", r"(?:lr|reduced-lr)(-).*"),
)


def facets(arms: Sequence[str], bases: Sequence[str]) -> list[list[str]]:
    """Arms in groups that one panel can show, each behind the base arms that it is compared with.

    Few arms are one group. Many are divided by what they have in common: the checkpoint that they go on from (these
    stand without the base arms), the remedy, the tensors that decay, full precision, SGD, the learning rate.
    """
    others = [arm for arm in arms if arm not in bases]
    if len(others) <= _FACET:
        return [[*bases, *others]]
    kinds: dict[tuple[str, str], list[str]] = {}
    for arm in others:
        kinds.setdefault(_kind(arm), []).append(arm)
    groups = []
    for (name, _), members in kinds.items():
        number = math.ceil(len(members) / (_FACET + 1 if name == "recovery" else _FACET))
        size = math.ceil(len(members) / number)
        front = [] if name == "recovery" else bases
        groups += [[*front, *members[i : i + size]] for i in range(0, len(members), size)]
    return groups


def _kind(arm: str) -> tuple[str, str]:
    for name, pattern in _KINDS:
        match = re.fullmatch(pattern, arm)
        if match:
            return name, match.group(1)
    return "other", ""


def styles(group: Sequence[str]) -> dict[str, tuple[str, Any, float]]:
    """Colour, dashes and width of each arm of a panel.

    Black: what the others are compared with. Dashed: decoupled decay. Arms that differ in that alone share a colour.
    """
    found: dict[str, tuple[str, Any, float]] = {}
    colours: dict[str, str] = {}
    for arm in group:
        dash = _DASHED if re.search(r"(^|-)adamw(-|$)", arm) else "solid"
        if arm in ("standard-lr", "adamw") or re.fullmatch(r"from-\d+-continue", arm):
            found[arm] = (BLACK, dash, 2.8)
        else:
            stem = re.sub(r"-(l2|adamw)$", "", arm)
            colour = colours.setdefault(stem, _COLOURS[len(colours) % len(_COLOURS)])
            found[arm] = (
                colour,
                dash,
                max(2.3 - 0.2 * len(found), 1.1),
            )  # where curves coincide, all can be seen
    return found


def _continues(group: Sequence[str]) -> bool:
    """Whether a panel's arms begin at a checkpoint instead of step 0."""
    return all(_kind(arm)[0] == "recovery" for arm in group)


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
            "Mean over seeds, thin lines the seeds; dashed: decoupled decay. The cross-entropy is also shown over τ, "
            "the sum of the learning rates so far: arms whose curves fall together there go through one course at "
            "different speeds. Below the unigram line a network predicts better than fixed word counts.",
            _CURVES,
        ),
        (
            "decay",
            f"{title}: what the decay does to the weights",
            "Share of the coordinates whose update the weight decay decides, and sizes of parameters. Dotted, the "
            "prediction: every weight moves towards 0 by the learning rate at each step, which is what an L2 term "
            "inside Adam does to a weight whose own gradient is small. τ is the sum of the learning rates so far.",
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
    sheets = math.ceil(len(groups) / _COLUMNS)
    size = math.ceil(len(groups) / sheets) if groups else 1
    for name, heading, caption, rows in plans:
        for sheet in range(sheets):
            shown = groups[sheet * size : (sheet + 1) * size]
            present = [row for row in rows if any(_has(study, arm, row) for group in shown for arm in group)]
            if present:
                number = f"-{sheet + 1}" if sheets > 1 else ""
                words = f"{heading} ({sheet + 1} of {sheets})" if sheets > 1 else heading
                image = png(_panels(study, shown, present))
                figures.append(RenderedFigure(f"{key}-{name}{number}", words, caption, image))
    return figures


def _has(study: Study, arm: str, row: Row) -> bool:
    return any(map(math.isfinite, study.mean_series(arm, row.key, row.over)[1]))


def _panels(study: Study, groups: Sequence[Sequence[str]], rows: Sequence[Row]) -> Figure:
    """A grid of panels: one column for each group of arms, its legend above it; a single group takes two columns."""
    single = len(groups) == 1 and len(rows) > 1
    columns = 2 if single else len(groups)
    lines = math.ceil(len(rows) / 2) if single else len(rows)
    left, right, gap_y, bottom = 0.85, 0.6, 0.65, 0.55  # inches
    gap_x, panel_w, panel_h = (1.35, 3.5, 1.9) if single else (0.25, 3.0 if columns > 1 else 5.4, 1.75)
    legend_columns = 3 if single else 1
    legend = 0.19 * math.ceil(max(len(group) for group in groups) / legend_columns) + 0.12
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
        axis = figure.add_axes(box, sharey=shared, sharex=None if _continues(group) else shared)
        first.setdefault(r, axis)
        handles = _draw(axis, study, group, row, first=group is groups[0], last=group is groups[-1])
        axis.set_xlabel(_X[row.over], fontsize=9, labelpad=1)
        if c == 0 or single:
            axis.set_ylabel(row.label, fontsize=9.5)
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
                fontsize=9,
                handlelength=2.6,
                labelspacing=0.25,
                borderpad=0.2,
            )
        if row.key in _FALLS and (
            single or c == columns - 1
        ):  # room above the curves for the name of the prediction
            low, high = axis.get_ylim()
            axis.set_ylim(low, high + 0.17 * (high - low))
    return figure


def _draw(axis: Any, study: Study, group: Sequence[str], row: Row, *, first: bool, last: bool) -> list[Any]:
    """One panel; what is written once a line of panels stands in or beside the first or the last of them."""
    if row.over == "step":
        # What begins at a late step would have all of its course in a corner of a logarithmic axis.
        step_axis(axis, log=not _continues(group))
    if row.log:
        axis.set_yscale("log")
    handles = []
    for arm, (colour, dash, width) in styles(group).items():
        for run in study.of(arm):
            axis.plot(*run.series(row.key, row.over), color=colour, linestyle=dash, linewidth=0.5, alpha=0.35)
        line = axis.plot(
            *study.mean_series(arm, row.key, row.over), color=colour, linestyle=dash, linewidth=width
        )[0]
        line.set_label(f"{arm} ({len(study.leading(arm))} seeds)")
        handles.append(line)
    if row.references:
        lines = [("unigram", study.unigram_cross_entropy)]
        lines += [("uniform", math.log(study.vocab_size))] if study.vocab_size else []
        for name, value in lines:
            if value is not None and math.isfinite(value):
                axis.axhline(value, color=_SOFT, linestyle=(0, (2, 2)), linewidth=0.9, zorder=1)
                if last:
                    _beside(axis, value, f"{name}\n{value:.2f}")
    if row.key in _FALLS and row.over == "cumulative_lr" and not _continues(group):
        _prediction(axis, study, group, row.key, named=first)
    if row.key == "absmean_mean":
        axis.axhline(1e-5, color=_SOFT, linestyle=_DOTTED, linewidth=1.2, zorder=1)
        if last:
            _beside(axis, 1e-5, "clamp\n1e-5")
    axis.tick_params(labelsize=9)
    axis.grid(True, which="major", color="#dddddd", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    return handles


def _beside(axis: Any, value: float, text: str) -> None:
    """A few words right of a panel, at a height of its scale: there they hide no curve."""
    axis.annotate(
        text,
        (1, value),
        xycoords=("axes fraction", "data"),
        xytext=(3, 0),
        textcoords="offset points",
        va="center",
        fontsize=8,
        color="#444444",
        annotation_clip=True,
    )


def _prediction(axis: Any, study: Study, group: Sequence[str], key: str, named: bool) -> None:
    """The course of weights that all move towards 0 by the learning rate, dotted in white and black over the curves."""
    series = (study.mean_series(arm, key, "cumulative_lr")[1] for arm in group)
    start = next((values[0] for values in series if values), None)
    if start is None:
        return
    clock = np.linspace(0, 4 * start, 80)
    fall = _one_by_one(clock, start) if key == "embedding_mean_abs" else np.maximum(start - clock, 0)
    axis.plot(clock, fall, color="white", linewidth=1.6, zorder=5)
    line = axis.plot(clock, fall, color=BLACK, linestyle=_DOTTED, linewidth=1.6, zorder=6)[0]
    if named:
        words = (
            "max(|w| \N{MINUS SIGN} τ, 0), normal w" if key == "embedding_mean_abs" else "1 \N{MINUS SIGN} τ"
        )
        line.set_label(f"predicted: {words}")
        axis.legend(handles=[line], loc="upper right", fontsize=8, frameon=False, handlelength=2, borderpad=0)


def _one_by_one(clock: NDArray[np.float64], start: float) -> NDArray[np.float64]:
    """Mean |w| of normal weights, each moved by `clock` towards 0 and no further: E max(|w| - clock, 0)."""
    deviation = start / math.sqrt(2 / math.pi)
    t = clock / deviation
    result: NDArray[np.float64] = 2 * deviation * (stats.norm.pdf(t) - t * stats.norm.sf(t))
    return result
