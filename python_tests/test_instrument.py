"""The instrument check on predictors whose metrics are known in closed form, and on planted metrics."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bitnet_ext.collapse import options
from bitnet_ext.collapse.instrument import command, judging
from bitnet_ext.collapse.instrument.check import InstrumentReport, instrument_check
from bitnet_ext.collapse.instrument.judging import judge
from bitnet_ext.collapse.instrument.measuring import jackknife_errors
from bitnet_ext.collapse.instrument.page import instrument_table, write_instrument
from bitnet_ext.collapse.instrument.predictors import NetworkPredictor, bigram_predictor, continuations
from bitnet_ext.collapse.instrument.scales import HIGHER, HUMAN_LIKE, LOWER, Scale
from bitnet_ext.data.corpora import Corpus
from bitnet_ext.data.statistics import token_counts, unigram_log_probs
from bitnet_ext.models import BitNetForCausalLM, preset
from bitnet_ext.training.checkpoint import write_checkpoint

V = 211
CONFIG = preset("collapse-64", vocab_size=V)


def _text(length: int, seed: int) -> Any:
    """A Markov chain: each id has three that follow it, and now and then any comes; frequent ids follow most, as in
    real text.
    """
    rng = np.random.default_rng(seed)
    weights = 1 / np.arange(1, V + 1)
    weights /= weights.sum()
    follow = np.random.default_rng(99).choice(V, (V, 3), p=weights)
    free = rng.choice(V, length, p=weights)
    tokens = np.zeros(length, np.uint16)
    for i in range(1, length):
        tokens[i] = follow[tokens[i - 1], rng.integers(3)] if rng.random() < 0.7 else free[i]
    return tokens


def _corpus() -> Corpus:
    return Corpus(
        "chain", "made", "a Markov chain", _text(30_000, 1), _text(9_000, 2), 1, 1, V, None, "0" * 64
    )


@pytest.fixture(scope="module")
def report() -> InstrumentReport:
    return instrument_check(_corpus(), CONFIG, max_tokens=1500)


def _row(report: InstrumentReport, name: str) -> dict[str, Any]:
    return next(row for row in report.rows if row["network"] == name)


def test_uniform(report: InstrumentReport) -> None:
    row = _row(report, "uniform")
    assert row["heldout_cross_entropy"] == pytest.approx(math.log(V), abs=1e-5)
    assert row["predictive_entropy"] == pytest.approx(math.log(V), abs=1e-5)
    assert row["mutual_information"] == pytest.approx(0, abs=1e-5)
    assert row["argmax_vocabulary"] == 1  # of equal logits the lowest id, everywhere
    assert row["unique_of_20"] == row["unique_20_random"] == 1
    assert row["greedy_seq_rep_4"] == pytest.approx(1 - 1 / 61)


def test_unigram(report: InstrumentReport) -> None:
    row = _row(report, "unigram")
    assert row["heldout_cross_entropy"] == pytest.approx(report.settings["unigram_cross_entropy"], abs=1e-5)
    assert row["excess_over_unigram"] == pytest.approx(0, abs=1e-5)
    assert row["mutual_information"] == pytest.approx(0, abs=1e-5)
    assert row["kl_to_unigram"] == pytest.approx(0, abs=1e-5)


def test_bigram_uses_context(report: InstrumentReport) -> None:
    row = _row(report, "bigram")
    assert row["excess_over_unigram"] < -0.5
    assert row["mutual_information"] > 0.5
    assert "final_gain_mean_abs" not in row  # no network


def test_human_text_is_the_best_there_is(report: InstrumentReport) -> None:
    row, corpus = _row(report, "human next token"), _corpus()
    assert row["heldout_cross_entropy"] == pytest.approx(0, abs=1e-5)
    assert row["accuracy"] == 1
    assert row["logit_std"] is None
    assert row["greedy_distinct_1"] == row["nucleus_distinct_1"]
    assert row["argmax_vocabulary"] <= len(np.unique(corpus.heldout))


def test_dead_networks(report: InstrumentReport) -> None:
    still, rounding, empty = (
        _row(report, f"dead: {name}") for name in ("final gain 0", "final gain 1e-7", "latents 0")
    )
    for row in (still, rounding):
        assert row["heldout_cross_entropy"] == pytest.approx(math.log(V), abs=1e-5)
        assert row["mutual_information"] == pytest.approx(0, abs=1e-5)
    assert still["argmax_vocabulary"] == 1
    assert rounding["argmax_vocabulary"] > 50  # rounding-level logits have argmaxes, too
    assert 0 < rounding["final_gain_mean_abs"] < 1e-6
    assert empty["latent_mean_abs"] == 0 and empty["ternary_zero"] == 1 and empty["absmean_clamped"] == 1


def test_values_lie_in_their_attainable_ranges(report: InstrumentReport) -> None:
    assert len(report.scales) > 35
    for scale in report.scales:
        for row in report.rows:
            value = row.get(scale.key)
            if value is not None:
                assert scale.low is None or value >= scale.low - 1e-5, (scale.key, row["network"])
                assert scale.high is None or value <= scale.high + 1e-5, (scale.key, row["network"])


def test_counts_fail_and_cross_entropy_and_context_pass(report: InstrumentReport) -> None:
    found = {judgement.key: judgement for judgement in report.judgements}
    for key in ("unique_20_random", "argmax_vocabulary", "greedy_seq_rep_4"):
        assert found[key].status == judging.INVERTED
        assert found[key].dead in {row["network"] for row in report.rows if row["kind"] == "dead"}
        assert found[key].healthy == "bigram"
    assert {"heldout_cross_entropy", "excess_over_unigram", "mutual_information", "accuracy"} <= set(
        report.usable
    )
    assert found["final_gain_mean_abs"].status == judging.DESCRIPTIVE


def test_error_of_cross_entropy_is_that_of_the_row_means(report: InstrumentReport) -> None:
    """For a mean over equal groups the jackknife is the textbook standard error."""
    x = np.random.default_rng(0).normal(size=20)
    left_out = [{"mean": float(np.delete(x, i).mean())} for i in range(20)]
    assert jackknife_errors(left_out)["mean"] == pytest.approx(x.std(ddof=1) / math.sqrt(20), rel=1e-9)
    assert jackknife_errors([{"a": 1.0}]) == {}
    assert jackknife_errors([{"a": 1.0}, {"a": math.nan}]) == {}
    bigram = report.errors["bigram"]
    assert 0.01 < bigram["heldout_cross_entropy"] < 0.3
    assert report.errors["uniform"]["heldout_cross_entropy"] < 1e-6


def _planted(better: str | None) -> Scale:
    return Scale("planted", "planted", better, None, None, "")


PAIR = [
    {"network": "good", "kind": "healthy", "planted": 2.0},
    {"network": "bad", "kind": "dead", "planted": 5.0},
    {"network": "text", "kind": "human", "planted": 1.9},
]


@pytest.mark.parametrize(
    ("better", "errors", "status"),
    [
        (HIGHER, {}, judging.INVERTED),
        (LOWER, {}, judging.USABLE),
        (HUMAN_LIKE, {}, judging.USABLE),
        (None, {}, judging.DESCRIPTIVE),
        (HIGHER, {"good": {"planted": 1.2}, "bad": {"planted": 1.2}}, judging.BLUNT),
        (LOWER, {"bad": {"planted": 2.0}}, judging.BLUNT),
        (HIGHER, {"good": {"planted": 0.5}, "bad": {"planted": 0.5}}, judging.INVERTED),
    ],
)
def test_a_planted_metric(better: str | None, errors: dict[str, dict[str, float]], status: str) -> None:
    (found,) = judge([_planted(better)], PAIR, errors)
    assert found.status == status
    if better is not None:
        assert (found.healthy_value, found.dead_value) == (2.0, 5.0)


def test_the_worst_pair_decides() -> None:
    rows = [*PAIR, {"network": "other", "kind": "dead", "planted": 1.0}]
    (found,) = judge([_planted(HIGHER)], rows, {})
    assert (found.status, found.dead) == (judging.INVERTED, "bad")
    (found,) = judge([_planted(LOWER)], rows, {})
    assert (found.status, found.dead, found.dead_value) == (judging.INVERTED, "other", 1.0)
    (found,) = judge([_planted(LOWER)], rows[:1], {})
    assert found.status == judging.UNMEASURED


def test_bigram_is_a_distribution_made_of_counts() -> None:
    tokens = np.array([0, 1, 0, 1, 0, 2, 0, 1], np.uint16)
    unigram = torch.from_numpy(unigram_log_probs(tokens, 4))
    session = bigram_predictor(tokens, unigram, "cpu", prior=2.0).session(4, 1)
    assert session is not None
    p = session(torch.arange(4)[:, None]).double().exp()
    assert torch.allclose(p.sum(1), torch.ones(4).double(), atol=1e-6)
    base = unigram.exp()
    assert p[0, 1].item() == pytest.approx((3 + 2 * base[1].item()) / (4 + 2), rel=1e-6)
    assert torch.allclose(p[3], base, atol=1e-6)  # an id that the text does not have
    assert token_counts(tokens, 4)[3] == 0
    with pytest.raises(ValueError, match="prior must be > 0"):
        bigram_predictor(tokens, unigram, "cpu", prior=0.0)
    # Arrays or tensors; ids beyond the vocabulary would be taken for other pairs.
    other = bigram_predictor(torch.from_numpy(tokens.astype(np.int64)), unigram.numpy(), "cpu", prior=2.0)
    again = other.session(4, 1)
    assert again is not None and torch.equal(again(torch.arange(4)[:, None]).double().exp(), p)
    with pytest.raises(ValueError, match="tokens holds the id 5"):
        bigram_predictor(np.array([0, 5, 1]), unigram, "cpu")


def test_files_and_table(report: InstrumentReport, tmp_path: Path) -> None:
    paths = write_instrument(report, tmp_path / "new")
    assert [path.name for path in paths] == ["instrument.json", "instrument.md", "instrument.png"]
    saved = json.loads(paths[0].read_text())
    assert saved["rows"] == report.rows
    assert [judgement["key"] for judgement in saved["judgements"]] == [scale.key for scale in report.scales]
    assert paths[2].read_bytes().startswith(b"\x89PNG")
    text = instrument_table(report).text()
    line = next(line for line in text.splitlines() if line.startswith("unique of 20, random"))
    assert "not for verdicts: dead:" in line and line.rstrip().split()[-2] == "bigram"
    assert "Hurlbert" in paths[1].read_text()


def test_a_checkpoint_is_a_second_reference(tmp_path: Path) -> None:
    model = BitNetForCausalLM(CONFIG, seed=5)
    path = write_checkpoint(tmp_path, 1, model.state_dict(), {}, {"model_config": CONFIG.to_dict()})
    found = instrument_check(_corpus(), CONFIG, max_tokens=300, checkpoint=path, generation=False)
    assert _row(found, "checkpoint")["kind"] == "healthy"
    # This one never learned anything: it cannot be told from the dead, and the check says so.
    assert "heldout_cross_entropy" not in found.usable
    assert not any("zipf" in scale.key for scale in found.scales)
    with pytest.raises(ValueError, match="vocab_size"):
        instrument_check(_corpus(), preset("collapse-64", vocab_size=V + 2), max_tokens=300, checkpoint=path)


def test_a_network_with_nan_is_measured_without_an_exception() -> None:
    model = BitNetForCausalLM(CONFIG, seed=5)
    with torch.no_grad():
        model.head_weight[3] = math.nan
    sick = NetworkPredictor("sick", "dead", model)
    session = sick.session(2, 6)
    assert session is not None
    assert continuations(session, torch.ones(2, 3, dtype=torch.int64), 3) is None


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    options.add_instrument_arguments(parser)
    args = parser.parse_args(["--data", str(tmp_path / "absent.txt"), "--out", str(tmp_path)])
    assert (args.model, args.eval_tokens, args.generation) == ("collapse-256", 4096, True)
    assert command.run(args) == 2
    assert "absent.txt" in capsys.readouterr().err
