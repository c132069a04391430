"""What a build asks for, which kernels it chooses, and what it tells."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
FACTS = ROOT / "build_backend" / "torch_facts.py"
ANNOUNCE = ROOT / "build_backend" / "announce.py"

# --- which kernels are compiled -------------------------------------------------------------------------------

ALL = "80-real;86-real;89-real;90a-real;100-real;120-real;90-virtual"
CPU_TORCH = {"TORCH_VERSION": "2.13.0+cpu", "TORCH_CUDA_VERSION": ""}
CUDA_TORCH = {"TORCH_VERSION": "2.13.0", "TORCH_CUDA_VERSION": "13.0"}
NVCC = {"NVCC_VERSION": "13.0.88", "NVCC_CODES": "sm_75;sm_80;sm_86;sm_89;sm_90;sm_100;sm_120"}
OLD_NVCC = {"NVCC_VERSION": "12.6.20", "NVCC_CODES": "sm_75;sm_80;sm_86;sm_89;sm_90"}
NO_NVCC = {"NVCC_VERSION": "", "NVCC_MISSING": "no nvcc is here"}


def choose(facts: dict[str, str], **environment: str) -> tuple[str, str, str]:
    """(architectures, reason, the line that the build prints) of cmake/cuda_choice.cmake."""
    cmake = shutil.which("cmake")
    if cmake is None:
        pytest.skip("needs cmake")
    names = ("BITNET_EXT_CUDA", "BITNET_EXT_CUDA_ARCHS", "TORCH_CUDA_ARCH_LIST")
    clean = {name: value for name, value in os.environ.items() if name not in names}
    done = subprocess.run(
        [cmake, *(f"-D{k}={v}" for k, v in facts.items()), "-P", str(ROOT / "cmake" / "cuda_choice.cmake")],
        capture_output=True, text=True, check=False, env={**clean, **environment},
    )  # fmt: skip
    if done.returncode != 0:
        raise ValueError(" ".join(done.stderr.split()))
    archs, reason, line = done.stderr.splitlines()
    return archs.removeprefix("archs: "), reason.removeprefix("reason: "), line


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        (CPU_TORCH | NVCC, "torch 2.13.0+cpu was built without CUDA"),
        (CPU_TORCH | NO_NVCC, "torch 2.13.0+cpu was built without CUDA"),
        (CUDA_TORCH | NO_NVCC, "no nvcc is here"),
        (CUDA_TORCH | {"NVCC_VERSION": "12.3"}, "nvcc is 12.3 and needed is 12.4 or newer"),
        (CUDA_TORCH | NVCC | {"VISIBLE_GPUS": "7.5;7.0"},
         "the visible GPUs, without 7.5, 7.0: the kernels need compute capability 8.0"),
    ],
)  # fmt: skip
def test_auto_leaves_cuda_out(facts: dict[str, str], reason: str) -> None:
    archs, found, line = choose(facts)
    assert (archs, found) == ("", reason)
    assert line.startswith(f"CPU kernels only: {reason}")
    assert ("BITNET_EXT_CUDA=ON" in line) == ("without CUDA" in reason)


def test_auto_with_nvcc_and_a_cuda_torch() -> None:
    archs, reason, line = choose(CUDA_TORCH | NVCC)
    assert (archs, reason) == (ALL, "all, because torch sees no GPU")
    assert line.startswith("CPU and CUDA kernels: nvcc 13.0.88 for 80-real 86-real")
    assert "BITNET_EXT_CUDA_ARCHS" in line and "BITNET_EXT_CUDA=OFF" in line and "cannot" not in line


def test_off() -> None:
    for facts in ({"BITNET_EXT_CUDA": "OFF"}, {}):
        archs, reason, line = choose(CUDA_TORCH | NVCC | facts, BITNET_EXT_CUDA="OFF")
        assert (archs, reason) == ("", "BITNET_EXT_CUDA=OFF")
        assert line == "CPU kernels only: BITNET_EXT_CUDA=OFF"
    assert choose(CUDA_TORCH | NVCC | {"BITNET_EXT_CUDA": "OFF"})[1] == "BITNET_EXT_CUDA=OFF"


def test_on_compiles_for_another_torch() -> None:
    archs, _, line = choose(CPU_TORCH | NVCC, BITNET_EXT_CUDA="ON")
    assert archs == ALL and "; torch 2.13.0+cpu cannot load them;" in line


def test_on_needs_nvcc() -> None:
    for facts in (NO_NVCC | CPU_TORCH, NO_NVCC | CUDA_TORCH):
        with pytest.raises(ValueError, match="BITNET_EXT_CUDA=ON, but no nvcc is here"):
            choose(facts, BITNET_EXT_CUDA="ON")


def test_on_beside_gpus_that_are_too_old() -> None:
    archs, reason, _ = choose(CUDA_TORCH | NVCC | {"VISIBLE_GPUS": "7.5"}, BITNET_EXT_CUDA="ON")
    assert archs == ALL and reason.startswith("all, because no visible GPU can run them, without 7.5")


def test_the_environment_decides_over_the_cache() -> None:
    assert choose(CUDA_TORCH | NVCC | {"BITNET_EXT_CUDA": "OFF"}, BITNET_EXT_CUDA="AUTO")[0] == ALL
    with pytest.raises(ValueError, match="BITNET_EXT_CUDA is 'yes'; accepted are AUTO, ON and OFF"):
        choose(CUDA_TORCH | NVCC, BITNET_EXT_CUDA="yes")


@pytest.mark.parametrize(
    ("gpus", "archs", "reason"),
    [
        ("9.0", "90a-real", "the visible GPUs"),
        ("9.0;9.0;8.6", "90a-real;86-real", "the visible GPUs"),
        ("10.0;12.0", "100-real;120-real", "the visible GPUs"),
        ("7.5;8.9", "89-real", "the visible GPUs, without 7.5: the kernels need compute capability 8.0"),
        ("13.0", "90-virtual", "the visible GPUs, of which nvcc 13.0.88 does not know 13.0"),
    ],
)
def test_the_visible_gpus_are_built_for(gpus: str, archs: str, reason: str) -> None:
    assert choose(CUDA_TORCH | NVCC | {"VISIBLE_GPUS": gpus})[:2] == (archs, reason)


def test_all_with_an_nvcc_before_blackwell() -> None:
    assert choose(CUDA_TORCH | OLD_NVCC)[0] == "80-real;86-real;89-real;90a-real;90-virtual"


@pytest.mark.parametrize(
    ("listed", "archs"),
    [
        ("9.0", "90a-real"),
        ("9.0a", "90a-real"),
        ("8.0 8.6;9.0,12.0", "80-real;86-real;90a-real;120-real"),
        ("9.0+PTX", "90a-real;90-virtual"),
        ("8.6+PTX", "86-real;86-virtual"),
        ("7.5 8.0 12.0+PTX", "80-real;120-real;120-virtual"),
    ],
)
def test_torch_cuda_arch_list(listed: str, archs: str) -> None:
    facts = CUDA_TORCH | NVCC | {"VISIBLE_GPUS": "8.9"}
    found, reason, line = choose(facts, TORCH_CUDA_ARCH_LIST=listed)
    assert found == archs and reason.startswith("TORCH_CUDA_ARCH_LIST")
    assert ("9.0 is built as 90a" in line) == ("9.0" in listed)
    assert (", without 7.5: " in line) == ("7.5" in listed)


def test_bitnet_ext_cuda_archs() -> None:
    facts = CUDA_TORCH | NVCC | {"VISIBLE_GPUS": "8.9"}
    other = {"TORCH_CUDA_ARCH_LIST": "8.0"}
    assert choose(facts, BITNET_EXT_CUDA_ARCHS="80-real, 90a-real", **other)[0] == "80-real;90a-real"
    for archs, complete in (("80-real 90-real", False), ("90", False), ("90-real 90a-real", True)):
        found, _, line = choose(facts, BITNET_EXT_CUDA_ARCHS=archs, **other)
        assert found == archs.replace(" ", ";")  # taken at its word
        assert ("kernels for Hopper are left out" in line) != complete
    assert choose(facts, BITNET_EXT_CUDA_ARCHS="all", **other)[:2] == (ALL, "BITNET_EXT_CUDA_ARCHS=all")


def test_bad_architectures_are_named() -> None:
    with pytest.raises(ValueError, match="BITNET_EXT_CUDA_ARCHS names 'sm_90'; accepted are all, or forms"):
        choose(CUDA_TORCH | NVCC, BITNET_EXT_CUDA_ARCHS="80 sm_90")
    with pytest.raises(ValueError, match="TORCH_CUDA_ARCH_LIST names 'Hopper'; accepted are forms"):
        choose(CUDA_TORCH | NVCC, TORCH_CUDA_ARCH_LIST="Hopper")


# --- the line that a build shows --------------------------------------------------------------------------------


def test_the_line_reaches_the_terminal() -> None:
    # As pip does it: the output is kept back. The terminal is the one that pty.spawn makes.
    hidden = f'exec "{sys.executable}" "{ANNOUNCE}" "$@" >{os.devnull} 2>&1'
    spawn = "import pty, sys; sys.exit(pty.spawn(sys.argv[1:]))"
    words = ["CPU kernels only:", "x " * 60]
    done = subprocess.run(
        [sys.executable, "-c", spawn, "sh", "-c", hidden, "sh", *words],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if "out of pty devices" in done.stderr:
        pytest.skip("needs a pseudo-terminal")
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert lines[1].startswith("  CPU kernels only: x x") and max(map(len, lines)) <= 100


def test_the_line_is_left_out_without_a_terminal() -> None:
    done = subprocess.run(
        [sys.executable, str(ANNOUNCE), "text"], capture_output=True, text=True, start_new_session=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# --- the torch that a build uses --------------------------------------------------------------------------------


def facts_of(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-S", str(FACTS), *arguments],
        capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(folder)},
    )  # fmt: skip


def fake_torch(folder: Path, version: str, *, cuda: str | None) -> None:
    (folder / "torch").mkdir()
    (folder / "torch" / "__init__.py").write_text("raise ImportError('nobody imports this torch')")
    (folder / "torch" / "version.py").write_text(f"__version__ = {version!r}\ncuda = {cuda!r}\n")


@pytest.mark.parametrize(("cuda", "printed"), [("13.0", "13.0"), (None, "none")])
def test_the_facts_of_torch_need_no_import(tmp_path: Path, cuda: str | None, printed: str) -> None:
    fake_torch(tmp_path, "2.12.1+x", cuda=cuda)
    assert facts_of(tmp_path).stdout.splitlines() == [str(tmp_path / "torch"), "2.12.1+x", printed]


def test_the_visible_gpus(tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "version.py").write_text("")
    (tmp_path / "torch" / "__init__.py").write_text(
        "class cuda:\n"
        "    device_count = staticmethod(lambda: 2)\n"
        "    get_device_capability = staticmethod(lambda index: ((9, 0), (8, 6))[index])\n"
    )
    assert facts_of(tmp_path, "--gpus").stdout.split() == ["9.0", "8.6"]


def test_no_torch(tmp_path: Path) -> None:
    done = facts_of(tmp_path)
    assert done.returncode == 1 and done.stdout == "" and "finds no torch" in done.stderr
    (tmp_path / "torch").mkdir()  # a folder that only has its name
    assert facts_of(tmp_path).returncode == 1


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Any:
    """build_backend/bitnet_build.py over a scikit-build-core that asks for one thing of its own."""
    package, build = ModuleType("scikit_build_core"), ModuleType("scikit_build_core.build")
    hooks = ("get_requires_for_build_wheel", "get_requires_for_build_editable")
    build.__dict__.update({hook: lambda settings: ["ninja>=1.5"] for hook in hooks})
    package.__dict__["build"] = build
    monkeypatch.setitem(sys.modules, package.__name__, package)
    monkeypatch.setitem(sys.modules, build.__name__, build)
    path = ROOT / "build_backend" / "bitnet_build.py"
    spec = importlib.util.spec_from_file_location("bitnet_build", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("program", "required"),
    [
        ("raise SystemExit('no torch')", ["torch>=2.11"]),
        ("import os; os.abort()", ["torch>=2.11"]),
        ("print('folder', '2.10.1+cu126', '12.6', sep='\\n')", ["torch>=2.11"]),
        ("print('folder', '1.13.1', 'none', sep='\\n')", ["torch>=2.11"]),
        ("print('folder', '2.11.0', 'none', sep='\\n')", []),
        ("print('folder', '2.11.0a0+git1f2e3d', 'none', sep='\\n')", []),
        ("print('folder', '3.0.0+cpu', 'none', sep='\\n')", []),
    ],
)
def test_the_build_asks_for_torch_where_it_is_missing_or_too_old(
    backend: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, program: str, required: list[str]
) -> None:
    (tmp_path / "facts.py").write_text(program)
    monkeypatch.setattr(backend, "_FACTS", tmp_path / "facts.py")
    assert backend.get_requires_for_build_wheel() == ["ninja>=1.5", *required]
    assert backend.get_requires_for_build_editable(None) == ["ninja>=1.5", *required]


def test_the_build_sees_the_torch_that_an_isolated_build_hides(
    backend: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # As pip does it: a sitecustomize.py on PYTHONPATH takes the environment's packages off sys.path.
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nsys.path = [entry for entry in sys.path if 'packages' not in entry]\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("PYTHONNOUSERSITE", "1")
    hidden = subprocess.run([sys.executable, "-c", "import torch"], capture_output=True, cwd=tmp_path)
    assert hidden.returncode != 0
    assert backend._installed_torch() == torch.__version__


def test_the_build_and_the_package_ask_for_the_same_torch(backend: Any) -> None:
    minimum = ".".join(map(str, backend.MINIMUM_TORCH))
    assert f"torch>={minimum}" in (importlib.metadata.requires("bitnet_ext") or [])
    assert f"VERSION_LESS {minimum})" in (ROOT / "cmake" / "torch_stable.cmake").read_text()
