"""The command line: the example and ``bitnet-ext``, on a small text, with good and bad arguments."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bitnet_ext import __version__, cli
from bitnet_ext.cli.program import COMMANDS
from bitnet_ext.collapse.arms import ARMS, arm_config, report_config
from bitnet_ext.models import config, preset
from bitnet_ext.nn import QUANTIZATIONS

EXAMPLE = Path(__file__).parent.parent / "examples" / "train_collapse.py"


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BITNET_EXT_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "text.txt"
    lines = (
        f"Line {n} of a small text about rivers, hills and the town of number {n % 17}." for n in range(400)
    )
    path.write_text("\n\n".join(lines))
    return path


def study_arguments(text: Path, out: Path, *more: str) -> list[str]:
    return [
        "collapse", "--model", "collapse-64", "--steps", "6", "--eval-tokens", "124", "--device", "cpu",
        "--data", str(text), "--out", str(out), *more,
    ]  # fmt: skip


def rows(out: Path) -> list[dict[str, str]]:
    with open(out / "summary.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_study_from_start_to_report(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "study"
    arms = ["standard-lr", "adamw", "fp-twin"]
    assert cli.main(study_arguments(text, out, "--arms", *arms)) == 0
    printed = capsys.readouterr().out
    assert "Tokens @" in printed and "report.html" in printed
    assert {row["arm"] for row in rows(out)} == set(arms)
    assert [row["step"] for row in rows(out) if row["arm"] == "adamw"] == ["1", "2", "5", "6"]
    assert len(list((out / "figures").glob("*.png"))) >= 5
    report = (out / "report.html").read_text()
    assert "<table" in report and 'src="http' not in report and "data:image/png;base64" in report
    study = json.loads((out / "study.json").read_text())
    assert study["config"]["arms"] == arms and study["data"]["train_tokens"] > 1000
    # Within a seed all arms start from the same weights and see the same rows.
    first = [row for row in rows(out) if row["step"] == "1"]
    assert first[0]["train_loss"] == first[1]["train_loss"] != first[2]["train_loss"]

    # The same folder again is refused; with --resume arms and seeds are added and nothing is repeated.
    assert cli.main(study_arguments(text, out, "--arms", *arms)) == 2
    assert "--resume" in capsys.readouterr().err
    stamp = (out / "adamw" / "seed0" / "metrics.jsonl").stat().st_mtime_ns
    assert cli.main(study_arguments(text, out, "--resume", "--arms", "no-decay", "--seeds", "2")) == 0
    assert (out / "adamw" / "seed0" / "metrics.jsonl").stat().st_mtime_ns == stamp
    assert {(row["arm"], row["seed"]) for row in rows(out)} == {
        (a, s) for a in (*arms, "no-decay") for s in "01"
    }
    assert cli.main(["collapse", "--resume", "--out", str(out), "--device", "cpu", "--steps", "9"]) == 2
    assert "steps is 9, but the study" in capsys.readouterr().err


def test_the_example_and_its_list_of_arms() -> None:
    result = subprocess.run(
        [sys.executable, str(EXAMPLE), "--list-arms"], capture_output=True, text=True, check=True
    )
    assert [line.split()[0] for line in result.stdout.splitlines()] == list(ARMS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arms", "dropout"], "arm 'dropout' is unknown; accepted are standard-lr"),
        (["--arms", "adamw", "adamw"], "arms must be one or more different names"),
        (["--steps", "0"], "steps must be >= 1, got 0"),
        (["--model", "gpt-5"], "name must be one of collapse-64"),
        (["--device", "tpu"], "device must be auto"),
    ],
)
def test_bad_arguments(
    arguments: list[str], message: str, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "study"
    assert cli.main([*study_arguments(text, out), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_missing_and_empty_corpora(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    for data in (tmp_path / "nothing.txt", empty):
        assert cli.main([*study_arguments(text, tmp_path / "study"), "--data", str(data)]) == 2
        error = capsys.readouterr().err
        assert data.name in error and len(error.splitlines()) == 1


def test_train_and_generate(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    train = [
        "train", "--data", str(text), "--model", "collapse-64", "--out", str(out), "--device", "cpu", "--steps", "3",
        "--batch-size", "2", "--seq-len", "16", "--grad-clip", "none", "--no-decay-embeddings",
    ]  # fmt: skip
    assert cli.main(train) == 0
    capsys.readouterr()
    assert cli.main(["generate", str(out), "The river", "--max-new-tokens", "5", "--device", "cpu"]) == 0
    found = capsys.readouterr().out
    assert found.startswith("The river")
    # Sampled by default; the likeliest tokens are another text.
    assert cli.main(["generate", str(out), "The river", "--max-new-tokens", "5", "--device", "cpu"]) == 0
    assert capsys.readouterr().out == found
    greedy = [
        "generate",
        str(out),
        "The river",
        "--max-new-tokens",
        "5",
        "--temperature",
        "0",
        "--device",
        "cpu",
    ]
    assert cli.main(greedy) == 0
    assert capsys.readouterr().out != found
    assert cli.main(["generate", str(out), "", "--device", "cpu"]) == 2
    assert "at least one token" in capsys.readouterr().err
    assert cli.main(["generate", str(tmp_path), "The river"]) == 2
    assert "holds no model" in capsys.readouterr().err
    assert cli.main(train) == 2
    assert "already holds a run" in capsys.readouterr().err


def test_a_forced_instruction_set_that_does_not_exist(tmp_path: Path) -> None:
    environment = {**os.environ, "BITNET_EXT_CPU_ISA": "avx9000"}
    for command in ([sys.executable, "-m", "bitnet_ext.cli", "info"], [sys.executable, str(EXAMPLE)]):
        result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
        assert result.returncode == 2
        assert (
            len(result.stderr.splitlines()) == 1 and "avx9000" in result.stderr and "scalar" in result.stderr
        )


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["cpu_isa"] in ("scalar", "avx2", "avx512")
    assert cli.main(["info"]) == 0
    lines = dict(
        line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if " kernels" not in line
    )
    assert lines["bitnet_ext"] == facts["version"] and lines["torch"].startswith(facts["torch"])
    assert "where --device auto runs" in lines["device"]


@pytest.mark.skipif(torch.version.cuda is not None, reason="says why there are no CUDA kernels")
def test_info_says_why_cuda_is_off(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("CUDA kernels"))
    assert "off" in line and "CUDA" in line.removeprefix("CUDA kernels")


WITHOUT_TORCH = """
import sys, importlib.abc
class Refuses(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.split(".")[0] in ("torch", "numpy", "tqdm", "tiktoken"):
            raise ImportError(f"{name} is not for help texts")
sys.meta_path.insert(0, Refuses())
import bitnet_ext_cli
sys.exit(bitnet_ext_cli.main())
"""


@pytest.mark.parametrize(
    "words",
    [
        ["--version"],
        ["--help"],
        *([name, "--help"] for name in COMMANDS),
        *(["collapse", name, "--help"] for name in ("report", "diagnose", "instrument")),
    ],
    ids=" ".join,
)
def test_help_and_version_need_no_torch(words: list[str], tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[2])}
    before = os.times()
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *words],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
    )
    assert result.returncode == 0, result.stderr
    expected = __version__ if words == ["--version"] else f"usage: bitnet-ext {' '.join(words[:-1])}".strip()
    assert expected in result.stdout
    if words[0] not in ("--version", "info", "collapse"):
        assert "examples:" in result.stdout
    # Time on the processor, of all that was started since: other programs do not count.
    now = os.times()
    assert now.children_user + now.children_system - before.children_user - before.children_system < 0.3


def test_the_package_registers_its_operators_on_import(tmp_path: Path) -> None:
    """Whoever imports it before torch finds torch.ops.bitnet_ext, and every lazy name."""
    code = (
        "import bitnet_ext, torch; torch.ops.bitnet_ext.quantize_act_int8(torch.ones(2, 8));"
        "import bitnet_ext.training as t, bitnet_ext.models as m;"
        "[getattr(p, n) for p in (bitnet_ext, t, m) for n in p.__all__]; t.trainer.Trainer is t.Trainer or exit(3)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[2])}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env=environment)
    import bitnet_ext.training

    with pytest.raises(AttributeError, match="no attribute 'Trainers'"):
        bitnet_ext.training.Trainers  # noqa: B018


def test_packages_are_attributes_and_imported_when_used(tmp_path: Path) -> None:
    code = (
        "import sys, bitnet_ext;"
        "names = [n for n in bitnet_ext.__all__ if n not in ('__version__', 'build_info', 'ops')];"
        "early = [n for n in names if f'bitnet_ext.{n}' in sys.modules];"
        "assert not early, early;"
        "assert {'collapse', 'data', 'formats', 'inference', 'metrics', 'models', 'nn', 'training'} <= set(names);"
        "assert set(bitnet_ext.__all__) <= set(dir(bitnet_ext));"
        "assert [n for n in names if getattr(bitnet_ext, n) is not sys.modules[f'bitnet_ext.{n}']] == [];"
        "bitnet_ext.nn.BitLinear(8, 8); bitnet_ext.formats.load_model; bitnet_ext.training.Trainer"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[2])}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env=environment)


def test_the_quantizations_of_models_and_layers_are_the_same() -> None:
    assert config.QUANTIZATIONS == QUANTIZATIONS


def test_an_unknown_field_names_those_there_are() -> None:
    with pytest.raises(
        ValueError, match=r"unknown fields qk_norm; BitNetConfig has vocab_size, .*convert_linear"
    ):
        preset("collapse-64", qk_norm=True)


def test_every_arm_differs_from_the_standard_run() -> None:
    assert set(ARMS) == {
        "standard-lr", "reduced-lr", "two-stage", "label-smoothing", "grad-clip", "entropy", "diversity", "output-l2",
        "adamw", "no-decay", "fp-twin", "fp-twin-adamw",
    }  # fmt: skip
    base = report_config(100, 0).to_dict()
    for name, arm in ARMS.items():
        changed = {k for k, v in arm_config(name, 100, 0).to_dict().items() if base[k] != v}
        assert changed <= set(arm.train)
        assert changed or arm.quantization == "none" or name == "standard-lr"
    assert report_config(100, 0).tokens_per_step == 124
