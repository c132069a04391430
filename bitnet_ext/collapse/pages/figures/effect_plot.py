"""The effect plot of a block: every arm against its base arm, as dots with their intervals and the numbers beside them.

Contrasts stand in bands, one for each base arm, so that small effects are not pressed into one point by large ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from bitnet_ext.collapse.pages.figures.drawing import BLUE, VERMILLION, RenderedFigure, new_figure, png
from bitnet_ext.collapse.verdicts.judging import CE, MI, ContrastResult
from bitnet_ext.collapse.verdicts.statistics import MIN_SEEDS, Estimate

#: How to read the figure, for its caption.
READING = (
    "Dot and bar: mean difference and its 95 % interval (BCa bootstrap over seeds); faint dots: seeds. Blue circle: "
    "the whole interval is better than the base (lower cross-entropy, more use of context); orange square: worse; grey "
    "diamond: the interval holds 0, or there are fewer than six seeds, so no direction is shown. At the right the mean "
    "with its interval, the number of seeds, and p of the exact sign-flip test, Holm-adjusted over the block. Bands "
    "have scales of their own."
)
_GREY = "#7a7a7a"
_PANELS = ((CE, "cross-entropy (nats per token)"), (MI, "use of context (nats)"))
_ALONE = 5.0  # a contrast so many times as far out as all others of its band gets a band of its own

# Sizes in inches.
_LEFT, _PANEL, _TEXT, _GAP, _LINE, _HEAD, _FOOT = 1.9, 1.6, 2.6, 0.1, 0.24, 0.28, 0.32
_COLUMNS = (0.08, 1.74, 2.0)  # where mean, n and p begin, right of a panel

Pair = tuple[str, str]
Found = dict[Pair, dict[str, ContrastResult]]


def effect_figure(
    name: str, title: str, caption: str, contrasts: Iterable[ContrastResult]
) -> RenderedFigure | None:
    """Differences to base arms with their 95 % intervals, one line a contrast; None without any.

    The panel on the left is held-out cross-entropy (lower is better), that on the right the use of context (higher is
    better).

    Args:
        name, title, caption: of the figure; what its marks mean is added to the caption (:data:`READING`).
        contrasts: in the order in which they are to stand.
    """
    found: Found = {}
    for contrast in contrasts:
        found.setdefault((contrast.base, contrast.other), {})[contrast.key] = contrast
    if not found:
        return None
    groups = bands(found)
    width = _LEFT + 2 * (_PANEL + _TEXT) + _GAP
    height = sum(_HEAD + _LINE * len(group) + _FOOT for group in groups) + 0.42
    figure = new_figure(width, height)
    top = height - 0.18
    for p, (_, label) in enumerate(_PANELS):
        x = _LEFT + p * (_PANEL + _TEXT + _GAP)
        figure.text(x / width, top / height, label, fontsize=9.5, fontweight="bold", va="center")
        for place, words in zip(_COLUMNS[1:], ("n", "p (Holm)"), strict=True):
            figure.text(
                (x + _PANEL + place) / width, top / height, words, fontsize=8.5, color="#555555", va="center"
            )
    top -= 0.14
    for group in groups:
        tall = _LINE * len(group)
        bases = dict.fromkeys(base for base, _ in group)
        heading = f"against {group[0][0]}" if len(bases) == 1 else "pairs"
        figure.text(0.08 / width, (top - 0.13) / height, heading, fontsize=9, color="#333333", va="center")
        names = [other if len(bases) == 1 else f"{other} vs {base}" for base, other in group]
        top -= _HEAD
        for p, (key, _) in enumerate(_PANELS):
            x = _LEFT + p * (_PANEL + _TEXT + _GAP)
            axis = figure.add_axes((x / width, (top - tall) / height, _PANEL / width, tall / height))
            _band(axis, [found[pair].get(key) for pair in group], key)
            axis.set_yticks(range(len(group)), names if p == 0 else [])
        top -= tall + _FOOT
    return RenderedFigure(name, title, f"{caption} {READING}", png(figure))


def bands(found: Found) -> list[list[Pair]]:
    """The contrasts of each base arm together.

    One that lies far out of all others of its base stands before them. Bases with one contrast each share a band.
    """
    by_base: dict[str, list[Pair]] = {}
    for pair in found:
        by_base.setdefault(pair[0], []).append(pair)
    groups, single = [], []
    for pairs in by_base.values():
        far = max(pairs, key=lambda pair: _reach(found[pair]))
        rest = [pair for pair in pairs if pair != far]
        if len(pairs) == 1:
            single += pairs
        elif len(rest) > 1 and _reach(found[far]) > _ALONE * max(_reach(found[pair]) for pair in rest):
            groups += [[far], rest]
        else:
            groups.append(pairs)
    return [*groups, single] if single else groups


def _reach(results: dict[str, ContrastResult]) -> float:
    """How far the seeds of a contrast lie from no difference in cross-entropy."""
    return max((abs(value) for value in results[CE].estimate.values), default=0.0) if CE in results else 0.0


def _band(axis: Any, results: Sequence[ContrastResult | None], key: str) -> None:
    axis.axvline(0, color="#444444", linewidth=1)
    for place, result in enumerate(results):
        if result is None:
            continue
        e = result.estimate
        colour, marker = _mark(e, key)
        axis.plot(
            e.values, [place] * len(e.values), ".", color=colour, alpha=0.4, markersize=4, markeredgewidth=0
        )
        if e.low is not None and e.high is not None:
            axis.plot([e.low, e.high], [place, place], color=colour, linewidth=2, solid_capstyle="butt")
        axis.plot(
            [e.mean],
            [place],
            marker,
            color=colour,
            markersize=4.5,
            markeredgecolor="white",
            markeredgewidth=0.5,
        )
        cells = (_interval(e), str(e.n), _p(result.p_holm))
        for inches, cell in zip(_COLUMNS, cells, strict=True):
            axis.annotate(
                cell,
                (1, place),
                xycoords=("axes fraction", "data"),
                xytext=(72 * inches, 0),
                textcoords="offset points",
                va="center",
                fontsize=8.5,
                color="#333333",
            )
    axis.set_ylim(len(results) - 0.4, -0.6)
    axis.locator_params(axis="x", nbins=3)  # their numbers stand apart also with two decimals and a sign
    axis.tick_params(axis="x", labelsize=8.5, length=2, pad=2)
    axis.tick_params(axis="y", labelsize=9, length=0)
    axis.grid(True, axis="x", color="#dddddd", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right", "left"]].set_visible(False)


def _mark(e: Estimate, key: str) -> tuple[str, str]:
    """Colour and marker: a direction only where the whole interval has it, of as many seeds as a verdict needs."""
    if e.n < MIN_SEEDS or e.low is None or e.high is None or e.low <= 0 <= e.high:
        return _GREY, "D"
    better = e.high < 0 if key == CE else e.low > 0
    return (BLUE, "o") if better else (VERMILLION, "s")


def _interval(e: Estimate) -> str:
    bounds = [bound for bound in (e.low, e.high) if bound is not None]
    digits = 3 if all(abs(value) < 1 for value in (e.mean, *bounds)) else 2
    mean = signed(e.mean, digits)
    return f"{mean} [{', '.join(signed(bound, digits, '-') for bound in bounds)}]" if bounds else mean


def signed(value: float, digits: int, sign: Literal["+", "-"] = "+") -> str:
    """A difference with its sign ("-": only where it is negative) and a true minus; what rounds to zero has none."""
    if not math.isfinite(value):
        return "not a number"
    text = f"{value:{sign}.{digits}f}"
    if float(text) == 0:
        return text.lstrip("+-")
    return text.replace("-", "\N{MINUS SIGN}")


def _p(value: float) -> str:
    return "1" if value > 0.9995 else f"{value:.3f}" if value >= 0.001 else "<0.001"
