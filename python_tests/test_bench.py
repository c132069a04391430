"""The benchmarks run in their smallest form and write what they promise; the tools they are made of. No speeds."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from bitnet_ext import ops, testing
from bitnet_ext.models import BitNetForCausalLM, preset
from bitnet_ext.ops.int8_mm import int8_mm
from bitnet_ext.testing import bench as bench_tools
from bitnet_ext.testing import products
from bitnet_ext.testing import script as script_tools
from bitnet_ext.testing.script import WrongResultError
from bitnet_ext.testing.twin import TwinModel

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
    ceilings = ("read_gb_per_s", "update_gb_per_s", "copy_gb_per_s", "fp32_gflop_per_s")
    assert set(result["ceiling"]) == set(ceilings)
    assert all(value > 0 for value in result["ceiling"].values())


def check_seconds(seconds: dict[str, Any]) -> None:
    order = [seconds[name] for name in ("min", "p25", "median", "p75", "max")]
    assert order == sorted(order) and order[0] > 0
    assert seconds["blocks"] >= 1 and seconds["calls"] >= 1


@pytest.mark.parametrize("device", DEVICES)
def test_weight_cache_has_a_row_for_each_loop(device: str, tmp_path: Path) -> None:
    arguments = ("--device", device, "--threads", "1", "--no-fsdp")
    printed, result = run_script("weight_cache.py", tmp_path, *arguments)
    assert "rule / vouched" in printed and "loop, 4 micro-batches" in printed
    steps, loops = [], []
    for row in result["rows"]:
        (steps if "step" in row["name"] else loops).append(set(row["variants"]))
        assert all(v["seconds_per_step"] > 0 for v in row["variants"].values())
    assert steps and all(names == {"rule", "vouched", "codes"} for names in steps)
    assert len(loops) == 2 and all(names == {"rule", "frozen", "vouched", "codes"} for names in loops)


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
    assert len(result["floor_seconds"]) == 5
    assert len(result["breakdown"]) == (5 if device == "cpu" else 0)
    for phase in result["breakdown"]:
        assert phase["phase"] in printed
        assert phase["seconds"] > 0 and phase["eager_seconds"] > 0 and phase["floor_seconds"] >= 0


@pytest.mark.parametrize("device", DEVICES)
def test_optimizer(device: str, tmp_path: Path) -> None:
    printed, result = run_script("optimizer.py", tmp_path, "--device", device, "--threads", "1")
    check_common(result, "optimizer", device)
    (row,) = result["rows"]
    assert row["model"] == "collapse-64" and row["parameters"] > row["ternary"] > 0
    assert len(row["variants"]) == 7
    for name, variant in row["variants"].items():
        assert name in printed
        check_seconds(variant["seconds"])
        assert (variant["bytes"] is None) == (name in ("fused", "foreach", "muon"))
    assert row["variants"]["ours"]["ratio"] == 1.0


@pytest.mark.parametrize("device", DEVICES)
def test_train_model(device: str, tmp_path: Path) -> None:
    printed, result = run_script("train_model.py", tmp_path, "--device", device)
    rows = {row["variant"]: row for row in result["rows"]}
    assert set(rows) == {"bitnet_ext, backward exact", "bitnet_ext, backward int8", "nn.Linear, eager"}
    assert rows["nn.Linear, eager"]["ratio_to_linear"] == 1.0
    for name, row in rows.items():
        assert name in printed and row["tokens_per_second"] == pytest.approx(32 / row["median"])
    # Equal weights and rows: the first losses differ by what the backward does not touch, so not at all.
    assert rows["bitnet_ext, backward exact"]["first_loss"] == rows["bitnet_ext, backward int8"]["first_loss"]
    config = preset("collapse-64")
    block = config.hidden_size * (4 * config.hidden_size + 3 * config.intermediate_size)
    weights = config.num_layers * block + 512 * config.hidden_size
    assert result["flops_per_token"] == 6 * weights + 12 * config.num_layers * 16 * config.hidden_size


@pytest.mark.parametrize("device", DEVICES)
def test_train_model_curve(device: str, tmp_path: Path) -> None:
    text = tmp_path.parent / "text.txt"
    text.write_text(
        "\n\n".join(f"The {i} quick brown foxes jump over {i + 1} lazy dogs." for i in range(400))
    )
    printed, result = run_script(
        "train_model.py", tmp_path, "--device", device, "--curve", "3", "--data", str(text)
    )
    exact, int8 = result["losses"]["exact"], result["losses"]["int8"]
    assert len(exact) == len(int8) == 3 and exact[0] == int8[0] and exact[1:] != int8[1:]
    difference = abs(sum(int8) - sum(exact)) / sum(exact)
    assert result["largest_relative_difference"] == pytest.approx(difference)
    assert "relative difference" in printed


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
    # On a GPU the product alone reads prepacked weights, which fill whole blocks of 16 x 128.
    alone = 64 * 128 // 4 if device == "cuda" else 64 * 12
    expected = {"packed 2-bit": 64 * 12, "packed, product alone": alone, "torch fp32": 4 * 64 * 48}
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
        ("decode", ("--shapes", "2560"), "a shape is NxK, such as 2560x6912, got '2560'"),
        ("decode", ("--tokens", "0"), "must be an integer >= 1, got '0'"),
        ("prefill", ("--cases", "64x64"), "a shape is MxNxK, such as 4096x14336x4096, got '64x64'"),
        ("prefill", ("--seconds", "nan"), "must be a number > 0, got 'nan'"),
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
    module = load(script)
    with pytest.raises(SystemExit) as exit_info:
        module.main() if hasattr(module, "main") else module.parse()
    assert exit_info.value.code == 2
    assert sentence in capsys.readouterr().err


# --- decode and prefill -------------------------------------------------------------------------------------

PEERS = {products.BF16, products.INT8, products.FP8}


class CpuOperators:
    """The operators of prepacked weights as the CPU's own products, which take the weights as they are."""

    @staticmethod
    def prepack_ternary(packed: torch.Tensor, K: int) -> torch.Tensor:
        return packed

    @staticmethod
    def prepack_int8(codes: torch.Tensor) -> torch.Tensor:
        return codes

    @staticmethod
    def prepacked_mm_int32(x_i8: torch.Tensor, weight: torch.Tensor, N: int) -> torch.Tensor:
        product = ops.int8xint2_mm if weight.dtype == torch.uint8 else int8_mm
        return product(x_i8, None, weight, out_dtype=torch.int32)

    @staticmethod
    def prepacked_mm(
        x_i8: torch.Tensor,
        act_scale: torch.Tensor,
        weight: torch.Tensor,
        N: int,
        weight_scale: torch.Tensor,
        bias: None,
        segments: list[int],
        out_dtype: torch.dtype,
        weight_is_constant: bool,
    ) -> torch.Tensor:
        return ops.int8xint2_mm(x_i8, act_scale, weight, weight_scale, out_dtype=out_dtype)


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of decode and prefill but the kernels."""
    monkeypatch.setattr(products, "_ops", CpuOperators)
    monkeypatch.setattr(products, "rotation_count", lambda nbytes, device: 2)


def run_quick(name: str, tmp_path: Path, *arguments: str, device: str = "cpu") -> dict[str, Any]:
    module = load(name)
    file = tmp_path / "result.json"
    module.run(module.parse(["--quick", "--json", str(file), *arguments]), torch.device(device))
    result = json.loads(file.read_text())
    assert result["bench"] == name and result["environment"]["device"] == device
    assert result["settings"]["quick"] is True and result["ceiling"]["read_gb_per_s"] > 0
    return result


@pytest.mark.parametrize("device", DEVICES)
def test_cross_entropy(device: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = run_quick("cross_entropy", tmp_path, "--peers", "eager", "liger", device=device)
    (case,) = result["cases"]
    assert (case["tokens"], case["hidden"], case["vocabulary"]) == (33, 24, 1001)
    assert [row["variant"] for row in case["rows"]][:2] == ["ours", "eager"]
    assert case["skipped"].keys() | {row["variant"] for row in case["rows"]} == {"ours", "eager", "liger"}
    for row in case["rows"][:2]:
        assert row["seconds"]["median"] > 0 and 0 < row["share_of_floor"] < 1
        assert row["errors"]["hidden_relative"] < 1e-2 and row["errors"]["weight_max"] < 1e-2
        assert (row["peak_bytes"] is None) == (device == "cpu")
    assert case["rows"][0]["ratio_to_ours"] == 1
    assert "33 x 24 x 1001" in capsys.readouterr().out


def test_cross_entropy_refuses_a_wrong_gradient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = load("cross_entropy")
    wrong = module.VARIANTS["ours"]
    monkeypatch.setitem(module.VARIANTS, "ours", (lambda: lambda *a: 1.01 * module.ours(*a), *wrong[1:]))
    args = module.parse(["--quick", "--json", str(tmp_path / "result.json")])
    with pytest.raises(WrongResultError, match="the gradient of hidden"):
        module.run(args, torch.device("cpu"))
    assert not list(tmp_path.iterdir())


def check_peers(peers: dict[str, Any], expected: set[str]) -> None:
    assert set(peers) == expected
    for peer in peers.values():
        if "skipped" in peer:
            assert peer["skipped"]
        else:
            check_seconds(peer["seconds"])
            assert peer["ratio"] > 0


@pytest.mark.parametrize("script", ["decode", "prefill", "train_linear"])
def test_without_a_gpu_one_sentence_says_so(script: str, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    command = [sys.executable, str(BENCH / f"{script}.py"), "--quick"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == (
        f"bench/{script}.py times CUDA kernels and needs an NVIDIA GPU, PyTorch sees none here\n"
    )
    assert list(tmp_path.iterdir()) == []


def check_decode(result: dict[str, Any], printed: str, expected_peers: set[str]) -> None:
    rows = result["rows"]
    assert [(r["N"], r["K"], r["M"], r["bits"]) for r in rows] == [
        *((64, 48, M, 2) for M in (1, 3, 24)),
        *((33, 30, M, 2) for M in (1, 3, 24)),
        (48, 64, 1, 8),
    ]
    for row in rows:
        check_seconds(row["seconds"])
        check_seconds(row["chained_seconds"])
        check_peers(row["peers"], expected_peers)
        assert row["floor_seconds"] == pytest.approx(row["share_of_read_ceiling"] * row["seconds"]["median"])
        assert (row["M"] == 1) == (row["ratio_to_one_token"] == 1.0)
        assert f"{row['N']}x{row['K']}{' int8' if row['bits'] == 8 else ''} " in printed
    assert rows[0]["peers"][products.INT8]["skipped"] == "needs M > 16"
    assert rows[5]["peers"][products.INT8]["skipped"] == "needs N and K in multiples of 8"
    assert "seconds" in rows[2]["peers"][products.INT8]
    assert result["sweeps"] == []


DECODE_OPTIONS = ("--shapes", "64x48", "33x30", "--heads", "48x64", "--tokens", "24", "1", "3")


def test_decode_but_for_its_kernels(on_cpu: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = run_quick("decode", tmp_path, *DECODE_OPTIONS)
    check_decode(result, capsys.readouterr().out, PEERS)
    # The weight and its scale, x with its scales, y.
    floor = (64 * 12 + 4 + 3 * (48 + 4) + 2 * 3 * 64) / result["ceiling"]["read_gb_per_s"] / 1e9
    assert result["rows"][1]["floor_seconds"] == pytest.approx(floor)


@pytest.mark.gpu
def test_decode(tmp_path: Path) -> None:
    printed, result = run_script("decode.py", tmp_path, *DECODE_OPTIONS)
    check_decode(result, printed, PEERS)
    assert all(row["seconds"]["graph"] and row["chained_seconds"]["graph"] for row in result["rows"])


def test_gemlite_is_a_note_where_it_is_not_there(
    on_cpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "gemlite", None)
    result = run_quick("decode", tmp_path, *DECODE_OPTIONS, "--gemlite")
    printed = capsys.readouterr().out
    check_decode(result, printed, PEERS | {products.GEMLITE})
    assert "gemlite us" in printed
    assert "cannot be imported" in result["rows"][0]["peers"][products.GEMLITE]["skipped"]


def test_decode_sweep(on_cpu: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = run_quick("decode", tmp_path, "--sweep", "--shapes", "64x48")
    printed = capsys.readouterr().out
    (sweep,) = result["sweeps"]
    assert [point["M"] for point in sweep["points"]] == [1, 2, 3, 4] and result["rows"] == []
    assert sweep["largest_step_beyond"] is None
    assert "largest step up to M = 64" in printed and "lowest ratio to bf16" in printed
    assert load("decode").parse(["--sweep"]).tokens[60:68] == [61, 62, 63, 64, 80, 96, 128, 160]


def test_sweep_summary() -> None:
    decode = load("decode")
    times = {1: 2.0, 2: 2.2, 3: 2.1, 16: 4.2, 64: 4.3, 80: 4.4, 96: 8.8}
    points = [{"M": M, "seconds": t, "ratio_to_bf16": 6 / t} for M, t in times.items()]
    summary = decode.summary_of(points)
    assert summary["largest_step"] == {"from": 3, "to": 16, "ratio": pytest.approx(2.0)}
    assert summary["largest_step_beyond"] == {"from": 80, "to": 96, "ratio": pytest.approx(2.0)}
    assert summary["lowest_ratio"] == {"M": 96, "ratio_to_bf16": pytest.approx(6 / 8.8)}
    assert decode.sentence_of(summary) == (
        "largest step up to M = 64: 2.00x from M = 3 to 16 (5.33x the tokens); "
        "largest step beyond: 2.00x from M = 80 to 96 (1.20x the tokens); "
        "lowest ratio to bf16: 0.68x at M = 96"
    )
    assert decode.summary_of(points[:1])["largest_step"] is None


def check_prefill(result: dict[str, Any], printed: str) -> None:
    rows = result["rows"]
    assert [(row["M"], row["N"], row["K"]) for row in rows] == [(24, 64, 48), (17, 33, 30)]
    for row in rows:
        for timed in (row, row["alone"]):
            check_seconds(timed["seconds"])
            check_peers(timed["peers"], PEERS)
            operations = 2 * row["M"] * row["N"] * row["K"]
            assert timed["top_per_s"] == pytest.approx(operations / timed["seconds"]["median"] / 1e12)
            assert timed["share_of_peak"] == pytest.approx(timed["top_per_s"] / 1000)
        assert printed.count(f"{row['M']}x{row['N']}x{row['K']} ") == 2


PREFILL_OPTIONS = ("--cases", "24x64x48", "17x33x30", "--peak", "1000")


def test_prefill_but_for_its_kernels(
    on_cpu: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check_prefill(run_quick("prefill", tmp_path, *PREFILL_OPTIONS), capsys.readouterr().out)
    unknown = run_quick("prefill", tmp_path, "--cases", "17x33x30")
    assert unknown["rows"][0]["share_of_peak"] is None and unknown["settings"]["peak_top_per_s"] is None


@pytest.mark.gpu
def test_prefill(tmp_path: Path) -> None:
    printed, result = run_script("prefill.py", tmp_path, *PREFILL_OPTIONS)
    check_prefill(result, printed)


def test_int8_peaks_of_the_data_sheets() -> None:
    prefill = load("prefill")
    assert prefill.peak_of("NVIDIA H200") == 1979 and prefill.peak_of("NVIDIA H100 80GB HBM3") == 1979
    assert prefill.peak_of("NVIDIA H100 PCIe") == 1513
    assert prefill.peak_of("NVIDIA GeForce RTX 4090") is None


@pytest.mark.parametrize("int8", [False, True])
def test_a_wrong_product_is_not_timed(on_cpu: None, int8: bool) -> None:
    problem = products.Problem(8, 16, 20, torch.device("cpu"), int8=int8)
    ours, peers = products.Ours(problem), products.Peers(problem)
    ours.calls(20, {}, constant=True)
    peers.calls(20)
    problem.sums[3, 5] += 1
    with pytest.raises(WrongResultError, match="the int32 sums differ for M x N x K = 20 x 8 x 16"):
        ours.calls(20, {}, constant=True)
    with pytest.raises(WrongResultError, match=r"torch\._int_mm is not the product"):
        peers.calls(20)
    problem.sums[3, 5] -= 1
    problem.act_scale[3] *= -1
    peers = products.Peers(problem, (products.BF16,))
    peers.calls(20)
    peers._weights[products.BF16][0][1] += 1
    with pytest.raises(WrongResultError, match="torch bf16 is not the product"):
        peers.calls(20)


def test_variables_are_set_for_the_call_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITNET_EXT_A", "old")
    monkeypatch.delenv("BITNET_EXT_B", raising=False)
    with script_tools.environment_variables({"BITNET_EXT_A": "1", "BITNET_EXT_B": "2"}):
        assert script_tools.library_variables().items() >= {"BITNET_EXT_A": "1", "BITNET_EXT_B": "2"}.items()
    assert script_tools.library_variables()["BITNET_EXT_A"] == "old"
    assert "BITNET_EXT_B" not in script_tools.library_variables()


# --- the twin and the tools ---------------------------------------------------------------------------------


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
    twin = TwinModel(config).load_from(model)
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


def test_rounds_are_thrown_away_until_it_has_settled() -> None:
    calls: list[float] = []
    options = {"repeats": 2, "min_block_seconds": 0.0, "settle_seconds": 0.02}
    timing = testing.time_interleaved({"x": [lambda: calls.append(time.perf_counter())]}, "cpu", **options)[
        "x"
    ]
    assert len(timing.samples) == 2
    assert calls[-2] - calls[0] >= 0.02


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


# --- train_linear -------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_train_linear(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = run_quick("train_linear", tmp_path, device="cuda")["rows"]
    assert {"nn.Linear bf16", "bitnet_ext exact", "bitnet_ext int8"} <= row["variants"].keys()
    assert "bitnet_ext int8" in capsys.readouterr().out
    for variant in row["variants"].values():
        check_seconds(variant["step_seconds"])
        assert variant["cosine_x"] > 0.995 and variant["cosine_weight"] > 0.995
        assert 0 <= variant["held_bytes"] < variant["peak_bytes"]
