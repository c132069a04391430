"""The page of a small comparison: its table, its figures and the report around them."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from comparison_studies import DYING, HEALTHY, OVERCONFIDENT, STEPS, rows_of, write_study

from bitnet_ext.collapse.arms import ARMS
from bitnet_ext.collapse.pages.comparison import render_report, write_outputs, write_report
from bitnet_ext.collapse.pages.comparison_table import comparison_table, recovery
from bitnet_ext.collapse.pages.figures.comparison import (
    arm_styles,
    draw_figures,
    render_figures,
    write_figures,
)
from bitnet_ext.collapse.results import milestones

DASH = "\N{EN DASH}"


# --- table ---------------------------------------------------------------------------------------------


def test_table_of_the_report(tmp_path: Path) -> None:
    arms = {"standard-lr": [rows_of(DYING)], "adamw": [rows_of(HEALTHY)]}
    table = comparison_table(write_study(tmp_path, arms))
    assert table.columns == [
        "Training", "Held-out CE", "Alive?", "Context use",
        "Tokens @ 1k", "Tokens @ 4k", "Loss @ 1k", "Loss @ 4k", "Recovery?",
    ]  # fmt: skip
    assert table.rows[0] == ["standard-lr", "10.82", "no", "0.00", "14", "14", "10.72", "10.72", "yes"]
    assert table.rows[1][1:4] + table.rows[1][8:] == ["6.40", "yes", "0.85", "no"]
    lines = table.text().splitlines()
    assert len({len(line) for line in lines[:2]}) == 1 and lines[2].startswith("standard-lr")
    markdown = table.markdown().splitlines()
    assert markdown[0].count("|") == markdown[2].count("|") == 10 and markdown[1].startswith("| --- | ---: |")
    assert table.html().count("<tr>") == 3


@pytest.mark.parametrize(
    ("last", "expected"),
    [(10_000, [1000, 4000]), (4000, [1000, 4000]), (2000, [1000, 2000]), (400, [100, 400])],
)
def test_milestones_fit_the_run(tmp_path: Path, last: int, expected: list[int]) -> None:
    steps = tuple(step for step in (*STEPS, 10_000) if step <= last)
    study = write_study(tmp_path, {"adamw": [rows_of(HEALTHY, steps=steps)]}, steps=last)
    assert milestones(study) == expected
    if last == 400:
        assert comparison_table(study).columns[4:6] == ["Tokens @ 100", "Tokens @ 400"]


def test_table_over_seeds_and_unfinished_runs(tmp_path: Path) -> None:
    arms = {
        "adamw": [rows_of(HEALTHY), rows_of(HEALTHY, shift=0.2), rows_of(DYING)],
        "fp-twin": [rows_of(HEALTHY, steps=STEPS[:6])],
    }
    table = comparison_table(write_study(tmp_path, arms))
    adamw, twin = table.rows
    assert (
        adamw[1] == f"7.94 (6.40{DASH}10.82)"
        and adamw[2] == "yes 2/3, no 1/3"
        and adamw[8] == "no 2/3, yes 1/3"
    )
    assert twin[5] == "4 @ 400", "a shorter arm says which step it is"
    assert f"<br><small>(6.40{DASH}10.82)</small>" in table.html()
    notes = " ".join(table.notes)
    assert "fp-twin seed 0 (at step 400 of 4,000), fp-twin seed 1 (no evaluation yet)" in notes


def test_recovery_without_a_fall(tmp_path: Path) -> None:
    study = write_study(tmp_path, {"no-decay": [rows_of(OVERCONFIDENT)]})
    assert recovery(study.runs[0]) == "no fall"


# --- figures -------------------------------------------------------------------------------------------


def test_figures(tmp_path: Path) -> None:
    rows = [{**row, "ternary_zero": None, "flip_rate": None} for row in rows_of(HEALTHY)]
    arms = {"standard-lr": [rows_of(DYING)] * 2, "fp-twin": [rows]}
    study = write_study(tmp_path, arms)
    figures = draw_figures(study)
    assert list(figures) == [
        "unique_and_loss", "heldout_loss", "context", "entropies", "sizes", "ternary", "optimisation"
    ]  # fmt: skip
    axis = figures["heldout_loss"].axes[0]
    assert axis.get_xscale() == "log" and axis.get_xlabel() == "step"
    assert not axis.texts, "words over the curves hide them"
    labels = [entry.get_text() for entry in figures["heldout_loss"].legends[0].get_texts()]
    assert labels == ["standard-lr", "fp-twin", "uniform, ln V = 10.82", "unigram (word counts), 7.25"]
    markers = [line.get_marker() for line in axis.lines if line.get_linewidth() > 1]
    assert len(set(markers) - {"None"}) == 2, "curves that coincide differ in their markers"
    shown = {handle.get_label() for handle in figures["ternary"].legends[0].legend_handles}
    assert "standard-lr" in shown
    paths = write_figures(study, tmp_path / "figures")
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths) and len(paths) == 7
    first, second = render_figures(study), render_figures(study)
    assert [figure.png for figure in first] == [figure.png for figure in second], (
        "the same data, the same bytes"
    )


def test_figures_leave_out_what_was_not_measured(tmp_path: Path) -> None:
    missing = {"ternary_negative": None, "ternary_zero": None, "ternary_positive": None, "flip_rate": None}
    study = write_study(tmp_path, {"fp-twin": [[{**row, **missing} for row in rows_of(DYING)]]})
    assert "ternary" not in draw_figures(study)


def test_styles_are_distinct_and_stable() -> None:
    names = [*ARMS, "mine", "yours"]
    styles = arm_styles(names)
    assert len({(colour, str(dash)) for colour, dash in styles.values()}) == len(names)
    assert arm_styles(["adamw"])["adamw"] == styles["adamw"]


# --- report --------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Tags in balance, and what the page would load."""

    VOID = frozenset({"meta", "img", "br"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.loads: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.loads += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_report_is_self_contained(tmp_path: Path) -> None:
    write_study(tmp_path, {"standard-lr": [rows_of(DYING)], "adamw": [rows_of(HEALTHY)]})
    paths = write_outputs(tmp_path)
    assert set(paths) == {"summary", "table", "figures", "report"} and all(
        path.exists() for path in paths.values()
    )
    source = paths["report"].read_text(encoding="utf-8")
    page = Page()
    page.feed(source)
    assert page.open == [] and not page.tags & {"script", "link", "iframe", "object"}
    assert all(load.startswith(("#", "data:image/png;base64,")) for load in page.loads)
    targets = set(re.findall(r'id="([^"]+)"', source))
    assert {load[1:] for load in page.loads if load.startswith("#")} <= targets
    assert source.count("<img ") == 7 and "url(" not in source and "http" not in source
    for words in (
        "In short",
        "wiki-leads",
        "1,234,567",
        "a processor",
        "torch",
        "about adamw",
        "One seed",
        "16.5",
    ):
        assert words in source, words


def test_report_escapes_everything(tmp_path: Path) -> None:
    evil = "<script>alert('x')</script>&"
    study = write_study(
        tmp_path,
        {"a<b>&c": [rows_of(DYING)]},
        data={"name": evil},
        command=evil,
        device=evil,
        **{evil: evil},
    )
    source = render_report(study, [])
    assert "<script" not in source and "a<b>" not in source
    assert "&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt;&amp;" in source and "a&lt;b&gt;&amp;c" in source


def test_report_of_an_interrupted_study(tmp_path: Path) -> None:
    write_study(
        tmp_path,
        {"standard-lr": [rows_of(DYING)], "adamw": [rows_of(HEALTHY, steps=STEPS[:5])], "fp-twin": []},
    )
    path = tmp_path / "adamw" / "seed0" / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + b'{"kind": "eval", "step": 40')
    source = write_report(tmp_path).read_text(encoding="utf-8")
    assert "This study is not finished" in source
    assert "adamw seed 0 (at step 200 of 4,000); fp-twin seed 0 (no evaluation yet)" in source
    assert "At step 200: held-out cross-entropy" in source, (
        "arms are compared at the last step that both have"
    )


def prepare_nothing(root: Path) -> None:
    root.rmdir()


def prepare_empty(root: Path) -> None:
    pass


def prepare_settings_only(root: Path) -> None:
    (root / "study.json").write_text('{"arms": ["adamw"], "seeds": [0]}')


def prepare_no_evaluation(root: Path) -> None:
    prepare_settings_only(root)
    run = root / "adamw" / "seed0"
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text('{"kind": "train", "step": 1, "loss": 11.0}\n')


@pytest.mark.parametrize(
    ("prepare", "sentence"),
    [
        (prepare_nothing, "does not exist"),
        (prepare_empty, "holds no study: expected study.json"),
        (prepare_settings_only, r"has no evaluation yet: no metrics.jsonl of its 1 arm\(s\)"),
        (prepare_no_evaluation, "has no evaluation yet"),
    ],
)
def test_an_empty_study_gets_one_sentence(
    tmp_path: Path, prepare: Callable[[Path], None], sentence: str
) -> None:
    root = tmp_path / "study"
    root.mkdir()
    prepare(root)
    with pytest.raises(ValueError, match=sentence):
        write_report(root)
    assert not (root / "report.html").exists()


def test_one_evaluation_is_enough(tmp_path: Path) -> None:
    study = write_study(tmp_path, {"adamw": [rows_of(HEALTHY, steps=(1,))]}, steps=4000)
    assert "barely trained" in render_report(study, [])
    draw_figures(study)["context"].savefig(io.BytesIO(), format="png")
