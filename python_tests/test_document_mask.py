"""Packed documents: attention stays within a document, in the model, in training steps and in evaluations."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from bitnet_ext import metrics
from bitnet_ext.models import BitNetForCausalLM, KVCache, preset
from bitnet_ext.training import TrainConfig, Trainer

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
VOCAB, SEPARATOR = 97, 96
CONFIG = TrainConfig(
    steps=3, batch_size=4, seq_len=16, lr=1e-3, checkpoint_seconds=None, document_separator=SEPARATOR
)


def model(device: str = "cpu", **overrides: object) -> BitNetForCausalLM:
    config = preset("collapse-64", vocab_size=VOCAB, num_heads=4, num_kv_heads=2, **overrides)
    return BitNetForCausalLM(config, seed=3).to(device)


def documents(lengths: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    parts = [torch.randint(0, SEPARATOR, (n,), generator=generator) for n in lengths]
    for part in parts[:-1]:
        part[-1] = SEPARATOR
    return parts


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("quantization", ["b1.58", "none"])
def test_a_packed_row_equals_each_document_alone(device: str, quantization: str) -> None:
    network = model(device, quantization=quantization).eval()
    parts = documents((7, 1, 12, 5))
    row = torch.cat(parts)[None].to(device)
    numbers = network.document_numbers(row, SEPARATOR)
    assert numbers[0].tolist() == [0] * 7 + [1] + [2] * 12 + [3] * 5
    with torch.no_grad():
        packed = network(row, documents=numbers)[0]
        unmasked = network(row)[0]
        start = 0
        # Sums of a masked row are rounded in another order, which int8 activations may turn into a step of 1/127.
        tolerance = 1e-5 if quantization == "none" else 1e-2
        for part in parts:
            alone = network(part[None].to(device))[0]
            here = slice(start, start + len(part))
            assert (packed[here] - alone).abs().max() < tolerance * alone.abs().max()
            start += len(part)
    assert (packed[7:] - unmasked[7:]).abs().max() > 0.05 * unmasked.abs().max()
    assert (packed[:7] - unmasked[:7]).abs().max() < tolerance * unmasked.abs().max()


def test_gradients_do_not_cross() -> None:
    network = model(quantization="none")
    row = torch.cat(documents((6, 10)))[None]
    seen: list[torch.Tensor] = []
    hook = network.embed_tokens.register_forward_hook(
        lambda module, inputs, out: seen.append(out.retain_grad() or out)
    )
    logits = network(row, documents=network.document_numbers(row, SEPARATOR))
    logits[0, 8].sum().backward()
    hook.remove()
    sizes = seen[0].grad[0].abs().sum(-1)
    assert (sizes[:6] == 0).all() and (sizes[6:9] > 0).all() and (sizes[9:] == 0).all()


def test_one_document_a_row_is_the_ordinary_attention() -> None:
    network = model(quantization="none").eval()
    row = torch.cat(documents((20,)))[None]
    with torch.no_grad():
        torch.testing.assert_close(network(row, documents=torch.zeros_like(row)), network(row))


def test_bad_documents() -> None:
    network = model()
    row = torch.cat(documents((20,)))[None]
    for bad in (torch.zeros(1, 19, dtype=torch.int64), torch.zeros(1, 20)):
        with pytest.raises(ValueError, match="documents must be integers of the shape"):
            network(row, documents=bad)
    with pytest.raises(ValueError, match="documents must be None with a cache"):
        network(row, KVCache(network.config, 1), documents=torch.zeros_like(row))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("cuda_graph", [False, True])
def test_a_training_step_sees_each_document_alone(device: str, cuda_graph: bool, tmp_path: Path) -> None:
    """The loss of the first step is the mean over documents alone, and the captured step takes masks from the ids."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, SEPARATOR, 17 * 12)
    tokens[rng.integers(0, len(tokens), 30)] = SEPARATOR
    config = dataclasses.replace(CONFIG, cuda_graph=cuda_graph, sampling="sequential", batch_size=2)
    network = model(device, quantization="none")
    rows = torch.from_numpy(tokens[: 2 * 17]).view(2, 17)
    total = count = 0.0
    for row in rows:
        ends = [*(np.flatnonzero(row[:-1].numpy() == SEPARATOR) + 1).tolist(), 16]
        start = 0
        for end in ends:
            if end > start:
                with torch.no_grad():
                    logits = network(row[None, start:end].to(device))[0].cpu()
                target = row[start + 1 : end + 1]
                total += float(torch.nn.functional.cross_entropy(logits, target, reduction="sum"))
                count += end - start
            start = end
    assert count == 32
    Trainer(network, config, tokens, run_dir=tmp_path, device=device).fit(progress=False)
    first = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert first["step"] == 1 and first["cross_entropy"] == pytest.approx(total / count, rel=1e-5)
    # The held-out loss uses the same masks.
    fresh = model(device, quantization="none")
    found = metrics.evaluate(fresh, tokens[:33], seq_len=16, document_separator=SEPARATOR)
    plain = metrics.evaluate(fresh, tokens[:33], seq_len=16)
    assert found["cross_entropy"] != pytest.approx(plain["cross_entropy"], rel=1e-6)


def test_accumulation_with_masks() -> None:
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, VOCAB, 17 * 12)
    losses = []
    for accumulation in (1, 2):
        config = dataclasses.replace(CONFIG, accumulation=accumulation)
        records: list[dict[str, float]] = []
        Trainer(model(), config, tokens, device="cpu").fit(
            progress=False, on_progress=lambda step, record, kept=records: kept.append(record)
        )
        losses.append([record["loss"] for record in records])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
