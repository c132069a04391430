"""Learning rate and weight decay of every step, computed before the run as plain arrays."""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray

from bitnet_ext.training.config import TrainConfig


def learning_rates(config: TrainConfig) -> NDArray[np.float64]:
    """Learning rate of steps 1..steps.

    With T = schedule_steps, t the step and a linear warm-up over the first config.warmup steps:

    * "constant": lr.
    * "linear": lr at the end of the warm-up to lr * lr_final at T.
    * "cosine": the same end points along half a cosine.
    * "two-stage" (b1.58 "Training Tips, Code and FAQ", section 2): linear decay ``lr (1 - t / T)`` up to
      T / 2, where the peak drops at once to lr_second: ``lr_second (1 - t / T)``.
    * "report" (the collapse report's reading of it): linear from lr to 2/3 lr at T / 2, then linear to
      lr / 1000 at T.

    After T the last value holds. With first_step_at_peak step 1 takes lr and step t > 1 the value of t - 1.
    """
    t = np.arange(1, config.steps + 1, dtype=np.float64)
    if config.first_step_at_peak:
        t = t - 1
    T = float(config.schedule_steps or config.steps)
    W = float(config.warmup)
    clipped = np.minimum(t, T)
    after_warmup = np.clip((clipped - W) / max(T - W, 1.0), 0.0, 1.0)
    peak = config.lr
    if config.lr_schedule == "constant":
        rates = np.full_like(t, peak)
    elif config.lr_schedule == "linear":
        rates = peak * (1 + (config.lr_final - 1) * after_warmup)
    elif config.lr_schedule == "cosine":
        rates = peak * (config.lr_final + (1 - config.lr_final) * 0.5 * (1 + np.cos(np.pi * after_warmup)))
    elif config.lr_schedule == "two-stage":
        second = 2 / 3 * peak if config.lr_second is None else config.lr_second
        # (T + 1): the last step still moves, at 1 / (T + 1) of the peak.
        rates = np.where(clipped <= T / 2, peak, second) * (1 - clipped / (T + 1))
    else:
        second = 2 / 3 * peak if config.lr_second is None else config.lr_second
        half = max(T / 2, W + 1)
        first = peak + (second - peak) * np.clip((clipped - W) / (half - W), 0.0, 1.0)
        last = second + (peak / 1000 - second) * np.clip((clipped - half) / max(T - half, 1.0), 0.0, 1.0)
        rates = np.where(clipped <= half, first, last)
    if W > 0:
        rates = np.where(t < W, peak * t / W, rates)
    if config.first_step_at_peak:
        rates[0] = peak
    return rates


def weight_decays(config: TrainConfig) -> NDArray[np.float64]:
    """Weight decay of steps 1..steps.

    * "constant": weight_decay.
    * "two-stage" (b1.58 FAQ): weight_decay up to T / 2, then wd_second.
    * "cosine-then-off" (BitNet b1.58 2B4T, arXiv 2504.12285, section 3.1): rises along half a cosine to
      weight_decay at T / 2, then wd_second.
    """
    t = np.arange(1, config.steps + 1, dtype=np.float64)
    half = (config.schedule_steps or config.steps) / 2
    if config.wd_schedule == "constant":
        return np.full_like(t, config.weight_decay)
    if config.wd_schedule == "two-stage":
        first = np.full_like(t, config.weight_decay)
    else:
        first = config.weight_decay * 0.5 * (1 - np.cos(np.pi * np.minimum(t / half, 1.0)))
    return np.where(t <= half, first, config.wd_second)


def muon_learning_rates(config: TrainConfig) -> NDArray[np.float64]:
    """:func:`learning_rates` with the peak muon_lr; a second peak keeps its ratio to the first."""
    second = config.lr_second
    if second is not None and config.lr > 0:
        second *= config.muon_lr / config.lr
    return learning_rates(dataclasses.replace(config, lr=config.muon_lr, lr_second=second))


def hyper_table(config: TrainConfig) -> NDArray[np.float32]:
    """What the optimiser reads at each step: [steps, 5] of lr, weight_decay, 1 - beta1^t, 1 - beta2^t and Muon's
    lr."""
    t = np.arange(1, config.steps + 1, dtype=np.float64)
    columns = (
        learning_rates(config),
        weight_decays(config),
        1 - config.beta1**t,
        1 - config.beta2**t,
        muon_learning_rates(config),
    )
    return np.stack(columns, axis=1).astype(np.float32)
