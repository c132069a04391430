"""Reading a study, its table, its figures and its report, from synthetic runs that behave in known ways."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitnet_ext.collapse.arms import ARMS
from bitnet_ext.collapse.pages.comparison import render_report, write_outputs, write_report
from bitnet_ext.collapse.pages.comparison_table import comparison_table, recovery
from bitnet_ext.collapse.pages.figures.comparison import (
    arm_styles,
    draw_figures,
    render_figures,
    write_figures,
)
from bitnet_ext.collapse.results import (
    Study,
    milestones,
    read_metrics,
    read_study,
    spread,
    write_atomic,
    write_summary_csv,
)
from bitnet_ext.collapse.results.settings import setting_changes
from bitnet_ext.collapse.results.status import STATUS, classify, course, find_fall
from bitnet_ext.collapse.verdicts.contrasts import CONTRASTS, contrast_findings
from bitnet_ext.collapse.verdicts.findings import arm_findings
from bitnet_ext.collapse.verdicts.summary import summary_findings

VOCAB = 50_257
LN_V = math.log(VOCAB)
UNIGRAM = 7.25
MINUS, DASH = "\N{MINUS SIGN}", "\N{EN DASH}"
STEPS = (1, 10, 50, 100, 200, 400, 600, 1000, 2000, 4000)

Row = dict[str, Any]
# At some steps: held-out cross-entropy, predictive entropy, mutual information, unique of 20, final gain.
Course = dict[int, tuple[float, float, float, float, float]]

DYING: Course = {
    1: (10.99, 10.67, 0.15, 20, 1.0),
    100: (10.43, 10.78, 0.04, 18, 0.98),
    400: (9.40, 10.61, 0.01, 2, 0.68),
    600: (10.04, 10.81, 0.0, 4, 0.40),
    1000: (LN_V, LN_V, 0.0, 14, 2e-4),
    4000: (LN_V, LN_V, 0.0, 14, 7e-4),
}
HEALTHY: Course = {
    1: (10.99, 10.67, 0.15, 20, 1.0),
    100: (7.79, 7.9, 0.07, 10, 1.0),
    400: (7.2, 6.9, 0.62, 4, 0.98),
    4000: (6.40, 6.2, 0.85, 4, 0.6),
}
WORD_COUNTS: Course = {
    1: (10.99, 10.67, 0.15, 20, 1.0),
    100: (8.0, 7.9, 0.05, 6, 1.0),
    4000: (7.30, 7.2, 0.01, 1, 1.0),
}
OVERCONFIDENT: Course = {
    1: (10.99, 10.67, 0.15, 20, 1.0),
    400: (7.2, 6.0, 0.6, 12, 1.0),
    4000: (9.1, 2.4, 1.9, 17, 1.3),
}
PEAKED: Course = {  # collapsed, but not uniform
    1: (10.99, 10.67, 0.15, 20, 1.0),
    400: (8.67, 9.6, 0.01, 3, 0.68),
    4000: (8.83, 9.6, 0.0, 2, 0.03),
}


def rows_of(
    points: Course, *, lr: float = 1.5e-3, shift: float = 0.0, steps: tuple[int, ...] = STEPS
) -> list[Row]:
    xs = [math.log(step) for step in points]
    rows = []
    for step in steps:
        ce, entropy, mi, unique, gain = (
            float(np.interp(math.log(step), xs, [values[i] for values in points.values()])) for i in range(5)
        )
        ce += shift
        rows.append(
            {
                "kind": "eval",
                "step": step,
                "tokens_seen": 124 * step,
                "lr": lr,
                "weight_decay": 0.1,
                "cumulative_lr": lr * step,
                "train_loss": ce - 0.1,
                "train_cross_entropy": ce - 0.1,
                "grad_norm": 0.5,
                "heldout_cross_entropy": ce,
                "unigram_cross_entropy": UNIGRAM,
                "excess_over_unigram": ce - UNIGRAM,
                "unique_of_20": round(unique),
                "argmax_vocabulary": 50,
                "effective_argmax_vocabulary": 10.0,
                "predictive_entropy": entropy,
                "marginal_entropy": min(LN_V, entropy + mi),
                "mutual_information": mi,
                "kl_to_unigram": 0.3,
                "logit_std": 0.5,
                "head_accuracy": 0.1,
                "torso_accuracy": 0.01,
                "tail_accuracy": None,
                "gain_mean_abs": gain,
                "final_gain_mean_abs": gain,
                "embedding_mean_abs": 0.8 * gain,
                "lm_head_mean_abs": 0.03 * gain,
                "latent_mean_abs": 0.03 * gain,
                "ternary_negative": 0.37,
                "ternary_zero": 0.26,
                "ternary_positive": 0.37,
                "flip_rate": 0.01,
            }
        )
    return rows


def write_run(root: Path, arm: str, seed: int, rows: list[Row], **config: Any) -> Path:
    folder = root / arm / f"seed{seed}"
    folder.mkdir(parents=True)
    time = {
        "kind": "time",
        "step": rows[-1]["step"] if rows else 0,
        "seconds": 61.0,
        "steps_per_second": 16.5,
    }
    content = {"arm": arm, "seed": seed, "model": {"vocab_size": VOCAB}, "train": {"lr": 1.5e-3, **config}}
    (folder / "config.json").write_text(json.dumps(content))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, time]))
    return folder


def write_study(root: Path, arms: dict[str, list[list[Row]]], *, steps: int = 4000, **settings: Any) -> Study:
    """A study with the rows of each seed of each arm."""
    root.mkdir(exist_ok=True)
    content = {
        "arms": {arm: {"summary": f"about {arm}"} for arm in arms},
        "seeds": list(range(max(map(len, arms.values())))),
        "steps": steps,
        "data": {"name": "wiki-leads", "train_tokens": 1_234_567},
        "device": {"type": "cpu", "name": "a processor"},
        "versions": {"torch": "2.13.0"},
        "command": "examples/train_collapse.py --seeds 1",
        **settings,
    }
    (root / "study.json").write_text(json.dumps(content))
    for arm, seeds in arms.items():
        for seed, rows in enumerate(seeds):
            write_run(root, arm, seed, rows, optimizer="adamw" if "adamw" in arm else "adam_l2")
    return read_study(root)


def kinds(findings: list[Any]) -> set[str]:
    return {finding.kind for finding in findings}


def text(findings: list[Any]) -> str:
    return "\n".join(finding.text for finding in findings)


# --- words follow from the data ------------------------------------------------------------------------


def test_words_for_a_dying_network(tmp_path: Path) -> None:
    study = write_study(tmp_path, {"standard-lr": [rows_of(DYING)]})
    found = arm_findings(study, "standard-lr")
    assert {"ending-uniform", "tokens-fell-collapse", "uniform", "unigram-never"} <= kinds(found)
    assert {"count-up-loss-up", "norms-shrunk"} <= kinds(found)
    words = text(found)
    assert "fell from 20 to 2 at step 400" in words
    assert "from 10.99 to 9.40, 2.15 nats above the unigram's, and mutual information was 0.010" in words
    assert "nearly uniform (entropy 10.61 of at most 10.82)" in words
    assert "From step 1,000 to the end cross-entropy and predictive entropy equal" in words
    assert "the count rose from 2 to 14 while held-out cross-entropy got worse, from 9.40 to 10.82" in words
    assert "the final norm's gain 0.07 %" in words


def test_words_for_a_healthy_network(tmp_path: Path) -> None:
    study = write_study(tmp_path, {"adamw": [rows_of(HEALTHY)]})
    found = arm_findings(study, "adamw")
    assert {"ending-alive", "tokens-fell-learning", "unigram-crossed", "count-down-loss-down"} <= kinds(found)
    assert not kinds(found) & {"uniform", "count-up-loss-up", "norms-shrunk", "over-confident"}
    assert "these few tokens are not a collapse" in text(found)
    assert "below the unigram's for the first time at step 400" in text(found)


def test_words_for_the_stage_of_word_counts(tmp_path: Path) -> None:
    found = arm_findings(write_study(tmp_path, {"adamw": [rows_of(WORD_COUNTS)]}), "adamw")
    assert {"ending-unigram", "tokens-fell-unigram", "unigram-never"} <= kinds(found)
    assert "learned the word frequencies only" in text(found)
    assert "collapse" not in text(found)


def test_words_for_an_overconfident_network(tmp_path: Path) -> None:
    found = arm_findings(write_study(tmp_path, {"no-decay": [rows_of(OVERCONFIDENT)]}), "no-decay")
    assert {"ending-overconfident", "tokens-kept", "unigram-lost", "over-confident"} <= kinds(found)
    assert "At the end cross-entropy is 6.70 nats above the mean predictive entropy" in text(found)
    assert "never fell to half of its initial 20" in text(found)


def test_no_two_kinds_of_network_get_the_same_words(tmp_path: Path) -> None:
    courses = {
        "dying": DYING,
        "healthy": HEALTHY,
        "counts": WORD_COUNTS,
        "sure": OVERCONFIDENT,
        "peaked": PEAKED,
    }
    study = write_study(tmp_path, {name: [rows_of(points)] for name, points in courses.items()})
    endings = {name: arm_findings(study, name)[0].kind for name in courses}
    assert len(set(endings.values())) == len(courses), endings
    page = render_report(study, [])
    for kind in endings.values():
        assert STATUS[kind.removeprefix("ending-")][1] in page


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({}, "alive"),
        ({"heldout_cross_entropy": 7.25, "predictive_entropy": 7.0}, "learning"),
        ({"heldout_cross_entropy": 8.0, "predictive_entropy": 7.0}, "overconfident"),
        ({"heldout_cross_entropy": 8.0, "predictive_entropy": 8.0}, "learning"),
        ({"heldout_cross_entropy": 8.0, "predictive_entropy": 8.0, "lm_head_mean_abs": 0.002}, "failing"),
        ({"mutual_information": 0.1}, "unigram"),
        ({"mutual_information": 0.1, "heldout_cross_entropy": 7.76}, "early"),
        ({"mutual_information": 0.1, "heldout_cross_entropy": 7.76, "lm_head_mean_abs": 0.002}, "collapsed"),
        (
            {"mutual_information": 0.1, "heldout_cross_entropy": 7.76, "final_gain_mean_abs": 0.09},
            "collapsed",
        ),
        ({"mutual_information": 0.1, "heldout_cross_entropy": 9, "predictive_entropy": 10.3}, "collapsed"),
        ({"mutual_information": 0.1, "heldout_cross_entropy": 10.7}, "untrained"),
        ({"heldout_cross_entropy": LN_V - 0.019, "predictive_entropy": LN_V - 0.019}, "uniform"),
        ({"heldout_cross_entropy": LN_V - 0.03, "predictive_entropy": LN_V - 0.019}, "untrained"),
        ({"heldout_cross_entropy": math.nan}, "diverged"),
        ({"mutual_information": None}, None),
        ({"heldout_cross_entropy": None}, None),
    ],
)
def test_rules_at_their_edges(change: Row, status: str | None) -> None:
    first, last = rows_of({1: HEALTHY[1], 4000: HEALTHY[4000]}, steps=(1, 4000))
    assert classify([first, {**last, **change}], LN_V) == status


@pytest.mark.parametrize(
    ("losses", "status"),
    [
        ([10.99, 9.5, 9.0, 8.0], "early"),
        ([10.99, 8.0, 8.6, 8.2], "collapsed"),  # was better before
        ([10.99, 8.6, 8.2, 8.15], "collapsed"),  # stands still
        ([10.99, 10.9, 10.8, 10.75], "untrained"),
    ],
)
def test_a_slow_start_is_not_a_collapse(losses: list[float], status: str) -> None:
    rows = rows_of(WORD_COUNTS, steps=(1, 100, 600, 1000))
    for row, loss in zip(rows, losses, strict=True):
        row |= {"heldout_cross_entropy": loss, "predictive_entropy": 8.0, "mutual_information": 0.05}
    assert classify(rows, LN_V) == status


def test_small_logits_at_the_start_are_no_death(tmp_path: Path) -> None:
    rows = rows_of({1: DYING[4000], 4000: DYING[4000]}, steps=(1, 2, 5))
    study = write_study(tmp_path, {"adamw": [rows]}, steps=5)
    found = kinds(arm_findings(study, "adamw"))
    assert "ending-untrained" in found and "uniform" not in found


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ([20, 12, 11], None),
        ([20, 10, 12], (20, 2, 10, 2, 3, 12, 3)),
        ([20, 8, 2, 9], (20, 2, 2, 3, None, None, None)),
        ([20, 9, 3, 10, 16, 2], (20, 2, 3, 3, 4, 16, 5)),
        ([20, 10, 10], (20, 2, 10, 2, None, None, None)),
    ],
)
def test_fall_and_rise_of_the_count(counts: list[int], expected: tuple[Any, ...] | None) -> None:
    fall = find_fall([{"step": step, "unique_of_20": count} for step, count in enumerate(counts, start=1)])
    found = None if fall is None else dataclasses.astuple(fall)
    assert found == expected


def test_a_diverged_run_is_named(tmp_path: Path) -> None:
    rows = rows_of(HEALTHY)
    for row in rows[-2:]:
        row["heldout_cross_entropy"] = math.nan
    study = write_study(tmp_path, {"adamw": [rows], "standard-lr": [rows_of(DYING)]})
    assert "not a finite number: the training diverged (first seen at step 2,000)" in text(
        arm_findings(study, "adamw")
    )
    assert kinds(contrast_findings(study)) == {"contrast-diverged"}
    draw_figures(study)["heldout_loss"].savefig(io.BytesIO(), format="png")


# --- arms against each other ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "other", "kind", "words"),
    [
        (DYING, HEALTHY, "contrast-only-base", "the loss alone does not bring the collapse"),
        (DYING, PEAKED, "contrast-both", "Decoupling the decay did not prevent the collapse"),
        (HEALTHY, DYING, "contrast-only-other", "the L2 term inside Adam is not the cause"),
        (HEALTHY, WORD_COUNTS, "contrast-neither", "this run cannot tell"),
    ],
)
def test_contrast_says_what_happened(
    tmp_path: Path, base: Course, other: Course, kind: str, words: str
) -> None:
    study = write_study(tmp_path, {"standard-lr": [rows_of(base)], "adamw": [rows_of(other)]})
    (finding,) = contrast_findings(study)
    assert finding.kind == kind and words in finding.text
    assert "optimizer adam_l2 → adamw" in finding.text
    assert "One seed: no spread" in finding.text


def test_contrast_over_seeds(tmp_path: Path) -> None:
    arms = {
        "standard-lr": [rows_of(HEALTHY, shift=shift) for shift in (0.0, 0.1, 0.2)],
        "adamw": [rows_of(HEALTHY, shift=shift) for shift in (-0.1, 0.05, 0.3)],
        "fp-twin": [rows_of(HEALTHY, shift=shift) for shift in (-0.4, -0.35, -0.3)],
    }
    adamw, twin = contrast_findings(write_study(tmp_path, arms))
    assert (
        f"Over 3 seeds the difference runs from {MINUS}0.10 to +0.10 nats: its sign is not the same"
        in adamw.text
    )
    assert f"Over 3 seeds the difference runs from {MINUS}0.50 to {MINUS}0.40 nats." in twin.text
    assert "One seed" not in adamw.text + twin.text


def test_missing_arms_get_no_sentence(tmp_path: Path) -> None:
    study = write_study(tmp_path, {"standard-lr": [rows_of(DYING)]})
    assert contrast_findings(study) == []
    page = render_report(study, [])
    assert "Arms against each other" not in page and "full-precision twin collapsed" not in page


def slowed(points: Course, factor: int) -> Course:
    return {max(1, step * factor) if step > 1 else 1: values for step, values in points.items()}


def test_clock_of_the_reduced_learning_rate(tmp_path: Path) -> None:
    dense = tuple(range(1, 4001, 40))
    standard = rows_of(DYING, steps=dense)
    rescaled = rows_of(slowed(DYING, 3), lr=5e-4, steps=dense)
    study = write_study(tmp_path / "a", {"standard-lr": [standard], "reduced-lr": [rescaled]})
    assert "clock-rescaled" in kinds(contrast_findings(study))
    other = rows_of(HEALTHY, lr=5e-4, steps=dense)
    study = write_study(tmp_path / "b", {"standard-lr": [standard], "reduced-lr": [other]})
    assert not {"clock-rescaled", "clock-same"} & kinds(contrast_findings(study))
    same = rows_of(DYING, lr=1.4e-3, steps=dense)
    study = write_study(tmp_path / "c", {"standard-lr": [standard], "reduced-lr": [same]})
    assert "clock-same" in kinds(contrast_findings(study))


def test_summary_names_how_arms_ended(tmp_path: Path) -> None:
    arms = {"standard-lr": DYING, "adamw": HEALTHY, "fp-twin": PEAKED}
    found = summary_findings(write_study(tmp_path, {arm: [rows_of(c)] for arm, c in arms.items()}))
    words = text(found)
    assert "Dead (uniform output): standard-lr. Collapsed: fp-twin. Alive: adamw." in words
    assert "no failure with adamw; failure all the same with fp-twin" in words
    assert "standard-lr ends with the highest count, 14 of 20" in words
    assert {"ranking-mixed", "ranking-against"} & kinds(found) and "one-seed" in kinds(found)


def test_summary_of_healthy_arms_speaks_of_no_collapse(tmp_path: Path) -> None:
    arms = {"standard-lr": [rows_of(HEALTHY)] * 2, "adamw": [rows_of(HEALTHY, shift=-0.3)] * 2}
    found = summary_findings(write_study(tmp_path, arms))
    assert "collapse" not in text(found).lower() and "one-seed" not in kinds(found)


def test_contrasts_name_registered_arms() -> None:
    assert {name for contrast in CONTRASTS for name in (contrast.base, contrast.other)} <= set(ARMS)
    assert set(ARMS) <= set(arm_styles(list(ARMS)))


def test_setting_changes(tmp_path: Path) -> None:
    write_study(tmp_path, {"standard-lr": []})
    write_run(tmp_path, "standard-lr", 0, rows_of(DYING), lr=1.5e-3, grad_clip=1.0)
    write_run(tmp_path, "reduced-lr", 0, rows_of(DYING), lr=5e-4, grad_clip=1.0)
    assert setting_changes(read_study(tmp_path), "standard-lr", "reduced-lr") == ["lr 0.0015 → 0.0005"]


# --- reading -------------------------------------------------------------------------------------------


def test_a_torn_last_line_is_left_out(tmp_path: Path) -> None:
    write_study(tmp_path, {"adamw": [rows_of(HEALTHY)]})
    path = tmp_path / "adamw" / "seed0" / "metrics.jsonl"
    whole = path.read_bytes()
    number = len(read_metrics(path))
    cut = whole[: whole.rindex(b'{"kind": "time"') + 9]
    for torn in (cut, cut + b"\n", cut + b"\xff\x00", whole + b"\x00" * 64):
        path.write_bytes(torn)
        assert len(read_metrics(path)) == number - (torn is not whole and not torn.startswith(whole))
        assert read_study(tmp_path).runs[0].last_step == 4000


@pytest.mark.parametrize("damage", [b'{"kind": "eval", "st', b"[1, 2]", b'{"kind": "eval"}', b"\xff\xfe"])
def test_damage_before_the_last_line_is_named(tmp_path: Path, damage: bytes) -> None:
    write_study(tmp_path, {"adamw": [rows_of(HEALTHY)]})
    path = tmp_path / "adamw" / "seed0" / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n")
    lines[2] = damage
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(ValueError, match=r"adamw/seed0/metrics\.jsonl, line 3: expected one JSON object"):
        read_study(tmp_path)


def test_damaged_settings_are_named(tmp_path: Path) -> None:
    write_study(tmp_path, {"adamw": [rows_of(HEALTHY)]})
    (tmp_path / "study.json").write_text('{"arms": ')
    with pytest.raises(ValueError, match=r"study\.json: expected one JSON object"):
        read_study(tmp_path)


def test_rows_written_twice_count_once(tmp_path: Path) -> None:
    rows = rows_of(HEALTHY)
    again = [{**row, "heldout_cross_entropy": 5.0} for row in rows[3:6]]
    study = write_study(tmp_path, {"adamw": [rows[:6] + again + rows[6:]]})
    run = study.runs[0]
    assert [row["step"] for row in run.evals] == list(STEPS)
    assert run.value_at("heldout_cross_entropy", STEPS[4]) == 5.0


def test_values_series_and_spread(tmp_path: Path) -> None:
    study = write_study(tmp_path, {"adamw": [rows_of(HEALTHY), rows_of(HEALTHY, shift=1.0)]})
    run = study.runs[0]
    assert run.value_at("step", 4999) == 4000 and run.value_at("step", 149) == 100
    assert run.value_at("tail_accuracy", 100) is None
    xs, ys = run.series("heldout_cross_entropy", "cumulative_lr")
    assert xs == pytest.approx([1.5e-3 * step for step in STEPS]) and ys[-1] == pytest.approx(6.4)
    assert run.series("tail_accuracy") == ([], [])
    assert study.mean_series("adamw", "heldout_cross_entropy")[1][-1] == pytest.approx(6.9)
    assert course(study, "adamw")[-1]["heldout_cross_entropy"] == pytest.approx(6.9)
    both = spread(run.final("heldout_cross_entropy") for run in study.runs)
    assert both is not None and (both.mean, both.low, both.high, both.count) == pytest.approx(
        (6.9, 6.4, 7.4, 2)
    )
    assert spread([None, math.nan]) is None
    assert study.vocab_size == VOCAB and study.unigram_cross_entropy == UNIGRAM


def test_summary_csv_is_tidy(tmp_path: Path) -> None:
    study = write_study(tmp_path, {"adamw": [rows_of(HEALTHY)] * 2, "fp-twin": [rows_of(DYING)]})
    path = write_summary_csv(study)
    with path.open(newline="") as file:
        table = list(csv.DictReader(file))
    assert path == tmp_path / "summary.csv" and len(table) == 3 * len(STEPS)
    assert list(table[0])[:4] == ["arm", "seed", "step", "tokens_seen"]
    assert table[-1]["arm"] == "fp-twin" and float(table[-1]["heldout_cross_entropy"]) == pytest.approx(LN_V)
    assert table[0]["tail_accuracy"] == "" and "kind" not in table[0]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_atomic(tmp_path / "a.txt", b"old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


# --- table ---------------------------------------------------------------------------------------------


def test_table_of_the_report(tmp_path: Path) -> None:
    arms = {"standard-lr": [rows_of(DYING)], "adamw": [rows_of(HEALTHY)]}
    table = comparison_table(write_study(tmp_path, arms))
    assert table.columns[:6] == [
        "Training", "Tokens @ 1k", "Tokens @ 4k", "Loss @ 1k", "Loss @ 4k", "Recovery?"
    ]  # fmt: skip
    assert table.rows[0] == ["standard-lr", "14", "14", "10.72", "10.72", "yes", "10.82", "0.00", "no"]
    assert table.rows[1][5:] == ["no", "6.40", "0.85", "yes"]
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
        assert comparison_table(study).columns[1:3] == ["Tokens @ 100", "Tokens @ 400"]


def test_table_over_seeds_and_unfinished_runs(tmp_path: Path) -> None:
    arms = {
        "adamw": [rows_of(HEALTHY), rows_of(HEALTHY, shift=0.2), rows_of(DYING)],
        "fp-twin": [rows_of(HEALTHY, steps=STEPS[:6])],
    }
    table = comparison_table(write_study(tmp_path, arms))
    adamw, twin = table.rows
    assert (
        adamw[6] == f"7.94 (6.40{DASH}10.82)"
        and adamw[8] == "yes 2/3, no 1/3"
        and adamw[5] == "no 2/3, yes 1/3"
    )
    assert twin[2] == "4 @ 400", "a shorter arm says which step it is"
    assert f"<br><small>(6.40{DASH}10.82)</small>" in table.html()
    notes = " ".join(table.notes)
    assert "fp-twin seed 0 (at step 400 of 4,000), fp-twin seed 1 (no evaluation yet)" in notes


def test_recovery_without_a_fall(tmp_path: Path) -> None:
    study = write_study(tmp_path, {"no-decay": [rows_of(OVERCONFIDENT)]})
    assert recovery(study.runs[0]) == "no fall"


# --- figures and report --------------------------------------------------------------------------------


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
    labels = [note.get_text() for note in axis.texts]
    assert labels == ["unigram, 7.25", "uniform, ln V = 10.82"]
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
