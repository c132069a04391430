"""The report of the factorial study: verdicts, the original report's table beside ours, every block with its figures.

One HTML file that opens offline, the same as Markdown with PNG files, and the raw numbers as one compressed table.
Everything that is said follows from the study's files.
"""

from __future__ import annotations

import gzip
import io
import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bitnet_ext._files import parse_json
from bitnet_ext.collapse.pages.factorial_tables import block_table, metrics_table, original_table
from bitnet_ext.collapse.pages.figures.curves import block_figures, facets
from bitnet_ext.collapse.pages.figures.drawing import RenderedFigure
from bitnet_ext.collapse.pages.figures.effect_plot import effect_figure
from bitnet_ext.collapse.pages.figures.parts import part_figure
from bitnet_ext.collapse.pages.glossary import GLOSSARY
from bitnet_ext.collapse.pages.markup import document, escape, figure_html, pairs, plural, table_html, words
from bitnet_ext.collapse.pages.table import Table
from bitnet_ext.collapse.results import (
    Run,
    Study,
    number,
    read_study,
    require_evaluations,
    summary_rows,
    write_atomic,
)
from bitnet_ext.collapse.results.status import RULES, log_vocab
from bitnet_ext.collapse.verdicts import Verdict, verdicts
from bitnet_ext.collapse.verdicts.block_effects import block_contrasts
from bitnet_ext.collapse.verdicts.judging import STATE_RULE
from bitnet_ext.collapse.verdicts.wording import nats, unfinished_text

_NAMED_ARMS = 8  # of a study that is not finished
_SHOWN = 4  # reasons of a verdict that are in view without a click
_TONE = {"supported": " good", "refuted": " bad"}


def write_study_page(study_dir: Path | str, out_dir: Path | str | None = None) -> dict[str, Path]:
    """Writes report.html, report.md with figures/*.png, and summary.csv.gz.

    Args:
        study_dir: of a study with blocks, however far its runs got.
        out_dir: default is the study's own folder.

    Returns:
        Their paths by `report`, `markdown`, `figures` (the folder) and `summary`.

    Raises:
        ValueError: when the folder holds no study, or no evaluation, or a damaged file.
    """
    study = read_study(study_dir)
    require_evaluations(study)
    out = Path(study_dir if out_dir is None else out_dir)
    content = Content(study)
    for figure in content.figures:
        write_atomic(out / "figures" / f"{figure.name}.png", figure.png)
    return {
        "summary": write_atomic(out / "summary.csv.gz", compressed_summary(study)),
        "markdown": write_atomic(out / "report.md", content.markdown().encode()),
        "figures": out / "figures",
        "report": write_atomic(out / "report.html", content.html().encode()),
    }


def compressed_summary(study: Study) -> bytes:
    """Every evaluated row as CSV, numbers with six significant digits, gzip without a date: equal for equal runs."""
    text = io.StringIO()
    for row in summary_rows(study, lambda value: f"{value:.6g}" if isinstance(value, float) else str(value)):
        text.write(",".join(row) + "\n")
    return gzip.compress(text.getvalue().encode(), mtime=0)


class Content:
    """What the page says, computed once for both of its forms.

    Args:
        study: with blocks and at least one evaluation.
        judged: verdicts of the study; computed when not given.
    """

    def __init__(self, study: Study, judged: Sequence[Verdict] | None = None) -> None:
        self.study = study
        self.ln_v = log_vocab(study)
        self.verdicts = verdicts(study) if judged is None else list(judged)
        blocks = study.settings["blocks"]
        self.blocks: dict[str, dict[str, Any]] = {
            key: block for key, block in blocks.items() if set(block["arms"]) & set(study.measured_arms)
        }
        self._block_figures = {key: self._figures_of(key, block) for key, block in self.blocks.items()}

    @property
    def figures(self) -> list[RenderedFigure]:
        return [figure for figures in self._block_figures.values() for figure in figures]

    @property
    def title(self) -> str:
        runs = sum(run.finished for run in self.study.runs)
        return f"Token collapse: {plural(len(self.study.measured_arms), 'arm')}, {plural(runs, 'run')}"

    # --- pieces ---------------------------------------------------------------------------------------------------

    def facts(self) -> list[tuple[str, str]]:
        settings = self.study.settings
        entries = []
        for key in ("data", "books"):
            about = settings.get(key)
            if isinstance(about, dict):
                sizes = f"{about['train_tokens']:,} tokens of training, {about['heldout_tokens']:,} held out"
                entries.append((key, f"{about['name']}: {about['description']}; {sizes}"))
        sessions = self._sessions()
        if sessions:
            names = ", ".join(dict.fromkeys(str(s.get("name")) for s in sessions))
            seconds = sum(float(s["seconds"]) * len(s.get("devices", [0])) for s in sessions)
            entries.append(
                (
                    "device",
                    f"{names}; {seconds / 60:,.1f} minutes of it in {plural(len(sessions), 'session')}",
                )
            )
        for key in ("device", "versions"):
            about = settings.get(key)
            if isinstance(about, dict) and not (key == "device" and sessions):
                entries.append((key, ", ".join(f"{k} {v}" for k, v in about.items())))
        if isinstance(settings.get("command"), str):
            # The program's own file is another one on each machine.
            entries.append(
                ("command", re.sub(r"^\S*(bitnet-ext|cli\.py)(?=\s|$)", "bitnet-ext", settings["command"]))
            )
        seconds = sum(_seconds(run) for run in self.study.runs)
        if seconds:
            text = f"{seconds / 60:,.1f} minutes, summed over runs of which several may have shared a device"
            entries.append(("time of the runs", text))
        if self.study.unigram_cross_entropy is not None:
            text = f"{nats(self.study.unigram_cross_entropy)} nats on the held-out text"
            entries.append(("fixed word counts score", text))
        if self.ln_v is not None:
            entries.append(("the uniform distribution scores", f"ln V = {nats(self.ln_v)} nats"))
        return entries

    def _sessions(self) -> list[dict[str, Any]]:
        path = self.study.directory / "sessions.jsonl"
        if not path.is_file():
            return []
        lines = path.read_bytes().splitlines()
        return [parse_json(line, path, "the sessions of a study") for line in lines if line.strip()]

    def unfinished(self) -> str:
        missing = self.study.unfinished
        if not missing:
            return ""
        arms = list(dict.fromkeys(arm for arm, *_ in missing))
        more = f" and {len(arms) - _NAMED_ARMS} more" if len(arms) > _NAMED_ARMS else ""
        return (
            f"This study is not finished: {len(missing)} of {len(missing) + self._finished()} runs are missing or "
            f"incomplete (arms {', '.join(arms[:_NAMED_ARMS])}{more}). What follows is what there is."
            if len(missing) > 6
            else "This study is not finished: "
            + "; ".join(unfinished_text(*entry) for entry in missing)
            + "."
        )

    def _finished(self) -> int:
        return sum(run.finished for run in self.study.runs)

    def verdict_table(self) -> Table:
        """The answers in short."""
        return Table(["Claim", "Answer"], [[verdict.claim, verdict.answer] for verdict in self.verdicts], [])

    def _figures_of(self, key: str, block: dict[str, Any]) -> list[RenderedFigure]:
        here = [arm for arm in block["arms"] if self.study.of(arm)]
        bases = [arm for arm in ("standard-lr", "adamw") if arm in here]
        figures = block_figures(self.study, f"block-{key}", block["title"], facets(here, bases))
        effects = effect_figure(
            f"block-{key}-effects",
            f"{block['title']}: differences, paired by seed",
            "Each arm against its base arm, seed by seed, at the last step that both have.",
            block_contrasts(self.study, here),
        )
        # By group of parameters it is shown once, in the block about the cause, or the first one if that was not run.
        shown = key == ("B" if "B" in self.blocks else next(iter(self.blocks)))
        parts = part_figure(f"block-{key}-parts", self.study) if shown else None
        return [figure for figure in (effects, *figures, parts) if figure is not None]

    # --- the two forms --------------------------------------------------------------------------------------------

    def html(self) -> str:
        """The page; everything from files is escaped."""
        links = [("verdicts", "Verdicts"), ("original", "Beside the report")]
        links += [(f"block-{key}", f"{key}: {block['title']}") for key, block in self.blocks.items()]
        links += [("metrics", "Metrics"), ("again", "Run it again")]
        checked = metrics_table(self.study)
        parts = [
            f"<h1>{escape(self.title)}</h1>",
            pairs(self.facts()),
            "<nav>"
            + " ".join(f'<a href="#{target}">{escape(text)}</a>' for target, text in links)
            + "</nav>",
            f'<p class="warn">{escape(self.unfinished())}</p>' if self.unfinished() else "",
            '<h2 id="verdicts">Verdicts</h2>',
            "<p>Each follows from the numbers of this study by the rule that stands with it; other numbers give other "
            "answers. The unit is the seed, intervals are 95 %.</p>",
            f"<ul>{''.join(f'<li>{escape(v.claim)}{_badge(v)}</li>' for v in self.verdicts)}</ul>",
            *(_verdict_html(verdict) for verdict in self.verdicts),
            f'<p class="notes">How an arm is judged: {escape(STATE_RULE)}</p>',
            '<h2 id="original">The report\'s own table, and ours</h2>',
            table_html(original_table(self.study), wide=True),
        ]
        for key, block in self.blocks.items():
            parts += [
                f'<h2 id="block-{escape(key)}">{escape(key)}: {escape(block["title"])}</h2>',
                f"<p>{escape(block['question'])}</p>",
                table_html(block_table(self.study, block["arms"]), wide=True),
                *(figure_html(figure, wide=True) for figure in self._block_figures[key]),
            ]
        parts += ['<h2 id="metrics">Metrics and their limits</h2>']
        parts += [table_html(checked, wide=True)] if checked is not None else []
        parts += [words(GLOSSARY), "<h3>How a run ended: the first of these that holds</h3>", words(RULES)]
        parts += ['<h2 id="again">Run it again</h2>', *(f"<p>{escape(line)}</p>" for line in _again())]
        return document(self.title, parts)

    def markdown(self) -> str:
        """The same for a reader of the repository."""
        lines = [f"# {self.title}", ""]
        lines += [f"* {key}: {value}" for key, value in self.facts()]
        lines += ["", f"**{self.unfinished()}**"] if self.unfinished() else []
        lines += ["", "## Verdicts", "", self.verdict_table().markdown()]
        for verdict in self.verdicts:
            lines += [
                f"### {verdict.title}",
                "",
                f"{verdict.claim} **{verdict.answer}**",
                "",
                f"Rule: {verdict.rule}",
                "",
            ]
            lines += [f"* {reason}" for reason in verdict.reasons]
            lines += [f"* Limit: {limit}" for limit in verdict.limits] + [""]
        lines += [f"How an arm is judged: {STATE_RULE}", ""]
        lines += ["## The report's own table, and ours", "", original_table(self.study).markdown()]
        for key, block in self.blocks.items():
            lines += [
                f"## {key}: {block['title']}",
                "",
                block["question"],
                "",
                block_table(self.study, block["arms"]).markdown(),
            ]
            for figure in self._block_figures[key]:
                lines += [f"![{figure.title}](figures/{figure.name}.png)", "", figure.caption, ""]
        checked = metrics_table(self.study)
        lines += ["## Metrics and their limits", ""]
        lines += [checked.markdown()] if checked is not None else []
        lines += [f"* **{term}**: {text}" for term, text in GLOSSARY]
        lines += ["", "## Run it again", "", *_again()]
        return "\n".join(lines) + "\n"


def _seconds(run: Run) -> float:
    """What a run took: its clock begins again at 0 whenever it is resumed."""
    clock = [value for row in run.times if (value := number(row.get("seconds"))) is not None]
    ends = [now for now, then in itertools.pairwise(clock) if then < now]
    return sum(ends) + (clock[-1] if clock else 0.0)


def _again() -> list[str]:
    return [
        "The command above, with --resume, runs what is missing and repeats nothing; `bitnet-ext collapse report DIR` "
        "makes these pages from the runs.",
        "summary.csv.gz holds every evaluated row of every run: one line for each arm, seed and step.",
    ]


def _own_rule(verdict: Verdict) -> str:
    """The rule without the part that all share, which stands below them."""
    return " ".join(verdict.rule.replace(STATE_RULE, "").split())


def _badge(verdict: Verdict) -> str:
    return f'<span class="badge{_TONE.get(verdict.answer, "")}">{escape(verdict.answer)}</span>'


def _verdict_html(verdict: Verdict) -> str:
    first, rest = verdict.reasons[:_SHOWN], verdict.reasons[_SHOWN:]
    shown = "".join(f"<li>{escape(reason)}</li>" for reason in first)
    hidden = "".join(f"<li>{escape(reason)}</li>" for reason in rest)
    more = (
        f"<details><summary>{plural(len(rest), 'number')} more</summary><ul>{hidden}</ul></details>"
        if rest
        else ""
    )
    limits = "".join(f"<li>{escape(limit)}</li>" for limit in verdict.limits)
    return (
        f'<section id="{escape(verdict.key)}"><h3>{escape(verdict.title)}{_badge(verdict)}</h3>'
        f"<p>{escape(verdict.claim)}</p>"
        f'<ul>{shown}</ul>{more}<p class="notes">Rule: {escape(_own_rule(verdict))}</p>'
        + (f'<ul class="notes">{limits}</ul>' if limits else "")
        + "</section>"
    )
