"""Figures of the factorial study: what an effect plot claims, which arms share a panel, and that colours stay apart."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from numpy.typing import NDArray
from PIL import Image

from bitnet_ext.collapse.blocks import BLOCKS
from bitnet_ext.collapse.pages.factorial import Content
from bitnet_ext.collapse.pages.factorial_tables import how_ended
from bitnet_ext.collapse.pages.figures.curves import block_figures, facets, styles
from bitnet_ext.collapse.pages.figures.drawing import (
    BLACK,
    BLUE,
    GREEN,
    ORANGE,
    PURPLE,
    SKY,
    VERMILLION,
    new_figure,
    png,
)
from bitnet_ext.collapse.pages.figures.effect_plot import bands, effect_figure, signed
from bitnet_ext.collapse.pages.figures.parts import part_figure
from bitnet_ext.collapse.pages.table import spread_text
from bitnet_ext.collapse.results import Study, read_study
from bitnet_ext.collapse.verdicts.block_effects import base_of
from bitnet_ext.collapse.verdicts.judging import CE, MI, ContrastResult
from bitnet_ext.collapse.verdicts.statistics import paired

INKS = (BLACK, ORANGE, SKY, GREEN, BLUE, VERMILLION, PURPLE)


def contrast(other: str, values: list[float], key: str = CE, base: str = "standard-lr") -> ContrastResult:
    estimate = paired(values)
    return ContrastResult(base, other, key, 3000, estimate, estimate.p)


def pixels(data: bytes) -> NDArray[np.uint8]:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def count(image: NDArray[np.uint8], colour: str, tolerance: int = 6) -> int:
    """Pixels of a colour."""
    wanted = 255 * np.array(to_rgb(colour))
    return int((np.abs(image.astype(int) - wanted) <= tolerance).all(axis=2).sum())


def write_study(out: Path, arms: dict[str, list[dict[str, Any]]], blocks: dict[str, list[str]]) -> Study:
    """A study of one seed an arm, from its rows."""
    settings = {
        "arms": {arm: {} for arm in arms}, "seeds": [0], "steps": dict.fromkeys(arms, 100), "vocab_size": 50257,
        "blocks": {key: {"title": f"Block {key}", "question": "Why?", "arms": names} for key, names in blocks.items()},
    }  # fmt: skip
    out.mkdir(parents=True)
    (out / "study.json").write_text(json.dumps(settings))
    for arm, rows in arms.items():
        folder = out / arm / "seed0"
        folder.mkdir(parents=True)
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_study(out)


def rows(**metrics: float) -> list[dict[str, Any]]:
    return [
        {"kind": "eval", "step": step, "cumulative_lr": 1.5e-3 * step, **metrics} for step in (1, 10, 100)
    ]


def test_all_inks_of_a_figure_stay_apart() -> None:
    figure = new_figure(3, 2)
    axis = figure.add_axes((0, 0, 1, 1))
    for place, ink in enumerate(INKS):
        axis.plot([0, 1], [place, place], color=ink, linewidth=3 if place else 0.8)
    data = png(figure)
    image = pixels(data)
    assert all(count(image, ink) > 100 for ink in INKS)
    assert count(image, "#ffffff", 0) > image.shape[0] * image.shape[1] / 2, "paper stays white"
    assert Image.open(io.BytesIO(data)).mode == "P" and data == png(figure)


@pytest.mark.parametrize(
    ("values", "key", "colour"),
    [
        ([-1.0, -1.1, -0.9, -1.05, -0.95, -1.0], CE, BLUE),
        ([1.0, 1.1, 0.9, 1.05, 0.95, 1.0], CE, VERMILLION),
        ([1.0, 1.1, 0.9, 1.05, 0.95, 1.0], MI, BLUE),
        ([1.0, -1.1, 0.9, -1.05, 0.95, -1.0], CE, None),
        ([-1.0, -1.1, -0.9, -1.05, -0.95], CE, None),  # fewer seeds than a verdict needs
        ([-1.0], CE, None),
    ],
)
def test_a_direction_is_claimed_only_by_a_whole_interval(
    values: list[float], key: str, colour: str | None
) -> None:
    found = effect_figure("f", "t", "c", [contrast("adamw", values, key)])
    assert found is not None
    image = pixels(found.png)
    for ink in (BLUE, VERMILLION):
        assert (count(image, ink) > 20) == (ink == colour), ink


def test_nothing_to_compare_makes_no_figure() -> None:
    assert effect_figure("f", "t", "c", []) is None


def test_a_large_effect_has_a_scale_of_its_own() -> None:
    small = [contrast(f"smoothing-{i}", [0.1, -0.1]) for i in range(3)]
    large = contrast("adamw", [-3.0, -3.2])
    twin = contrast("fp-l2-0.01", [0.1, 0.2], base="l2-0.01")
    found = {(c.base, c.other): {CE: c} for c in (large, *small, twin)}
    names = [[other for _, other in band] for band in bands(found)]
    assert names == [["adamw"], ["smoothing-0", "smoothing-1", "smoothing-2"], ["fp-l2-0.01"]]
    near = {(c.base, c.other): {CE: c} for c in (contrast("adamw", [0.3, 0.2]), *small)}
    assert len(bands(near)) == 1


def test_differences_have_signs_and_zero_has_none() -> None:
    assert [signed(value, 2) for value in (0.5, -0.5, -0.001, 0.0)] == ["+0.50", "−0.50", "0.00", "0.00"]  # noqa: RUF001
    assert signed(0.5, 3, "-") == "0.500" and signed(math.nan, 2) == "not a number"


def test_panels_hold_what_belongs_together() -> None:
    recovery = facets(BLOCKS["D"].arms, [])
    assert [{arm.split("-")[1] for arm in group} for group in recovery] == [{"350"}, {"1100"}, {"4000"}]
    for group in facets(BLOCKS["C"].arms, ["standard-lr", "adamw"]):
        assert group[:2] == ["standard-lr", "adamw"] and len({arm.split("-")[0] for arm in group[2:]}) == 1
    precision = next(g for g in facets(BLOCKS["B"].arms, ["standard-lr", "adamw"]) if "fp-twin" in g)
    assert all(arm.startswith("fp-") for arm in precision[2:])
    assert len(facets(BLOCKS["A"].arms, ["standard-lr"])) == 1
    for block in BLOCKS.values():
        bases = [arm for arm in ("standard-lr", "adamw") if arm in block.arms]
        groups = facets(block.arms, bases)
        assert sorted({arm for group in groups for arm in group}) == sorted(set(block.arms))
        for group in groups:
            looks = styles(group)
            assert len(group) <= 8 and len({(colour, dash) for colour, dash, _ in looks.values()}) == len(
                group
            )


def test_dashes_are_decoupled_decay() -> None:
    looks = styles(["standard-lr", "adamw", "smoothing-0.1-l2", "smoothing-0.1-adamw", "from-350-continue"])
    assert looks["standard-lr"][0] == looks["adamw"][0] == looks["from-350-continue"][0] == BLACK
    assert looks["smoothing-0.1-l2"][0] == looks["smoothing-0.1-adamw"][0]
    assert [looks[arm][1] == "solid" for arm in looks] == [True, False, True, False, True]


def test_a_change_on_the_way_is_compared_with_a_run_that_lasts_as_long() -> None:
    arms = BLOCKS["A"].arms
    assert base_of("wd-to-0", arms) == "wd-to-0.05" and base_of("wd-to-0.05", arms) is None
    assert base_of("wd-to-0", [arm for arm in arms if arm != "wd-to-0.05"]) is None


def test_many_panels_make_several_figures(tmp_path: Path) -> None:
    arms = [
        f"{kind}-{level}-l2" for kind in ("smoothing", "entropy", "diversity", "head-l2") for level in (1, 2)
    ]
    groups = facets(["standard-lr", *arms], ["standard-lr"])
    everything = {arm: rows(heldout_cross_entropy=9.0) for arm in ("standard-lr", *arms)}
    study = write_study(tmp_path / "s", everything, {"C": list(everything)})
    figures = block_figures(study, "block-C", "Solutions", groups)
    assert [figure.name for figure in figures] == ["block-C-curves-1", "block-C-curves-2"]
    assert figures[0].title == "Solutions: loss, context, and the count (1 of 2)"


def test_decay_by_group_needs_its_metrics(tmp_path: Path) -> None:
    plain = rows(heldout_cross_entropy=9.0)
    study = write_study(
        tmp_path / "old", {"standard-lr": plain, "adamw": plain}, {"B": ["standard-lr", "adamw"]}
    )
    assert part_figure("f", study) is None
    some = rows(decay_share_embedding=1.0, embedding_norm_unseen=16.0)
    arms = {"standard-lr": some, "adamw": plain, "no-decay": rows(decay_share_embedding=math.nan)}
    study = write_study(tmp_path / "new", arms, {"B": list(arms)})
    found = part_figure("f", study)
    assert found is not None and found.name == "f" and found.png.startswith(b"\x89PNG")
    assert "block-B-parts" in {figure.name for figure in Content(study, []).figures}


def test_a_wide_figure_keeps_legible_letters(tmp_path: Path) -> None:
    study = write_study(
        tmp_path / "s", {"standard-lr": rows(heldout_cross_entropy=9.0)}, {"A": ["standard-lr"]}
    )
    content = Content(study, [])
    width = pixels(content.figures[0].png).shape[1]
    assert f'style="--least: {round(0.55 * width)}px"' in content.html()


def test_facts_of_the_runs(tmp_path: Path) -> None:
    """A resumed run's clock begins again; the program's own folder says nothing to others."""
    times = [{"kind": "time", "step": step, "seconds": s} for step, s in ((1, 1.0), (10, 100.0), (100, 20.0))]
    arms = {"standard-lr": rows(heldout_cross_entropy=9.0) + times}
    study = write_study(tmp_path / "s", arms, {"A": ["standard-lr"]})
    study.settings["command"] = "/home/someone/bin/bitnet-ext collapse --blocks A"
    facts = dict(Content(study, []).facts())
    assert facts["time of the runs"].startswith("2.0 minutes")
    assert facts["command"] == "bitnet-ext collapse --blocks A"


def test_ranges_of_negative_numbers_can_be_read() -> None:
    assert spread_text([-0.7, -0.5], lambda value: f"{value:.1f}") == "-0.6 (-0.7 to -0.5)"


def test_how_runs_ended_in_words() -> None:
    assert how_ended(["collapsed", None, "collapsed"]) == "collapsed"
    assert how_ended(["uniform", "collapsed", "collapsed"]) == "collapsed 2/3 (dead: uniform output 1/3)"
    assert how_ended([None]) == "\N{EN DASH}"
