"""Prompts of every form: texts, lists of unequal rows, padded batches; each continued as it would be alone."""

from __future__ import annotations

import pytest
import torch

from bitnet_ext.inference import generate
from bitnet_ext.models import BitNetForCausalLM, KVCache, preset
from bitnet_ext.nn import pack_model

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
VOCAB = 97
ROWS = [[5, 17, 3, 88, 41, 2, 9], [11], [23, 23, 8]]


class Letters:
    """A tokenizer of one id for each character."""

    def encode(self, text: str) -> list[int]:
        return [ord(letter) - 32 for letter in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(i + 32) for i in ids)


def model(device: str = "cpu", **overrides: object) -> BitNetForCausalLM:
    config = preset("collapse-64", vocab_size=VOCAB, num_heads=4, num_kv_heads=2, **overrides)
    return BitNetForCausalLM(config, seed=3).to(device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("form", ["training", "packed", "none"])
def test_rows_of_unequal_length_are_continued_as_alone(device: str, form: str) -> None:
    network = model(device, quantization="none" if form == "none" else "b1.58")
    if form == "packed":
        network = pack_model(network, inplace=True)
    together = generate(network, ROWS, 12)
    assert [len(row) for row in together] == [len(row) + 12 for row in ROWS]
    for row, found in zip(ROWS, together, strict=True):
        alone = generate(network, torch.tensor([row], device=device), 12)[0]
        assert torch.equal(found, alone)


@pytest.mark.parametrize("device", DEVICES)
def test_an_attention_mask_hides_the_padding(device: str) -> None:
    network = model(device)
    prompt = torch.full((2, 5), 96, device=device)
    prompt[0] = torch.tensor([4, 8, 15, 16, 23])
    prompt[1, 3:] = torch.tensor([42, 7])
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 0, 1, 1]], device=device)
    found = generate(network, prompt, 9, attention_mask=mask)
    assert torch.equal(found[1, 3:], generate(network, prompt[1:, 3:], 9)[0])
    # Without the mask the padding is text, and the continuation another one.
    assert not torch.equal(found[1, 3:], generate(network, prompt, 9)[1, 3:])
    for bad in (mask.flip(1), mask[:, :4], mask * 0):
        with pytest.raises(ValueError, match="attention_mask must"):
            generate(network, prompt, 1, attention_mask=bad)


@pytest.mark.parametrize("quantization", ["b1.58", "none"])
def test_logits_behind_padding_equal_those_without(quantization: str) -> None:
    network = model(quantization=quantization).eval()
    row = torch.tensor([[9, 30, 77, 2]])
    cache = KVCache(network.config, 2, 12)
    cache.padding = torch.tensor([3, 0])
    longer = torch.tensor([[1, 2, 3, 9, 30, 77, 2], [5, 6, 7, 8, 9, 10, 11]])
    with torch.no_grad():
        padded = network(longer, cache)
        more = network(torch.tensor([[50], [51]]), cache)
        alone = network(torch.cat([row, torch.tensor([[50]])], 1))
    tolerance = 1e-5 if quantization == "none" else 1e-2
    assert (padded[0, 3:] - alone[0, :4]).abs().max() < tolerance
    assert (more[0, 0] - alone[0, 4]).abs().max() < tolerance


def test_texts_in_texts_out() -> None:
    network = model()
    found = generate(network, "river", 5, tokenizer=Letters())
    ids = generate(network, torch.tensor([Letters().encode("river")]), 5)
    assert found == Letters().decode(ids[0].tolist()) and found.startswith("river")
    both = generate(network, ["river", "to"], 5, tokenizer=Letters())
    assert both[0] == found and both[1] == generate(network, "to", 5, tokenizer=Letters())
    network.tokenizer = Letters()  # of a model that was loaded with its own
    assert generate(network, "river", 5) == found


def test_what_is_no_prompt() -> None:
    network = model()
    with pytest.raises(ValueError, match="a prompt of text needs tokenizer="):
        generate(network, "river", 5)
    with pytest.raises(ValueError, match="at least one token, got the text ''"):
        generate(network, "", 5, tokenizer=Letters())
    for bad in ([[]], [[1.5]], [["a"], ["b"]], [[[1]]], [5]):
        with pytest.raises(ValueError, match="row 0 is"):
            generate(network, bad, 5)  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="empty list"):
        generate(network, [], 5)
    with pytest.raises(ValueError, match="attention_mask must be None"):
        generate(network, ROWS, 5, attention_mask=torch.ones(3, 7))  # type: ignore[call-overload]


def test_a_model_of_another_kind_is_refused() -> None:
    for model in (
        torch.nn.Linear(4, 4),
        torch.nn.Sequential(BitNetForCausalLM(preset("collapse-64", vocab_size=97), seed=0)),
    ):
        with pytest.raises(TypeError, match=r"model must be a BitNetForCausalLM, got \w+; a model of"):
            generate(model, torch.zeros(1, 3, dtype=torch.int64), 2)  # type: ignore[call-overload]
