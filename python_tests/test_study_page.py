"""The report of the factorial study, from small made-up studies: what it says, how it is built, what it leaves out."""

from __future__ import annotations

import csv
import gzip
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitnet_ext import cli
from bitnet_ext.collapse.blocks import BLOCKS, FACTORIAL
from bitnet_ext.collapse.pages.factorial import Content, write_study_page
from bitnet_ext.collapse.pages.figures.curves import facets
from bitnet_ext.collapse.results import read_study
from bitnet_ext.collapse.verdicts import Verdict
from bitnet_ext.collapse.verdicts.block_effects import base_of, block_contrasts

LN_V = math.log(50257)
MARKS = (1, 100, 1000, 2500, 4000)


def dying(tau: float) -> float:
    return max(9.0, min(LN_V, 9.0 + 2 * tau))


def row(step: int, arm: str, seed: int, dead: bool) -> dict[str, Any]:
    lr = 5e-4 if "reduced" in arm else 1.5e-3
    noise = np.random.default_rng([seed, step, len(arm)]).normal(0, 0.02)
    ce = (dying(lr * step) if dead else max(6.5, 10.9 - 1.2 * math.log10(step + 1) ** 1.4)) + noise
    return {
        "kind": "eval", "step": step, "cumulative_lr": lr * step, "lr": lr, "heldout_cross_entropy": ce,
        "unigram_cross_entropy": 7.25, "excess_over_unigram": ce - 7.25, "predictive_entropy": ce,
        "mutual_information": 0.01 if dead else 0.8 + noise, "unique_of_20": 3 if dead else 5,
        "train_cross_entropy": ce - 0.2, "effective_argmax_vocabulary": 2.0 if dead else 15.0,
        "final_gain_mean_abs": max(1 - lr * step, 0.0) if dead else 1.0, "lm_head_mean_abs": 1e-4 if dead else 0.2,
        "embedding_mean_abs": 0.8 * math.exp(-lr * step) if dead else 0.8, "decay_share": 0.99 if dead else 0.4,
        "ternary_zero": 0.3, "absmean_mean": 1e-5 if dead else 0.02, "flip_rate": 0.001,
    }  # fmt: skip


def write_study(
    out: Path,
    blocks: tuple[str, ...] = ("A", "B"),
    seeds: int = 3,
    marks: tuple[int, ...] = MARKS,
    **extra: Any,
) -> Path:
    arms = list(dict.fromkeys(arm for key in blocks for arm in BLOCKS[key].arms))
    settings = {
        "arms": {arm: {"summary": FACTORIAL[arm].summary, "source": "control"} for arm in arms},
        "blocks": {key: {"key": key, "title": BLOCKS[key].title, "question": BLOCKS[key].question,
                         "arms": list(BLOCKS[key].arms)} for key in blocks},
        "steps": dict.fromkeys(arms, marks[-1]), "seeds": list(range(seeds)), "vocab_size": 50257,
        "seeds_of": dict.fromkeys(arms, seeds), "command": "bitnet-ext collapse --blocks A B",
        "data": {"name": "text", "description": "a text", "train_tokens": 1000, "heldout_tokens": 100}, **extra,
    }  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    (out / "study.json").write_text(json.dumps(settings))
    for arm in arms:
        dead = FACTORIAL[arm].train.get("optimizer") != "adamw" and "no-decay" not in arm
        for seed in range(seeds):
            folder = out / arm / f"seed{seed}"
            folder.mkdir(parents=True)
            lines = [json.dumps(row(step, arm, seed, dead)) for step in marks]
            (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return out


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    out = write_study(tmp_path_factory.mktemp("study") / "s")
    session = {"seconds": 120.0, "devices": ["cuda:0"], "name": "GPU X", "began": "now"}
    (out / "sessions.jsonl").write_text(json.dumps(session) + "\n")
    return write_study_page(out)


def test_the_page_stands_alone(written: dict[str, Path]) -> None:
    page = written["report"].read_text()
    assert not re.search(r'(src|href)="(?!data:|#)', page) and "<script" not in page
    assert page.count("<img ") == len(list(written["figures"].glob("*.png"))) >= 6
    assert all(re.search(r'alt="[^"]{5,}"', tag) for tag in re.findall(r"<img [^>]*>", page))
    assert len(page) < 4_000_000
    for text in ("A: Replication", "B: Cause", "GPU X; 2.0 minutes", "a text; 1,000 tokens", "Run it again"):
        assert text in page


def test_the_original_table_stands_beside_ours(written: dict[str, Path]) -> None:
    text = written["markdown"].read_text()
    line = next(line for line in text.splitlines() if line.startswith("| reduced-lr | 3 | 18 | 9.89 | YES!"))
    assert "9.9" in line  # ours at step 1,000: 9.0 + 2 x 0.5, less 0.2 of training, give or take noise
    assert "![" in text and "figures/block-B-effects.png" in text


def test_the_raw_table_holds_every_row(written: dict[str, Path]) -> None:
    rows = list(csv.DictReader(gzip.decompress(written["summary"].read_bytes()).decode().splitlines()))
    assert len(rows) == 3 * len(MARKS) * len({arm for key in "AB" for arm in BLOCKS[key].arms})
    one = next(r for r in rows if (r["arm"], r["seed"], r["step"]) == ("adamw", "1", "1000"))
    expected = row(1000, "adamw", 1, False)["heldout_cross_entropy"]
    assert float(one["heldout_cross_entropy"]) == pytest.approx(expected, rel=1e-5)


def test_equal_studies_give_equal_bytes(tmp_path: Path, written: dict[str, Path]) -> None:
    again = write_study_page(written["report"].parent, tmp_path / "pages")
    for name in ("report", "markdown", "summary"):
        assert again[name].read_bytes() == written[name].read_bytes()


def test_effects_are_paired_by_seed(tmp_path: Path) -> None:
    study = read_study(write_study(tmp_path / "s", ("B",)))
    results = {(c.other, c.key): c for c in block_contrasts(study, list(BLOCKS["B"].arms))}
    gain = results["adamw", "heldout_cross_entropy"]
    direct = [
        row(4000, "adamw", s, False)["heldout_cross_entropy"]
        - row(4000, "standard-lr", s, True)["heldout_cross_entropy"]
        for s in range(3)
    ]
    assert (
        gain.estimate.values == pytest.approx(direct)
        and gain.estimate.mean < -3
        and gain.p_holm >= gain.estimate.p
    )
    assert ("standard-lr", "heldout_cross_entropy") not in results


def test_every_arm_has_a_base_in_its_block() -> None:
    for block in BLOCKS.values():
        bases = {arm: base_of(arm, block.arms) for arm in block.arms}
        without = {arm for arm, base in bases.items() if base is None}
        assert without <= {"standard-lr", "adamw", "books-l2", "wd-to-0.05"} | {
            f"from-{s}-continue" for s in (350, 1100, 4000)
        } | {"sgd-no-decay", "sgd-no-decay-lr-0.5"}
    assert base_of("fp-l2-0.01", BLOCKS["B"].arms) == "l2-0.01"
    assert base_of("from-350-adamw", BLOCKS["D"].arms) == "from-350-continue"
    assert base_of("sgd-l2-lr-0.5", BLOCKS["B2"].arms) == "sgd-no-decay-lr-0.5"
    assert base_of("smoothing-0.1-adamw", BLOCKS["C"].arms) == "adamw"


def test_panels_hold_few_lines() -> None:
    for block in BLOCKS.values():
        groups = facets(block.arms, ["standard-lr", "adamw"])
        assert all(len(group) <= 8 for group in groups)
        assert {arm for group in groups for arm in group} >= set(block.arms)


def test_unfinished_partial_and_odd_studies(tmp_path: Path) -> None:
    """Runs that are missing, one seed, metrics that old files lack: the page says what there is."""
    out = write_study(tmp_path / "s", ("A", "D"), seeds=1, marks=(1, 100))
    for path in out.glob("grad-clip/seed*/metrics.jsonl"):
        path.unlink()
    for path in out.glob("standard-lr/seed*/metrics.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text(
            "".join(json.dumps({k: v for k, v in r.items() if k != "decay_share"}) + "\n" for r in rows)
        )
    page = Content(read_study(out)).html()
    assert "not finished" in page and "grad-clip" in page and "D: Recovery" in page
    empty = write_study(tmp_path / "empty", ("A",), seeds=1)
    for path in empty.glob("*/seed*/metrics.jsonl"):
        path.write_text("")
    with pytest.raises(ValueError, match="has no evaluation yet"):
        write_study_page(empty)


def test_text_from_files_is_escaped(tmp_path: Path) -> None:
    out = write_study(tmp_path / "s", ("B2",), seeds=2, command="<script>alert(1)</script>")
    verdict = Verdict(
        "q1", "<b>T</b>", "<i>C</i>", "supported", "r & r", ["<u>1</u>", "2", "3", "4", "5"], ["<s>"]
    )
    page = Content(read_study(out), [verdict]).html()
    assert "<script" not in page and "<i>C" not in page and "<u>" not in page and "r &amp; r" in page
    assert "1 number more" in page and 'class="badge good"' in page


def test_the_check_of_the_metrics_is_shown(tmp_path: Path) -> None:
    out = write_study(tmp_path / "s", ("B2",), seeds=1)
    check = {
        "rows": [{"network": "uniform", "heldout_cross_entropy": LN_V, "greedy_zipf": None}],
        "scales": [{"key": "heldout_cross_entropy", "label": "CE"}, {"key": "greedy_zipf", "label": "Zipf"}],
        "judgements": [{"key": "heldout_cross_entropy", "status": "usable"}],
    }
    (out / "instrument.json").write_text(json.dumps(check))
    page = Content(read_study(out)).html()
    assert "uniform" in page and "<td>10.8</td>" in page and "usable" in page


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = write_study(tmp_path / "s", ("B2",), seeds=1)
    assert cli.main(["collapse", "report", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "undecided" in printed and str(out / "report.html") in printed
    assert cli.main(["collapse", "report", str(tmp_path / "nowhere")]) == 2
    assert "does not exist" in capsys.readouterr().err
    assert cli.main(["collapse", "diagnose", str(tmp_path / "nowhere")]) == 2
    assert cli.main(["collapse", "--list-blocks"]) == 0
    assert "from-350-continue" in capsys.readouterr().out
