"""Statistics over seeds against brute force, SciPy, textbook examples and simulation."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from bitnet_ext.collapse.results import Study, read_study
from bitnet_ext.collapse.verdicts.statistics import (
    differences,
    equivalence,
    holm,
    last_common_step,
    paired,
    sign_flip,
    smallest_p,
    values,
)

NUMBERS = (0.31, -0.12, 0.55, 0.43, 0.08, 0.27, -0.05, 0.61)


def brute_force(data: tuple[float, ...]) -> float:
    observed = abs(sum(data))
    patterns = list(itertools.product((1, -1), repeat=len(data)))
    far = sum(
        abs(sum(s * d for s, d in zip(signs, data, strict=True))) >= observed - 1e-12 for signs in patterns
    )
    return far / len(patterns)


@pytest.mark.parametrize("n", range(1, 9))
def test_sign_flip_is_the_brute_force_one(n: int) -> None:
    assert sign_flip(NUMBERS[:n]) == pytest.approx(brute_force(NUMBERS[:n]))


def test_sign_flip_agrees_with_scipy() -> None:
    expected = stats.permutation_test(
        (np.asarray(NUMBERS),), np.mean, permutation_type="samples", n_resamples=np.inf
    )
    assert sign_flip(NUMBERS) == pytest.approx(expected.pvalue)


@pytest.mark.parametrize("n", [1, 2, 5, 6, 10, 16])
def test_sign_flip_of_one_sign_reaches_its_smallest_p(n: int) -> None:
    assert sign_flip([0.1 * (i + 1) for i in range(n)]) == 2 / 2**n == smallest_p(n)
    assert (smallest_p(n) < 0.05) == (n >= 6), "five seeds cannot show anything at 5 %"


def test_sign_flip_counts_ties_and_zeros() -> None:
    assert sign_flip([0.1] * 3) == 0.25 and sign_flip([0.0] * 8) == 1.0
    # 0.1 + 0.2 - 0.3 is not 0 in floating point: a tie must be counted as one.
    assert sign_flip([0.1, 0.2, -0.3]) == 1.0
    assert sign_flip([0.1, 0.2, 0.3, -0.3]) == pytest.approx(brute_force((0.1, 0.2, 0.3, -0.3)))


def test_sign_flip_beyond_the_exact_range() -> None:
    rng = np.random.default_rng(0)
    for shift in (0.2, 0.5):
        data = tuple(rng.normal(shift, 1.0, 30))
        normal = 2 * stats.norm.sf(abs(sum(data)) / math.sqrt(sum(d * d for d in data)))
        assert sign_flip(data) == pytest.approx(normal, abs=0.02) and sign_flip(data) == sign_flip(data)
    assert 0 < sign_flip([1.0] * 30) < 1e-4


def test_sign_flip_keeps_its_level_under_the_null() -> None:
    rng = np.random.default_rng(1)
    rejected = np.mean([sign_flip(rng.standard_t(3, 8)) < 0.05 for _ in range(1500)])
    assert 0.025 < rejected < 0.066  # at most 12 of the 256 attainable levels; binomial error 0.006


def test_estimate_is_scipys_bca() -> None:
    found = paired(NUMBERS)
    wide = stats.bootstrap(
        (np.asarray(NUMBERS),), np.mean, n_resamples=60_000, method="BCa", rng=np.random.default_rng(5)
    ).confidence_interval
    assert found.mean == pytest.approx(np.mean(NUMBERS)) and found.n == 8 and found.values == NUMBERS
    assert (found.low, found.high) == pytest.approx((wide.low, wide.high), abs=0.01)
    assert found == paired(list(NUMBERS)), "the same numbers, the same interval"
    narrow = paired(NUMBERS, confidence=0.5)
    assert found.low < narrow.low < narrow.mean < narrow.high < found.high  # type: ignore[operator]


def test_interval_moves_and_scales_with_its_data() -> None:
    found, moved = paired(NUMBERS), paired([3 - 2 * x for x in NUMBERS])
    assert found.low is not None and found.high is not None
    assert moved.mean == pytest.approx(3 - 2 * found.mean)
    assert (moved.low, moved.high) == pytest.approx((3 - 2 * found.high, 3 - 2 * found.low), abs=0.02)


@pytest.mark.parametrize(("n", "least"), [(6, 0.83), (10, 0.87), (14, 0.89)])
def test_coverage_of_the_interval(n: int, least: float) -> None:
    """A bootstrap of few values is somewhat too narrow, but not by more than this; and not too wide."""
    rng = np.random.default_rng(n)
    trials = 200
    hits = 0
    for _ in range(trials):
        found = paired(rng.normal(1.0, 2.0, n))
        assert found.low is not None and found.high is not None
        hits += found.low <= 1.0 <= found.high
    assert least - 0.03 < hits / trials < 0.985


@pytest.mark.parametrize("n", range(1, 31))
def test_every_number_of_seeds(n: int) -> None:
    data = list(np.random.default_rng(n).normal(1.0, 0.5, n))
    found = paired(data)
    assert found.n == n and 0 < found.p <= 1
    if n == 1:
        assert found.low is None and found.high is None and found.p == 1.0
    else:
        assert found.low is not None and found.high is not None
        assert min(data) - 1e-9 <= found.low <= found.mean <= found.high <= max(data) + 1e-9


def test_equal_missing_and_no_values() -> None:
    same = paired([0.1] * 7)
    assert same.low == same.high == same.mean == pytest.approx(0.1) and same.p == 2 / 2**7
    zero = paired([0.0] * 6)
    assert (zero.low, zero.high, zero.p) == (0.0, 0.0, 1.0)
    gaps = paired([1.0, None, math.nan, 2.0, math.inf])
    assert gaps.n == 2 and gaps.values == (1.0, 2.0) and gaps.mean == 1.5
    none = paired([math.nan])
    assert none.n == 0 and math.isnan(none.mean) and (none.low, none.high, none.p) == (None, None, 1.0)
    # One value apart from many equal ones: resamples are degenerate for a share of them.
    odd = paired([0.0] * 9 + [1.0])
    assert odd.low is not None and odd.high is not None and 0 <= odd.low <= 0.1 <= odd.high <= 1


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95, math.nan])
def test_a_confidence_that_is_none(confidence: float) -> None:
    with pytest.raises(ValueError, match="confidence must lie between 0 and 1"):
        paired(NUMBERS, confidence)


def test_holm_textbook() -> None:
    # Wikipedia, "Holm-Bonferroni method": 0.01, 0.04, 0.03, 0.005 at 5 % rejects the first and the last only.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == [] and holm([0.2]) == [0.2] and holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([0.01, 0.01, 0.04]) == pytest.approx([0.03, 0.03, 0.04])
    with pytest.raises(ValueError, match=r"p_values must lie in \[0, 1\], got 1.2"):
        holm([0.1, 1.2])


def test_holm_bounds_the_family_wise_error() -> None:
    rng = np.random.default_rng(2)
    errors = [min(holm(list(rng.uniform(size=12)))) < 0.05 for _ in range(2000)]
    assert 0.035 < np.mean(errors) < 0.062


def test_equivalence_is_two_one_sided_tests() -> None:
    data = [0.01, -0.02, 0.015, 0.0, -0.01, 0.02]
    found = equivalence(data, 0.05)
    error = np.std(data, ddof=1) / math.sqrt(6)
    t = (0.05 - abs(np.mean(data))) / error
    assert found.p == pytest.approx(stats.t.sf(t, 5)) and found.holds and found.margin == 0.05
    half = stats.t.ppf(0.95, 5) * error
    assert (found.low, found.high) == pytest.approx((np.mean(data) - half, np.mean(data) + half))
    assert not equivalence(data, 0.01).holds
    assert not equivalence([x + 0.05 for x in data], 0.05).holds, "a large p of no difference is not enough"
    assert not equivalence([0.3, -0.3, 0.2, -0.2], 0.05).holds


@pytest.mark.parametrize("margin", [0.02, 0.05, 0.2])
def test_equivalence_and_its_interval_say_the_same(margin: float) -> None:
    for seed in range(30):
        found = equivalence(np.random.default_rng(seed).normal(0.02, 0.05, 8), margin)
        assert found.low is not None and found.high is not None
        assert found.holds == (-margin < found.low and found.high < margin)


def test_equivalence_at_the_edges() -> None:
    assert equivalence([0.01], 0.05).holds is False and equivalence([], 0.05).p == 1.0
    assert equivalence([0.01] * 6, 0.05).holds and not equivalence([0.06] * 6, 0.05).holds
    for margin in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="margin must be above 0"):
            equivalence([0.1, 0.2], margin)


# --- of a study ----------------------------------------------------------------------------------------


def make_study(root: Path, runs: dict[tuple[str, int], dict[int, float | None]]) -> Study:
    """Runs as arm, seed -> step -> held-out cross-entropy."""
    arms = list(dict.fromkeys(arm for arm, _ in runs))
    (root / "study.json").write_text(json.dumps({"arms": arms, "seeds": 4}))
    for (arm, seed), points in runs.items():
        folder = root / arm / f"seed{seed}"
        folder.mkdir(parents=True)
        rows: list[dict[str, Any]] = [
            {"kind": "eval", "step": step, "heldout_cross_entropy": value} for step, value in points.items()
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_study(root)


def test_values_and_differences_of_a_study(tmp_path: Path) -> None:
    key = "heldout_cross_entropy"
    study = make_study(
        tmp_path,
        {
            ("a", 0): {1: 11.0, 100: 9.0, 200: 8.0},
            ("a", 1): {1: 11.0, 100: 9.5},
            ("a", 2): {1: 11.0, 100: None, 200: 7.0},
            ("a", 3): {1: 10.0},
            ("b", 0): {1: 11.5, 100: 7.0, 200: 6.0, 300: 5.0},
            ("b", 1): {1: 11.0, 100: 7.5, 200: 6.5},
            ("b", 2): {1: 11.0, 100: math.nan, 200: 6.0},
        },
    )
    assert values(study, "a", key) == {0: 11.0, 1: 11.0, 2: 11.0, 3: 10.0}
    assert values(study, "b", key) == {0: 6.0, 1: 6.5, 2: 6.0}
    assert values(study, "b", key, 300) == {0: 5.0} and values(study, "b", key, 150) == {}
    assert differences(study, "a", "b", key) == {0: -2.0, 1: -2.0}, "seed 2 has no value at step 100"
    assert differences(study, "a", "b", key, step=200) == {0: -2.0, 2: -1.0}
    assert differences(study, "a", "b", key, step=1) == {0: 0.5, 1: 0.0, 2: 0.0}
    assert differences(study, "a", "none", key) == {} and values(study, "none", key) == {}
    assert values(study, "a", "no_such_metric") == {}
    assert last_common_step(study.of("b")) == 200 and last_common_step([]) is None
