"""Measures of generated text, and sampling from a nucleus, against values known beforehand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from bitnet_ext.collapse.instrument.predictors import (
    LastTokenPredictor,
    NetworkPredictor,
    continuations,
    sample_nucleus,
)
from bitnet_ext.inference import generate
from bitnet_ext.metrics import continuation_metrics, heldout_prompts, zipf_exponent
from bitnet_ext.models import BitNetForCausalLM, preset

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("exponent", [0.5, 1.0, 1.7])
def test_zipf_finds_the_exponent_of_a_power_law(exponent: float) -> None:
    counts = 1e9 * np.arange(1, 400) ** -exponent
    assert zipf_exponent(np.random.default_rng(0).permutation(counts)) == pytest.approx(exponent, abs=1e-6)


def test_zipf_of_equal_counts_is_zero_and_of_too_few_is_none() -> None:
    assert zipf_exponent([7] * 50) == pytest.approx(0.0, abs=1e-12)
    assert zipf_exponent([9, 9, 1, 1, 0]) is None


def test_measures_of_a_text_made_by_hand() -> None:
    loop = [1, 2, 3, 4] * 2  # 8 tokens: 5 four-grams, 4 of them different
    fresh = [10, 11, 12, 13, 14, 15, 16, 17]
    measured = continuation_metrics(torch.tensor([loop, fresh]))
    assert measured["distinct_1"] == 12 / 16
    assert measured["distinct_2"] == (4 + 7) / 14  # (1 2) (2 3) (3 4) (4 1), and seven of the other
    assert measured["seq_rep_4"] == pytest.approx((1 / 5 + 0) / 2)
    assert measured["zipf"] == pytest.approx(0.0, abs=1e-12)  # four tokens twice each


def test_prompts_are_real_contexts_spread_over_the_text() -> None:
    prompts = heldout_prompts(np.arange(10_000), 64, 16)
    assert prompts.shape == (64, 16)
    assert bool((prompts.diff(dim=1) == 1).all())
    gaps = prompts[:, 0].diff()
    assert int(gaps.min()) > 16 and int(gaps.max() - gaps.min()) <= 1
    assert int(prompts[0, 0]) == 0 and int(prompts[-1, -1]) > 9_980


@pytest.mark.parametrize("device", DEVICES)
def test_nucleus_leaves_out_the_tail_and_keeps_the_proportions(device: str) -> None:
    p = torch.tensor([0.05, 0.4, 0.3, 0.01, 0.24], device=device)
    generator = torch.Generator(device).manual_seed(0)
    draws = sample_nucleus(p.expand(40_000, -1).contiguous(), 0.9, generator)
    share = torch.bincount(draws, minlength=5).double().cpu() / len(draws)
    expected = torch.tensor([0.0, 0.4, 0.3, 0.0, 0.24]).double() / 0.94
    assert share[0] == 0 and share[3] == 0
    assert float((share - expected).abs().max()) < 4 * math.sqrt(0.25 / len(draws))


def test_nucleus_of_a_certain_prediction_is_its_argmax() -> None:
    p = torch.eye(6).repeat(3, 1)
    assert torch.equal(sample_nucleus(p, 0.95, torch.Generator().manual_seed(1)), p.argmax(-1))


@pytest.mark.parametrize("top_p", [0.0, 1.5])
def test_nucleus_refuses_a_share_outside_its_range(top_p: float) -> None:
    with pytest.raises(ValueError, match=r"top_p must be in \(0, 1\]"):
        sample_nucleus(torch.ones(1, 2) / 2, top_p, torch.Generator())


@pytest.mark.parametrize("device", DEVICES)
def test_greedy_continuation_is_that_of_generate(device: str) -> None:
    model = BitNetForCausalLM(preset("collapse-64", vocab_size=101), seed=3).to(device)
    prompts = torch.randint(0, 101, (5, 7), generator=torch.Generator().manual_seed(0)).to(device)
    session = NetworkPredictor("net", "fresh", model).session(5, 7 + 9)
    assert session is not None
    written = continuations(session, prompts, 9)
    assert written is not None
    assert torch.equal(written, generate(model, prompts, 9)[:, 7:])


def test_logits_that_are_no_numbers_give_no_text() -> None:
    sick = LastTokenPredictor("sick", "dead", 4, lambda last: torch.full((len(last), 4), math.nan))
    session = sick.session(2, 5)
    assert session is not None
    assert continuations(session, torch.zeros(2, 1, dtype=torch.int64), 3, top_p=0.95) is None
