"""What all figures of the study's pages share: a canvas without a display, and small PNG files with equal bytes."""

from __future__ import annotations

import io

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

DPI = 130
_COLOURS = 128  # of a file's palette: no difference to the eye, and a third of the bytes of full colour


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of a size in inches."""
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    return figure


def png(figure: Figure, dpi: int = DPI) -> bytes:
    """A figure as a PNG with a palette; the same figure gives the same bytes."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=dpi)
    drawn.seek(0)
    small = io.BytesIO()
    image = Image.open(drawn).convert("RGB").quantize(_COLOURS, dither=Image.Dither.NONE)
    image.save(small, format="png", optimize=True)
    return small.getvalue()
