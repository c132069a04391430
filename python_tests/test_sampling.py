"""Rows and batches: every row once an epoch, exact resume, ranks that partition the batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitnet_ext.data.corpora import Corpus
from bitnet_ext.data.sampling import RowSampler
from bitnet_ext.data.statistics import as_token_array, token_counts, unigram_log_probs
from bitnet_ext.data.token_file import TokenFile, TokenFileWriter

STREAM = np.arange(10_000, dtype=np.uint16)
CORPUS = Corpus("made", "here", "numbers", STREAM, STREAM[:100], 1, 1, 10_000, None, "0" * 64)


def test_sequential_is_the_stream_in_order() -> None:
    sampler = RowSampler(STREAM, batch_size=4, seq_len=31)
    for step in (0, 1, 77):
        batch = sampler.batch(step)
        assert batch.shape == (4, 32) and batch.dtype == np.int64
        np.testing.assert_array_equal(batch.ravel(), STREAM[128 * step : 128 * (step + 1)])
    np.testing.assert_array_equal(sampler.batches(0, 78).ravel(), STREAM[: 128 * 78])


def test_sequential_begins_again_at_the_end() -> None:
    sampler = RowSampler(np.arange(50, dtype=np.uint16), batch_size=2, seq_len=9)  # 5 rows of 10
    firsts = sampler.batches(0, 5)[:, :, 0].tolist()
    assert firsts == [[0, 10], [20, 30], [40, 0], [10, 20], [30, 40]]
    assert (sampler.num_rows, sampler.steps_per_epoch) == (5, 2.5)
    assert [sampler.epoch(step) for step in (0, 2, 3, 5)] == [0, 0, 1, 2]


def test_tokens_beyond_the_last_whole_row_are_not_used() -> None:
    sampler = RowSampler(np.arange(39, dtype=np.uint16), batch_size=1, seq_len=9)
    assert sampler.num_rows == 3
    assert sampler.batches(0, 30).max() == 29


@settings(max_examples=100, deadline=None)
@given(
    num_rows=st.integers(1, 40),
    batch_size=st.integers(1, 16),
    epochs=st.integers(1, 4),
    seed=st.integers(0, 2**64 - 1),
    order=st.sampled_from(["sequential", "shuffled"]),
)
def test_every_row_once_an_epoch(num_rows: int, batch_size: int, epochs: int, seed: int, order: Any) -> None:
    tokens = np.arange(num_rows * 3, dtype=np.uint32)
    sampler = RowSampler(tokens, batch_size=batch_size, seq_len=2, order=order, seed=seed)
    steps = -(-num_rows * epochs // batch_size)
    rows = sampler.batches(0, steps).reshape(-1, 3)
    np.testing.assert_array_equal(rows[:, 1:], rows[:, :1] + [1, 2])  # rows are consecutive tokens
    for epoch in range(epochs):
        seen = rows[epoch * num_rows : (epoch + 1) * num_rows, 0] // 3
        assert sorted(seen.tolist()) == list(range(num_rows))


@pytest.mark.parametrize("order", ["sequential", "shuffled"])
def test_resume_needs_only_the_step(order: Any) -> None:
    def make() -> RowSampler:
        return RowSampler(STREAM, batch_size=8, seq_len=31, order=order, seed=5)

    whole = [make().batch(step) for step in range(100)]  # 39 steps an epoch
    straight = make()
    np.testing.assert_array_equal(np.stack([straight.batch(step) for step in range(100)]), whole)
    np.testing.assert_array_equal(make().batches(0, 100), whole)
    resumed = make()
    np.testing.assert_array_equal(resumed.batches(57, 43), whole[57:])
    np.testing.assert_array_equal(resumed.batch(3), whole[3])  # and back to an earlier epoch


@pytest.mark.parametrize("order", ["sequential", "shuffled"])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_partition_the_global_batch(order: Any, world_size: int) -> None:
    def make(rank: int, size: int) -> RowSampler:
        return RowSampler(STREAM, batch_size=8, seq_len=15, order=order, seed=1, rank=rank, world_size=size)

    parts = [make(rank, world_size).batches(75, 10) for rank in range(world_size)]  # across an epoch's end
    assert all(part.shape == (10, 8 // world_size, 16) for part in parts)
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), make(0, 1).batches(75, 10))


def test_shuffled_order_depends_on_seed_and_epoch_only() -> None:
    def epoch_rows(seed: int, epoch: int) -> list[int]:
        sampler = RowSampler(STREAM, batch_size=10, seq_len=9, order="shuffled", seed=seed)
        return sampler.row_indices(epoch * 100, 100).ravel().tolist()

    assert epoch_rows(3, 2) == epoch_rows(3, 2)
    assert epoch_rows(3, 2) != epoch_rows(3, 1)
    assert epoch_rows(3, 2) != epoch_rows(4, 2)
    assert epoch_rows(3, 0) != list(range(1000))
    # Fixed for good: a run may be resumed with another version of numpy or on another machine.
    small = RowSampler(np.arange(20), batch_size=10, seq_len=1, order="shuffled", seed=7)
    assert small.row_indices(0, 2).tolist() == [
        [8, 4, 1, 6, 3, 2, 7, 5, 9, 0],
        [3, 9, 1, 6, 2, 5, 4, 8, 0, 7],
    ]


def test_fewer_rows_than_a_batch() -> None:
    sampler = RowSampler(np.arange(6), batch_size=7, seq_len=2, order="shuffled")
    assert sorted((sampler.batch(0)[:6, 0] // 3).tolist()) == [0, 0, 0, 1, 1, 1]


def test_a_memory_map_is_read_row_by_row(tmp_path: Path) -> None:
    with TokenFileWriter(tmp_path / "a.tokens", vocab_size=50257) as writer:
        writer.append(STREAM)
    tokens = TokenFile.open(tmp_path / "a.tokens").tokens
    mapped = RowSampler(tokens, batch_size=4, seq_len=15, order="shuffled", seed=2)
    in_memory = RowSampler(STREAM, batch_size=4, seq_len=15, order="shuffled", seed=2)
    block = mapped.batches(0, 300)
    np.testing.assert_array_equal(block, in_memory.batches(0, 300))
    assert type(block) is np.ndarray and block.flags.writeable and block.flags.c_contiguous


def test_no_steps_is_an_empty_block() -> None:
    assert RowSampler(STREAM, batch_size=4, seq_len=31, order="shuffled").batches(9, 0).shape == (0, 4, 32)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"tokens": STREAM[:31]},
            ValueError,
            "tokens holds 31 tokens, a row of seq_len 31 needs at least 32",
        ),
        (
            {"batch_size": 6, "world_size": 4},
            ValueError,
            "batch_size is 6, accepted are multiples of world_size 4",
        ),
        ({"batch_size": 0}, ValueError, "batch_size is 0, accepted is 1 or more"),
        ({"seq_len": 0}, ValueError, "seq_len is 0, accepted is 1 or more"),
        ({"world_size": 0}, ValueError, "world_size is 0, accepted is 1 or more"),
        ({"rank": 1}, ValueError, r"rank is 1, accepted is 0\.\.0"),
        ({"rank": -1}, ValueError, "rank is -1"),
        ({"order": "random"}, ValueError, "order is 'random', accepted are 'sequential' and 'shuffled'"),
        ({"seed": -1}, ValueError, "seed is -1, accepted is 0"),
        ({"tokens": [1, 2, 3]}, ValueError, "tokens holds 3 tokens, a row of seq_len 31 needs at least 32"),
        ({"tokens": "a text"}, TypeError, r"tokens is str, accepted are token ids: load_corpus\(path\)"),
        ({"tokens": None}, TypeError, "tokens is NoneType, accepted are token ids"),
        ({"tokens": [[1], [1, 2]]}, TypeError, "tokens is no row of integers"),
        ({"tokens": CORPUS}, TypeError, r"tokens is a Corpus, which has two streams: give its \.train"),
        ({"tokens": np.zeros(99)}, TypeError, r"tokens is float64 \[99\], accepted"),
        ({"tokens": np.zeros((9, 9), int)}, TypeError, r"tokens is int64 \[9, 9\], accepted"),
    ],
)
def test_bad_arguments(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"tokens": STREAM, "batch_size": 4, "seq_len": 31, **changes}
    with pytest.raises(error, match=message):
        RowSampler(arguments.pop("tokens"), **arguments)


@pytest.mark.parametrize(("start", "count", "name"), [(-1, 1, "start"), (0, -1, "count")])
def test_bad_steps(start: int, count: int, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is -1, accepted is 0 or more"):
        RowSampler(STREAM, batch_size=4, seq_len=31).batches(start, count)


def test_unigram_log_probs() -> None:
    tokens = np.array([0, 0, 0, 2], np.uint16)
    log_probs = unigram_log_probs(tokens, 4, add=0.1)
    np.testing.assert_allclose(np.exp(log_probs), np.array([3.1, 0.1, 1.1, 0.1]) / 4.4)
    assert log_probs.dtype == np.float64
    np.testing.assert_allclose(np.exp(unigram_log_probs(STREAM, 50257)).sum(), 1.0)
    assert token_counts(tokens, 4).tolist() == [3, 0, 1, 0]
    np.testing.assert_allclose(unigram_log_probs(tokens[:0], 4), np.log(0.25))


@pytest.mark.parametrize("kind", ["list", "tensor", "uint16", "memory map"])
def test_tokens_of_every_kind(kind: str, tmp_path: Path) -> None:
    ids = [3, 1, 2, 1, 0, 3, 3, 2]
    tokens: Any = {"list": ids, "tensor": torch.tensor(ids), "uint16": np.array(ids, np.uint16)}.get(kind)
    if kind == "memory map":
        with TokenFileWriter(tmp_path / "a.tokens", vocab_size=4) as writer:
            writer.append(ids)
        tokens = TokenFile.open(tmp_path / "a.tokens").tokens
    assert as_token_array(tokens).tolist() == ids
    assert token_counts(tokens, 4).tolist() == [1, 2, 2, 3]
    np.testing.assert_array_equal(unigram_log_probs(tokens, 5), unigram_log_probs(np.array(ids), 5))
    batch = RowSampler(tokens, batch_size=1, seq_len=3).batch(1)
    assert batch.dtype == np.int64 and batch.tolist() == [ids[4:]]


def test_counts_are_not_taken_for_tokens() -> None:
    tokens = np.random.default_rng(0).integers(0, 50, 1000).astype(np.uint16)
    counts = token_counts(tokens, 60)
    for taken in (counts, torch.from_numpy(counts)):
        with pytest.raises(ValueError, match="exactly vocab_size = 60 int64 values, as token_counts gives"):
            unigram_log_probs(taken, 60)
        np.testing.assert_array_equal(unigram_log_probs(counts=taken), unigram_log_probs(tokens, 60))
    # As many tokens as ids, in a form that no count has.
    assert unigram_log_probs(np.arange(60, dtype=np.uint16), 60).shape == (60,)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({}, TypeError, "either train_tokens or counts"),
        ({"train_tokens": [1], "counts": [1]}, TypeError, "either train_tokens or counts"),
        ({"train_tokens": [1]}, TypeError, "needs vocab_size"),
        ({"train_tokens": [0.5], "vocab_size": 3}, TypeError, "train_tokens is float64"),
        ({"train_tokens": "text", "vocab_size": 3}, TypeError, "train_tokens is str"),
        ({"train_tokens": CORPUS, "vocab_size": 10_000}, TypeError, "train_tokens is a Corpus"),
        (
            {"counts": [1, 2], "vocab_size": 3},
            ValueError,
            "counts has 2 values, accepted is one for each of 3",
        ),
        ({"counts": [1, -2]}, ValueError, "counts must hold a number >= 0"),
        ({"counts": []}, ValueError, "counts must hold a number >= 0"),
    ],
)
def test_what_the_unigram_refuses(kwargs: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as told:
        unigram_log_probs(**kwargs)
    assert "\n" not in str(told.value)


def test_counts_of_a_long_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = np.random.default_rng(0).integers(0, 100, 10_000).astype(np.uint16)
    monkeypatch.setattr("bitnet_ext.data.statistics._CHUNK", 999)
    np.testing.assert_array_equal(token_counts(tokens, 100), np.bincount(tokens, minlength=100))


@pytest.mark.parametrize(
    ("tokens", "vocab_size", "add", "message"),
    [
        (np.array([1, 5]), 5, 0.1, r"tokens holds the id 5, accepted are 0\.\.4"),
        (np.array([-1]), 5, 0.1, "tokens holds the id -1"),
        (np.array([1]), 0, 0.1, "vocab_size is 0"),
        (np.array([1]), 5, 0.0, "add is 0.0, accepted is a positive finite number"),
        (np.array([1]), 5, float("nan"), "add is nan"),
    ],
)
def test_bad_statistics(tokens: Any, vocab_size: int, add: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        unigram_log_probs(tokens, vocab_size, add)
