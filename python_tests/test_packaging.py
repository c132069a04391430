"""The installed package: its compiled modules, data, metadata and command, and what its build asks for."""

from __future__ import annotations

import gzip
import hashlib
import importlib.metadata
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import sysconfig
from importlib import resources
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import bitnet_ext
from bitnet_ext import _load, cli
from bitnet_ext.data.gpt2 import VOCAB_BPE_SHA256

ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted(_load._compiled.glob("_*.so"))
SYSTEM_LIBRARIES = re.compile(r"lib(torch|torch_cpu|stdc\+\+|gcc_s|m|c|pthread|dl|rt)\.so(\.\d+)?$|ld-linux")


def readelf(*arguments: str) -> str:
    tool = shutil.which("readelf")
    if tool is None:
        pytest.skip("needs readelf (binutils)")
    return subprocess.run([tool, "-W", *arguments], capture_output=True, text=True, check=True).stdout


def command(*arguments: str) -> str:
    script = Path(sysconfig.get_path("scripts")) / "bitnet-ext"
    return subprocess.run([str(script), *arguments], capture_output=True, text=True, check=True).stdout


# --- compiled modules ---------------------------------------------------------------------------------------


def test_the_modules_come_from_one_build() -> None:
    names = {path.name.split(".")[0] for path in MODULES}
    assert {"_C", "_native"} <= names <= {"_C", "_C_cuda", "_native"}
    assert all(
        Path(sys.modules[f"bitnet_ext.{name}"].__file__ or "") in MODULES for name in ("_C", "_native")
    )


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.name.split(".")[0])
def test_a_module_needs_torch_and_the_system_only(path: Path) -> None:
    dynamic = readelf("-d", str(path))
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic)
    assert needed and all(SYSTEM_LIBRARIES.match(name) for name in needed), needed
    assert "RPATH" not in dynamic and "RUNPATH" not in dynamic


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.name.split(".")[0])
def test_a_module_uses_only_the_stable_abi_of_torch(path: Path) -> None:
    lines = [line.split() for line in readelf("--dyn-syms", str(path)).splitlines()]
    undefined = [fields[7].split("@")[0] for fields in lines if len(fields) > 7 and fields[6] == "UND"]
    assert undefined
    # The CUDA runtime is linked in; a C++ symbol of torch would tie the module to one torch version.
    cuda = [name for name in undefined if re.match(r"cuda|__cuda|cu[A-Z]", name)]
    unstable = [name for name in undefined if re.match(r"_ZNK?(2at|3c10|5torch)", name)]
    assert cuda == [] and unstable == []
    exported = [fields[7] for fields in lines if len(fields) > 7 and fields[6] not in ("UND", "Ndx")]
    initialiser = "PyInit_" + path.name.split(".")[0]
    assert initialiser in exported and not [name for name in exported if "bitnet_ext" in name]


def test_build_info() -> None:
    info = bitnet_ext.build_info()
    types: dict[str, type] = {
        "version": str, "torch": str, "torch_at_build": str, "compiler": str, "cuda_kernels": bool,
        "cuda_archs": list, "cuda_at_build": str, "cpu_isa": str, "cpu_isas": list, "cpu_features": dict,
    }  # fmt: skip
    assert {key: type(value) for key, value in info.items()} == types
    assert info["version"] == bitnet_ext.__version__ and info["torch"] == torch.__version__
    assert re.match(r"\d+\.\d+", info["torch_at_build"]) and re.match(r"(gcc|clang) \d+", info["compiler"])
    assert info["cpu_isas"][0] == "scalar" and info["cpu_isa"] in info["cpu_isas"]
    assert all(type(value) is bool for value in info["cpu_features"].values())
    assert (
        bool(info["cuda_archs"]) == bool(info["cuda_at_build"]) == any("_C_cuda" in p.name for p in MODULES)
    )
    assert all(re.fullmatch(r"\d+[af]?(-real|-virtual)?", arch) for arch in info["cuda_archs"])
    assert info["cuda_kernels"] <= bool(torch.version.cuda)


def test_modules_of_another_version_are_refused() -> None:
    with pytest.raises(
        ImportError, match=r"bitnet_ext \d.* found compiled modules of version 0\.0\.1 .*elsewhere"
    ):
        _load._check_version("0.0.1", Path("elsewhere"))


def test_missing_modules_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(ImportError, match=r"no compiled modules for Python.*pip install"):
        _load._folder()
    with pytest.raises(ImportError, match=f"no compiled module _nothing in {re.escape(str(tmp_path))}"):
        _load._import(tmp_path, "_nothing")


def test_the_root_of_a_checkout_finds_the_installed_modules() -> None:
    program = (
        "import bitnet_ext, torch; print(bitnet_ext.__file__); torch.ops.bitnet_ext.pack_ternary.default; "
        "print(bitnet_ext._load._compiled)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    package, compiled = done.stdout.split()
    assert Path(package) == ROOT / "bitnet_ext" / "__init__.py"
    assert any(Path(compiled).glob("_native*.so"))


# --- what else is installed ---------------------------------------------------------------------------------


def test_package_data() -> None:
    package = resources.files("bitnet_ext")
    assert (package / "py.typed").is_file()
    assets = resources.files("bitnet_ext.data") / "assets"
    table = gzip.decompress((assets / "gpt2_vocab.bpe.gz").read_bytes())
    assert hashlib.sha256(table).hexdigest() == VOCAB_BPE_SHA256
    assert "Copyright (c) 2019 OpenAI" in (assets / "GPT2_NOTICE.txt").read_text(encoding="utf-8")


def test_metadata() -> None:
    distribution = importlib.metadata.distribution("bitnet_ext")
    assert distribution.version == bitnet_ext.__version__
    assert distribution.metadata["License-Expression"] == "Apache-2.0"
    assert "Apache License" in (distribution.read_text("licenses/LICENSE") or "")
    assert "The bitnet_ext authors" in (distribution.read_text("licenses/NOTICE") or "")
    required = {
        re.split(r"[<>=; ]", line)[0] for line in distribution.requires or [] if "extra ==" not in line
    }
    assert required == {"torch", "numpy", "tiktoken", "safetensors", "tqdm", "matplotlib", "pillow", "scipy"}
    extras = set(distribution.metadata.get_all("Provides-Extra") or [])
    assert extras == {"examples", "datasets", "tensorboard", "test", "dev"}


def test_command_info_prints_json() -> None:
    assert json.loads(command("info")) == bitnet_ext.build_info()


def test_command_help_lists_the_subcommands() -> None:
    text = command("--help")
    for name in ("info", "train", "generate", "collapse"):
        assert re.search(rf"^ +{name} +\w", text, re.MULTILINE), name


def test_command_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert capsys.readouterr().out.split() == ["bitnet_ext", bitnet_ext.__version__]


# --- the build backend --------------------------------------------------------------------------------------


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
    ("probe", "required"),
    [
        ("raise ImportError('No module named torch')", ["torch>=2.11"]),
        ("import os; os.abort()", ["torch>=2.11"]),
        ("print('2.10.1+cu126')", ["torch>=2.11"]),
        ("print('1.13.1')", ["torch>=2.11"]),
        ("print('2.11.0')", []),
        ("print('2.11.0a0+git1f2e3d')", []),
        ("print('a line of a plug-in'); print('3.0.0+cpu')", []),
    ],
)
def test_the_build_asks_for_torch_where_it_is_missing_or_too_old(
    backend: Any, monkeypatch: pytest.MonkeyPatch, probe: str, required: list[str]
) -> None:
    monkeypatch.setattr(backend, "_PROBE", probe)
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
