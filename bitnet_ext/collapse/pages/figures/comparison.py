"""The figures of a small comparison: one colour and line style for each arm throughout, thin lines for seeds, thick
for means.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from bitnet_ext.collapse.pages.figures.drawing import (
    BLACK,
    BLUE,
    GREEN,
    ORANGE,
    PURPLE,
    SKY,
    VERMILLION,
    RenderedFigure,
    full_colour_png,
    new_figure,
)
from bitnet_ext.collapse.results import Study, require_evaluations, write_atomic

_COLOURS = (VERMILLION, BLUE, GREEN, ORANGE, PURPLE, SKY, BLACK)
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
#: Reference predictors: words of the legend, and the dashes of a grey line.
_REFERENCES: dict[str, tuple[str, Any]] = {
    "uniform": ("uniform, ln V = {:.2f}", (0, (1, 1.6))),
    "unigram": ("unigram (word counts), {:.2f}", (0, (7, 2, 1, 2))),
}
_DASHES: tuple[Any, ...] = ("solid", (0, (5, 2)), (0, (1, 1.3)), (0, (6, 1.5, 1, 1.5)))

#: Looks of the registered arms: the colour is the optimiser or the remedy, dashes are a full-precision twin.
_KNOWN: dict[str, tuple[str, Any]] = {
    "standard-lr": (VERMILLION, _DASHES[0]),
    "fp-twin": (VERMILLION, _DASHES[1]),
    "adamw": (BLUE, _DASHES[0]),
    "fp-twin-adamw": (BLUE, _DASHES[1]),
    "reduced-lr": (ORANGE, _DASHES[0]),
    "two-stage": (PURPLE, _DASHES[0]),
    "label-smoothing": (GREEN, _DASHES[0]),
    "grad-clip": (SKY, _DASHES[0]),
    "no-decay": (BLACK, _DASHES[0]),
    "entropy": (GREEN, _DASHES[2]),
    "diversity": (SKY, _DASHES[3]),
    "output-l2": (PURPLE, _DASHES[2]),
}


@dataclass(frozen=True)
class _Panel:
    key: str
    label: str
    log: bool = False
    reference: str | None = None  # "unigram", "uniform" or both, separated by a blank
    top: float | None = None  # the axis reaches at least to here
    zero: bool = False  # the axis starts at 0


@dataclass(frozen=True)
class _Plan:
    name: str
    title: str
    caption: str
    panels: tuple[_Panel, ...]
    over: tuple[str, ...] = ("step",)  # one column of panels for each


_GREY = "#666666"
_LOSS = "nats per token"
_PLANS = (
    _Plan(
        "unique_and_loss",
        "Unique tokens and training loss",
        "The picture of the original report: distinct greedy predictions for 20 random prompts (at most "
        "20), and cross-entropy on the training batches. Read together with the next figures: a count says "
        "nothing about whether the predictions are any good.",
        (
            _Panel("unique_of_20", "unique of 20", top=20.5, zero=True),
            _Panel("train_cross_entropy", f"training cross-entropy\n({_LOSS})", reference="uniform"),
        ),
    ),
    _Plan(
        "heldout_loss",
        "Held-out cross-entropy over steps and over cumulative learning rate",
        "Cross-entropy on text that training never sees. Below the unigram line a network predicts better "
        "than fixed word counts; on the ln V line its output is uniform. Below, the same curves over the "
        "sum of the learning rates so far: arms whose curves fall together there go through the same "
        "course at different speeds.",
        (_Panel("heldout_cross_entropy", f"held-out cross-entropy\n({_LOSS})", reference="unigram uniform"),),
        ("step", "cumulative_lr"),
    ),
    _Plan(
        "context",
        "Use of context and effective vocabulary of the argmax",
        "Mutual information is 0 when every position gets the same distribution, whatever it is: a network "
        "that ignores its context. The effective vocabulary is exp of the entropy of the argmax histogram "
        "over held-out positions; it is high for a dead network too, whose argmax is rounding noise.",
        (
            _Panel("mutual_information", "mutual information\n(nats)", zero=True),
            _Panel("effective_argmax_vocabulary", "effective argmax\nvocabulary (tokens)", log=True),
        ),
    ),
    _Plan(
        "entropies",
        "Entropies of the predictions",
        "Mean entropy of the single predictions, and entropy of their mean over positions; mutual "
        "information is the distance between the two. Both at ln V: uniform output.",
        (
            _Panel("predictive_entropy", "predictive entropy\n(nats)", reference="uniform"),
            _Panel("marginal_entropy", "marginal entropy\n(nats)", reference="uniform"),
        ),
    ),
    _Plan(
        "sizes",
        "Sizes of the parameters over cumulative learning rate",
        "Mean absolute values. A straight fall at slope 1 against the cumulative learning rate is what an "
        "L2 term inside Adam does to a weight whose own gradient is small; a final gain of 0 makes all "
        "logits 0.",
        (
            _Panel("final_gain_mean_abs", "gain of the\nfinal norm", zero=True),
            _Panel("embedding_mean_abs", "embedding", zero=True),
            _Panel("lm_head_mean_abs", "head", log=True),
            _Panel("latent_mean_abs", "BitLinear\nlatent weights", log=True),
        ),
        ("cumulative_lr",),
    ),
    _Plan(
        "ternary",
        "Ternary codes",
        "Shares of the codes, and share of all codes that the evaluated step changed. Full-precision twins "
        "have "
        "no codes.",
        (
            _Panel("ternary_zero", "share of 0", zero=True),
            _Panel("ternary_positive", "share of +1", zero=True),
            _Panel("ternary_negative", "share of \N{MINUS SIGN}1", zero=True),
            _Panel("flip_rate", "codes changed\nby one step", log=True),
        ),
    ),
    _Plan(
        "optimisation",
        "Gradient norm, learning rate, weight decay",
        "Norm of the gradient of all parameters before clipping, and the two schedules.",
        (
            _Panel("grad_norm", "gradient norm", log=True),
            _Panel("lr", "learning rate", log=True),
            _Panel("weight_decay", "weight decay", zero=True),
        ),
    ),
)

_X_LABEL = {
    "step": "step",
    "cumulative_lr": "cumulative learning rate (sum of the learning rates of all steps so far)",
}


def arm_styles(arms: Sequence[str]) -> dict[str, tuple[str, Any]]:
    """Colour and matplotlib line style of each arm: the registered arms' own, free combinations for others."""
    styles = {arm: _KNOWN[arm] for arm in arms if arm in _KNOWN}
    taken = set(styles.values())
    free = [(colour, dash) for dash in _DASHES for colour in _COLOURS if (colour, dash) not in taken]
    for index, arm in enumerate(arm for arm in arms if arm not in styles):
        styles[arm] = free[index % len(free)]
    return {arm: styles[arm] for arm in arms}


def draw_figures(study: Study) -> dict[str, Figure]:
    """All figures for which the study has data, by name. Each one can be saved with `savefig`.

    Raises:
        ValueError: for a study without any evaluation.
    """
    return {plan.name: figure for plan, figure in _drawn(study)}


def render_figures(study: Study) -> list[RenderedFigure]:
    """The figures of :func:`draw_figures` as PNG bytes at 150 dpi. The same study gives the same bytes."""
    rendered = []
    for plan, figure in _drawn(study):
        rendered.append(RenderedFigure(plan.name, plan.title, plan.caption, full_colour_png(figure)))
    return rendered


def write_figures(
    study: Study, directory: Path | str, figures: Sequence[RenderedFigure] | None = None
) -> list[Path]:
    """Writes `<name>.png` for each figure into a directory, which is made when it is not there.

    Args:
        figures: the study's rendered figures, when they are there already.
    """
    rendered = render_figures(study) if figures is None else figures
    return [write_atomic(Path(directory) / f"{figure.name}.png", figure.png) for figure in rendered]


def _drawn(study: Study) -> list[tuple[_Plan, Figure]]:
    require_evaluations(study)
    styles = arm_styles(study.measured_arms)
    drawn = []
    for plan in _PLANS:
        figure = _draw(study, plan, styles)
        if figure is not None:
            drawn.append((plan, figure))
    return drawn


def _has_data(study: Study, key: str, over: str) -> bool:
    return any(any(map(math.isfinite, run.series(key, over)[1])) for run in study.runs)


def _draw(study: Study, plan: _Plan, styles: dict[str, tuple[str, Any]]) -> Figure | None:
    cells = [
        (panel, over) for over in plan.over for panel in plan.panels if _has_data(study, panel.key, over)
    ]
    if not cells:
        return None
    references = [
        name
        for name in _REFERENCES
        if any(name in (panel.reference or "") for panel, _ in cells)
        and _reference_value(study, name) is not None
    ]
    entries = len(styles) + len(references)
    legend_columns = entries if entries < 4 else 2 if entries == 4 else 3
    figure, axes = _layout(cells, math.ceil(entries / legend_columns))
    used: list[str] = []
    for axis, (panel, over) in zip(axes, cells, strict=True):
        used += [arm for arm in _draw_panel(axis, study, panel, over, styles) if arm not in used]
    for over in plan.over:  # panels over one clock lie above each other: one range for all, one label
        group = [axis for axis, (_, clock) in zip(axes, cells, strict=True) if clock == over]
        limits = [axis.get_xlim() for axis in group]
        for axis in group:
            axis.set_xlim(min(low for low, _ in limits), max(high for _, high in limits))
            axis.tick_params(labelbottom=axis is group[-1])
        group[-1].set_xlabel(_X_LABEL[over])
    handles = [
        Line2D(
            [], [], color=colour, linestyle=dash, linewidth=2, label=arm, marker=_marker(index), markersize=5
        )
        for index, (arm, (colour, dash)) in enumerate(styles.items())
        if arm in used
    ]
    handles += [
        Line2D(
            [], [], color=_GREY, linestyle=_REFERENCES[name][1],
            label=_REFERENCES[name][0].format(_reference_value(study, name)),
        )
        for name in references
    ]  # fmt: skip
    legend = figure.legend(
        handles=handles,
        loc="lower center",
        bbox_to_anchor=(0.5, 0.0),
        ncols=legend_columns,
        frameon=False,
        handlelength=2.8,
        columnspacing=1.4,
    )
    for name in legend.get_texts():
        name.set_parse_math(False)  # a dollar sign in a name is a dollar sign
    return figure


def _layout(cells: Sequence[tuple[_Panel, str]], legend_rows: int) -> tuple[Figure, list[Any]]:
    """A figure with one axis for each cell, one above the other, and room for a legend below them.

    Set by hand, in inches, so that the axes of all figures line up; an automatic layout also draws
    everything twice.
    """
    width, left, right, top, panel, gap, label = 6.6, 1.02, 0.12, 0.22, 2.05, 0.24, 0.62
    changes = sum(cells[i][1] != cells[i + 1][1] for i in range(len(cells) - 1))
    below = 0.55 + 0.23 * legend_rows + 0.12
    height = top + panel * len(cells) + gap * (len(cells) - 1 - changes) + label * changes + below
    figure = new_figure(width, height)
    axes, y = [], height - top
    for index, (_, over) in enumerate(cells):
        y -= panel
        box = (left / width, y / height, 1 - (left + right) / width, panel / height)
        axes.append(figure.add_axes(box))
        y -= label if index + 1 < len(cells) and cells[index + 1][1] != over else gap
    return figure, axes


def _draw_panel(
    axis: Any, study: Study, panel: _Panel, over: str, styles: dict[str, tuple[str, Any]]
) -> list[str]:
    """Draws one metric of all arms; returns the arms that have it."""
    drawn = []
    if over == "step":
        _log_steps(axis, study)
    if panel.log:
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    elif panel.zero:
        axis.ticklabel_format(axis="y", style="sci", scilimits=(-2, 4), useMathText=True)
    for index, (arm, (colour, dash)) in enumerate(styles.items()):
        runs = [run for run in study.of(arm) if run.series(panel.key, over)[0]]
        if not runs:
            continue
        drawn.append(arm)
        leading = study.leading(arm)
        if len(runs) > 1 or len(leading) > 1:
            for run in runs:
                axis.plot(
                    *run.series(panel.key, over), color=colour, linestyle=dash, linewidth=0.7, alpha=0.45
                )
        xs, ys = study.mean_series(arm, panel.key, over)
        # Later arms are thinner and on top, and the markers of the arms alternate: curves that coincide stay distinct.
        width = 2.9 - 1.6 * index / max(1, len(styles) - 1)
        every = (index % max(1, len(xs)), len(styles))
        axis.plot(
            xs, ys, color=colour, linestyle=dash, linewidth=width,
            marker=_marker(index), markersize=4.5, markevery=every,
        )  # fmt: skip
    axis.set_ylabel(panel.label)
    high = axis.get_ylim()[1]
    if panel.zero and high > 0:
        axis.set_ylim(0, high)
    if panel.top is not None:
        axis.set_ylim(top=max(panel.top, high))
    if panel.log:
        _minor_ticks(axis)
    for name in (panel.reference or "").split():
        value = _reference_value(study, name)
        if value is not None:
            axis.axhline(value, color=_GREY, linestyle=_REFERENCES[name][1], linewidth=1, zorder=1)
    axis.grid(True, which="major", color="#d9d9d9", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    return drawn


def _log_steps(axis: Any, study: Study) -> None:
    """A logarithmic step axis with plain numbers; step 0, where there is one, gets a place left of step 1."""
    first = min(run.evals[0]["step"] for run in study.runs if run.evals)
    if first <= 0:
        axis.set_xscale("symlog", linthresh=1, linscale=0.25)
        axis.set_xlim(left=-0.05)
    else:
        axis.set_xscale("log")
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axis.xaxis.set_minor_formatter(NullFormatter())
    if first > 0:
        axis.xaxis.set_minor_locator(LogLocator(subs=(2, 5)))


def _minor_ticks(axis: Any) -> None:
    """Ticks at 2 and 5 of a logarithmic axis, with numbers where it is too short for two powers of ten."""
    low, high = axis.get_ylim()
    axis.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    axis.yaxis.set_minor_formatter(
        FuncFormatter(lambda value, _: f"{value:,.6g}") if low > 0 and high / low < 30 else NullFormatter()
    )


def _marker(index: int) -> str:
    return _MARKERS[index % len(_MARKERS)]


def _reference_value(study: Study, name: str) -> float | None:
    """Cross-entropy of the uniform or of the unigram predictor, nats; None where the study does not know it."""
    if name == "uniform":
        return math.log(study.vocab_size) if study.vocab_size else None
    value = study.unigram_cross_entropy
    return value if value is not None and math.isfinite(value) else None
