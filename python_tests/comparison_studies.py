"""Small comparisons of arms, made up from courses that behave in known ways."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from bitnet_ext.collapse.results import Study, read_study

VOCAB = 50_257
LN_V = math.log(VOCAB)
UNIGRAM = 7.25
STEPS = (1, 10, 50, 100, 200, 400, 600, 1000, 2000, 4000)

Row = dict[str, Any]
# At some steps: held-out cross-entropy, predictive entropy, mutual information, unique of 20, final gain.
Course = dict[int, tuple[float, float, float, float, float]]

DYING: Course = {
    1: (10.99, 10.67, 0.15, 20, 1.0),
    100: (10.43, 10.78, 0.04, 18, 0.98),
    400: (9.40, 10.61, 0.01, 2, 0.68),
    600: (10.04, 10.81, 0.0, 4, 0.40),
    1000: (LN_V, LN_V, 0.0, 14, 2e-4),
    4000: (LN_V, LN_V, 0.0, 14, 7e-4),
}
HEALTHY: Course = {
    1: (10.99, 10.67, 0.15, 20, 1.0),
    100: (7.79, 7.9, 0.07, 10, 1.0),
    400: (7.2, 6.9, 0.62, 4, 0.98),
    4000: (6.40, 6.2, 0.85, 4, 0.6),
}
WORD_COUNTS: Course = {
    1: (10.99, 10.67, 0.15, 20, 1.0),
    100: (8.0, 7.9, 0.05, 6, 1.0),
    4000: (7.30, 7.2, 0.01, 1, 1.0),
}
OVERCONFIDENT: Course = {
    1: (10.99, 10.67, 0.15, 20, 1.0),
    400: (7.2, 6.0, 0.6, 12, 1.0),
    4000: (9.1, 2.4, 1.9, 17, 1.3),
}
PEAKED: Course = {  # collapsed, but not uniform
    1: (10.99, 10.67, 0.15, 20, 1.0),
    400: (8.67, 9.6, 0.01, 3, 0.68),
    4000: (8.83, 9.6, 0.0, 2, 0.03),
}


def rows_of(
    points: Course, *, lr: float = 1.5e-3, shift: float = 0.0, steps: tuple[int, ...] = STEPS
) -> list[Row]:
    xs = [math.log(step) for step in points]
    rows = []
    for step in steps:
        ce, entropy, mi, unique, gain = (
            float(np.interp(math.log(step), xs, [values[i] for values in points.values()])) for i in range(5)
        )
        ce += shift
        rows.append(
            {
                "kind": "eval",
                "step": step,
                "tokens_seen": 124 * step,
                "lr": lr,
                "weight_decay": 0.1,
                "cumulative_lr": lr * step,
                "train_loss": ce - 0.1,
                "train_cross_entropy": ce - 0.1,
                "grad_norm": 0.5,
                "heldout_cross_entropy": ce,
                "unigram_cross_entropy": UNIGRAM,
                "excess_over_unigram": ce - UNIGRAM,
                "unique_of_20": round(unique),
                "argmax_vocabulary": 50,
                "effective_argmax_vocabulary": 10.0,
                "predictive_entropy": entropy,
                "marginal_entropy": min(LN_V, entropy + mi),
                "mutual_information": mi,
                "kl_to_unigram": 0.3,
                "logit_std": 0.5,
                "head_accuracy": 0.1,
                "torso_accuracy": 0.01,
                "tail_accuracy": None,
                "gain_mean_abs": gain,
                "final_gain_mean_abs": gain,
                "embedding_mean_abs": 0.8 * gain,
                "lm_head_mean_abs": 0.03 * gain,
                "latent_mean_abs": 0.03 * gain,
                "ternary_negative": 0.37,
                "ternary_zero": 0.26,
                "ternary_positive": 0.37,
                "flip_rate": 0.01,
            }
        )
    return rows


def write_run(root: Path, arm: str, seed: int, rows: list[Row], **config: Any) -> Path:
    folder = root / arm / f"seed{seed}"
    folder.mkdir(parents=True)
    time = {
        "kind": "time",
        "step": rows[-1]["step"] if rows else 0,
        "seconds": 61.0,
        "steps_per_second": 16.5,
    }
    content = {"arm": arm, "seed": seed, "model": {"vocab_size": VOCAB}, "train": {"lr": 1.5e-3, **config}}
    (folder / "config.json").write_text(json.dumps(content))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, time]))
    return folder


def write_study(root: Path, arms: dict[str, list[list[Row]]], *, steps: int = 4000, **settings: Any) -> Study:
    """A study with the rows of each seed of each arm."""
    root.mkdir(exist_ok=True)
    content = {
        "arms": {arm: {"summary": f"about {arm}"} for arm in arms},
        "seeds": list(range(max(map(len, arms.values())))),
        "steps": steps,
        "data": {"name": "wiki-leads", "train_tokens": 1_234_567},
        "device": {"type": "cpu", "name": "a processor"},
        "versions": {"torch": "2.13.0"},
        "command": "examples/train_collapse.py --seeds 1",
        **settings,
    }
    (root / "study.json").write_text(json.dumps(content))
    for arm, seeds in arms.items():
        for seed, rows in enumerate(seeds):
            write_run(root, arm, seed, rows, optimizer="adamw" if "adamw" in arm else "adam_l2")
    return read_study(root)
