"""metrics.evaluate against plain PyTorch, for training and packed models, Hugging Face's form and functions."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from bitnet_ext import metrics
from bitnet_ext.data import load_corpus
from bitnet_ext.models import BitNetForCausalLM, preset
from bitnet_ext.nn import pack_model

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
VOCAB = 97


def model(device: str = "cpu", **overrides: object) -> BitNetForCausalLM:
    return BitNetForCausalLM(preset("collapse-64", vocab_size=VOCAB, **overrides), seed=3).to(device)


def tokens(n: int = 100) -> np.ndarray:
    return np.random.default_rng(0).integers(0, VOCAB, n).astype(np.uint16)


def reference(network: torch.nn.Module, ids: np.ndarray, seq_len: int) -> float:
    """Mean loss with rows one by one, in float64."""
    losses = []
    device = next(network.parameters()).device
    for start in range(0, len(ids) - 1, seq_len):
        row = torch.from_numpy(ids[start : start + seq_len + 1].astype(np.int64)).to(device)
        with torch.no_grad():
            logits = network(row[None, :-1])[0].double()
        losses.append(F.cross_entropy(logits, row[1:], reduction="none"))
    assert sum(map(len, losses)) == len(ids) - 1
    return float(torch.cat(losses).mean())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("form", ["training", "packed", "packed with int8 head", "none"])
def test_every_token_but_the_first_is_predicted_once(device: str, form: str) -> None:
    network = model(device, quantization="none" if form == "none" else "b1.58")
    if form.startswith("packed"):
        network = pack_model(network, inplace=True, head="int8" if "int8" in form else "keep")
    network.train()
    for ids, seq_len, batch_size in ((tokens(), 16, 3), (tokens(33), 16, None), (tokens(5), 16, None)):
        found = metrics.evaluate(network, ids, seq_len=seq_len, batch_size=batch_size)
        expected = reference(network.eval(), ids, seq_len)
        network.train()
        assert found["tokens"] == len(ids) - 1
        assert found["cross_entropy"] == pytest.approx(expected, rel=1e-5)
        assert found["perplexity"] == pytest.approx(math.exp(expected), rel=1e-4)
        assert "bits_per_byte" not in found
    assert network.training  # as it was


def test_two_arguments_are_enough() -> None:
    network, ids = model(), tokens(600)
    found = metrics.evaluate(network, ids)
    assert found["cross_entropy"] == pytest.approx(reference(network.eval(), ids, 256), rel=1e-5)
    assert found == metrics.evaluate(network, torch.from_numpy(ids.astype(np.int64)))


def test_any_callable_that_gives_logits() -> None:
    table = torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(0))
    ids = tokens()
    rows = torch.from_numpy(ids.astype(np.int64))
    expected = float(F.cross_entropy(table[rows[:-1]].double(), rows[1:]))
    for function in (lambda x: table[x], lambda x: SimpleNamespace(logits=table[x])):
        assert metrics.evaluate(function, ids)["cross_entropy"] == pytest.approx(expected, rel=1e-6)
    network = torch.nn.Embedding.from_pretrained(table)
    assert metrics.evaluate(network, ids)["cross_entropy"] == pytest.approx(expected, rel=1e-6)
    with pytest.raises(ValueError, match=r"model must give logits \[B, T, V\]"):
        metrics.evaluate(lambda x: table[x][0], ids)


def test_bits_per_byte() -> None:
    class Words:
        eos_id = 0

        def decode(self, ids: list[int]) -> str:
            return "".join("é" if i % 2 else "abc" for i in ids)

    network, ids = model(), tokens(65)
    found = metrics.evaluate(network, ids, seq_len=16, tokenizer=Words())
    size = sum(0 if i == 0 else 2 if i % 2 else 3 for i in ids[1:].tolist())
    expected = found["cross_entropy"] * 64 / math.log(2) / size
    assert found["bits_per_byte"] == pytest.approx(expected)
    assert metrics.evaluate(network, ids, seq_len=16, num_bytes=size)["bits_per_byte"] == pytest.approx(
        expected
    )


def test_at_most_so_many_tokens() -> None:
    network, ids = model(), tokens(1000)
    found = metrics.evaluate(network, ids, seq_len=10, max_tokens=100)
    assert found["tokens"] == 100
    rows = metrics.heldout_rows(ids, 10, 100)
    single = [metrics.evaluate(network, row)["cross_entropy"] for row in rows]
    assert found["cross_entropy"] == pytest.approx(np.mean(single), rel=1e-5)
    assert metrics.evaluate(network, ids[:50], seq_len=10, max_tokens=100)["tokens"] == 49


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seq_len": 0}, "seq_len must be"),
        ({"seq_len": 2000}, r"seq_len must be 1..1024 \(the model's max_seq_len\)"),
        ({"batch_size": 0}, "batch_size must be 1 or more"),
        ({"num_bytes": 5, "max_tokens": 5}, "num_bytes is of the whole text"),
        ({"tokens": np.zeros((2, 3), np.int64)}, "tokens must be one dimension"),
        ({"tokens": np.zeros(1, np.int64)}, "at least 2 integer ids"),
        ({"tokens": np.zeros(5)}, "integer ids, got float64"),
        ({"tokens": np.array([1, 97])}, "tokens must be in 0..96"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], message: str) -> None:
    values = {"tokens": tokens(), **arguments}
    with pytest.raises(ValueError, match=message):
        metrics.evaluate(model(), values.pop("tokens"), **values)


def test_a_corpus_is_told_to_give_a_part(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("".join(f"Line {n}.\n" for n in range(200)))
    corpus = load_corpus(tmp_path / "text.txt", cache_dir=tmp_path, progress=False)
    with pytest.raises(TypeError, match=r"got a corpus: give its part, such as corpus\.heldout"):
        metrics.evaluate(model(), corpus)  # type: ignore[arg-type]
