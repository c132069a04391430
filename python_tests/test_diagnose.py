"""``collapse diagnose``: planted troubles, each a real short training, and files that are cut, old or wrong.

The thresholds of the rules were fixed before these runs were made; see the constants of diagnose_weights and
diagnose_course.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from bitnet_ext.collapse.diagnose import NONE, UNKNOWN, Diagnosis, diagnose
from bitnet_ext.collapse.diagnose_command import add_arguments, as_text, run
from bitnet_ext.collapse.diagnose_inputs import initial_sizes, read_case
from bitnet_ext.collapse.evaluator import CollapseEvaluator
from bitnet_ext.data.statistics import unigram_log_probs
from bitnet_ext.metrics import weight_norms
from bitnet_ext.models import BitNetForCausalLM, preset
from bitnet_ext.training import TrainConfig, Trainer, TrainingDivergedError

VOCAB = 600
BASE = TrainConfig(
    steps=240,
    batch_size=6,
    seq_len=40,
    optimizer="adamw",
    lr=2.5e-3,
    lr_schedule="constant",
    wd_schedule="constant",
    warmup_steps=8,
    checkpoint_seconds=None,
    final_checkpoint="model",
)


def markov_text(n: int, seed: int, followers: int = 6) -> np.ndarray:
    """Text with structure: each id has a few followers with falling weights, ids are frequent by Zipf's law."""
    rng = np.random.default_rng(seed)
    zipf = 1 / np.arange(1, VOCAB + 1)
    zipf /= zipf.sum()
    table = rng.choice(VOCAB, size=(VOCAB, followers), p=zipf)
    weights = np.cumsum(1 / np.arange(1, followers + 1))
    picks = np.searchsorted(weights / weights[-1], rng.random(n))
    jumps, elsewhere = rng.random(n) < 0.15, rng.choice(VOCAB, size=n, p=zipf)
    ids = np.empty(n, np.uint16)
    state = 0
    for i in range(n):
        state = elsewhere[i] if jumps[i] else table[state, picks[i]]
        ids[i] = state
    return ids


TEXT = markov_text(34_000, seed=101)
TRAIN, HELDOUT = TEXT[:30_000], TEXT[30_000:]


class PlantedNaN(CollapseEvaluator):
    """Puts a NaN into the final gain before it evaluates a step from 150 on."""

    def evaluate(self, model: BitNetForCausalLM) -> dict[str, Any]:
        self.seen = getattr(self, "seen", 0) + 1
        if self.seen == 5:
            with torch.no_grad():
                model.final_norm.weight[2] = math.nan
        return super().evaluate(model)


def train(
    out: Path,
    config: TrainConfig,
    *,
    tokens: np.ndarray = TRAIN,
    evaluator: type[CollapseEvaluator] | None = CollapseEvaluator,
    decays: Callable[[str], bool] | None = None,
    **model: Any,
) -> Path:
    """A real run of a 64-wide network; `decays` overrides which parameters decay reaches."""
    network = BitNetForCausalLM(preset("collapse-64", vocab_size=VOCAB, **model), seed=config.seed)
    measure = None
    if evaluator is not None:
        unigram = unigram_log_probs(tokens, VOCAB)
        measure = evaluator(
            HELDOUT, unigram, seq_len=config.seq_len, max_tokens=1200, device=torch.device("cpu")
        )
    every = max(1, config.steps // 8)
    trainer = Trainer(
        network,
        config,
        tokens,
        run_dir=out,
        device="cpu",
        evaluator=measure,
        eval_steps=[1, *range(every, config.steps, every), config.steps],
    )
    if decays is not None:
        trainer.optimizer._decayed = {name: decays(name) for name in trainer.optimizer._decayed}
    trainer.fit()
    return out


def config(**changes: Any) -> TrainConfig:
    return dataclasses.replace(BASE, **changes)


def only_gains(name: str) -> bool:
    return "norm" in name


#: name -> (kind, how it was planted)
PLANTED: dict[str, tuple[str, dict[str, Any]]] = {
    "coupled L2, ternary": (
        "decay-death",
        {
            "config": config(
                optimizer="adam_l2", lr=4e-3, weight_decay=0.05, decay_norms=True, grad_clip=0.5, seed=21
            )
        },
    ),
    "coupled L2, full precision": (
        "decay-death",
        {
            "config": config(
                optimizer="adam_l2",
                lr=3e-3,
                weight_decay=0.3,
                decay_norms=True,
                sampling="sequential",
                seed=22,
            ),
            "quantization": "none",
        },
    ),
    "decay on the gains only": (
        "decay-death",
        {
            "config": config(optimizer="adam_l2", lr=3e-3, decay_norms=True, steps=160, seed=23),
            "decays": only_gains,
            "quantization": "none",
        },
    ),
    "a few hundred tokens, repeated": (
        "over-confidence",
        {"config": config(lr=3e-3, steps=280, seed=24), "tokens": TRAIN[:300]},
    ),
    "huge L2 on the ternary layers only": (
        "dead-ternary",
        {"config": config(optimizer="adam_l2", lr=2e-3, weight_decay=10.0, decay_embeddings=False, seed=25)},
    ),
    "cut at the unigram stage": ("unigram-stage", {"config": config(lr=1e-3, steps=24, seed=26)}),
    "lr 0": ("frozen", {"config": config(lr=0.0, steps=40, seed=27)}),
    "lr too small": ("frozen", {"config": config(lr=2e-6, steps=80, seed=28)}),
    "lr far too large": (
        "diverged",
        {"config": config(lr=3.0, grad_clip=None, steps=80, warmup_steps=20, seed=29)},
    ),
    "healthy, ternary": (NONE, {"config": config(lr=3e-3, steps=320, seed=30)}),
    "healthy, full precision": (NONE, {"config": config(steps=320, seed=31), "quantization": "none"}),
    "healthy, no decay, cosine": (
        NONE,
        {"config": config(weight_decay=0.0, lr_schedule="cosine", steps=320, seed=32)},
    ),
}


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The run folder of a planted case, trained at its first use."""
    root = tmp_path_factory.mktemp("planted")
    done: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in done:
            done[name] = train(root / str(len(done)), **PLANTED[name][1])
        return done[name]

    return folder


def told(path: Path) -> Diagnosis:
    return diagnose(read_case(path))


def command(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return run(parser.parse_args([str(each) for each in arguments]))


@pytest.mark.parametrize("name", PLANTED)
def test_planted_trouble_is_named(runs: Callable[[str], Path], name: str) -> None:
    found = told(runs(name))
    assert found.kind == PLANTED[name][0], as_text(found, "run folder")
