"""Learning-rate and weight-decay schedules at the points their sources name."""

from __future__ import annotations

import numpy as np
import pytest

from bitnet_ext.training import TrainConfig, learning_rates, weight_decays
from bitnet_ext.training.config import LR_SCHEDULES
from bitnet_ext.training.schedules import hyper_table


def rates(**settings: object) -> np.ndarray:
    return learning_rates(TrainConfig(**settings))  # type: ignore[arg-type]


def test_the_reports_logged_rates() -> None:
    """The report logs next step's rate: .001479, .001444, .001410, .001376 at 1k, 2k, 3k, 4k (T = 30,000)."""
    lr = rates(steps=4001, lr=1.5e-3, lr_schedule="report", schedule_steps=30_000, first_step_at_peak=True)
    assert lr[0] == 1.5e-3  # the first step is taken at the peak
    assert lr[1] == pytest.approx(1.5e-3 / 375)
    logged = [lr[step] for step in (1000, 2000, 3000, 4000)]  # the rate of step + 1
    np.testing.assert_allclose(logged, [0.001479, 0.001444, 0.001410, 0.001376], atol=1.5e-6)
    reduced = rates(steps=2001, lr=5e-4, lr_schedule="report", schedule_steps=10_000, first_step_at_peak=True)
    np.testing.assert_allclose([reduced[1000], reduced[2000]], [0.000477, 0.000441], atol=1.5e-6)


def test_report_schedule_corners() -> None:
    lr = rates(steps=1000, lr=3e-3, lr_schedule="report", warmup_steps=100)
    assert lr[99] == pytest.approx(3e-3)
    assert lr[499] == pytest.approx(2e-3)
    assert lr[-1] == pytest.approx(3e-6)
    assert np.all(np.diff(lr[100:]) < 0)


def test_two_stage_drops_at_half() -> None:
    lr = rates(steps=1000, lr=1.5e-3, lr_second=1e-3, lr_schedule="two-stage", warmup_steps=10)
    assert lr[500] / lr[499] == pytest.approx(2 / 3, rel=1e-2)
    assert lr[-1] > 0


def test_cosine_linear_constant() -> None:
    cosine = rates(steps=100, lr=1.0, lr_schedule="cosine", warmup_steps=10, lr_final=0.1)
    assert cosine[4] == pytest.approx(0.5) and cosine[9] == pytest.approx(1.0)
    assert cosine[-1] == pytest.approx(0.1)
    linear = rates(steps=100, lr=1.0, lr_schedule="linear", warmup_steps=0)
    assert linear[49] == pytest.approx(0.5) and linear[-1] == pytest.approx(0.0)
    assert set(rates(steps=9, lr=2.0, lr_schedule="constant", warmup_steps=0)) == {2.0}
    after = rates(steps=50, lr=1.0, lr_schedule="linear", warmup_steps=0, schedule_steps=20, lr_final=0.5)
    assert after[19] == after[-1] == pytest.approx(0.5)


def test_weight_decay() -> None:
    two = weight_decays(TrainConfig(steps=10, weight_decay=0.1, wd_schedule="two-stage", wd_second=0.05))
    assert two.tolist() == [0.1] * 5 + [0.05] * 5
    wave = weight_decays(TrainConfig(steps=10, weight_decay=0.1, wd_schedule="cosine-then-off"))
    assert wave[4] == pytest.approx(0.1) and np.all(np.diff(wave[:5]) > 0) and wave[5] == 0
    assert set(weight_decays(TrainConfig(steps=3, weight_decay=0.2, wd_schedule="constant"))) == {0.2}


def test_hyper_table() -> None:
    config = TrainConfig(steps=3, beta1=0.9, beta2=0.95)
    table = hyper_table(config)
    assert table.shape == (3, 5) and table.dtype == np.float32
    np.testing.assert_allclose(table[:, 2], [0.1, 0.19, 0.271], rtol=1e-6)
    np.testing.assert_allclose(table[:, 0], learning_rates(config), rtol=1e-6)


@pytest.mark.parametrize("schedule", LR_SCHEDULES)
@pytest.mark.parametrize("second", [None, 1e-3])
def test_muon_follows_the_schedule(schedule: str, second: float | None) -> None:
    config = TrainConfig(
        steps=50, warmup_steps=5, lr=2e-3, muon_lr=0.03, lr_schedule=schedule, lr_second=second
    )
    np.testing.assert_allclose(hyper_table(config)[:, 4], 15 * learning_rates(config), rtol=1e-6)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"steps": 0}, "steps must be an integer >= 1"),
        ({"optimizer": "sgd"}, "optimizer must be one of adam_l2, adamw, muon"),
        ({"batch_size": 6, "accumulation": 4}, "batch_size must be a multiple of accumulation"),
        ({"lr": float("nan")}, "lr must be finite"),
        ({"beta2": 1.0}, r"beta2 must be in \[0, 1\)"),
        ({"grad_clip": 0.0}, "grad_clip must be > 0 or None"),
        ({"lr_schedule": "wsd"}, "lr_schedule must be one of"),
        ({"label_smoothing": -0.1}, "label_smoothing must be in"),
    ],
)
def test_bad_settings(settings: dict[str, object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        TrainConfig(**settings)  # type: ignore[arg-type]


def test_round_trip() -> None:
    config = TrainConfig(steps=7, lr=1e-3)
    assert TrainConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match="unknown keys"):
        TrainConfig.from_dict({"learning_rate": 1})
