"""The look of the pages: style sheet, the document around a body, and the pieces that bodies are made of.

No scripts, nothing to load: style and figures are inside, so a page opens offline, prints, and reads on a phone.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence

from bitnet_ext.collapse.pages.figures.drawing import RenderedFigure
from bitnet_ext.collapse.pages.table import Table
from bitnet_ext.collapse.verdicts.findings import Finding

_STYLE = """
:root { --ink: #1b1f24; --soft: #57606a; --line: #d7dce1; --tint: #f5f7f9; --link: #0b5cad; }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; color: var(--ink); background: #fff;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 920px; margin: 0 auto; padding: 2.2rem 1.25rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .3rem; letter-spacing: -.01em; }
h2 { font-size: 1.3rem; margin: 2.6rem 0 .8rem; padding-bottom: .3rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 1.6rem 0 .4rem; }
p { margin: .5rem 0 .8rem; }
a { color: var(--link); }
.lead { color: var(--soft); margin: 0 0 1.2rem; }
nav { font-size: .9rem; margin: 0 0 1.2rem; }
nav a { margin-right: 1rem; white-space: nowrap; text-decoration: none; }
.warn { background: #fff6e5; border-left: 4px solid #e69f00; padding: .6rem .9rem; margin: 1rem 0; }
.key { background: var(--tint); border-radius: 6px; padding: .4rem 1.1rem; }
ul { padding-left: 1.15rem; margin: .4rem 0 .8rem; }
li { margin: .35rem 0; overflow-wrap: anywhere; }
/* A shadow at the edge says that a box scrolls: the white covers move with the content, the shadows stay. */
.scroll { overflow-x: auto; margin: .8rem 0; -webkit-overflow-scrolling: touch;
  background: linear-gradient(to right, #fff 30%, transparent) left / 3rem 100% no-repeat local,
    linear-gradient(to left, #fff 30%, transparent) right / 3rem 100% no-repeat local,
    linear-gradient(to right, rgb(27 31 36 / 28%), transparent) left / .9rem 100% no-repeat scroll,
    linear-gradient(to left, rgb(27 31 36 / 28%), transparent) right / .9rem 100% no-repeat scroll; }
.hint { display: none; color: var(--soft); font-size: .85rem; margin: .8rem 0 -.4rem; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; width: 100%; }
th, td { padding: .4rem .6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
thead th { vertical-align: bottom; white-space: normal; color: var(--soft); font-weight: 600;
  border-bottom: 2px solid var(--line); }
th[scope=row], thead th:first-child { text-align: left; font-weight: 600; position: sticky; left: 0;
background: #fff; } td small { color: var(--soft); } .notes { color: var(--soft); font-size: .85rem; }
.notes li { margin: .1rem 0; } .badge { display: inline-block; font-size: .75rem; font-weight: 600; padding:
.08rem .5rem; border-radius:
  1rem; border: 1px solid var(--line); background: var(--tint); color: var(--soft); margin-left: .5rem;
  white-space: nowrap; vertical-align: middle; }
.badge.good { background: #e3f4ee; border-color: #8fcdb8; color: #00543d; }
.badge.early { background: #fff6e5; border-color: #e6c27a; color: #6b4700; }
.badge.bad { background: #fbe9e0; border-color: #e8a988; color: #8a3a00; }
.swatch { display: inline-block; width: 1.5rem; height: 0; border-top: 4px solid; margin-right: .5rem;
  vertical-align: middle; }
details { margin: .3rem 0 .6rem; font-size: .92rem; }
summary { color: var(--link); cursor: pointer; }
figure { margin: 1.4rem 0 2rem; }
figure img { display: block; width: 100%; max-width: 860px; height: auto; }
figure.wide img { max-width: none; min-width: var(--least, 700px); }
figure.wide .scroll { margin: 0 0 .3rem; }
.scroll.wide table { font-size: .82rem; }
.scroll.wide :is(th, td) { padding: .4rem .45rem; }
@media (min-width: 1000px) {
  .scroll.wide, figure.wide .scroll { --room: min(1160px, 100vw - 3rem); width: var(--room);
    margin-left: calc(50% - var(--room) / 2); }
}
figcaption { font-size: .9rem; color: var(--soft); max-width: 660px; }
figcaption b { color: var(--ink); display: block; }
dl { margin: .5rem 0; }
dl.pairs { display: grid; grid-template-columns: minmax(7rem, max-content) 1fr; gap: .15rem 1rem; font-size:
.92rem; } dl.pairs dt { color: var(--soft); } dl.pairs dd { margin: 0; overflow-wrap: anywhere; } dl.words
dt { font-weight: 600; margin-top: .7rem; } dl.words dd { margin: .1rem 0 0; } code { font: .88em
ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; overflow-wrap: anywhere; } @media (max-width:
700px) {
  .hint { display: block; }
}
@media (max-width:
560px) {
  main { padding: 1.3rem .9rem 3rem; }
  h1 { font-size: 1.5rem; }
  dl.pairs { grid-template-columns: 1fr; gap: 0; }
  dl.pairs dd { margin-bottom: .4rem; }
  th, td { padding: .35rem .45rem; }
}
@media print {
  main { max-width: none; padding: 0; }
  nav { display: none; }
  body { font-size: 10.5pt; }
  .scroll, .scroll.wide, figure.wide .scroll { overflow: visible; width: auto; margin-left: 0; background: none; }
  .hint { display: none; }
  table, .scroll.wide table { font-size: 8pt; }
  th, td, .scroll.wide :is(th, td) { padding: .2rem .3rem; }
  figure img, figure.wide img { min-width: 0; width: auto; max-width: 100%; max-height: 21cm; }
  details::details-content { content-visibility: visible; block-size: auto; }
  figure, li, tr { break-inside: avoid; }
  h2, h3 { break-after: avoid; }
}
"""

_NARROW_COLUMNS = 4  # columns that a phone of 390 px shows without scrolling
_SCROLL_HINT = '<p class="hint">The table has more columns: scroll it sideways.</p>'
_LEAST = 0.55  # screen pixels for each pixel of a wide figure, at the least


def document(title: str, parts: Sequence[str]) -> str:
    """A whole page; empty parts are left out."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n<body><main>\n"
        + "\n".join(part for part in parts if part)
        + "\n</main></body></html>\n"
    )


def escape(value: object) -> str:
    """Text from anywhere, safe in a page."""
    return html.escape(str(value))


def plural(value: int, noun: str) -> str:
    """A number with its noun: 1 arm, 2 arms."""
    return f"{value:,} {noun}{'s' if value != 1 else ''}"


def finding_list(findings: Iterable[Finding]) -> str:
    """Findings as a list."""
    items = "".join(
        f"<li><b>{escape(finding.label)}.</b> {escape(finding.text)}</li>" for finding in findings
    )
    return f"<ul>{items}</ul>"


def words(entries: Iterable[tuple[str, str]]) -> str:
    """Terms with their explanations."""
    return (
        '<dl class="words">'
        + "".join(f"<dt>{escape(t)}</dt><dd>{escape(d)}</dd>" for t, d in entries)
        + "</dl>"
    )


def pairs(entries: Iterable[tuple[str, str]]) -> str:
    """Names with values, side by side where there is room."""
    return (
        '<dl class="pairs">'
        + "".join(f"<dt>{escape(t)}</dt><dd>{escape(d)}</dd>" for t, d in entries)
        + "</dl>"
    )


def table_html(table: Table, wide: bool = False) -> str:
    """A table that scrolls inside its box, with its notes below; a wide one may be wider than the text."""
    notes = "".join(f"<li>{escape(note)}</li>" for note in table.notes)
    box = '<div class="scroll wide">' if wide else '<div class="scroll">'
    hint = _SCROLL_HINT if len(table.columns) > _NARROW_COLUMNS else ""
    return f'{hint}{box}{table.html()}</div><ul class="notes">{notes}</ul>'


def figure_html(figure: RenderedFigure, wide: bool = False) -> str:
    """A figure inside the page, with its caption; a wide one takes the page's width and scrolls on a narrow window."""
    data = base64.b64encode(figure.png).decode("ascii")
    image = f'<img alt="{escape(figure.title)}" src="data:image/png;base64,{data}">'
    if wide:
        width = int.from_bytes(
            figure.png[16:20], "big"
        )  # of the picture, from its head: letters stay legible
        image = f'<div class="scroll" style="--least: {round(_LEAST * width)}px">{image}</div>'
    opening = '<figure class="wide">' if wide else "<figure>"
    return (
        f"{opening}{image}"
        f"<figcaption><b>{escape(figure.title)}</b>{escape(figure.caption)}</figcaption></figure>"
    )
