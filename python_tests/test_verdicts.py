"""Verdicts of synthetic studies: the same code must say supported, refuted and undecided as the numbers have it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitnet_ext.collapse.results import Study, read_study
from bitnet_ext.collapse.verdicts import Verdict, verdicts
from bitnet_ext.collapse.verdicts.answers import FAMILIES, contrasts
from bitnet_ext.collapse.verdicts.clock import compare_clocks
from bitnet_ext.collapse.verdicts.judging import Evidence, amount, state_of
from bitnet_ext.collapse.verdicts.questions import CHANGES, STARTS, recovery_arm, width_arm
from bitnet_ext.collapse.verdicts.solutions import LOSS_ARMS, SOLUTIONS, arms_on
from bitnet_ext.collapse.verdicts.statistics import holm

LN_V = math.log(50_257)
UNIGRAM = 7.25
KEYS = ("q1", "q2", "q3", "q4", "q5", "quantisation", *SOLUTIONS)

#: Kind of ending -> held-out cross-entropy, predictive entropy, context use, unique of 20, effective vocabulary.
ENDINGS: dict[str, tuple[float, float, float, float, float]] = {
    "dead": (LN_V, LN_V, 0.0, 14.0, 30.0),
    "peaked": (8.9, 9.6, 0.01, 2.0, 1.2),
    "alive": (6.40, 6.2, 0.85, 4.0, 17.0),
    "learning": (7.45, 7.2, 0.4, 5.0, 8.0),
    "words": (7.30, 7.2, 0.02, 1.0, 1.0),
    "overconfident": (9.0, 2.4, 1.9, 17.0, 60.0),
    "failing": (9.0, 9.1, 0.3, 6.0, 3.0),
}
Plan = dict[str, str | tuple[str, float]]


def rows_of(
    kind: str, *, steps: tuple[int, ...], lr: float, shift: float, begin: str | None
) -> list[dict[str, Any]]:
    """A course from an ordinary start (or from another ending) to the given ending."""
    first = ENDINGS[begin] if begin else (10.99, 10.67, 0.15, 20.0, 800.0)
    rows = []
    for index, step in enumerate(steps):
        share = index / (len(steps) - 1)
        ce, entropy, context, unique, argmax = (
            a + share * (b - a) for a, b in zip(first, ENDINGS[kind], strict=True)
        )
        rows.append(
            {
                "kind": "eval",
                "step": step,
                "cumulative_lr": lr * step,
                "heldout_cross_entropy": ce + share * shift,
                "unigram_cross_entropy": UNIGRAM,
                "predictive_entropy": entropy,
                "mutual_information": context,
                "unique_of_20": unique,
                "effective_argmax_vocabulary": argmax,
                "final_gain_mean_abs": 1 - 0.9 * share,
            }
        )
    return rows


STEPS = (1, 100, 500, 1000, 2000, 4000)


def write_study(
    root: Path, plan: Plan, *, seeds: int = 8, noise: float = 0.02, steps: tuple[int, ...] = STEPS
) -> Study:
    """A study folder: arm -> kind of ending (and what is added to its cross-entropy), with noise between seeds."""
    root.mkdir(exist_ok=True)
    (root / "study.json").write_text(
        json.dumps(
            {
                "arms": {arm: {"summary": arm, "source": "test"} for arm in plan},
                "seeds": seeds,
                "steps": {arm: steps[-1] for arm in plan},
                "vocab_size": 50_257,
                "data": {"name": "made-up"},
            }
        )
    )
    for index, (arm, given) in enumerate(plan.items()):
        kind, added = (given, 0.0) if isinstance(given, str) else given
        begin, own = None, steps
        if arm.startswith("from-"):
            start = int(arm.split("-")[1])
            begin, own = "dead", (start + 1, start + 300, start + 1500)
        for seed in range(seeds):
            shift = added + noise * float(np.random.default_rng([index, seed]).normal())
            write_run(root, arm, seed, rows_of(kind, steps=own, lr=1.5e-3, shift=shift, begin=begin))
    return read_study(root)


def write_run(root: Path, arm: str, seed: int, rows: list[dict[str, Any]]) -> None:
    folder = root / arm / f"seed{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"arm": arm, "seed": seed}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def by_key(study: Study) -> dict[str, Verdict]:
    found = verdicts(study)
    assert tuple(verdict.key for verdict in found) == KEYS
    for verdict in found:
        assert verdict.title and verdict.claim.endswith(".") and verdict.rule and verdict.limits
        assert all(
            sentence.strip() and "nan" not in sentence for sentence in [*verdict.reasons, *verdict.limits]
        )
    return {verdict.key: verdict for verdict in found}


def plan_of(
    *,
    base: str = "dead",
    healthy: str = "alive",
    loss: str = "dead",
    twin: str = "peaked",
    reduced: str = "dead",
    recovery: str = "dead",
    widths: str = "dead",
    **special: str | tuple[str, float],
) -> Plan:
    """A whole study; single arms by name, with _ for - and ., in `special`'s keys as given."""
    plan: Plan = {"standard-lr": base, "adamw": healthy, "no-decay": healthy, "fp-twin": twin}
    plan |= {"reduced-lr": reduced, "reduced-lr-long": reduced, "label-smoothing": loss}
    for key in SOLUTIONS:
        plan |= {arm: loss for arm in arms_on(key, "l2")} | {arm: healthy for arm in arms_on(key, "adamw")}
    plan |= {recovery_arm(start, change): recovery for start in STARTS for change in CHANGES}
    for width in (128, 512, 768):
        plan |= {width_arm(width, "l2"): widths, width_arm(width, "adamw"): healthy}
    return plan | special


# --- each verdict in each direction --------------------------------------------------------------------


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Verdict]]:
    """Whole studies of made-up worlds, written and judged once."""
    plans: dict[str, Plan] = {
        # The L2 term is the cause, nothing else helps, and the dead stay dead.
        "decay": plan_of(),
        # The loss is the cause: the optimiser does not matter, a changed loss helps; quantisation does too.
        "loss": plan_of(
            healthy="dead", loss="alive", twin="alive", reduced="alive", recovery="alive", widths="dead",
            **{f"width-{width}-{o}": "alive" for width in (512, 768) for o in ("l2", "adamw")},
        ),
        # Nothing collapses.
        "well": plan_of(
            base="alive", loss="alive", twin="alive", reduced="alive", recovery="alive", widths="alive"
        ),
    }  # fmt: skip
    done: dict[str, dict[str, Verdict]] = {}

    def world(name: str) -> dict[str, Verdict]:
        if name not in done:
            done[name] = by_key(write_study(tmp_path_factory.mktemp(name), plans[name]))
        return done[name]

    return world


@pytest.mark.parametrize("key", KEYS)
def test_other_numbers_give_another_answer(worlds: Callable[[str], dict[str, Verdict]], key: str) -> None:
    expected = {"decay": "refuted", "loss": "supported"}
    for name, answer in expected.items():
        assert worlds(name)[key].answer == answer, (name, worlds(name)[key].reasons)
    # Without a collapse there is nothing to explain, fix or prevent; what started dead did come back.
    assert worlds("well")[key].answer == ("supported" if key == "q3" else "undecided")


def test_reasons_carry_the_numbers(worlds: Callable[[str], dict[str, Verdict]]) -> None:
    found = worlds("decay")
    q1 = " ".join(found["q1"].reasons)
    assert "With the same cross-entropy loss neither adamw nor no-decay collapses." in q1
    assert "adamw minus standard-lr at step 4,000: held-out cross-entropy \N{MINUS SIGN}4.4" in q1
    assert "n = 8, p = 0.008, Holm-adjusted p = 0.016 over 2 contrasts." in q1
    assert "The loss itself does not prefer what standard-lr became: it is lower with adamw." in q1
    assert "standard-lr at step 4,000: cross-entropy 3.5" in q1 and "ignores its context" in q1
    s1 = " ".join(found["s1"].reasons)
    assert "None of the 3 levels keeps the network from collapsing." in s1
    assert "On the healthy optimiser: smoothing-0.1-adamw minus adamw" in s1
    assert "Brought back: from-350-no-decay" in worlds("loss")["q3"].reasons[0]
    limits = " ".join(found["s1"].limits)
    assert "One text (made-up)" in limits and "8 seeds an arm and 4,000 steps" in limits
    assert "ranks them the wrong way round" in limits and "smallest Holm-adjusted p" not in limits
    assert "Widths from 128 to 768" in " ".join(found["q5"].limits)


def test_rules_state_their_thresholds(worlds: Callable[[str], dict[str, Verdict]]) -> None:
    for verdict in worlds("decay").values():
        assert "undecided otherwise" in verdict.rule and "95% interval" in verdict.rule, verdict.key
        assert "0.1 nats" in verdict.rule and "0.5 nats" in verdict.rule and "6 seeds" in verdict.rule


@pytest.mark.parametrize("key", KEYS)
def test_missing_arms_and_few_seeds_are_named(tmp_path: Path, key: str) -> None:
    alone = by_key(write_study(tmp_path / "a", {"standard-lr": "dead"}))[key]
    assert alone.answer == "undecided" and any("Missing arms: " in reason for reason in alone.reasons)


def test_five_seeds_decide_nothing(tmp_path: Path) -> None:
    for name, plan in (("a", plan_of()), ("b", plan_of(healthy="dead", loss="alive", recovery="alive"))):
        for verdict in by_key(write_study(tmp_path / name, plan, seeds=5)).values():
            assert verdict.answer == "undecided"
            assert any("sign-flip test over so few cannot reach p < 0.05" in r for r in verdict.reasons)


def test_one_missing_level_leaves_a_refutation_open(tmp_path: Path) -> None:
    plan = {arm: kind for arm, kind in plan_of().items() if arm != "diversity-0.3-l2"}
    found = by_key(write_study(tmp_path, plan))
    assert found["s3"].answer == found["q2"].answer == "undecided"
    assert found["s1"].answer == found["s2"].answer == found["s4"].answer == "refuted"
    assert "Missing arms: diversity-0.3-l2." in found["s3"].reasons


def test_one_level_that_works_is_enough(tmp_path: Path) -> None:
    found = by_key(write_study(tmp_path, plan_of(**{"entropy-0.1-l2": "learning"})))
    assert {key: found[key].answer for key in ("s1", "s2", "s3", "s4", "q2")} == {
        "s1": "refuted", "s2": "supported", "s3": "refuted", "s4": "refuted", "q2": "supported"
    }  # fmt: skip
    assert found["q1"].answer == "undecided", "the optimiser and the loss both remove it"
    assert "do not single out one cause" in found["q1"].reasons[0]
    assert "Kept from collapsing: entropy-0.1-l2." in found["s2"].reasons


def test_wide_intervals_leave_open(tmp_path: Path) -> None:
    plan = {"standard-lr": "dead", **{arm: "learning" for arm in arms_on("s1", "l2")}}
    narrow = by_key(write_study(tmp_path / "a", plan, noise=0.05))
    wide = by_key(write_study(tmp_path / "b", plan, noise=1.5))
    assert narrow["s1"].answer == "supported" and wide["s1"].answer == "undecided"
    assert any("Intervals on both sides of a threshold" in reason for reason in wide["s1"].reasons)


def test_looking_at_many_arms_asks_for_more(tmp_path: Path) -> None:
    """A level that just makes it alone does not when it is the best of three."""
    rows = [
        {"excess_over_unigram": 0.3 + x, "mutual_information": 0.5} for x in (-0.3, -0.2, 0, 0.1, 0.2, 0.33)
    ]
    assert state_of(rows) == "learning" and state_of(rows, confidence=1 - 0.05 / 21) == "open"


def test_cost_on_the_healthy_optimiser_is_measured(tmp_path: Path) -> None:
    plan = plan_of(
        **{
            "smoothing-0.05-adamw": ("alive", 0.002),
            "smoothing-0.1-adamw": ("alive", 0.2),
            "smoothing-0.15-adamw": ("alive", -0.2),
        }
    )
    said = by_key(write_study(tmp_path, plan, noise=0.01))["s1"].reasons
    cost = [reason for reason in said if "On the healthy optimiser" in reason and "cross-entropy" in reason]
    assert "It is shown to be within 0.05 nats" in cost[0] and "worse" not in cost[0]
    assert "not shown to be within" in cost[1] and cost[1].endswith("It makes the predictions worse.")
    assert cost[2].endswith("It makes the predictions better.")


def test_a_dead_start_is_needed_for_a_recovery(tmp_path: Path) -> None:
    root = tmp_path / "a"
    study = write_study(root, {recovery_arm(s, c): "dead" for s in STARTS for c in CHANGES})
    assert by_key(study)["q3"].answer == "refuted"
    for seed in range(8):
        rows = rows_of("alive", steps=(351, 800, 1850), lr=1.5e-3, shift=0.0, begin="alive")
        write_run(root, recovery_arm(350, "no-decay"), seed, rows)
    verdict = by_key(read_study(root))["q3"]
    assert verdict.answer == "undecided", "what never was collapsed was not brought back"
    assert any("from-350-no-decay" in r and "not counted" in r for r in verdict.reasons)


def test_width_readings(tmp_path: Path) -> None:
    wide = plan_of(**{"width-768-l2": "alive", "width-512-l2": "alive"})
    assert by_key(write_study(tmp_path / "a", wide))["q5"].answer == "supported"
    # Under L2 it stays at every width, under AdamW it would go away: the two do not agree.
    both = plan_of(**{"width-128-adamw": "dead"})
    assert by_key(write_study(tmp_path / "b", both))["q5"].answer == "undecided"
    wrong = plan_of(**{"width-128-l2": "alive"})
    assert by_key(write_study(tmp_path / "c", wrong))["q5"].answer == "undecided"


# --- states ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ENDINGS)
def test_states_of_endings(tmp_path: Path, kind: str) -> None:
    end = Evidence(write_study(tmp_path, {"standard-lr": kind})).ending("standard-lr")
    assert end.state == {"dead": "collapsed", "peaked": "collapsed"}.get(kind, kind)
    assert end.excess.n == 8 and end.step == 4000


def test_missing_values_and_ended_runs(tmp_path: Path) -> None:
    study = write_study(tmp_path, {"standard-lr": "dead"}, seeds=8)
    rows = rows_of("dead", steps=STEPS, lr=1.5e-3, shift=0.0, begin=None)
    write_run(tmp_path, "standard-lr", 0, [*rows[:-1], {**rows[-1], "heldout_cross_entropy": math.nan}])
    write_run(tmp_path, "standard-lr", 1, rows[:3])
    end = Evidence(read_study(tmp_path)).ending("standard-lr")
    assert end.excess.n == 6 and end.left_out == 2 and end.state == "collapsed"
    write_run(tmp_path, "standard-lr", 2, [*rows[:-1], {**rows[-1], "mutual_information": None}])
    assert Evidence(read_study(tmp_path)).ending("standard-lr").state == "few"
    (tmp_path / "standard-lr" / "seed3" / "ended.json").write_text('{"reason": "the loss is nan"}')
    assert Evidence(read_study(tmp_path)).ending("standard-lr").state == "diverged"
    assert by_key(read_study(tmp_path))["q1"].answer == "undecided"
    assert study.seeds == list(range(8))


def test_short_runs_are_not_judged(tmp_path: Path) -> None:
    plan = plan_of()
    found = by_key(write_study(tmp_path, plan, steps=(1, 10, 100, 600)))
    assert {found[key].answer for key in KEYS if key != "q3"} == {"undecided"}
    assert any("Too short to be judged" in reason for reason in found["q1"].reasons)


@pytest.mark.parametrize("rows", [0, 1])
def test_next_to_nothing_is_enough(tmp_path: Path, rows: int) -> None:
    study = write_study(tmp_path, {"standard-lr": "dead"}, seeds=1)
    write_run(tmp_path, "standard-lr", 0, rows_of("dead", steps=STEPS, lr=1e-3, shift=0, begin=None)[:rows])
    assert {verdict.answer for verdict in verdicts(read_study(study.directory))} == {"undecided"}
    assert contrasts(read_study(study.directory)) == []


# --- the clock ------------------------------------------------------------------------------------------


def dying(step: float, speed: float) -> float:
    """Cross-entropy that falls and then rises to uniform, on a clock."""
    at = step * speed
    return float(np.interp(at, [0, 0.15, 0.6, 1.5, 50], [10.99, 9.7, 9.4, LN_V, LN_V]))


@pytest.mark.parametrize(
    ("kind", "reading"), [("slowed", "rescaled"), ("other", "different"), ("same", "same")]
)
def test_clock(tmp_path: Path, kind: str, reading: str) -> None:
    steps = range(1, 4001, 50)
    study = write_study(tmp_path, {"standard-lr": "dead", "reduced-lr": "dead"})
    for seed in range(8):
        wobble = 0.01 * seed
        for arm, lr in (("standard-lr", 1.5e-3), ("reduced-lr", 1.45e-3 if kind == "same" else 5e-4)):
            by_step = kind == "other"  # then both run the same course by steps, whatever the learning rate
            rows = [
                {
                    **rows_of("dead", steps=(1, 2), lr=lr, shift=0.0, begin=None)[1],
                    "step": step,
                    "cumulative_lr": lr * step,
                    "heldout_cross_entropy": dying(step, 1.5e-3 if by_step else lr)
                    + (wobble if arm == "reduced-lr" else 0.0),
                }
                for step in steps
            ]
            write_run(tmp_path, arm, seed, rows)
    clock = compare_clocks(read_study(study.directory), "standard-lr", "reduced-lr", "heldout_cross_entropy")
    assert clock is not None and clock.reading == reading
    q4 = by_key(read_study(study.directory))["q4"]
    assert any("over the cumulative learning rate, ratio" in reason for reason in q4.reasons)


# --- contrasts ------------------------------------------------------------------------------------------


def test_contrasts_are_paired_and_corrected(tmp_path: Path) -> None:
    study = write_study(tmp_path, plan_of(), seeds=7)
    found = contrasts(study)
    assert {result.family for result in found} == set(FAMILIES)
    first = next(
        result for result in found if result.family == "q1" and result.key == "heldout_cross_entropy"
    )
    assert (first.base, first.other, first.step, first.estimate.n) == ("standard-lr", "adamw", 4000, 7)
    finals = [
        next(r for r in study.of("adamw") if r.seed == seed).final("heldout_cross_entropy")
        - next(r for r in study.of("standard-lr") if r.seed == seed).final("heldout_cross_entropy")  # type: ignore
        for seed in range(7)
    ]
    assert first.estimate.values == pytest.approx(finals)
    for name in FAMILIES:
        for key in FAMILIES[name].keys:
            members = [result for result in found if result.family == name and result.key == key]
            assert [r.p_holm for r in members] == holm([r.estimate.p for r in members])
            assert all(r.family_size == len(members) for r in members)


def test_every_loss_arm_is_of_a_solution() -> None:
    assert len(LOSS_ARMS) == 12 and len(set(LOSS_ARMS)) == 12


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0.000"), (-0.0001, "0.000"), (-1.234, "\N{MINUS SIGN}1.23"), (0.05, "0.050")]
)
def test_amounts(value: float, text: str) -> None:
    assert amount(value) == text
