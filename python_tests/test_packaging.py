"""The installed package: its compiled modules, data, metadata and command, and what an import costs."""

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
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
import torch

import bitnet_ext
from bitnet_ext import _load, cli
from bitnet_ext.data.gpt2 import VOCAB_BPE_SHA256
from bitnet_ext.ops._compiler import assume_constant_result
from bitnet_ext.training.device import resolve_device

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
    assert {"_C"} <= names <= {"_C", "_C_cuda", "_native"}
    loaded = [name for name in ("_C", "_C_cuda", "_native") if f"bitnet_ext.{name}" in sys.modules]
    assert "_C" in loaded
    assert all(Path(sys.modules[f"bitnet_ext.{name}"].__file__ or "") in MODULES for name in loaded)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.name.split(".")[0])
def test_the_operators_use_only_the_limited_api_of_python(path: Path) -> None:
    if path.name.startswith("_native"):
        pytest.skip("pybind11 has no limited API: a wheel holds _native for one version of Python")
    assert path.name.endswith(".abi3.so")
    lines = [line.split() for line in readelf("--dyn-syms", str(path)).splitlines()]
    python = {fields[7].split("@")[0] for fields in lines if len(fields) > 7 and fields[7].startswith("Py")}
    assert python == {"PyInit_" + path.name.split(".")[0], "PyModule_Create2"}


def test_the_package_works_without_the_module_of_one_python(tmp_path: Path) -> None:
    """As a wheel serves a Python other than the one that built it."""
    package = tmp_path / "bitnet_ext"
    shutil.copytree(ROOT / "bitnet_ext", package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for path in MODULES:
        if not path.name.startswith("_native"):
            shutil.copy(path, package)
    program = (
        "import bitnet_ext, torch; assert bitnet_ext._load._native is None; "
        "print(bitnet_ext._load._compiled, len(bitnet_ext.build_info()['cpu_features'])); "
        "bitnet_ext.ops.pack_ternary(torch.ones(1, 4, dtype=torch.int8))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [str(package), "8"]


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
        "cuda_reason": str, "cuda_archs": list, "cuda_at_build": str, "cpu_isa": str, "cpu_isas": list,
        "cpu_features": dict,
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
    assert info["cuda_kernels"] == (info["cuda_reason"] == "")


@pytest.mark.parametrize(
    ("archs", "reason", "cuda", "expected"),
    [
        ("", "BITNET_EXT_CUDA=OFF", "13.0",
         "bitnet_ext was built without CUDA kernels, because BITNET_EXT_CUDA=OFF"),
        ("", "torch 2.13.0+cpu was built without CUDA", None,
         "bitnet_ext was built without CUDA kernels, because torch 2.13.0+cpu was built without CUDA"),
        ("90a-real", "BITNET_EXT_CUDA_ARCHS", None,
         f"the CUDA kernels are built, but this torch ({torch.__version__}) has no CUDA"),
    ],
)  # fmt: skip
def test_the_reason_for_no_cuda_kernels(
    archs: str, reason: str, cuda: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = {**_load._built, "cuda_archs": archs, "cuda_reason": reason}
    monkeypatch.setattr(_load, "_built", built)
    monkeypatch.setattr(_load, "_C_cuda", None)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    assert bitnet_ext.build_info()["cuda_reason"] == expected
    assert _load.cuda_status() == f"off: {expected}"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    with pytest.raises(ValueError, match=re.escape(f"device 'cuda' cannot be used: {expected}; install it")):
        resolve_device("cuda")
    assert resolve_device("auto") == torch.device("cpu")


@pytest.mark.parametrize(
    ("archs", "capability", "served"),
    [
        ("80-real,90a-real", (8, 0), True),
        ("80-real,90a-real", (8, 9), True),  # machine code serves later GPUs of its generation
        ("86-real", (8, 0), False),
        ("80-real", (9, 0), False),
        ("90a-real", (9, 0), True),
        ("90a-real", (10, 0), False),
        ("90a-real,90-virtual", (12, 0), True),  # PTX serves all later ones
        ("90-virtual", (8, 9), False),
        ("80", (9, 0), True),
        ("100f-real", (10, 3), True),
        ("120-real", (12, 1), True),
    ],
)
def test_gpus_that_a_build_serves(
    archs: str, capability: tuple[int, int], served: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_load, "_built", {**_load._built, "cuda_archs": archs})
    assert _load.built_for(capability) is served
    monkeypatch.setattr(_load, "_C_cuda", object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "a card")
    if served:
        assert resolve_device("cuda") == torch.device("cuda", 0)
    else:
        with pytest.raises(ValueError, match=r"built for .*, not for the \d+\.\d of a card; .*ARCHS=all"):
            resolve_device("cuda")


def test_modules_of_another_version_are_refused() -> None:
    with pytest.raises(
        ImportError, match=r"bitnet_ext \d.* found compiled modules of version 0\.0\.1 .*elsewhere"
    ):
        _load._check_version("0.0.1", Path("elsewhere"))


def test_a_module_of_an_earlier_build_is_passed_over(tmp_path: Path) -> None:
    for suffix in EXTENSION_SUFFIXES:
        (tmp_path / f"_C{suffix}").touch()
    assert ".abi3.so" in EXTENSION_SUFFIXES
    assert _load._find(tmp_path, "_C") == tmp_path / "_C.abi3.so"


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
    assert any(Path(compiled).glob("_C.*so"))


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
    assert extras == {"examples", "datasets", "tensorboard", "hf", "docs", "test", "dev"}


def test_command_info_prints_json() -> None:
    assert json.loads(command("info", "--json")) == bitnet_ext.build_info()


def test_command_help_lists_the_subcommands() -> None:
    text = command("--help")
    for name in ("info", "train", "generate", "collapse"):
        assert re.search(rf"^ +{name} +\w", text, re.MULTILINE), name


def test_command_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert capsys.readouterr().out.split() == ["bitnet_ext", bitnet_ext.__version__]


# --- hints and the cost of an import ------------------------------------------------------------------------


def test_hints_name_commands_that_work() -> None:
    # The package is on no registry: pip would not find bitnet_ext[...], or would install somebody else's.
    sources = [*(ROOT / "bitnet_ext").rglob("*.py"), *(ROOT / "examples").glob("*.py"), ROOT / "README.md"]
    for path in sources:
        assert not re.search(r"pip install[^\n]*\bbitnet[_-]ext\b", path.read_text(encoding="utf-8")), path


def test_the_corpus_hint_and_the_extra_name_one_version() -> None:
    extra = re.search(r'^examples = \["([^"]+)"\]', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert extra is not None
    assert f"pip install {extra[1]}" in (ROOT / "bitnet_ext/data/corpora.py").read_text()


def test_an_import_brings_nothing_slow() -> None:
    """torch._dynamo alone takes as long as the rest of torch; the libraries of a report take longer."""
    program = (
        "import importlib, sys, torch\n"
        "for name in ('bitnet_ext', 'bitnet_ext.nn', 'bitnet_ext.models', 'bitnet_ext.inference', "
        "'bitnet_ext.training'):\n"
        "    before = set(sys.modules); importlib.import_module(name)\n"
        "    print(name, *sorted(set(sys.modules) - before))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    added = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines()}
    slow = ("torch._dynamo", "torch._inductor", "sympy", "matplotlib", "scipy", "PIL", "datasets")
    assert [name for names in added.values() for name in names if name.startswith(slow)] == []
    # The operators, modules and models need torch only.
    for name in ("bitnet_ext", "bitnet_ext.nn", "bitnet_ext.models"):
        assert [other for other in added[name] if other.split(".")[0] not in ("bitnet_ext", "torch")] == []
    assert len(added["bitnet_ext"]) < 60


def test_assume_constant_result_is_that_of_torch() -> None:
    def first() -> int:
        return 1

    def second() -> int:
        return 1

    expected = torch.compiler.assume_constant_result(first).__dict__
    assert expected and assume_constant_result(second).__dict__ == expected
