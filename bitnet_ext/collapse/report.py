"""report.html: one self-contained page about a study, with everything computed from the study's files.

No scripts, nothing to load: style and figures are inside, so the page opens offline, prints, and reads on a
phone.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bitnet_ext.collapse.contrasts import (
    context_rule,
    contrast_findings,
    flatten,
    settings_of,
    summary_findings,
)
from bitnet_ext.collapse.figures import RenderedFigure, arm_styles, render_figures, write_figures
from bitnet_ext.collapse.findings import Finding, arm_findings, steps
from bitnet_ext.collapse.glossary import GLOSSARY
from bitnet_ext.collapse.reading import RULES, STATUS, classify, course, log_vocab
from bitnet_ext.collapse.results import (
    Study,
    arm_settings,
    number,
    read_study,
    require_evaluations,
    write_atomic,
    write_summary_csv,
)
from bitnet_ext.collapse.table import Table, comparison_table, unfinished_text

_GOOD, _BAD = frozenset({"alive"}), frozenset({"uniform", "collapsed", "failing", "diverged"})

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
.scroll { overflow-x: auto; margin: .8rem 0; -webkit-overflow-scrolling: touch; }
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
.badge.bad { background: #fbe9e0; border-color: #e8a988; color: #8a3a00; }
.swatch { display: inline-block; width: 1.5rem; height: 0; border-top: 4px solid; margin-right: .5rem;
  vertical-align: middle; }
figure { margin: 1.4rem 0 2rem; }
figure img { display: block; width: 100%; max-width: 660px; height: auto; }
figcaption { font-size: .9rem; color: var(--soft); max-width: 660px; }
figcaption b { color: var(--ink); display: block; }
dl { margin: .5rem 0; }
dl.pairs { display: grid; grid-template-columns: minmax(7rem, max-content) 1fr; gap: .15rem 1rem; font-size:
.92rem; } dl.pairs dt { color: var(--soft); } dl.pairs dd { margin: 0; overflow-wrap: anywhere; } dl.words
dt { font-weight: 600; margin-top: .7rem; } dl.words dd { margin: .1rem 0 0; } code { font: .88em
ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; overflow-wrap: anywhere; } @media (max-width:
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
  .scroll { overflow: visible; }
  table { font-size: 8pt; }
  th, td { padding: .2rem .3rem; }
  figure, li, tr { break-inside: avoid; }
  h2, h3 { break-after: avoid; }
}
"""


def write_report(study_dir: Path | str, figures: Sequence[RenderedFigure] | None = None) -> Path:
    """Writes report.html into a study directory, from what its runs have written so far.

    Args:
        study_dir: the directory of the study, see :mod:`bitnet_ext.collapse.results`.
        figures: rendered figures, when they are there already.

    Raises:
        ValueError: when the directory holds no study, no evaluation, or a damaged file.
    """
    study = read_study(study_dir)
    page = render_report(study, figures)
    return write_atomic(study.directory / "report.html", page.encode("utf-8"))


def write_outputs(study_dir: Path | str) -> dict[str, Path]:
    """Writes all that a study leaves besides its runs: summary.csv, table.md, figures/*.png and report.html.

    Returns:
        Their paths, by `summary`, `table`, `figures` (the folder) and `report`.
    """
    study = read_study(study_dir)
    table = comparison_table(study)
    figures = render_figures(study)
    write_figures(study, study.directory / "figures", figures)
    return {
        "summary": write_summary_csv(study),
        "table": write_atomic(study.directory / "table.md", table.markdown().encode("utf-8")),
        "figures": study.directory / "figures",
        "report": write_atomic(
            study.directory / "report.html", render_report(study, figures).encode("utf-8")
        ),
    }


def render_report(study: Study, figures: Sequence[RenderedFigure] | None = None) -> str:
    """The page as text. Everything that comes from files is escaped."""
    require_evaluations(study)
    table = comparison_table(study)
    if figures is None:
        figures = render_figures(study)
    title = f"Token collapse: {_plural(len(study.measured_arms), 'arm')}, {steps(study.last_step)} steps"
    contrasts = contrast_findings(study)
    parts = [
        f"<h1>{_e(title)}</h1>",
        f'<p class="lead">{_e(_lead(study))}</p>',
        _navigation(bool(contrasts)),
        _unfinished(study),
        '<h2 id="short">In short</h2>',
        f'<div class="key">{_list(summary_findings(study))}</div>',
        '<h2 id="table">Comparison</h2>',
        _table(table),
        '<h2 id="arms">What the curves show</h2>',
        "<p>Each sentence follows from the numbers of this study by the rules "
        f'<a href="#rules">stated below</a>; with other data it would be another one, or absent. '
        f"{_e(_seed_sentence(study))}</p>",
        *(_arm(study, arm) for arm in study.measured_arms),
    ]
    if contrasts:
        parts += [
            '<h2 id="contrasts">Arms against each other</h2>',
            f"<p>{_e(context_rule())}</p>",
            _list(contrasts),
        ]
    parts += [
        '<h2 id="figures">Figures</h2>',
        f"<p>{_e(_figure_sentence(study))}</p>",
        *(_figure(figure) for figure in figures),
        '<h2 id="run">What was run</h2>',
        _what_was_run(study),
        '<h2 id="rules">Rules</h2>',
        "<p>How an arm ended is the first of these that holds at its last evaluation:</p>",
        _words(RULES),
        '<h2 id="glossary">Metrics and their traps</h2>',
        _words(GLOSSARY),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light">'
        f"<title>{_e(title)}</title><style>{_STYLE}</style></head>\n<body><main>\n"
        + "\n".join(part for part in parts if part)
        + "\n</main></body></html>\n"
    )


def _e(value: object) -> str:
    return html.escape(str(value))


def _plural(value: int, noun: str) -> str:
    return f"{value:,} {noun}{'s' if value != 1 else ''}"


def _lead(study: Study) -> str:
    parts = [f"Arms: {', '.join(study.measured_arms)}"]
    parts.append(_plural(max(len(study.of(arm)) for arm in study.measured_arms), "seed"))
    data = study.settings.get("data")
    name = data.get("name") if isinstance(data, dict) else data
    if isinstance(name, str):
        parts.append(f"text: {name}")
    device = study.settings.get("device")
    name = device.get("name") if isinstance(device, dict) else device
    if isinstance(name, str):
        parts.append(f"device: {name}")
    return "; ".join(parts) + "."


def _navigation(contrasts: bool) -> str:
    links = [("table", "Comparison"), ("arms", "Curves in words")]
    links += [("contrasts", "Arms against each other")] if contrasts else []
    links += [("figures", "Figures"), ("run", "What was run"), ("glossary", "Metrics and traps")]
    return "<nav>" + " ".join(f'<a href="#{target}">{_e(text)}</a>' for target, text in links) + "</nav>"


def _unfinished(study: Study) -> str:
    if not study.unfinished:
        return ""
    each = "; ".join(unfinished_text(*entry) for entry in study.unfinished)
    return (
        f'<p class="warn"><b>This study is not finished.</b> {_e(each)}. '
        "The report shows what there is; start the study with <code>--resume</code> to complete it.</p>"
    )


def _list(findings: Iterable[Finding]) -> str:
    items = "".join(f"<li><b>{_e(finding.label)}.</b> {_e(finding.text)}</li>" for finding in findings)
    return f"<ul>{items}</ul>"


def _words(entries: Iterable[tuple[str, str]]) -> str:
    return '<dl class="words">' + "".join(f"<dt>{_e(t)}</dt><dd>{_e(d)}</dd>" for t, d in entries) + "</dl>"


def _pairs(entries: Iterable[tuple[str, str]]) -> str:
    return '<dl class="pairs">' + "".join(f"<dt>{_e(t)}</dt><dd>{_e(d)}</dd>" for t, d in entries) + "</dl>"


def _table(table: Table) -> str:
    notes = "".join(f"<li>{_e(note)}</li>" for note in table.notes)
    return f'<div class="scroll">{table.html()}</div><ul class="notes">{notes}</ul>'


def _seed_sentence(study: Study) -> str:
    seeds = max(len(study.leading(arm)) for arm in study.measured_arms)
    return f"Numbers are means over {seeds} seeds." if seeds > 1 else "Numbers are those of one seed."


def _figure_sentence(study: Study) -> str:
    text = (
        "One colour and line style for each arm throughout; where curves coincide, the thinner line lies "
        "on the "
        "wider one."
    )
    if any(len(study.of(arm)) > 1 for arm in study.measured_arms):
        return text + " Thin lines are seeds, thick lines their mean."
    return text + " One line an arm: there was one seed."


def _arm(study: Study, arm: str) -> str:
    status = classify(course(study, arm), log_vocab(study))
    badge = ""
    if status is not None:
        tone = " good" if status in _GOOD else " bad" if status in _BAD else ""
        badge = f'<span class="badge{tone}">{_e(STATUS[status][0])}</span>'
    colour, dash = arm_styles(study.measured_arms)[arm]
    line = "solid" if dash == "solid" else "dotted" if dash[1][0] < 2 else "dashed"
    swatch = f'<span class="swatch" style="border-top-color:{colour};border-top-style:{line}"></span>'
    about = arm_settings(study.settings).get(arm, {})
    summary = about.get("summary") or about.get("description")
    note = f'<p class="notes">{_e(summary)}</p>' if isinstance(summary, str) else ""
    return f"<h3>{swatch}{_e(arm)}{badge}</h3>{note}{_list(arm_findings(study, arm))}"


def _figure(figure: RenderedFigure) -> str:
    data = base64.b64encode(figure.png).decode("ascii")
    return (
        f'<figure><img alt="{_e(figure.title)}" src="data:image/png;base64,{data}">'
        f"<figcaption><b>{_e(figure.title)}</b>{_e(figure.caption)}</figcaption></figure>"
    )


def _what_was_run(study: Study) -> str:
    general = {key: value for key, value in study.settings.items() if key not in ("arms", "config")}
    config = study.settings.get("config")
    for key, value in config.items() if isinstance(config, dict) else ():
        general.setdefault(key, value)
    general.pop("arms", None)
    entries = [("arms", ", ".join(study.arms)), *flatten(general).items()]
    command = general.get("command")
    if isinstance(command, list):
        entries = [(k, " ".join(map(str, command)) if k == "command" else v) for k, v in entries]
    parts = [_pairs((key.replace("_", " ").replace(".", ": "), value) for key, value in entries if value)]
    parts += ["<h3>Runs</h3>", f'<div class="scroll">{_runs(study).html()}</div>']
    settings = {arm: settings_of(study, arm) for arm in study.arms}
    settings = {arm: flat for arm, flat in settings.items() if flat}
    if settings:
        parts.append(_settings(settings))
    return "".join(parts)


def _settings(settings: dict[str, dict[str, str]]) -> str:
    keys = list(dict.fromkeys(key for flat in settings.values() for key in flat))
    differing = [key for key in keys if len({flat.get(key, "none") for flat in settings.values()}) > 1]
    parts = []
    if differing:
        rows = [[key, *(flat.get(key, "none") for flat in settings.values())] for key in differing]
        table = Table(["Setting", *settings], rows, [])
        parts += [
            "<h3>Settings that differ between arms</h3>",
            f'<div class="scroll">{table.html()}</div>',
        ]
    first = next(iter(settings.values()))
    same = [(key, first[key]) for key in keys if key not in differing]
    if same:
        heading = "Settings of all arms" if len(settings) > 1 else "Settings"
        parts += [f"<h3>{heading}</h3>", _pairs(same)]
    return "".join(parts)


def _runs(study: Study) -> Table:
    rows = []
    for run in study.runs:
        time: dict[str, Any] = run.times[-1] if run.times else {}
        speed, seconds = number(time.get("steps_per_second")), number(time.get("seconds"))
        rows.append(
            [
                f"{run.arm}, seed {run.seed}",
                steps(run.last_step) if run.evals else "–",  # noqa: RUF001 - an en dash
                "yes" if run.finished else "no",
                f"{speed:.3g}" if speed is not None else "–",  # noqa: RUF001
                f"{seconds:,.0f} s" if seconds is not None else "–",  # noqa: RUF001
            ]
        )
    return Table(["Run", "Last step", "Finished", "Steps/s", "Time"], rows, [])
