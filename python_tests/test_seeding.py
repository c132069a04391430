"""Seeds: initial parameters and samples come from generators of their own; without a seed from torch's global one."""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from bitnet_ext.inference import generate
from bitnet_ext.models import BitNetConfig, BitNetForCausalLM, preset
from bitnet_ext.nn import BitLinear

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SHAPES = {
    "report": preset("collapse-64", vocab_size=301),
    "normal": preset("collapse-64", vocab_size=301, init="normal", num_layers=3),
    "tied": preset("bitnet-100m", vocab_size=301, hidden_size=64, num_heads=2, num_kv_heads=2, num_layers=2),
    "odd": preset(
        "collapse-64", vocab_size=5, hidden_size=6, num_heads=1, num_kv_heads=1, intermediate_size=3
    ),
}


def old_way(config: BitNetConfig, seed: int, device: str = "cpu") -> list[Tensor]:
    """The matrices in the order in which earlier versions drew them from the global generator, reseeded."""
    H, inner = config.hidden_size, config.intermediate_size
    kv = config.num_kv_heads * config.head_dim
    linear = [(H, H), (H, kv), (H, kv), (H, H), (H, inner), (H, inner), (inner, H)]
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())), torch.device(device):
        torch.manual_seed(seed)
        modules: list[nn.Module] = [nn.Embedding(config.vocab_size, H)]
        for _ in range(config.num_layers):
            modules += [nn.Linear(k, n, bias=False) for k, n in linear]
        if not config.tie_embeddings:
            modules.append(nn.Linear(H, config.vocab_size, bias=False))
        weights: list[Tensor] = [module.weight.detach() for module in modules]  # type: ignore[misc]
        if config.init == "normal":
            for index, weight in enumerate(weights):
                place = (index - 1) % 7 if 0 < index <= 7 * config.num_layers else 0
                output = place in (3, 6)
                weight.normal_(0.0, config.init_std / (math.sqrt(2 * config.num_layers) if output else 1.0))
    return weights


def generators() -> list[Tensor]:
    return [torch.get_rng_state(), *torch.cuda.get_rng_state_all()]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", SHAPES)
def test_the_parameters_of_a_seed_stay_what_they_were(name: str, device: str) -> None:
    """The results of the collapse study rest on them."""
    config = SHAPES[name]
    torch.randn(3)
    before = generators()
    with torch.device(device):
        model = BitNetForCausalLM(config, seed=7)
    after = generators()
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    matrices = [p.detach() for p in model.parameters() if p.dim() == 2]
    expected = old_way(config, 7, device)
    assert len(matrices) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(matrices, expected, strict=True))
    assert all(bool((p == 1).all()) for p in model.parameters() if p.dim() == 1)


def test_no_seed_follows_the_global_generator() -> None:
    config = SHAPES["report"]
    torch.manual_seed(7)
    model, next_one = BitNetForCausalLM(config), BitNetForCausalLM(config)
    seeded = BitNetForCausalLM(config, seed=7)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), seeded.parameters(), strict=True))
    assert not torch.equal(next_one.embed_tokens.weight, model.embed_tokens.weight)


def test_seeds_in_threads() -> None:
    """As relia-05."""
    config = SHAPES["normal"]

    def digest(seed: int) -> str:
        state = BitNetForCausalLM(config, seed=seed).state_dict()
        return hashlib.sha256(b"".join(value.numpy().tobytes() for value in state.values())).hexdigest()

    expected, wrong = [digest(seed) for seed in range(6)], []

    def work(first: int) -> None:
        for k in range(15):
            torch.manual_seed(k)  # another thread's seed is nobody else's
            if digest((first + k) % 6) != expected[(first + k) % 6]:
                wrong.append(k)

    threads = [threading.Thread(target=work, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_seed_on_meta_draws_nothing() -> None:
    with torch.device("meta"):
        model = BitNetForCausalLM(SHAPES["normal"], seed=1)
    assert all(p.is_meta for p in model.parameters())


def test_layers_outside_follow_the_global_generator() -> None:
    torch.manual_seed(3)
    first = BitLinear(8, 4).weight
    BitNetForCausalLM(SHAPES["odd"], seed=1)
    second = BitLinear(8, 4).weight
    torch.manual_seed(3)
    assert torch.equal(first, BitLinear(8, 4).weight) and torch.equal(second, BitLinear(8, 4).weight)


# --- sampling ------------------------------------------------------------------------------------------------------


@pytest.fixture(params=DEVICES)
def sampling(request: pytest.FixtureRequest) -> Iterator[tuple[BitNetForCausalLM, Tensor]]:
    model = BitNetForCausalLM(preset("collapse-64", vocab_size=257), seed=0).to(request.param)
    yield model, torch.tensor([[1, 2, 3]], device=request.param)


def sample(sampling: tuple[BitNetForCausalLM, Tensor], seed: int | None = None) -> tuple[int, ...]:
    model, prompt = sampling
    return tuple(generate(model, prompt, 20, temperature=1.0, seed=seed)[0].tolist())


def test_sampling_without_a_seed_follows_torch(sampling: tuple[BitNetForCausalLM, Tensor]) -> None:
    """As 01."""
    texts = []
    for seed in range(10):
        torch.manual_seed(seed)
        texts.append(sample(sampling))
    assert len(set(texts)) == 10
    torch.manual_seed(4)
    assert sample(sampling) == texts[4]
    assert sample(sampling) != texts[4]


def test_sampling_with_a_seed_is_its_own(sampling: tuple[BitNetForCausalLM, Tensor]) -> None:
    before = generators()
    texts = [sample(sampling, seed) for seed in (0, 1, 0)]
    assert texts[0] == texts[2] != texts[1]
    assert all(torch.equal(a, b) for a, b in zip(before, generators(), strict=True))
