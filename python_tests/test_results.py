"""A study's files read back, whatever became of them, and the rules of how a run ended."""

from __future__ import annotations

import csv
import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
from comparison_studies import (
    DYING,
    HEALTHY,
    LN_V,
    STEPS,
    UNIGRAM,
    VOCAB,
    WORD_COUNTS,
    Row,
    rows_of,
    write_run,
    write_study,
)

from bitnet_ext.collapse.results import read_metrics, read_study, spread, write_atomic, write_summary_csv
from bitnet_ext.collapse.results.settings import setting_changes
from bitnet_ext.collapse.results.status import classify, course, find_fall

# --- files ---------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    "damage",
    [
        b'{"kind": "eval", "st',
        b"[1, 2]",
        b'{"kind": "eval"}',
        b'{"kind": ["eval"], "step": 1}',
        b'{"kind": "eval", "step": 1e999}',
        b'{"kind": "eval", "step": 1' + b"0" * 400 + b"}",
        b'{"kind": ' * 100_000,
        b"\xff\xfe",
    ],
)
def test_damage_before_the_last_line_is_named(tmp_path: Path, damage: bytes) -> None:
    write_study(tmp_path, {"adamw": [rows_of(HEALTHY)]})
    path = tmp_path / "adamw" / "seed0" / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n")
    lines[2] = damage
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(ValueError, match=r"adamw/seed0/metrics\.jsonl, line 3: expected one JSON object"):
        read_study(tmp_path)


@pytest.mark.parametrize("damage", [b'{"arms": ', b"[]", b'"x"', b"", b"\xff", b'{"a":' * 100_000])
@pytest.mark.parametrize("name", ["study.json", "adamw/seed0/config.json", "adamw/seed0/ended.json"])
def test_damaged_settings_are_named(name: str, damage: bytes, tmp_path: Path) -> None:
    write_study(tmp_path, {"adamw": [rows_of(HEALTHY)]})
    (tmp_path / name).write_bytes(damage)
    with pytest.raises(ValueError, match=rf"{name} is damaged: it must hold .* as a JSON object") as error:
        read_study(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("settings", ['{"seeds": 1000000000000}', '{"seeds_of": {"adamw": 1000000000000}}'])
def test_a_number_of_seeds_beyond_memory_is_left_out(settings: str, tmp_path: Path) -> None:
    write_study(tmp_path, {"adamw": [rows_of(HEALTHY)]})
    (tmp_path / "study.json").write_text(settings)
    assert len(read_study(tmp_path).planned_seeds("adamw")) == 1


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


def test_setting_changes(tmp_path: Path) -> None:
    write_study(tmp_path, {"standard-lr": []})
    write_run(tmp_path, "standard-lr", 0, rows_of(DYING), lr=1.5e-3, grad_clip=1.0)
    write_run(tmp_path, "reduced-lr", 0, rows_of(DYING), lr=5e-4, grad_clip=1.0)
    assert setting_changes(read_study(tmp_path), "standard-lr", "reduced-lr") == ["lr 0.0015 → 0.0005"]


# --- how a run ended -----------------------------------------------------------------------------------


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
        # A new network's output is nearly uniform: an entropy that stayed so is no failure while the loss falls.
        ({"mutual_information": 0.1, "heldout_cross_entropy": 9, "predictive_entropy": 10.3}, "early"),
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


@pytest.mark.parametrize(
    ("losses", "gain", "warmup", "status"),
    [
        ([10.99, 10.9, 10.8, 10.75], 1.0, 1000, "warmup"),  # barely trained, were it past its warm-up
        ([10.99, 9.5, 9.0, 8.0], 1.0, 1000, "warmup"),  # falling
        ([10.99, 8.6, 8.2, 8.15], 1.0, 1000, "warmup"),  # stands still, at a rate that still rises
        ([10.99, 8.6, 8.2, 8.15], 1.0, 999, "collapsed"),
        ([10.99, 8.6, 8.2, 8.15], 0.05, 1000, "collapsed"),  # a vanished gain is a failure at any step
        ([10.99, 8.6, 7.9, 7.5], 1.0, 1000, "unigram"),
    ],
)
def test_warm_up_comes_before_a_verdict(losses: list[float], gain: float, warmup: int, status: str) -> None:
    rows = rows_of(WORD_COUNTS, steps=(1, 100, 600, 1000))
    for row, loss in zip(rows, losses, strict=True):
        row |= {"heldout_cross_entropy": loss, "predictive_entropy": 8.0, "mutual_information": 0.05}
    rows[-1] |= {"final_gain_mean_abs": gain}
    assert classify(rows, LN_V, warmup) == status


@pytest.mark.parametrize(
    ("first_gain", "losses", "status"),
    [
        (
            1.0,
            [10.99, 10.6, 10.0, 9.4],
            "early",
        ),  # a new network's output is nearly uniform while its loss falls
        (0.5, [10.99, 10.6, 10.0, 9.4], "collapsed"),  # a run that goes on from another one began elsewhere
    ],
)
def test_a_nearly_uniform_output(first_gain: float, losses: list[float], status: str) -> None:
    rows = rows_of(WORD_COUNTS, steps=(1, 100, 600, 1000))
    for row, loss in zip(rows, losses, strict=True):
        row |= {"heldout_cross_entropy": loss, "predictive_entropy": 10.5, "mutual_information": 0.05}
        row |= {"final_gain_mean_abs": first_gain}
    assert classify(rows, LN_V) == status


@pytest.mark.parametrize(
    ("gains", "status"),
    [
        ([1.0, 0.95, 0.9, 0.8], "untrained"),
        ([1.0, 0.6, 0.2, 0.001], "collapsed"),  # moved a long way without a better loss
        ([0.7, 0.65, 0.6, 0.5], "collapsed"),  # goes on from another run
    ],
)
def test_only_a_fresh_network_is_barely_trained(gains: list[float], status: str) -> None:
    rows = rows_of(WORD_COUNTS, steps=(1, 100, 600, 1000))
    for row, gain in zip(rows, gains, strict=True):
        row |= {"heldout_cross_entropy": 10.7, "predictive_entropy": 10.5, "mutual_information": 0.01}
        row |= {"final_gain_mean_abs": gain, "lm_head_mean_abs": 0.03}
    assert classify(rows, LN_V) == status
    for row in rows:
        row |= {"heldout_cross_entropy": LN_V, "predictive_entropy": LN_V}
    assert classify(rows, LN_V) == ("uniform" if gains[0] < 1 else "untrained")


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
