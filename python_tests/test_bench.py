"""The benchmarks run in their smallest form and write what they promise; the tools they are made of. No speeds."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from bitnet_ext import testing
from bitnet_ext.models import BitNetForCausalLM, preset
from bitnet_ext.testing import bench as bench_tools

BENCH = Path(__file__).resolve().parent.parent / "bench"
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def run_script(name: str, tmp_path: Path, *arguments: str) -> tuple[str, dict[str, Any]]:
    """Runs a benchmark from a foreign folder; returns what it printed and its file."""
    file = tmp_path / "result.json"
    command = [sys.executable, str(BENCH / name), "--quick", "--json", str(file), *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]
    return done.stdout, json.loads(file.read_text())


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, BENCH / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def check_common(result: dict[str, Any], name: str, device: str) -> None:
    assert result["bench"] == name
    facts = result["environment"]
    assert facts["device"] == device
    assert facts["torch"] == torch.__version__
    assert facts["bitnet_ext"]["cpu_isa"] in facts["bitnet_ext"]["cpu_isas"]
    assert facts["cpu"]["threads"] == 1 and facts["cpu"]["model"]
    assert f"bench/{name}.py --quick --json result.json" in facts["command"]
    assert ("gpu" in facts) == (device == "cuda")
    assert result["settings"]["quick"] is True
    assert set(result["ceiling"]) == {"read_gb_per_s", "update_gb_per_s", "fp32_gflop_per_s"}
    assert all(value > 0 for value in result["ceiling"].values())


def check_seconds(seconds: dict[str, Any]) -> None:
    order = [seconds[name] for name in ("min", "p25", "median", "p75", "max")]
    assert order == sorted(order) and order[0] > 0
    assert seconds["blocks"] >= 1 and seconds["calls"] >= 1


@pytest.mark.parametrize("device", DEVICES)
def test_train_step(device: str, tmp_path: Path) -> None:
    printed, result = run_script("train_step.py", tmp_path, "--device", device, "--threads", "1")
    check_common(result, "train_step", device)
    assert printed.count("vs eager") == 1
    rows = {row["variant"]: row for row in result["rows"]}
    assert len(rows) >= 3
    names = list(rows)
    assert names[0].startswith("bitnet_ext") and names[1] == "eager twin"
    for name, row in rows.items():
        assert name in printed
        if "skipped" in row:
            continue
        check_seconds(row["seconds"])
        assert row["steps_per_second"] == pytest.approx(1 / row["seconds"]["median"])
        assert row["ratio_to_eager"] > 0
        assert len(row["first_losses"]) == 10
        assert (row["peak_bytes"] is not None) == (device == "cuda")
    assert rows["eager twin"]["ratio_to_eager"] == 1.0
    assert 0 <= result["max_relative_loss_difference"] <= 0.02
    assert len(result["floor_seconds"]) == 6
    assert len(result["breakdown"]) == (6 if device == "cpu" else 0)
    for phase in result["breakdown"]:
        assert phase["phase"] in printed
        assert phase["seconds"] > 0 and phase["eager_seconds"] > 0 and phase["floor_seconds"] >= 0


@pytest.mark.parametrize("device", DEVICES)
def test_packed_linear(device: str, tmp_path: Path) -> None:
    shapes = ("64x48", "33x30")
    options = ("--device", device, "--tokens", "1", "24", "--threads", "1")
    printed, result = run_script("packed_linear.py", tmp_path, "--shapes", *shapes, *options)
    check_common(result, "packed_linear", device)
    assert result["settings"]["shapes"] == [[64, 48], [33, 30]]
    layers = result["layers"]
    assert len(layers) == 2 * 2 * 5
    for row in layers:
        assert f"{row['N']}x{row['K']}" in printed
        if device == "cuda" and row["variant"] == "torch._int_mm" and (row["M"], row["N"]) != (24, 64):
            assert "needs" in row["skipped"] and row["skipped"] in printed
            continue
        check_seconds(row["seconds"])
        assert row["ratio_to_fp32"] > 0 and row["ratio_to_bf16"] > 0
        assert (row["share_of_read_ceiling"] is not None) == (row["M"] == 1)
    sizes = {row["variant"]: row["weight_bytes"] for row in layers if row["N"] == 64 and row["M"] == 24}
    expected = {"packed 2-bit": 64 * 12, "packed, product alone": 64 * 12, "torch fp32": 4 * 64 * 48}
    assert sizes.items() >= expected.items() and sizes["torch bf16"] == 2 * 64 * 48
    models = {row["variant"]: row for row in result["models"]}
    assert models["fp32 twin"]["decode_ratio_to_fp32"] == 1.0
    assert models["training form"]["model_bytes"] == models["fp32 twin"]["model_bytes"]
    assert models["bf16 twin"]["model_bytes"] < models["fp32 twin"]["model_bytes"]
    assert models["packed, rest in bf16"]["model_bytes"] < models["packed"]["model_bytes"]
    for row in models.values():
        check_seconds(row["prefill_seconds"])
        assert row["decode_tokens_per_second"] == pytest.approx(1 / row["decode_seconds"]["median"])
        assert row["packed_logits_difference"] == 0.0 or device == "cuda"


@pytest.mark.parametrize(
    ("script", "options", "sentence"),
    [
        ("train_step", ("--steps", "0"), "--steps must be >= 1, got 0"),
        ("train_step", ("--device", "tpu"), "device must be auto, cpu, cuda or cuda:N, got 'tpu'"),
        ("packed_linear", ("--shapes", "2560"), "a shape is NxK, such as 2560x6912, got '2560'"),
        ("packed_linear", ("--tokens", "-1"), "must be an integer >= 1, got '-1'"),
    ],
)
def test_bad_options_are_named(
    script: str,
    options: tuple[str, ...],
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", [script, *options])
    with pytest.raises(SystemExit) as exit_info:
        load(script).main()
    assert exit_info.value.code == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("name", ["collapse-64", "bitnet-100m"])
@pytest.mark.parametrize("quantization", ["b1.58", "none"])
def test_twin_is_the_same_network(name: str, quantization: str) -> None:
    """Untied and tied head, both norm layouts: logits of the plain twin equal ours to rounding."""
    sizes = {"vocab_size": 64, "hidden_size": 64, "num_heads": 4, "num_kv_heads": 2, "intermediate_size": 96}
    config = preset(name, quantization=quantization, num_layers=2, **sizes)
    model = BitNetForCausalLM(config, seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5)
    train_step = load("train_step")
    twin = train_step.TwinModel(config).load_from(model)
    ids = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(0))
    ours, theirs = model(ids), twin(ids)
    # An activation at a tie may round the other way, which moves a logit by about 1 / 127 of its terms.
    assert (ours - theirs).abs().max() < 0.02 * ours.abs().max()
    assert sum(p.numel() for p in twin.parameters()) == sum(p.numel() for p in model.parameters())


def test_ratio_is_refused_when_losses_differ() -> None:
    train_step = load("train_step")
    assert train_step.max_relative_difference([10.0, 9.0], [10.0, 10.0]) == pytest.approx(0.1)
    result = train_step.Result("x", variant=object(), samples=[1.0], cpu_samples=[1.0])
    cells, values = train_step.row_of(result, result, comparable=False, cuda=False)
    assert "refused" in cells and values["ratio_to_eager"] is None


def test_wrong_result_is_caught() -> None:
    packed_linear = load("packed_linear")
    layer = packed_linear.Layer(8, 12, torch.device("cpu"))
    layer.calls(3)
    layer.weights["torch._int_mm"][0] += 1
    with pytest.raises(packed_linear.WrongResultError, match=r"torch\._int_mm is not the exact product"):
        layer.calls(3)


@pytest.mark.parametrize("device", DEVICES)
def test_time_interleaved_takes_turns(device: str) -> None:
    order: list[str] = []
    variants = {
        "a": [lambda: order.append("a1"), lambda: order.append("a2")],
        "b": [lambda: order.append("b")],
    }
    timings = testing.time_interleaved(variants, device, repeats=3, min_block_seconds=0.0, graph=False)
    assert order[-9:] == ["a1", "a2", "b"] * 3
    assert timings["a"].calls == 2 and timings["b"].calls == 1
    assert len(timings["a"].samples) == 3 and not timings["a"].graph


def test_blocks_last_as_long_as_asked() -> None:
    timing = testing.time_interleaved({"x": [lambda: None]}, "cpu", repeats=2, min_block_seconds=0.002)["x"]
    assert timing.calls > 100
    calls = testing.time_interleaved(
        {"x": [lambda: None]}, "cpu", repeats=1, min_block_seconds=0, min_calls=7
    )
    assert calls["x"].calls >= 7


@pytest.mark.gpu
def test_graph_where_capturable_else_events() -> None:
    x = torch.ones(1000, device="cuda")
    variants = {"graph": [lambda: x.mul_(1.0)], "waits": [lambda: x.sum().item()]}
    timings = testing.time_interleaved(variants, "cuda", repeats=2, min_block_seconds=0.0)
    assert timings["graph"].graph and not timings["waits"].graph
    assert timings["graph"].min > 0 and timings["waits"].min > 0


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="repeats must be >= 1, got 0"):
        testing.time_interleaved({"x": [lambda: None]}, "cpu", repeats=0)
    with pytest.raises(ValueError, match="variant 'x' must have at least one call"):
        testing.time_interleaved({"x": []}, "cpu")
    with pytest.raises(ValueError, match="a row must have 2 cells, got 1"):
        testing.format_table(("a", "b"), [["1"]])


def test_statistics() -> None:
    timing = testing.Timing((4.0, 1.0, 3.0, 2.0, 5.0), (1.0,) * 5, 1, False)
    assert (timing.min, timing.p25, timing.median, timing.p75, timing.max) == (1, 2, 3, 4, 5)
    assert testing.Timing((1.0, 2.0), (1.0, 1.0), 1, False).p25 == 1.25
    # Round by round: a machine that is ten times slower in one round does not move the ratio.
    base = testing.Timing((2.0, 20.0, 2.2), (1.0,) * 3, 1, False)
    other = testing.Timing((1.0, 10.0, 1.1), (1.0,) * 3, 1, False)
    assert testing.paired_ratio(base, other) == pytest.approx(2.0)


def test_rotation_exceeds_three_caches() -> None:
    cache = bench_tools.cache_bytes("cpu")
    assert cache >= 1 << 15
    nbytes = cache // 2
    assert testing.rotation_count(nbytes, "cpu", limit_bytes=100 * cache) * nbytes > 3 * cache
    assert testing.rotation_count(100 * cache, "cpu", limit_bytes=1000 * cache) == 2
    assert testing.rotation_count(cache, "cpu", limit_bytes=cache) == 1
    assert testing.rotation_count(1, "cpu") == bench_tools.MAX_COPIES


def test_table() -> None:
    table = testing.format_table(("name", "us"), [["a", "1.5"], ["long name", "12"]])
    assert table.splitlines() == ["name        us", "---------  ---", "a          1.5", "long name   12"]


def test_json_is_whole_or_absent(tmp_path: Path) -> None:
    path = testing.write_json(tmp_path / "new" / "x.json", {"a": 1})
    assert json.loads(path.read_text()) == {"a": 1}
    with pytest.raises(ValueError, match="not JSON compliant"):
        testing.write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [file.name for file in path.parent.iterdir()] == ["x.json"]


def test_slug() -> None:
    assert bench_tools.slug("AMD EPYC 9B14 (96-core)") == "amd-epyc-9b14-96-core"
