"""Measurements that are made first and fetched later: combined, repeated, captured; decoding that is captured."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from bitnet_ext import metrics
from bitnet_ext._capture import places_of
from bitnet_ext.collapse import evaluator as evaluator_module
from bitnet_ext.collapse.evaluator import CollapseEvaluator
from bitnet_ext.inference import generate
from bitnet_ext.models import BitNetForCausalLM, preset
from bitnet_ext.models.kv_cache import KVCache, SteadyKVCache
from bitnet_ext.nn import pack_model
from bitnet_ext.training import EvaluatedStep, TrainConfig, Trainer

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
VOCAB = 503


def model(**overrides: Any) -> BitNetForCausalLM:
    return BitNetForCausalLM(preset("collapse-64", vocab_size=VOCAB, **overrides), seed=0)


def tokens(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).zipf(1.4, count).clip(max=VOCAB - 1).astype(np.int64)


@pytest.mark.parametrize("device", DEVICES)
def test_combined_measurements_are_fetched_with_their_shapes(device: str) -> None:
    first = metrics.Measurement(
        (torch.arange(6, device=device).view(2, 3), torch.tensor(0.5, device=device)),
        lambda arrays: {"sum": arrays[0][1].sum(), "half": float(arrays[1])},
    )
    second = metrics.Measurement(
        (torch.tensor([2**40 + 1], device=device),), lambda arrays: {"n": arrays[0][0]}
    )
    nothing = metrics.measure_flip_rate([], [])
    values = metrics.combine([first, nothing, second]).result()
    assert values == {"sum": 12, "half": 0.5, "flip_rate": None, "n": 2**40 + 1}
    assert metrics.combine([nothing]).result() == {"flip_rate": None}


@pytest.mark.parametrize("device", DEVICES)
def test_repeated_follows_its_tensors(device: str) -> None:
    """Three times, so that on a GPU the second one captures and the third one replays."""
    value = torch.zeros(4, device=device)
    repeated = metrics.Repeated(torch.device(device))

    def make() -> metrics.Measurement:
        return metrics.Measurement((value.square().sum(),), lambda arrays: {"norm": float(arrays[0])})

    for number in (1.0, 2.0, 3.0):
        value.fill_(number)
        assert repeated.launch(make)() == {"norm": 4 * number**2}


class Everything(CollapseEvaluator):
    """Measures each step twice, as a run does and without what was captured."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.pairs: list[tuple[dict[str, Any], dict[str, Any]]] = []

    def evaluate(self, model: BitNetForCausalLM, step: EvaluatedStep) -> dict[str, Any]:
        values = super().evaluate(model, step)()
        self.pairs.append((values, self._measure(model, step.optimizer).result()))
        return values


@pytest.fixture
def few_prompts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(evaluator_module, "PROMPTS", 40)
    yield


@pytest.mark.parametrize("optimizer", ["adam_l2", "adamw", "sgd_l2"])
@pytest.mark.parametrize("graph", [True, False])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.usefixtures("few_prompts")
def test_repeated_evaluations_are_those_made_anew(device: str, graph: bool, optimizer: str) -> None:
    settings = TrainConfig(
        steps=40, batch_size=4, seq_len=31, warmup_steps=0, optimizer=optimizer, cuda_graph=graph
    )
    unigram = torch.log_softmax(torch.arange(VOCAB, 0, -1).double() / 50, 0).numpy()
    evaluator = Everything(
        tokens(700, 1), unigram, seq_len=31, max_tokens=600, device=torch.device(device), generation=False
    )
    net = model()
    Trainer(
        net,
        settings,
        tokens(4000),
        device=device,
        evaluator=evaluator,
        eval_steps=(1, 2, 3, 11, 40),
    ).fit()
    assert len(evaluator.pairs) == 5
    for repeated, anew in evaluator.pairs:
        assert repeated.keys() >= anew.keys()
        for key, value in anew.items():
            expected = value if value is None else pytest.approx(value, rel=1e-6, abs=1e-9)
            assert repeated[key] == expected, key
    shares = [pair[0]["decay_share"] for pair in evaluator.pairs]
    assert len(set(shares)) > 1 and all(0 <= share <= 1 for share in shares)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_steady_cache_is_the_cache(device: str, kv_heads: int) -> None:
    """Prompt in two parts, then token by token: the same logits with either cache."""
    net = model(num_heads=2, num_kv_heads=kv_heads).to(device).eval()
    ids = torch.from_numpy(tokens(2 * 19).reshape(2, 19)).to(device)
    caches = [cls(net.config, 2, 24, device=device) for cls in (KVCache, SteadyKVCache)]
    for part in (ids[:, :5], ids[:, 5:12], *ids[:, 12:].split(1, dim=1)):
        with torch.no_grad():
            expected, got = (net(part, cache) for cache in caches)
        torch.testing.assert_close(got, expected, rtol=2e-5, atol=2e-5)
    assert [cache.length for cache in caches] == [19, 19]
    with pytest.raises(ValueError, match="room for 24 tokens, but 25"):
        net(ids[:, :6], caches[1])


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "choice", [{}, {"temperature": 0.9, "top_k": 40}, {"temperature": 1.0, "top_p": 0.9}], ids=str
)
def test_captured_decoding(packed: bool, choice: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Replayed, decoding gives what it gives token by token."""
    module = __import__("bitnet_ext.inference.generate", fromlist=["CAPTURED_TOKENS"])
    net: Any = model(max_seq_len=64).cuda()
    net = pack_model(net) if packed else net
    prompts = torch.from_numpy(tokens(3 * 9).reshape(3, 9)).cuda()
    captured = generate(net, prompts, 40, seed=3, **choice)
    assert torch.equal(captured, generate(net, prompts, 40, seed=3, **choice))
    columns: list[torch.Tensor] = []
    listened = generate(net, prompts, 40, seed=3, on_token=columns.append, **choice)
    assert torch.equal(torch.stack(columns, 1), listened[:, 9:])
    eos = int(captured[0, 30])
    ended = generate(net, prompts, 40, seed=3, eos_id=eos, **choice)
    first = int((captured[0, 9:] == eos).nonzero()[0])
    assert torch.equal(ended[0, : 9 + first], captured[0, : 9 + first]) and bool(
        (ended[0, 9 + first :] == eos).all()
    )
    monkeypatch.setattr(module, "CAPTURED_TOKENS", 1_000)
    eager = generate(net, prompts, 40, seed=3, **choice)
    # Attention adds up in another order, so that a choice between near equals may fall otherwise.
    assert (eager == captured).float().mean() > 0.7
    assert torch.equal(eager[:, :12], captured[:, :12])


def test_places_tell_that_a_replay_would_read_other_memory() -> None:
    p = torch.nn.Parameter(torch.ones(4, 6))
    before = places_of([p])
    with torch.no_grad():
        p.add_(1)
    p.data.copy_(torch.zeros(4, 6))
    assert places_of([p]) == before  # values are read by the replay
    held = p.data
    p.data = p.detach().clone()
    assert places_of([p]) != before and held.shape == p.shape
    p.data = held
    assert places_of([p]) == before
    p.data = held.view(6, 4)
    assert places_of([p]) != before
