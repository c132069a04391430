"""Where in a network the decay rules: its shares by group of parameters, and row norms by how frequent the token is.

One column a run of arms with different decay, so that the same panel can be read across.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bitnet_ext.collapse.pages.figures.drawing import (
    BLACK,
    BLUE,
    GREEN,
    ORANGE,
    VERMILLION,
    RenderedFigure,
    new_figure,
    png,
    step_axis,
)
from bitnet_ext.collapse.results import Study

#: Arms of the figure, as far as they were run: the report's decay, a hundredth of it, decoupled, none.
ARMS = ("standard-lr", "l2-0.001", "adamw", "no-decay")

Line = tuple[str, str, str, Any]  # key, words, colour, dashes
_DASHES: tuple[Any, ...] = ("solid", (0, (5, 2)), (0, (1, 1.2)), (0, (6, 1.5, 1, 1.5)))
_GROUPS: tuple[Line, ...] = (
    ("decay_share_final_gain", "last gain", VERMILLION, _DASHES[0]),
    ("decay_share_gains", "all gains", ORANGE, _DASHES[1]),
    ("decay_share_embedding", "embedding", BLUE, _DASHES[0]),
    ("decay_share_lm_head", "output head", BLACK, _DASHES[1]),
    ("decay_share_latent", "ternary latents", GREEN, _DASHES[3]),
)


def _bins(prefix: str) -> tuple[Line, ...]:
    return (
        (f"{prefix}_norm_head", "frequent: first 50 %", VERMILLION, _DASHES[0]),
        (f"{prefix}_norm_torso", "next 40 %", ORANGE, _DASHES[1]),
        (f"{prefix}_norm_tail", "rare: last 10 %", BLUE, _DASHES[3]),
        (f"{prefix}_norm_unseen", "never in the text", BLACK, _DASHES[2]),
    )


@dataclass(frozen=True)
class _Row:
    label: str
    lines: tuple[Line, ...]
    over: str
    log: bool = False


_ROWS = (
    _Row("share of coordinates that\nthe decay dominates", _GROUPS, "step"),
    _Row("embedding: mean norm\nof a token's row", _bins("embedding"), "cumulative_lr", log=True),
    _Row("output head: mean norm\nof a token's row", _bins("lm_head"), "cumulative_lr", log=True),
)
_X = {"step": "step", "cumulative_lr": "cumulative learning rate τ"}

# Sizes in inches.
_LEFT, _RIGHT, _PANEL_W, _PANEL_H, _GAP_X, _GAP_Y, _TOP, _BOTTOM = 0.8, 1.7, 2.0, 1.75, 0.2, 0.62, 0.3, 0.5


def part_figure(name: str, study: Study, arms: Sequence[str] = ARMS) -> RenderedFigure | None:
    """Decay by group of parameters, and row norms by frequency; None when no arm has these metrics.

    Args:
        name: of the figure's file.
        study: with evaluations.
        arms: one column each; those that were not run, or lack all of these metrics, are left out.
    """
    here = [
        arm for arm in arms if any(_points(study, arm, line, row)[1] for row in _ROWS for line in row.lines)
    ]
    rows = [
        row for row in _ROWS if any(_points(study, arm, line, row)[1] for arm in here for line in row.lines)
    ]
    if not rows:
        return None
    width = _LEFT + len(here) * _PANEL_W + (len(here) - 1) * _GAP_X + _RIGHT
    height = _TOP + len(rows) * _PANEL_H + (len(rows) - 1) * _GAP_Y + _BOTTOM
    figure = new_figure(width, height)
    for r, row in enumerate(rows):
        first = None
        for c, arm in enumerate(here):
            x, y = _LEFT + c * (_PANEL_W + _GAP_X), height - _TOP - (r + 1) * _PANEL_H - r * _GAP_Y
            box = (x / width, y / height, _PANEL_W / width, _PANEL_H / height)
            axis = figure.add_axes(box, sharex=first, sharey=first)
            first = first or axis
            handles = _draw(axis, study, arm, row)
            if r == 0:
                axis.set_title(f"{arm} ({len(study.leading(arm))} seeds)", fontsize=9.5)
            if c == 0:
                axis.set_ylabel(row.label, fontsize=9.5)
            else:
                axis.tick_params(labelleft=False)
            if c == len(here) - 1:
                axis.legend(
                    handles=handles,
                    loc="center left",
                    bbox_to_anchor=(1.02, 0.5),
                    frameon=False,
                    fontsize=8.5,
                )
    return RenderedFigure(
        name,
        "Where the decay rules",
        "Mean over seeds. Above: the share of the coordinates of each group of parameters whose update the decay "
        "decides. Below: mean Euclidean norm of the rows of the embedding and of the output head, for tokens that make "
        "up the first half of the training text, the next 40 %, the last 10 %, and for those that never occur in it, "
        "whose rows get no gradient in the embedding.",
        png(figure),
    )


def _points(study: Study, arm: str, line: Line, row: _Row) -> tuple[list[float], list[float]]:
    """The mean course of one line, where it is a number."""
    xs, ys = study.mean_series(arm, line[0], row.over) if arm in study.arms else ([], [])
    kept = [(x, y) for x, y in zip(xs, ys, strict=True) if math.isfinite(y)]
    return [x for x, _ in kept], [y for _, y in kept]


def _draw(axis: Any, study: Study, arm: str, row: _Row) -> list[Any]:
    if row.over == "step":
        step_axis(axis, log=True)
    if row.log:
        axis.set_yscale("log")
    handles = []
    for line in row.lines:
        _, words, colour, dash = line
        drawn = axis.plot(*_points(study, arm, line, row), color=colour, linestyle=dash, linewidth=1.7)[0]
        drawn.set_label(words)
        handles.append(drawn)
    axis.set_xlabel(_X[row.over], fontsize=9, labelpad=1)
    axis.tick_params(labelsize=9)
    axis.grid(True, which="major", color="#dddddd", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    return handles
