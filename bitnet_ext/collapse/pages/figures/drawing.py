"""What all figures share: colours, a canvas without a display, and PNG files with equal bytes."""

from __future__ import annotations

import functools
import io
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter
from numpy.typing import NDArray
from PIL import Image

# Okabe & Ito's palette for all kinds of colour vision, without its yellow, which is too light for a line.
BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
BLUE, VERMILLION, PURPLE = "#0072B2", "#D55E00", "#CC79A7"

DPI = 130
FULL_COLOUR_DPI = 150
_INKS = (BLACK, ORANGE, SKY, GREEN, BLUE, VERMILLION, PURPLE)
_TINTS, _SHADES = 30, 6  # of each ink towards white and towards black: edges of lines, and where lines cross
_LEVELS = 32  # of each channel in the table of nearest colours


@dataclass(frozen=True)
class RenderedFigure:
    """One figure as PNG bytes, with its file name (without .png), its title and its caption."""

    name: str
    title: str
    caption: str
    png: bytes


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of a size in inches."""
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    return figure


def step_axis(axis: Any, *, log: bool) -> None:
    """Whole numbers with separators below a panel over steps."""
    if log:
        axis.set_xscale("log")
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axis.xaxis.set_minor_formatter(NullFormatter())


@functools.cache
def _palette() -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """All inks with their tints and shades [colours, 3], and the nearest of them to every colour of a coarse cube.

    The palette is the same for all figures: one fitted to the picture may lose the colour of a thin line.
    """
    colours = []
    for ink in _INKS:
        rgb = np.array([int(ink[i : i + 2], 16) for i in (1, 3, 5)])
        colours += [rgb + (255 - rgb) * step / (_TINTS - 1) for step in range(_TINTS)]
        colours += [rgb * step / (_SHADES + 1) for step in range(1, _SHADES + 1)]
    table = np.unique(np.rint(colours).astype(np.uint8), axis=0)
    level = np.arange(_LEVELS) * 255 / (_LEVELS - 1)
    cube = np.stack(np.meshgrid(level, level, level, indexing="ij"), axis=-1).reshape(-1, 3)
    far = ((cube[:, None, :] - table[None, :, :].astype(np.float64)) ** 2).sum(axis=2)
    return table, far.argmin(axis=1).astype(np.uint8)


def full_colour_png(figure: Figure) -> bytes:
    """A figure as a PNG of all its colours, at 150 dpi; equal figures, equal bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=FULL_COLOUR_DPI, metadata={"Software": None})
    return buffer.getvalue()


def png(figure: Figure, dpi: int = DPI) -> bytes:
    """A figure as a PNG of at most 256 colours, a third of the bytes of full colour; equal figures, equal bytes."""
    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    table, nearest = _palette()
    level = (np.asarray(canvas.buffer_rgba())[:, :, :3].astype(np.uint32) * (_LEVELS - 1) + 127) // 255
    image = Image.fromarray(nearest[(level[:, :, 0] * _LEVELS + level[:, :, 1]) * _LEVELS + level[:, :, 2]])
    image.putpalette(table.tobytes())
    small = io.BytesIO()
    image.save(small, format="png", optimize=True)
    return small.getvalue()
