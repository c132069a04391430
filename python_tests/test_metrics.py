"""The measures of predictions and networks against closed forms and direct fp64 computations."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bitnet_ext import metrics, ops
from bitnet_ext.metrics import PredictionStatistics, distribution
from bitnet_ext.metrics.measurement import in_blocks
from bitnet_ext.models import BitNetForCausalLM, preset
from bitnet_ext.nn import BitLinear

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
V = 211


def unigram(vocab_size: int = V, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.log_softmax(2 * torch.randn(vocab_size, generator=generator, dtype=torch.float64), 0)


def targets(count: int, log_probs: Tensor, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.multinomial(log_probs.exp(), count, replacement=True, generator=generator)


def statistics(
    logits: Tensor, target: Tensor, log_probs: Tensor, device: str, chunk: int = 1 << 30
) -> dict[str, Any]:
    accumulator = PredictionStatistics(logits.size(1), log_probs, device)
    for z, t in zip(logits.split(chunk), target.split(chunk), strict=True):
        accumulator.update(z.to(device), t.to(device))
    return accumulator.result()


def direct(logits: Tensor, target: Tensor, log_probs: Tensor) -> dict[str, Any]:
    """Every statistic from its definition, in fp64, without streaming."""
    z = logits.double()
    log_p = torch.log_softmax(z, 1)
    p, rows = log_p.exp(), torch.arange(z.size(0))
    mean_p = p.mean(0)
    argmax = z.argmax(1)
    share = torch.bincount(argmax).double() / z.size(0)
    share = share[share > 0]
    cross_entropy = -log_p[rows, target].mean().item()
    base = -log_probs[target].mean().item()
    entropy = -(p * log_p).sum(1).mean().item()
    marginal = -(mean_p * mean_p.log()).sum().item()
    bins: list[set[int]] = [set(), set(), set()]
    mass = 0.0
    for token in torch.argsort(log_probs, descending=True).tolist():
        bins[0 if mass < 0.5 else 1 if mass < 0.9 else 2].add(token)
        mass += log_probs[token].exp().item()
    accuracy = []
    for ids in bins:
        hits = [int(a == t) for a, t in zip(argmax.tolist(), target.tolist(), strict=True) if t in ids]
        accuracy.append(sum(hits) / len(hits) if hits else None)
    return {
        "heldout_cross_entropy": cross_entropy,
        "unigram_cross_entropy": base,
        "excess_over_unigram": cross_entropy - base,
        "predictive_entropy": entropy,
        "marginal_entropy": marginal,
        "mutual_information": marginal - entropy,
        "kl_to_unigram": (mean_p * (mean_p.log() - log_probs)).sum().item(),
        "logit_std": z.std(1, correction=0).mean().item(),
        "argmax_vocabulary": argmax.unique().numel(),
        "effective_argmax_vocabulary": torch.exp(-(share * share.log()).sum()).item(),
        "unique_20_real": expected_distinct(torch.bincount(argmax), 20),
        "accuracy": (argmax == target).double().mean().item(),
        "top1_probability": p.max(1).values.mean().item(),
        "head_accuracy": accuracy[0],
        "torso_accuracy": accuracy[1],
        "tail_accuracy": accuracy[2],
    }


def expected_distinct(counts: Tensor, sample: int) -> float | None:
    """Distinct classes to expect in a sample without replacement, by binomial coefficients in exact integers."""
    total = int(counts.sum())
    if total < sample:
        return None
    every = math.comb(total, sample)
    return sum(1 - math.comb(total - count, sample) / every for count in counts.tolist() if count)


@pytest.mark.parametrize("device", DEVICES)
def test_uniform_logits(device: str) -> None:
    log_probs = unigram()
    result = statistics(torch.full((64, V), 0.7), targets(64, log_probs), log_probs, device)
    for key in ("heldout_cross_entropy", "predictive_entropy", "marginal_entropy"):
        assert result[key] == pytest.approx(math.log(V), abs=2e-6)
    assert result["mutual_information"] == pytest.approx(0, abs=2e-6)
    assert result["logit_std"] == pytest.approx(0, abs=1e-6)
    assert (result["argmax_vocabulary"], result["effective_argmax_vocabulary"]) == (1, 1.0)


@pytest.mark.parametrize("device", DEVICES)
def test_unigram_logits(device: str) -> None:
    log_probs = unigram()
    result = statistics(log_probs.float().repeat(500, 1), targets(500, log_probs), log_probs, device)
    for key in ("excess_over_unigram", "kl_to_unigram", "mutual_information"):
        assert result[key] == pytest.approx(0, abs=2e-6)
    assert result["heldout_cross_entropy"] == pytest.approx(result["unigram_cross_entropy"], abs=2e-6)
    assert result["argmax_vocabulary"] == 1


@pytest.mark.parametrize("device", DEVICES)
def test_certain_and_right(device: str) -> None:
    log_probs = torch.full((16,), 1 / 16, dtype=torch.float64).log()
    target = torch.arange(16).repeat(4)
    result = statistics(50.0 * nn.functional.one_hot(target, 16).float(), target, log_probs, device)
    assert result["heldout_cross_entropy"] == pytest.approx(0, abs=1e-6)
    assert result["predictive_entropy"] == pytest.approx(0, abs=1e-6)
    assert result["mutual_information"] == pytest.approx(math.log(16), abs=1e-6)
    assert result["effective_argmax_vocabulary"] == pytest.approx(16)
    assert result["argmax_vocabulary"] == 16
    assert result["head_accuracy"] == result["torso_accuracy"] == result["tail_accuracy"] == 1.0


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("dtype", "scale"), [(torch.float32, 3.0), (torch.float32, 1e-6), (torch.bfloat16, 3.0)]
)
def test_random_logits_against_fp64(device: str, dtype: torch.dtype, scale: float) -> None:
    log_probs = unigram()
    generator = torch.Generator().manual_seed(3)
    logits = (scale * torch.randn(700, V, generator=generator) + 5 * scale).to(dtype)
    target = targets(700, log_probs)
    # Half of the time the right answer, so that the accuracies are not all zero.
    logits[torch.arange(0, 700, 2), target[::2]] = 12 * scale
    result, expected = statistics(logits, target, log_probs, device), direct(logits, target, log_probs)
    assert list(result) == list(expected)
    for key, value in expected.items():
        # fp32 row statistics; the spread of tiny logits must be right relative to itself.
        assert result[key] == pytest.approx(value, rel=1e-5, abs=0 if key == "logit_std" else 2e-6), key


@pytest.mark.parametrize("device", DEVICES)
def test_chunks_do_not_matter(device: str) -> None:
    log_probs = unigram()
    logits, target = torch.randn(97, V, generator=torch.Generator().manual_seed(4)), targets(97, log_probs)
    whole = statistics(logits, target, log_probs, device)
    for chunk in (1, 13, 96):
        parts = statistics(logits, target, log_probs, device, chunk)
        for key in whole:
            assert parts[key] == pytest.approx(whole[key], rel=1e-9, abs=1e-7), (chunk, key)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_logits_are_not_hidden(device: str, bad: float) -> None:
    log_probs = unigram()
    logits, target = torch.randn(40, V), targets(40, log_probs)
    logits[17, 5] = bad
    result = statistics(logits, target, log_probs, device, chunk=10)
    assert result.pop("unigram_cross_entropy") == pytest.approx(-log_probs[target].mean().item())
    assert all(value is None or math.isnan(value) for value in result.values())
    assert math.isnan(result["heldout_cross_entropy"]) and math.isnan(result["argmax_vocabulary"])


def test_large_vocabulary_takes_several_blocks() -> None:
    size = 50_257
    log_probs = torch.full((size,), 1 / size, dtype=torch.float64).log()
    logits = torch.randn(37, size, generator=torch.Generator().manual_seed(5))
    target = torch.arange(37)
    result, expected = statistics(logits, target, log_probs, "cpu"), direct(logits, target, log_probs)
    for key in ("heldout_cross_entropy", "mutual_information", "marginal_entropy", "logit_std"):
        assert result[key] == pytest.approx(expected[key], abs=1e-5), key


def test_frequency_bins() -> None:
    log_probs = torch.tensor([0.05, 0.3, 0.25, 0.2, 0.15, 0.03, 0.02], dtype=torch.float64).log()
    # In order: 0.3 and 0.25 reach 0.5; 0.2 and 0.15 reach 0.9; the rest is the tail.
    assert metrics.frequency_bins(log_probs).tolist() == [2, 0, 0, 1, 1, 2, 2]
    assert metrics.frequency_bins(log_probs.numpy()).tolist() == [2, 0, 0, 1, 1, 2, 2]
    half = torch.full((4,), 0.25, dtype=torch.float64).log()
    assert metrics.frequency_bins(half).tolist() == [0, 0, 1, 1]  # equal frequencies: the lower id first


def test_an_empty_bin_is_none() -> None:
    log_probs = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64).log()
    result = statistics(torch.zeros(2, 3), torch.tensor([0, 0]), log_probs, "cpu")
    assert (result["head_accuracy"], result["torso_accuracy"], result["tail_accuracy"]) == (1.0, None, None)


def test_statistics_reject_bad_input() -> None:
    log_probs = unigram()
    with pytest.raises(ValueError, match=r"unigram_log_probs must have shape \[5\]"):
        PredictionStatistics(5, log_probs, "cpu")
    with pytest.raises(ValueError, match="sum to 1"):
        PredictionStatistics(V, log_probs + 0.1, "cpu")
    with pytest.raises(ValueError, match="finite"):
        PredictionStatistics(2, torch.tensor([0.0, -math.inf]), "cpu")
    accumulator = PredictionStatistics(V, log_probs, "cpu")
    with pytest.raises(ValueError, match="at least one position"):
        accumulator.result()
    with pytest.raises(ValueError, match="logits must have shape"):
        accumulator.update(torch.zeros(2, V + 1), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="target must be int64"):
        accumulator.update(torch.zeros(2, V), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"target must lie in \[0, 211\); got values from 0 to 211"):
        accumulator.update(torch.zeros(2, V), torch.tensor([0, V]))


# --- held-out evaluation of a model --------------------------------------------------------------------


def small_model(device: str = "cpu", **overrides: Any) -> BitNetForCausalLM:
    config = preset("collapse-64", vocab_size=V, num_layers=2, **overrides)
    return BitNetForCausalLM(config, seed=0).to(device)


@pytest.mark.parametrize("device", DEVICES)
def test_evaluate_heldout_equals_all_logits(device: str) -> None:
    model = small_model(device)
    log_probs = unigram()
    tokens = targets(1000, log_probs).numpy().astype(np.uint16)
    model.train()
    model.final_norm.eval()
    result = metrics.evaluate_heldout(
        model, tokens, log_probs, seq_len=16, max_tokens=500, batch_rows=7, device=device
    )
    assert model.training and not model.final_norm.training, "each module gets its own mode back"
    rows = torch.from_numpy(metrics.heldout_rows(tokens, 16, 500))
    assert rows.shape == (31, 17)
    with torch.no_grad():
        logits = model(rows[:, :-1].to(device)).float().cpu()
    expected = direct(logits.reshape(-1, V), rows[:, 1:].reshape(-1), log_probs)
    for key, value in expected.items():
        assert result[key] == pytest.approx(value, rel=1e-4, abs=1e-5), key
    # What `unigram_log_probs` gives is taken as it is.
    same = metrics.evaluate_heldout(
        model, tokens, log_probs.numpy(), seq_len=16, max_tokens=500, batch_rows=7, device=device
    )
    assert same == result


def test_evaluation_mode_is_restored_after_an_error() -> None:
    model = small_model()
    model.train()
    with pytest.raises(ValueError, match="held-out tokens"):
        metrics.evaluate_heldout(
            model, np.zeros(5, np.uint16), unigram(), seq_len=16, max_tokens=64, batch_rows=2, device="cpu"
        )
    tokens = np.full(100, V, dtype=np.uint16)  # outside the vocabulary
    with pytest.raises((ValueError, IndexError)):
        metrics.evaluate_heldout(
            model, tokens, unigram(), seq_len=16, max_tokens=64, batch_rows=2, device="cpu"
        )
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize(
    ("length", "seq_len", "max_tokens", "rows"), [(100, 9, 1000, 11), (100, 9, 45, 5), (10, 9, 3, 1)]
)
def test_heldout_rows_are_spread_evenly(length: int, seq_len: int, max_tokens: int, rows: int) -> None:
    picked = metrics.heldout_rows(np.arange(length, dtype=np.uint16), seq_len, max_tokens)
    assert picked.shape == (rows, seq_len + 1) and picked.dtype == np.int64
    assert picked[0, 0] == 0 and (rows == 1 or picked[-1, -1] == length - 1)
    scored = picked[:, 1:].reshape(-1)
    assert len(set(scored.tolist())) == scored.size, "no target is scored twice"
    if rows > 1:
        gaps = np.diff(picked[:, 0])
        assert gaps.max() - gaps.min() <= 1


# --- diversity -----------------------------------------------------------------------------------------


def test_fixed_prompts_are_fixed() -> None:
    prompts = metrics.fixed_prompts(50_257, seed=7)
    assert prompts.shape == (20, 8) and prompts.dtype == torch.int64
    assert torch.equal(prompts, metrics.fixed_prompts(50_257, seed=7))
    assert not torch.equal(prompts, metrics.fixed_prompts(50_257, seed=8))
    assert int(prompts.min()) >= 0 and int(prompts.max()) < 50_257
    # The stream itself is part of the contract: other numbers would make old and new runs incomparable.
    assert metrics.fixed_prompts(50_257, count=1, length=4, seed=0).tolist() == [[2732, 43567, 42613, 45891]]
    with pytest.raises(ValueError, match="at least 1"):
        metrics.fixed_prompts(50_257, count=0)


@pytest.mark.parametrize("device", DEVICES)
def test_unique_predictions(device: str) -> None:
    model = small_model(device)
    prompts = metrics.fixed_prompts(V)
    with torch.no_grad():
        logits = model(prompts.to(device))[:, -1]
    assert metrics.unique_predictions(model, prompts) == logits.argmax(-1).unique().numel() > 5
    with torch.no_grad():
        model.final_norm.weight.zero_()  # all logits are 0: the first token wins everywhere
    assert metrics.unique_predictions(model, prompts) == 1
    with torch.no_grad():
        model.head_weight[5, 3] = math.nan  # one token of them
    assert metrics.unique_predictions(model, prompts) is None
    with pytest.raises(ValueError, match="prompts must be int64"):
        metrics.unique_predictions(model, prompts.float())


def test_blocks_cover_everything_once() -> None:
    one, two = torch.arange(1000.0).view(10, 100), torch.randn(10, 100)
    parts = list(in_blocks(one, two, elements=300))
    assert [len(a) for a, _ in parts] == [300, 300, 300, 100]
    assert torch.equal(torch.cat([a for a, _ in parts]), one.view(-1))
    assert torch.equal(torch.cat([b for _, b in parts]), two.view(-1))


def test_large_parameters_are_measured_whole() -> None:
    """More elements than a block has, against direct fp64 sums."""
    generator = torch.Generator().manual_seed(0)
    weight, m = (torch.randn(1100, 500, generator=generator) for _ in range(2))
    v = torch.rand(1100, 500, generator=generator)
    terms = metrics.DecayTerms(weight, 0.1, metrics.AdamDirection(m, v, 0.5, 0.3, 1e-8), torch.tensor(0.2))
    direction = (m / 0.5) / ((v / 0.3).sqrt() + 1e-8)
    assert int(metrics.decay_dominates(terms)) == int((weight.abs() * 0.1 > (direction * 0.2).abs()).sum())
    assert int(metrics.decay_dominates(metrics.DecayTerms(weight, 0.1, m))) == int(
        (weight.abs() * 0.1 > m.abs()).sum()
    )
    model = BitNetForCausalLM(preset("collapse-64", vocab_size=9000), seed=0)
    found = metrics.weight_norms(model)
    for key, p in (
        ("embedding_mean_abs", model.embed_tokens.weight),
        ("lm_head_mean_abs", model.head_weight),
    ):
        assert found[key] == pytest.approx(p.detach().double().abs().mean().item(), rel=1e-6)


def test_heldout_positions_of_several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer rows of logits at once than a batch has positions: the same statistics."""
    model, log_probs = small_model(), unigram()
    tokens = targets(1000, log_probs).numpy().astype(np.uint16)
    settings: Any = {"seq_len": 16, "max_tokens": 500, "batch_rows": 7, "device": "cpu"}
    whole = metrics.evaluate_heldout(model, tokens, log_probs, **settings)
    monkeypatch.setattr(distribution, "_CPU_LOGITS_BYTES", 13 * 4 * V)
    parts = metrics.evaluate_heldout(model, tokens, log_probs, **settings)
    for key, value in whole.items():
        assert parts[key] == pytest.approx(value, rel=1e-6, abs=1e-7), key


def test_effective_size() -> None:
    assert metrics.effective_size([5, 5, 5, 5]) == pytest.approx(4)
    assert metrics.effective_size(np.array([9, 0, 0])) == pytest.approx(1)
    p = np.array([0.5, 0.25, 0.25])
    assert metrics.effective_size(torch.tensor([2, 1, 1])) == pytest.approx(math.exp(-(p * np.log(p)).sum()))
    with pytest.raises(ValueError, match="at least one"):
        metrics.effective_size([0, 0])
    with pytest.raises(ValueError, match="negative"):
        metrics.effective_size([1, -1])


@pytest.mark.parametrize("sample", [1, 2, 3, 5, 7])
def test_rarefied_unique_equals_enumeration(sample: int) -> None:
    counts = [4, 2, 1]
    items = [label for label, number in enumerate(counts) for _ in range(number)]
    draws = [len(set(draw)) for draw in itertools.combinations(items, sample)]
    assert metrics.rarefied_unique(counts, sample) == pytest.approx(sum(draws) / len(draws))


def test_rarefied_unique_of_many() -> None:
    assert metrics.rarefied_unique([1] * 20, 20) == pytest.approx(20)
    assert metrics.rarefied_unique([10**6] * 10, 20) == pytest.approx(10 * (1 - 0.9**20), rel=1e-4)
    with pytest.raises(ValueError, match=r"sample must lie in \[1, 3\]"):
        metrics.rarefied_unique([1, 2], 4)


def test_ngram_measures() -> None:
    loop, varied = [1, 2, 1, 2, 1, 2], torch.tensor([1, 2, 3, 4, 5, 6])
    assert metrics.distinct_n([loop], 1) == pytest.approx(2 / 6)
    assert metrics.distinct_n([loop, varied], 2) == pytest.approx(6 / 10)  # (1,2) occurs in both
    assert metrics.seq_rep_n([varied], 4) == 0.0
    assert metrics.seq_rep_n([loop], 4) == pytest.approx(1 - 2 / 3)
    assert metrics.seq_rep_n([loop, varied, [1, 2]], 4) == pytest.approx(
        (1 - 2 / 3) / 2
    )  # [1, 2] is too short
    assert metrics.distinct_n([[1]], 2) is None and metrics.seq_rep_n([], 4) is None
    with pytest.raises(ValueError, match="n must be at least 1"):
        metrics.distinct_n([loop], 0)


# --- ternary codes and sizes ---------------------------------------------------------------------------


def layers(*shapes: tuple[int, int], quantization: str = "b1.58", device: str = "cpu") -> nn.ModuleList:
    torch.manual_seed(0)
    made = [BitLinear(k, n, quantization=quantization) for n, k in shapes]
    return nn.ModuleList(made).to(device)


@pytest.mark.parametrize("device", DEVICES)
def test_ternary_fractions_count_codes(device: str) -> None:
    model = layers((5, 7), (3, 4), (2, 1), device=device)  # rows with 1, 0 and 3 padded fields
    codes = torch.cat(
        [ops.quantize_weight_ternary(layer.weight.detach())[0].reshape(-1) for layer in model]
    ).cpu()
    assert codes.numel() == 49
    fractions = metrics.ternary_fractions(model)
    assert fractions["ternary_negative"] == pytest.approx((codes == -1).sum().item() / 49)
    assert fractions["ternary_zero"] == pytest.approx((codes == 0).sum().item() / 49)
    assert fractions["ternary_positive"] == pytest.approx((codes == 1).sum().item() / 49)


@pytest.mark.parametrize("device", DEVICES)
def test_flip_rate_counts_changed_codes(device: str) -> None:
    model = layers((6, 9), (4, 5), device=device)
    before = metrics.packed_codes(model)
    assert metrics.flip_rate(before, metrics.packed_codes(model)) == 0.0
    old = [ops.quantize_weight_ternary(layer.weight.detach())[0] for layer in model]
    with torch.no_grad():
        model[0].weight[2] *= -1  # every -1 becomes +1, every +1 becomes -1
        model[1].weight[0, 3] = 10.0
    new = [ops.quantize_weight_ternary(layer.weight.detach())[0] for layer in model]
    changed = sum(int((a != b).sum()) for a, b in zip(old, new, strict=True))
    assert changed > 0
    assert metrics.flip_rate(before, metrics.packed_codes(model)) == pytest.approx(changed / (54 + 20))
    with pytest.raises(ValueError, match="same layers"):
        metrics.flip_rate(before[:1], before)


def test_a_full_precision_twin_has_no_codes() -> None:
    model = layers((5, 7), quantization="none")
    assert metrics.packed_codes(model) == []
    assert set(metrics.ternary_fractions(model).values()) == {None}
    assert metrics.flip_rate([], []) is None


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("overrides", [{}, {"tie_embeddings": True}, {"quantization": "none"}])
def test_weight_norms(device: str, overrides: dict[str, Any]) -> None:
    model = small_model(device, **overrides)
    with torch.no_grad():
        model.final_norm.weight.fill_(-0.25)
    norms = metrics.weight_norms(model)
    gains = [p for name, p in model.named_parameters() if p.dim() == 1]
    expected_gain = torch.cat([g.detach().abs() for g in gains]).mean().item()
    latents = [m.weight.detach().abs() for m in model.modules() if isinstance(m, BitLinear)]
    assert len(latents) > 5 and len(gains) > 5
    assert norms["final_gain_mean_abs"] == pytest.approx(0.25)
    assert norms["gain_mean_abs"] == pytest.approx(expected_gain)
    assert expected_gain < 1, "the final gain is among all gains"
    assert norms["embedding_mean_abs"] == pytest.approx(model.embed_tokens.weight.abs().mean().item())
    assert norms["lm_head_mean_abs"] == pytest.approx(model.head_weight.abs().mean().item())
    assert norms["latent_mean_abs"] == pytest.approx(
        torch.cat([w.reshape(-1) for w in latents]).mean().item()
    )


def test_the_instruments_on_known_models() -> None:
    """A count of unique tokens ranks a dead network above a good one; mutual information does not."""
    log_probs = unigram()
    target = targets(2000, log_probs)
    generator = torch.Generator().manual_seed(6)
    dead = 1e-7 * torch.randn(2000, V, generator=generator)
    good = log_probs.float().repeat(2000, 1)
    good[torch.arange(0, 2000, 3), target[::3]] += 4.0  # knows something of a third of the targets
    a, b = (statistics(z, target, log_probs, "cpu") for z in (dead, good))
    assert a["argmax_vocabulary"] > b["argmax_vocabulary"]
    assert a["mutual_information"] < 1e-4 < 0.1 < b["mutual_information"]
    assert a["excess_over_unigram"] > 0 > b["excess_over_unigram"]
