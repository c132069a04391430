"""The report of a small comparison: one self-contained page, with everything computed from the study's files.

No scripts, nothing to load: style and figures are inside, so the page opens offline, prints, and reads on a
phone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bitnet_ext.collapse.pages.comparison_table import comparison_table
from bitnet_ext.collapse.pages.figures.comparison import arm_styles, render_figures, write_figures
from bitnet_ext.collapse.pages.figures.drawing import RenderedFigure
from bitnet_ext.collapse.pages.glossary import GLOSSARY
from bitnet_ext.collapse.pages.markup import (
    document,
    escape,
    figure_html,
    finding_list,
    pairs,
    plural,
    table_html,
    words,
)
from bitnet_ext.collapse.pages.table import Table
from bitnet_ext.collapse.results import (
    Study,
    arm_settings,
    number,
    read_study,
    require_evaluations,
    write_atomic,
    write_summary_csv,
)
from bitnet_ext.collapse.results.settings import flatten, settings_of
from bitnet_ext.collapse.results.status import DEAD, EARLY, RULES, STATUS, arm_status
from bitnet_ext.collapse.verdicts.contrasts import context_rule, contrast_findings
from bitnet_ext.collapse.verdicts.findings import arm_findings
from bitnet_ext.collapse.verdicts.summary import summary_findings
from bitnet_ext.collapse.verdicts.wording import steps, unfinished_text

_TONES = {
    "alive": " good",
    "diverged": " bad",
    **dict.fromkeys(DEAD, " bad"),
    **dict.fromkeys(EARLY, " early"),
}
_ORIGINAL = (
    "Some arms are named after the original run. It is the recipe of a report of December 2025, which saw the "
    "predictions of a small ternary model fall to two or three tokens while its loss fell: Adam with an L2 term of 0.1 "
    'in the gradient, a learning rate of 0.0015, batches of 4 x 32 tokens. "The report\'s" in a summary of an arm '
    "means that recipe."
)


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
    title = f"Token collapse: {plural(len(study.measured_arms), 'arm')}, {steps(study.last_step)} steps"
    contrasts = contrast_findings(study)
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="lead">{escape(_lead(study))}</p>',
        f'<p class="notes">{escape(_ORIGINAL)}</p>' if _names_the_original(study) else "",
        _navigation(bool(contrasts)),
        _unfinished(study),
        '<h2 id="short">In short</h2>',
        f'<div class="key">{finding_list(summary_findings(study))}</div>',
        '<h2 id="table">Comparison</h2>',
        table_html(table),
        '<h2 id="arms">What the curves show</h2>',
        "<p>Each sentence follows from the numbers of this study by the rules "
        f'<a href="#rules">stated below</a>; with other data it would be another one, or absent. '
        f"{escape(_seed_sentence(study))}</p>",
        *(_arm(study, arm) for arm in study.measured_arms),
    ]
    if contrasts:
        parts += [
            '<h2 id="contrasts">Arms against each other</h2>',
            f"<p>{escape(context_rule())}</p>",
            finding_list(contrasts),
        ]
    parts += [
        '<h2 id="figures">Figures</h2>',
        f"<p>{escape(_figure_sentence(study))}</p>",
        *(figure_html(figure) for figure in figures),
        '<h2 id="run">What was run</h2>',
        _what_was_run(study),
        '<h2 id="rules">Rules</h2>',
        "<p>How an arm ended is the first of these that holds at its last evaluation:</p>",
        words(RULES),
        '<h2 id="glossary">Metrics and their traps</h2>',
        words(GLOSSARY),
    ]
    return document(title, parts)


def _lead(study: Study) -> str:
    parts = [f"Arms: {', '.join(study.measured_arms)}"]
    parts.append(plural(max(len(study.of(arm)) for arm in study.measured_arms), "seed"))
    data = study.settings.get("data")
    name = data.get("name") if isinstance(data, dict) else data
    if isinstance(name, str):
        parts.append(f"text: {name}")
    device = study.settings.get("device")
    name = device.get("name") if isinstance(device, dict) else device
    if isinstance(name, str):
        parts.append(f"device: {name}")
    return "; ".join(parts) + "."


def _names_the_original(study: Study) -> bool:
    about = arm_settings(study.settings)
    texts = [about.get(arm, {}).get("summary") for arm in study.measured_arms]
    return any(isinstance(text, str) and "report's" in text for text in texts)


def _navigation(contrasts: bool) -> str:
    links = [("table", "Comparison"), ("arms", "Curves in words")]
    links += [("contrasts", "Arms against each other")] if contrasts else []
    links += [("figures", "Figures"), ("run", "What was run"), ("glossary", "Metrics and traps")]
    return "<nav>" + " ".join(f'<a href="#{target}">{escape(text)}</a>' for target, text in links) + "</nav>"


def _unfinished(study: Study) -> str:
    if not study.unfinished:
        return ""
    each = "; ".join(unfinished_text(*entry) for entry in study.unfinished)
    return (
        f'<p class="warn"><b>This study is not finished.</b> {escape(each)}. '
        "The report shows what there is; start the study with <code>--resume</code> to complete it.</p>"
    )


def _seed_sentence(study: Study) -> str:
    seeds = max(len(study.leading(arm)) for arm in study.measured_arms)
    return f"Numbers are means over {seeds} seeds." if seeds > 1 else "Numbers are those of one seed."


def _figure_sentence(study: Study) -> str:
    text = (
        "Each arm has one colour, line style and marker throughout. Where curves coincide, their markers alternate "
        "and the thinner line is on top."
    )
    if any(len(study.of(arm)) > 1 for arm in study.measured_arms):
        return text + " Thin lines are seeds, thick lines their mean."
    return text + " There was one seed, so each arm has one line."


def _arm(study: Study, arm: str) -> str:
    status = arm_status(study, arm)
    badge = ""
    if status is not None:
        badge = f'<span class="badge{_TONES.get(status, "")}">{escape(STATUS[status][0])}</span>'
    colour, dash = arm_styles(study.measured_arms)[arm]
    line = "solid" if dash == "solid" else "dotted" if dash[1][0] < 2 else "dashed"
    swatch = f'<span class="swatch" style="border-top-color:{colour};border-top-style:{line}"></span>'
    about = arm_settings(study.settings).get(arm, {})
    summary = about.get("summary") or about.get("description")
    note = f'<p class="notes">{escape(summary)}</p>' if isinstance(summary, str) else ""
    return f"<h3>{swatch}{escape(arm)}{badge}</h3>{note}{finding_list(arm_findings(study, arm))}"


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
    parts = [pairs((key.replace("_", " ").replace(".", ": "), value) for key, value in entries if value)]
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
        parts += [f"<h3>{heading}</h3>", pairs(same)]
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
