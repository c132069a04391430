"""What a small comparison is said to show: words follow from its numbers, other numbers give other words."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
from comparison_studies import (
    DYING,
    HEALTHY,
    OVERCONFIDENT,
    PEAKED,
    STEPS,
    WORD_COUNTS,
    Course,
    Row,
    rows_of,
    write_run,
    write_study,
)

from bitnet_ext.collapse.arms import ARMS
from bitnet_ext.collapse.diagnose.diagnosis import diagnose
from bitnet_ext.collapse.diagnose.inputs import read_case
from bitnet_ext.collapse.pages.comparison import render_report
from bitnet_ext.collapse.pages.comparison_table import comparison_table
from bitnet_ext.collapse.pages.figures.comparison import arm_styles, draw_figures
from bitnet_ext.collapse.results import read_study
from bitnet_ext.collapse.results.status import STATUS, arm_status
from bitnet_ext.collapse.verdicts.contrasts import CONTRASTS, contrast_findings
from bitnet_ext.collapse.verdicts.findings import arm_findings
from bitnet_ext.collapse.verdicts.summary import summary_findings
from bitnet_ext.models import preset
from bitnet_ext.training import TrainConfig

MINUS = "\N{MINUS SIGN}"


def kinds(findings: list[Any]) -> set[str]:
    return {finding.kind for finding in findings}


def text(findings: list[Any]) -> str:
    return "\n".join(finding.text for finding in findings)


# --- one arm -------------------------------------------------------------------------------------------


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


def test_small_logits_at_the_start_are_no_death(tmp_path: Path) -> None:
    rows = rows_of({1: DYING[4000], 4000: DYING[4000]}, steps=(1, 2, 5))
    for row in rows:
        row["final_gain_mean_abs"] = 1.0  # as in a new network
    study = write_study(tmp_path, {"adamw": [rows]}, steps=5)
    found = kinds(arm_findings(study, "adamw"))
    assert "ending-untrained" in found and "uniform" not in found


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


# --- too early -------------------------------------------------------------------------------------------


def _short(folder: Path, arm: str, course: Course, warmup_steps: int) -> list[Row]:
    """Rows of a run of 100 steps, and its config.json with a warm-up."""
    rows = rows_of(course, steps=(1, 10, 50, 100))
    write_run(folder, arm, 0, rows, warmup_steps=warmup_steps)
    return rows


SLOW: Course = {1: (10.99, 10.67, 0.15, 20, 1.0), 100: (10.2, 10.6, 0.05, 4, 1.0)}


def test_a_comparison_within_the_warm_up_concludes_nothing(tmp_path: Path) -> None:
    write_study(tmp_path, {"standard-lr": [], "adamw": []}, steps=100)
    for arm, course in (("standard-lr", SLOW), ("adamw", {**SLOW, 100: (9.3, 10.3, 0.09, 12, 1.0)})):
        _short(tmp_path, arm, course, warmup_steps=375)
    study = read_study(tmp_path)
    found = summary_findings(study)
    assert found[0].kind == "too-early" and "All arms are too short" in found[0].text
    assert "rises until step 375, and the last evaluation is at step 100" in found[0].text
    assert not kinds(found) & {"ranking-against", "ranking-agrees", "ranking-mixed", "highest-count-dead"}
    assert kinds(contrast_findings(study)) == {"contrast-too-early"}
    assert not kinds(arm_findings(study, "adamw")) & {
        "tokens-fell-collapse",
        "over-confident",
        "under-confident",
    }
    assert [row[2] for row in comparison_table(study).rows] == ["too early", "too early"]
    page = render_report(study)
    assert page.count('class="badge early"') == 2 and 'class="badge bad"' not in page


def test_arms_that_are_too_short_stay_out_of_a_comparison(tmp_path: Path) -> None:
    arms = {"standard-lr": [rows_of(DYING)], "adamw": [rows_of(HEALTHY)], "no-decay": []}
    write_study(tmp_path, arms)
    _short(tmp_path, "no-decay", SLOW, warmup_steps=375)
    found = summary_findings(read_study(tmp_path))
    assert (
        found[0].kind == "too-early"
        and "1 of 3 arms are too short for a conclusion (no-decay)" in found[0].text
    )
    (ranking,) = (finding for finding in found if finding.kind.startswith("ranking"))
    assert ranking.text.startswith("Of 1 pair of arms")


# --- one verdict for one run -------------------------------------------------------------------------------

#: Kinds of a diagnosis that agree with a report's status; "none" is no finding.
AGREEING = {
    "warmup": {"warm-up"},
    "early": {"unigram-stage", "decay-death"},  # decay that acts is told before it has done its work
    "untrained": {"frozen", "diverged"},
    "unigram": {"unigram-stage"},
    "collapsed": {"collapsed", "decay-death", "diverged", "uniform-output"},
    "failing": {"collapsed", "decay-death", "diverged", "uniform-output"},
    "uniform": {"decay-death", "uniform-output"},
    "overconfident": {"over-confidence", "diverged"},
    "learning": {"none", "unigram-stage"},
    "alive": {"none", "over-confidence"},  # it predicts well, and may be too sure of it
}


@pytest.mark.parametrize("warmup_steps", [10, 375])
@pytest.mark.parametrize("last", [100, 400, 1000, 4000])
@pytest.mark.parametrize("course", [DYING, HEALTHY, WORD_COUNTS, OVERCONFIDENT, PEAKED, SLOW])
def test_report_and_diagnose_agree(tmp_path: Path, course: Course, last: int, warmup_steps: int) -> None:
    write_study(tmp_path, {"standard-lr": []}, steps=last)
    rows = rows_of(course, steps=tuple(step for step in STEPS if step <= last))
    rows = [row | {"latent_mean_abs": 0.03 + 1e-6 * row["step"]} for row in rows]  # what trains moves
    settings = TrainConfig(
        steps=last, optimizer="adam_l2", weight_decay=0.1, decay_norms=True, warmup_steps=warmup_steps
    )
    folder = write_run(tmp_path, "standard-lr", 0, rows)
    content = json.loads((folder / "config.json").read_text())
    content |= {"model": preset("collapse-256").to_dict(), "train": settings.to_dict()}
    (folder / "config.json").write_text(json.dumps(content))
    status = arm_status(read_study(tmp_path), "standard-lr")
    found = diagnose(read_case(folder))
    assert found.status == status and status is not None
    assert found.kind in AGREEING[status], (status, found.findings)
