"""``collapse diagnose``: planted troubles, each a real short training, and files that are cut, old or wrong.

The thresholds of the rules were fixed before these runs were made; see the constants of ``weights``, ``ternary`` and
``course`` in bitnet_ext.collapse.diagnose.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from bitnet_ext.collapse.diagnose.command import as_text, run
from bitnet_ext.collapse.diagnose.diagnosis import NONE, UNKNOWN, Diagnosis, diagnose
from bitnet_ext.collapse.diagnose.inputs import read_case
from bitnet_ext.collapse.diagnose.sizes import initial_sizes
from bitnet_ext.collapse.evaluator import CollapseEvaluator
from bitnet_ext.collapse.options import add_diagnose_arguments
from bitnet_ext.data import load_corpus
from bitnet_ext.data.statistics import unigram_log_probs
from bitnet_ext.metrics import weight_norms
from bitnet_ext.models import BitNetForCausalLM, preset
from bitnet_ext.training import EvaluatedStep, TrainConfig, Trainer, TrainingDivergedError, read_checkpoint
from bitnet_ext.training.checkpoint import write_checkpoint

VOCAB = 600
BASE = TrainConfig(
    steps=200,
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
    """Puts a NaN into the final gain just before its fifth evaluation."""

    evaluations = 0

    def evaluate(self, model: BitNetForCausalLM, step: EvaluatedStep) -> dict[str, Any]:
        self.evaluations += 1
        if self.evaluations == 5:
            with torch.no_grad():
                model.final_norm.weight[2] = math.nan
        return super().evaluate(model, step)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Networks this small run slower on more threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def train(
    out: Path,
    config: TrainConfig,
    *,
    tokens: np.ndarray = TRAIN,
    evaluator: type[CollapseEvaluator] | None = CollapseEvaluator,
    **model: Any,
) -> Path:
    """A real run of a 64-wide network."""
    network = BitNetForCausalLM(preset("collapse-64", vocab_size=VOCAB, **model), seed=config.seed)
    measure = None
    if evaluator is not None:
        unigram = unigram_log_probs(tokens, VOCAB)
        measure = evaluator(
            HELDOUT, unigram, seq_len=config.seq_len, max_tokens=800, device=torch.device("cpu")
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
    with contextlib.suppress(TrainingDivergedError):
        trainer.fit()
    return out


def config(**changes: Any) -> TrainConfig:
    return dataclasses.replace(BASE, **changes)


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
            "config": config(optimizer="adam_l2", lr=3e-3, decay_only="gains,final_gain", steps=160, seed=23),
            "quantization": "none",
        },
    ),
    "a few hundred tokens, repeated": (
        "over-confidence",
        {"config": config(lr=3e-3, steps=240, seed=24), "tokens": TRAIN[:300]},
    ),
    "huge L2 on the ternary layers only": (
        "dead-ternary",
        {"config": config(optimizer="adam_l2", lr=2e-3, weight_decay=10.0, decay_only="linear", seed=25)},
    ),
    "cut at the unigram stage": ("unigram-stage", {"config": config(lr=1e-3, steps=24, seed=26)}),
    "lr 0": ("frozen", {"config": config(lr=0.0, steps=40, seed=27)}),
    "lr too small": ("frozen", {"config": config(lr=2e-6, steps=80, seed=28)}),
    "lr far too large": (
        "diverged",
        {"config": config(lr=3.0, grad_clip=None, steps=80, warmup_steps=20, seed=29)},
    ),
    "NaN in a gain": ("diverged", {"config": config(steps=64, seed=33), "evaluator": PlantedNaN}),
    "healthy, ternary": (NONE, {"config": config(lr=3e-3, steps=260, seed=30)}),
    "healthy, full precision": (NONE, {"config": config(steps=260, seed=31), "quantization": "none"}),
    "healthy, no decay, cosine": (
        NONE,
        {"config": config(weight_decay=0.0, lr_schedule="cosine", steps=260, seed=32)},
    ),
}


@pytest.fixture(scope="module")
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
    add_diagnose_arguments(parser)
    return run(parser.parse_args([str(each) for each in arguments]))


@pytest.mark.parametrize("name", PLANTED)
def test_planted_trouble_is_named(runs: Callable[[str], Path], name: str) -> None:
    found = told(runs(name))
    assert found.kind == PLANTED[name][0], as_text(found, "run folder")


def test_more_than_one_trouble(tmp_path: Path) -> None:
    """Decoupled decay can be too strong as well; it takes the scale of the ternary layers with it."""
    found = told(train(tmp_path, config(weight_decay=60.0, decay_norms=True, steps=150, seed=34)))
    assert [each.kind for each in found.findings][:2] == ["decay-death", "dead-ternary"]
    assert any("decoupled" in each.text for each in found.findings[0].evidence)
    assert any("weight_decay=0.1 or less (it was 60)" in each for each in found.findings[0].change)


def test_l2_under_sgd_is_not_that_of_adam(tmp_path: Path) -> None:
    """At lr weight_decay / (1 - momentum) of a weight a step, which momentum makes enough here."""
    settings = config(
        optimizer="sgd_l2", lr=0.02, momentum=0.9, weight_decay=0.5, decay_norms=True, steps=150
    )
    found = told(train(tmp_path, settings))
    assert found.kind == "decay-death"
    assert any("SGD with L2" in each.text for each in found.findings[0].evidence)
    assert not any("adam" in each for each in found.findings[0].change)


# --- checkpoints and plain runs -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run as ``bitnet-ext train`` makes them: "train" lines and a checkpoint, no evaluation. Coupled L2 kills it."""
    settings = config(optimizer="adam_l2", lr=6e-3, decay_norms=True, steps=200, seed=40)
    return train(tmp_path_factory.mktemp("plain") / "run", settings, evaluator=None)


def test_a_plain_run_is_judged_by_its_checkpoint(plain: Path) -> None:
    found = told(plain)
    assert found.kind == "decay-death" and found.findings[0].certainty == "certain"
    assert any("--data" in each for each in found.not_judged)
    for path in (plain / "checkpoint", next(plain.glob("checkpoint/step-*")) / "model.safetensors"):
        alone = told(path)
        assert alone.kind == "decay-death" and any("metrics" in each for each in alone.not_judged), path
        assert alone.findings[0].evidence[0].step == 200


def test_a_plain_metrics_file_alone(plain: Path, tmp_path: Path) -> None:
    """Without sizes only the output can tell, and here it has not died yet: a note says what coupled L2 may do."""
    found = told(plain / "metrics.jsonl")  # its settings lie beside it
    assert any("sizes" in each for each in found.not_judged) and any(
        "coupled L2" in each for each in found.notes
    )
    ln_v, metrics = math.log(VOCAB), tmp_path / "run" / "metrics.jsonl"
    shutil.copytree(plain, metrics.parent)
    rows = [
        {"kind": "train", "step": 10 * i, "lr": 6e-3, "weight_decay": 0.1, "cumulative_lr": 0.06 * i}
        | {"cross_entropy": min(ln_v, 5 + i / 10), "entropy": min(ln_v, 6 + i / 50)}
        for i in range(1, 21)
    ]
    metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = told(metrics)
    assert found.kind == "decay-death" and found.findings[0].certainty == "likely"
    assert "uniform" in found.findings[0].headline
    (tmp_path / "metrics.jsonl").write_bytes((plain / "metrics.jsonl").read_bytes())
    missing = " ".join(told(tmp_path / "metrics.jsonl").not_judged)
    assert "sizes" in missing and "vocabulary" in missing and "coupled" in missing


def test_a_healthy_plain_run(tmp_path: Path) -> None:
    found = told(train(tmp_path / "run", config(steps=60, lr=3e-3, seed=41), evaluator=None))
    assert found.kind == NONE and any("over-confidence" in each for each in found.not_judged)


def test_evaluations_without_word_counts_leave_the_unigram_stage_open(tmp_path: Path) -> None:
    """As the trainer writes them with --eval-interval."""
    run = train(tmp_path / "run", config(steps=60, lr=3e-3, seed=41), evaluator=None)
    row = {"kind": "eval", "step": 60, "heldout_cross_entropy": 4.0, "heldout_perplexity": math.exp(4.0)}
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")
    found = told(run)
    assert found.kind == NONE
    assert any("unigram stage" in each and "--data NAME|PATH" in each for each in found.not_judged)


@pytest.mark.parametrize("quantization", ["b1.58", "none"])
@pytest.mark.parametrize(
    "shape",
    [
        {"sub_norm": False, "pre_linear_norm": False},
        {"tie_embeddings": True, "init": "normal"},
        {"pre_linear_norm": True, "init": "normal", "init_std": 0.05},
        {"num_heads": 2, "num_kv_heads": 1},
    ],
)
def test_checkpoints_of_other_networks(tmp_path: Path, shape: dict[str, Any], quantization: str) -> None:
    """Sizes are held against the initialisation of the network's own configuration."""
    network = BitNetForCausalLM(
        preset("collapse-64", vocab_size=VOCAB, quantization=quantization, **shape), seed=3
    )
    measured, expected = weight_norms(network), initial_sizes(network.config)
    assert measured == pytest.approx(expected, rel=0.02)
    healthy = train(
        tmp_path / "healthy", config(steps=30, seed=42), evaluator=None, quantization=quantization, **shape
    )
    assert told(healthy / "checkpoint").kind == NONE
    killer = config(optimizer="adam_l2", lr=2e-2, warmup_steps=0, decay_norms=True, steps=60, seed=43)
    dead = told(
        train(tmp_path / "dead", killer, evaluator=None, quantization=quantization, **shape) / "checkpoint"
    )
    assert dead.kind == "decay-death"
    if shape.get("tie_embeddings"):
        assert not any("output head" in each.name for each in dead.findings[0].evidence)


def edit(run_dir: Path, change: Callable[[dict[str, torch.Tensor]], None], tmp_path: Path) -> Path:
    """A copy of a run's weights with a change, beside no state.json."""
    tensors = safetensors.torch.load_file(next(run_dir.glob("checkpoint/step-*")) / "model.safetensors")
    change(tensors)
    safetensors.torch.save_file(tensors, tmp_path / "weights.safetensors")
    return tmp_path / "weights.safetensors"


def test_bare_weights(runs: Callable[[str], Path], tmp_path: Path) -> None:
    """Without state.json the gains are held against 1, and NaN is NaN."""
    healthy = runs("healthy, ternary")
    assert told(edit(healthy, lambda tensors: None, tmp_path)).kind == NONE
    assert told(edit(healthy, lambda t: t["final_norm.weight"].mul_(1e-3), tmp_path)).kind == "decay-death"
    found = told(edit(healthy, lambda t: t["lm_head.weight"][0].fill_(math.nan), tmp_path))
    assert found.kind == "diverged" and "64 of" in found.findings[0].evidence[0].text


def test_dead_codes_in_a_checkpoint(tmp_path: Path) -> None:
    """Zeroed layers have no code but 0 and a scale below the clamp; a dead tensor is named."""
    run_dir = train(tmp_path / "run", config(steps=12, seed=44), evaluator=None)
    for names in (("layers.1.attention.o_proj.weight",), ("_proj.weight",)):
        checkpoint = read_checkpoint(run_dir / "checkpoint")
        for name, value in checkpoint.model.items():
            if name.endswith(names):
                value.zero_()
        out = tmp_path / str(len(names[0]))
        write_checkpoint(out, checkpoint.step, checkpoint.model, {}, checkpoint.state)
        found = told(out)
        assert found.kind == "dead-ternary" and found.findings[0].certainty == "certain"
        told_numbers = {each.name: each for each in found.findings[0].evidence}
        if len(names[0]) > 20:
            assert told_numbers["tensors whose codes are all 0"].text == names[0]
        else:
            assert told_numbers["share of ternary codes that are 0"].value == 1.0
            assert told_numbers["share of ternary tensors at the clamp"].value == 1.0


def test_data_evaluates_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BITNET_EXT_CACHE", str(tmp_path / "cache"))
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"Line {n} is about rivers, hills and town {n % 17}." for n in range(300)))
    corpus = load_corpus(text, progress=False)
    network = BitNetForCausalLM(preset("collapse-64", num_layers=1), seed=1)
    Trainer(network, config(steps=4, lr=1e-5), corpus.train, run_dir=tmp_path / "run", device="cpu").fit()
    capsys.readouterr()
    assert command(tmp_path / "run", "--data", text, "--eval-tokens", 200, "--device", "cpu", "--json") == 1
    found = json.loads(capsys.readouterr().out)
    assert found["kinds"] == ["frozen"]
    assert not any("held-out" in each for each in found["not_judged"])
    # The metrics file alone has no weights to evaluate; the vocabulary of a small network does not fit.
    assert command(tmp_path / "run" / "metrics.jsonl", "--data", text, "--device", "cpu") == 2
    assert "--data needs a checkpoint" in capsys.readouterr().err
    small = train(tmp_path / "small", config(steps=2), evaluator=None)
    assert command(small, "--data", text, "--device", "cpu") == 2
    assert "vocab" in capsys.readouterr().err


# --- files --------------------------------------------------------------------------------------------------------


def test_torn_last_line_and_missing_keys(runs: Callable[[str], Path], tmp_path: Path) -> None:
    source = runs("coupled L2, full precision") / "metrics.jsonl"
    torn = tmp_path / "metrics.jsonl"
    torn.write_bytes(source.read_bytes() + b'{"kind": "eval", "step": 999, "lr"')
    assert told(torn).kind == "decay-death"

    def without(*keys: str) -> Diagnosis:
        rows = [json.loads(line) for line in source.read_text().splitlines()]
        kept = [{key: value for key, value in row.items() if key not in keys} for row in rows]
        torn.write_text("".join(json.dumps(row) + "\n" for row in kept))
        return told(torn)

    assert without("mutual_information", "flip_rate", "cumulative_lr", "decay_share").kind == "decay-death"
    sizes = (
        "gain_mean_abs",
        "final_gain_mean_abs",
        "embedding_mean_abs",
        "lm_head_mean_abs",
        "latent_mean_abs",
    )
    assert any("sizes" in each for each in without(*sizes).not_judged)
    nothing = without(
        *sizes, "loss", "cross_entropy", "heldout_cross_entropy", "train_cross_entropy", "train_loss"
    )
    assert nothing.kind == UNKNOWN and nothing.not_judged
    torn.write_text("")
    assert told(torn).kind == UNKNOWN and command(torn) == 1
    torn.write_text('{"kind": "train", "step": 1, "loss": 6.5}\n')
    assert told(torn).kind == UNKNOWN


def test_damaged_checkpoint_leaves_the_metrics(runs: Callable[[str], Path], tmp_path: Path) -> None:
    copy = shutil.copytree(runs("lr 0"), tmp_path / "copy")
    weights = next(copy.glob("checkpoint/step-*")) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    found = told(copy)
    assert found.kind == "frozen" and any("checkpoint was left out" in each for each in found.notes)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p / "nowhere", "does not exist"),
        (lambda p: p, "holds neither metrics.jsonl nor a checkpoint"),
        (lambda p: written(p / "model.pt", b"\x80\x02"), "never opened"),
        (lambda p: written(p / "model.safetensors", b"xx"), "does not read as safetensors"),
        (lambda p: written(p / "optimizer.safetensors", b"xx"), "holds optimiser moments"),
        (lambda p: written(p / "study.json", b"{}").parent, "is a study of several runs"),
        (lambda p: written(p / "metrics.jsonl", b'{"step": 1}\n{"kind": "eval", "step": 2}\n'), "line 1"),
        (lambda p: written(p / "state.json", b"{").parent, "state.json is damaged"),
        (lambda p: foreign(p / "other.safetensors"), "no final_norm.weight"),
    ],
)
def test_bad_input(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], make: Callable[[Path], Path], message: str
) -> None:
    assert command(make(tmp_path)) == 2
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.count("\n") == 1 and not printed.out


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def foreign(path: Path) -> Path:
    safetensors.torch.save_file({"weight": torch.zeros(2)}, path)
    return path


def test_output(runs: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    folder = runs("huge L2 on the ternary layers only")
    assert command(folder, "--json") == 1
    found = json.loads(capsys.readouterr().out)
    assert found["kind"] == found["kinds"][0] == "dead-ternary" and found["steps"] == 200
    first = found["findings"][0]
    assert set(first) == {"kind", "headline", "evidence", "change", "certainty", "rule"}
    assert first["evidence"][0]["step"] == 200 and any("adamw" in each for each in first["change"])
    assert command(folder) == 1
    text = capsys.readouterr().out
    assert "1. dead-ternary (certain)" in text and "rule: " in text
    assert command(runs("healthy, ternary")) == 0
    assert "none: no rule found a trouble" in capsys.readouterr().out
    assert command(folder, "--eval-tokens", 0) == 2


# --- rules, on rows written by hand -------------------------------------------------------------------------------

LN_V = math.log(1000)
SIZES = {
    "final_gain_mean_abs": 1.0,
    "lm_head_mean_abs": 0.06,
    "gain_mean_abs": 1.0,
    "embedding_mean_abs": 0.8,
}


def by_hand(folder: Path, rows: list[dict[str, Any]], **settings: Any) -> Diagnosis:
    """The diagnosis of evaluation rows, 100 steps apart, of a network with 1,000 tokens."""
    model = preset("collapse-64", vocab_size=1000).to_dict()
    plan = config(steps=100 * len(rows), **settings).to_dict()
    (folder / "config.json").write_text(json.dumps({"model": model, "train": plan}))
    lines = []
    for index, row in enumerate(rows, start=1):
        base = {"kind": "eval", "step": 100 * index, "lr": 1e-3, "weight_decay": plan["weight_decay"]}
        values = base | {"cumulative_lr": 0.1 * index, "unigram_cross_entropy": 5.0} | SIZES | row
        drift = 1 + 0.001 * index  # parameters that are trained never stay quite the same
        lines.append({key: value * drift if key in SIZES else value for key, value in values.items()})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return told(folder)


def good(ce: float, **more: Any) -> dict[str, Any]:
    values = {"heldout_cross_entropy": ce, "predictive_entropy": ce, "mutual_information": 0.5}
    return values | {"train_cross_entropy": ce, "ternary_zero": 0.3, "flip_rate": 0.01} | more


def flat(ce: float) -> dict[str, Any]:
    return good(ce, predictive_entropy=LN_V - 0.001, mutual_information=0.0)


def test_uniform_output_needs_a_cause(tmp_path: Path) -> None:
    rows = [flat(6.0), flat(6.5), flat(LN_V), flat(LN_V)]
    assert by_hand(tmp_path, rows).findings[0].headline.startswith("The output has died away")
    assert by_hand(tmp_path, rows, weight_decay=0.0, entropy_weight=1.0).kind == "uniform-output"
    change = by_hand(tmp_path, rows, weight_decay=0.0, entropy_weight=1.0).findings[0].change
    assert any("entropy_weight=0 (it is 1)" in each for each in change)


def test_decay_that_cannot_have_done_it(tmp_path: Path) -> None:
    """A head may shrink for other reasons: decoupled decay of 0.1 over a sum of learning rates of 0.4 is not one."""
    rows = [good(4.0), good(3.5), good(3.0), good(2.9, lm_head_mean_abs=0.004)]
    assert by_hand(tmp_path, rows).kind == NONE
    assert by_hand(tmp_path, rows, optimizer="adam_l2").kind == "decay-death"
    assert by_hand(tmp_path, rows, optimizer="adam_l2", decay_embeddings=False).kind == NONE
    assert by_hand(tmp_path, rows, optimizer="adam_l2", decay_only="gains,linear").kind == NONE
    assert by_hand(tmp_path, rows, weight_decay=5.0).kind == "decay-death"


def test_an_embedding_that_shrinks_while_the_output_works_is_a_note(tmp_path: Path) -> None:
    rows = [good(4.0 - 0.3 * i, embedding_mean_abs=0.8 - 0.09 * i) for i in range(4)]
    found = by_hand(tmp_path, rows, optimizer="adam_l2")
    assert found.kind == NONE and any("shrinking the embedding" in each for each in found.notes)
    rows = [
        flat(6.0),
        *(row | {"embedding_mean_abs": 0.8 - 0.09 * i} for i, row in enumerate([flat(6.8)] * 3)),
    ]
    assert by_hand(tmp_path, rows, optimizer="adam_l2").kind == "decay-death"


def test_clock_and_measured_decay_shares(tmp_path: Path) -> None:
    rows = [good(4.0 - 0.3 * i, gain_mean_abs=1 - 0.09 * i, decay_share_gains=0.98) for i in range(4)]
    found = by_hand(tmp_path, rows, optimizer="adam_l2", decay_norms=True)
    names = [each.name for each in found.findings[0].evidence]
    assert found.kind == "decay-death" and "decay share, norm gains" in names
    slow = [good(4.0 - 0.3 * i, gain_mean_abs=1 - 0.03 * i) for i in range(4)]
    assert by_hand(tmp_path, slow, optimizer="adam_l2", decay_norms=True).kind == NONE
    assert by_hand(tmp_path, rows, decay_norms=True).kind == NONE  # decoupled decay falls otherwise


def test_recovered_after_decay_was_turned_off(tmp_path: Path) -> None:
    rows = [good(4.5 - 0.5 * i, embedding_mean_abs=0.01, lm_head_mean_abs=0.001) for i in range(4)]
    rows[-1] |= {"weight_decay": 0.0}
    found = by_hand(tmp_path, rows, optimizer="adam_l2")
    assert found.kind == NONE and any("vanished earlier" in each for each in found.notes)


def test_course_rules(tmp_path: Path) -> None:
    assert by_hand(tmp_path, [good(4.0), good(3.0), good(9.0)]).kind == "diverged"
    assert by_hand(tmp_path, [good(5.0), good(2.0), good(3.5), good(3.6), good(3.6)]).kind == "diverged"
    null = good(3.0) | {"heldout_cross_entropy": None, "predictive_entropy": None}
    assert by_hand(tmp_path, [good(4.0), null]).kind == "diverged"
    rows = [good(5.9, mutual_information=0.3)] * 4
    assert by_hand(tmp_path, rows).findings[0].headline.startswith("It does not converge")
    rows = [good(4.0, train_cross_entropy=4.0 - i, predictive_entropy=3.4) | {"heldout_cross_entropy": 4 + 0.2 * i}
            for i in range(4)]  # fmt: skip
    assert by_hand(tmp_path, rows).kind == "over-confidence"
    assert by_hand(tmp_path, [good(4.0, top1_probability=0.6, accuracy=0.3)] * 2).kind == "over-confidence"
    assert by_hand(tmp_path, [good(6.0), good(5.1, mutual_information=0.02)]).kind == "unigram-stage"


def test_ternary_rules(tmp_path: Path) -> None:
    still = [good(4.0 - 0.2 * i, flip_rate=0.0) for i in range(4)]
    found = by_hand(tmp_path, still).findings[0]
    assert found.kind == "dead-ternary" and found.certainty == "likely"
    ended = [row | {"lr": 1e-3 / 20**i} for i, row in enumerate(still)]
    assert by_hand(tmp_path, ended).kind == NONE  # a schedule that has ended flips nothing
    assert by_hand(tmp_path, [good(4.0), good(3.9, absmean_clamped=0.6)]).kind == "dead-ternary"
    assert by_hand(tmp_path, [good(4.0), good(3.9, ternary_zero=0.995)]).kind == "dead-ternary"
    assert by_hand(tmp_path, [good(4.0), good(3.9, ternary_zero=0.8)]).kind == NONE


def test_a_run_that_the_trainer_stopped(tmp_path: Path) -> None:
    (tmp_path / "ended.json").write_text(
        json.dumps({"reason": "training diverged at step 230: NaN", "step": 229})
    )
    found = by_hand(tmp_path, [good(4.0), good(3.5)])
    assert found.kind == "diverged" and "step 230" in found.findings[0].evidence[0].text
    (tmp_path / "ended.json").write_text("{")
    assert any("could not all be read" in each for each in told(tmp_path).notes)


def test_early_end_is_noted(tmp_path: Path) -> None:
    found = by_hand(tmp_path, [good(4.0), good(3.5)])
    assert not any("metrics end" in each for each in found.notes)
    (tmp_path / "config.json").write_text(json.dumps({"train": config(steps=900).to_dict()}))
    assert any("step 200 of 900" in each for each in told(tmp_path).notes)
