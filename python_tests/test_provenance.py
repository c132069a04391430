"""What a checkpoint says of its run, what a resumed run compares, and what a Trainer takes as model and tokens."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import bitnet_ext
from bitnet_ext.data import Corpus
from bitnet_ext.models import BitNetConfig, BitNetForCausalLM
from bitnet_ext.training import (
    CheckpointError,
    TrainConfig,
    Trainer,
    read_checkpoint,
    resolve_checkpoint,
)
from bitnet_ext.training.provenance import BLOCK_TOKENS, BLOCKS, fingerprint, token_stream

SHAPE = BitNetConfig(
    vocab_size=97,
    hidden_size=32,
    num_layers=1,
    num_heads=1,
    num_kv_heads=1,
    intermediate_size=64,
    max_seq_len=64,
)
CONFIG = TrainConfig(steps=6, warmup_steps=2, batch_size=2, seq_len=16, checkpoint_seconds=None)


def stream(n: int = 500, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 97, n).astype(np.uint16)


def trainer(run_dir: Path | None, tokens: Any = None, shape: BitNetConfig = SHAPE, **options: Any) -> Trainer:
    tokens = stream() if tokens is None else tokens
    config = options.pop("config", CONFIG)
    model = options.pop("model", None) or BitNetForCausalLM(shape, seed=0)
    return Trainer(model, config, tokens, run_dir=run_dir, device="cpu", **options)


def stop_at(run: Trainer, step: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        run.fit(on_progress=lambda now, record: run.request_stop() if now == step else None)


def corpus(tokens: np.ndarray, name: str = "notes") -> Corpus:
    values: dict[str, Any] = {
        "name": name,
        "train": tokens,
        "heldout": tokens[:50],
        "vocab_size": 97,
        "tokenizer": None,
        "fingerprint": "0" * 64,
    }
    return Corpus(**{field.name: values.get(field.name, {}) for field in dataclasses.fields(Corpus)})


# --- what is recorded ---------------------------------------------------------------------------------------------


def test_a_checkpoint_says_where_it_comes_from(tmp_path: Path) -> None:
    trainer(tmp_path, corpus(stream())).fit()
    state = read_checkpoint(tmp_path).state
    assert state["tokens"] == fingerprint(stream()) and state["tokens"]["length"] == 500
    assert state["versions"]["bitnet_ext"] == bitnet_ext.__version__
    assert state["versions"]["torch"] == torch.__version__
    assert state["device"]["type"] == "cpu"
    assert state["command"] == sys.argv
    assert state["created"].endswith("Z")
    assert state["source"]["fingerprint"] == "0" * 64 and state["source"]["name"] == "notes"
    assert state["model_config"] == SHAPE.to_dict()


def test_the_fingerprint(tmp_path: Path) -> None:
    for n in (0, 5, BLOCKS * BLOCK_TOKENS, BLOCKS * BLOCK_TOKENS + 1, 3 * BLOCKS * BLOCK_TOKENS):
        tokens = np.arange(n) % 60_000
        expected = fingerprint(tokens)
        for dtype in (np.uint16, np.int32, np.uint32, ">i4"):
            assert fingerprint(tokens.astype(dtype)) == expected
        for changed in (0, n // 2, n - 1) if 0 < n <= BLOCKS * BLOCK_TOKENS else (0, n - 1):
            if n:
                other = tokens.copy()
                other[changed] += 1
                assert fingerprint(other) != expected
        assert fingerprint(np.append(tokens, 0)) != expected


def test_the_fingerprint_reads_little_of_a_memory_map(tmp_path: Path) -> None:
    """A sparse file of 10^10 ids: reading it all takes minutes, its blocks milliseconds."""
    tokens = np.memmap(tmp_path / "tokens.bin", np.uint16, mode="w+", shape=(10**10,))
    tokens[-1] = 7
    assert fingerprint(tokens)["length"] == 10**10
    blocks = (tmp_path / "tokens.bin").stat().st_blocks * 512
    assert blocks < 1 << 20


# --- what is compared -----------------------------------------------------------------------------------------


def test_a_resume_with_another_text_is_refused(tmp_path: Path) -> None:
    """As 12 and relia-03."""
    stop_at(trainer(tmp_path, corpus(stream())), 3)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    anew = r"init_from \(--init-from\) and another folder$"
    for tokens, message in (
        (stream(400), r"the text has 400 tokens, but .*step-00000003 was written with 500 tokens"),
        (stream(seed=1), r"the text has other 500 tokens, but .* was written with 500 tokens"),
        (corpus(stream(400), "letters"), r"the text has 400 tokens \(letters\), but .* 500 tokens \(notes\)"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            trainer(tmp_path, tokens).fit(resume=True)
        assert error.match(anew)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    trainer(tmp_path, stream().astype(np.int64)).fit(resume=True)  # the same ids in another dtype
    assert read_checkpoint(tmp_path).step == 6


@pytest.mark.parametrize(
    ("name", "value"),
    [("quantization", "none"), ("activation", "silu"), ("norm_eps", 1e-6), ("max_seq_len", 32)],
)
def test_a_resume_with_another_network_is_refused(name: str, value: object, tmp_path: Path) -> None:
    """As relia-03: the weights of these would fit."""
    stop_at(trainer(tmp_path), 3)
    was = getattr(SHAPE, name)
    with pytest.raises(
        ValueError, match=rf"the model's {name} is {value!r}, but .* was written with {was!r}"
    ):
        trainer(tmp_path, shape=dataclasses.replace(SHAPE, **{name: value})).fit(resume=True)


def test_a_checkpoint_of_an_earlier_version_is_resumed(tmp_path: Path) -> None:
    trainer(tmp_path / "whole").fit()
    stop_at(trainer(tmp_path / "cut"), 3)
    path = resolve_checkpoint(tmp_path / "cut") / "state.json"
    content = json.loads(path.read_text())
    for name in ("tokens", "source", "versions", "device", "command", "created"):
        del content["state"][name]
    del content["state"]["model_config"]["init_std"]
    path.write_text(json.dumps(content))
    trainer(tmp_path / "cut").fit(resume=True)
    expected = read_checkpoint(tmp_path / "whole").model
    assert all(torch.equal(v, expected[k]) for k, v in read_checkpoint(tmp_path / "cut").model.items())


# --- beginning with weights -----------------------------------------------------------------------------------


def test_init_from_takes_weights_only(tmp_path: Path) -> None:
    trainer(tmp_path / "first").fit()
    trained = read_checkpoint(tmp_path / "first")
    config = dataclasses.replace(CONFIG, steps=3, lr=1e-4)
    run = trainer(tmp_path / "second", stream(300, 1), config=config, init_from=tmp_path / "first")
    assert run.step == 0
    assert all(torch.equal(v, trained.model[k]) for k, v in run.model.state_dict().items())
    assert all(int(value.count_nonzero()) == 0 for value in run.optimizer.state().values())
    run.fit()
    rows = [json.loads(line) for line in (tmp_path / "second" / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["step"] == 1 and rows[0]["lr"] <= 1e-4
    state = read_checkpoint(tmp_path / "second").state
    assert state["init_from"] == {"path": str(trained.path), "step": 6}
    model = BitNetForCausalLM(SHAPE, seed=9)
    model.load_state_dict(trained.model)
    by_hand = trainer(None, stream(300, 1), config=config, model=model)
    by_hand.fit()
    second = read_checkpoint(tmp_path / "second").model
    assert all(torch.equal(v, second[k]) for k, v in by_hand.model.state_dict().items())


def test_init_from_checks(tmp_path: Path) -> None:
    trainer(tmp_path).fit()
    with pytest.raises(
        CheckpointError, match=r"embed_tokens\.weight has shape \(98, 32\), the checkpoint has \(97, 32\)"
    ):
        trainer(None, shape=dataclasses.replace(SHAPE, vocab_size=98), init_from=tmp_path)
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        trainer(None, init_from=tmp_path / "nothing")
    with pytest.raises(ValueError, match="start_from and init_from exclude each other"):
        trainer(None, init_from=tmp_path, start_from=tmp_path)
    with pytest.raises(ValueError, match="start_from must be a checkpoint of a step before"):
        trainer(None, start_from=tmp_path)  # a run folder names its checkpoint there too


# --- what a Trainer takes -----------------------------------------------------------------------------------------


def test_token_streams(tmp_path: Path) -> None:
    tokens = stream(60)
    np.save(tmp_path / "tokens.npy", tokens)
    for given in (
        tokens,
        np.load(tmp_path / "tokens.npy", mmap_mode="r"),
        torch.from_numpy(tokens.astype(np.int64)),
        torch.from_numpy(tokens.astype(np.int32)),
        tokens.tolist(),
        tuple(tokens.tolist()),
        corpus(tokens),
    ):
        found = token_stream(given).ids
        assert isinstance(found, np.ndarray) and found.tolist() == tokens.tolist()
    assert token_stream(range(5)).ids.tolist() == [0, 1, 2, 3, 4]


def test_every_kind_of_tokens_trains_alike(tmp_path: Path) -> None:
    weights = []
    for given in (stream(), torch.from_numpy(stream().astype(np.int64)), stream().tolist(), corpus(stream())):
        run = trainer(None, given)
        run.fit()
        weights.append(run.model.embed_tokens.weight)
    assert all(torch.equal(weights[0], other) for other in weights[1:])


@pytest.mark.parametrize(
    ("tokens", "error", "message"),
    [
        ("text", TypeError, r"must be token ids, got str; bitnet_ext\.data\.load_corpus\(PATH\)"),
        (b"text", TypeError, "must be token ids, got bytes"),
        (Path("text.txt"), TypeError, "must be token ids, got PosixPath"),
        (
            None,
            TypeError,
            r"as a numpy array, a torch tensor, a list, or a bitnet_ext\.data\.Corpus, got NoneType",
        ),
        ({1: 2}, TypeError, "got dict"),
        (torch.zeros(9), ValueError, r"flat array of integer ids, got torch\.float32 of shape \(9,\)"),
        (torch.zeros(3, 3).long(), ValueError, r"integer ids, got int64 of shape \(3, 3\)"),
        (torch.zeros(9).bool(), ValueError, "integer ids, got bool"),
        ([1.5, 2.5], ValueError, "integer ids, got float64"),
        (["a", "b"], ValueError, "integer ids, got <U1"),
        ([[1], [2, 3]], ValueError, "integer ids, got list"),
        ([10**30], ValueError, "integer ids, got object"),
        ([], ValueError, "holds 0 tokens"),
        ([1, 2, 200] * 20, ValueError, r"must be in 0\.\.96 .* got id 200"),
        ([1, -2, 3] * 20, ValueError, r"must be in 0\.\.96 .* got id -2"),
    ],
)
def test_other_tokens_are_refused(tokens: Any, error: type[Exception], message: str) -> None:
    model = BitNetForCausalLM(SHAPE, seed=0)
    with pytest.raises(error, match=message) as told:
        Trainer(model, CONFIG, tokens, device="cpu")
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("model", [torch.nn.Linear(3, 3), "collapse-64", None, SHAPE])
def test_other_models_are_refused(model: Any) -> None:
    with pytest.raises(TypeError, match=f"model must be a BitNetForCausalLM, got {type(model).__name__}"):
        Trainer(model, CONFIG, stream(), device="cpu")
