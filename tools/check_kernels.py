"""Checks the compiled CUDA kernels without a GPU: resource use and the instructions they are meant to have.

    python tools/check_kernels.py [--arch 80 --arch 90a] [--nvcc PATH] [--nvdisasm PATH]

Compiles every csrc/cuda/*.cu for each architecture and prints, a kernel a line, its registers, shared memory,
stack and spills as ptxas reports them. Fails when a kernel spills or has a stack frame, when its machine code
lacks what it was written for: tensor-core instructions in the products, none of them serialised, and 16-byte
accesses wherever memory is the bound (a compiler that stops vectorising is otherwise seen only as lost speed),
and when it touches a register that a product in flight still uses (wgmma_hazards.py).

Needs nvcc, and nvdisasm, which the package nvidia-cuda-nvdisasm brings when the toolkit lacks it.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from wgmma_hazards import hazards

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "csrc" / "cuda"
FLAGS = ["-std=c++17", "--expt-relaxed-constexpr", f"-I{ROOT / 'csrc'}"]


@dataclass(frozen=True)
class Rule:
    """Kernels whose name matches `kernel` must hold an instruction that matches each of `needs`."""

    source: str
    kernel: str
    needs: tuple[str, ...]
    arch: str = ""  # the only architecture it is for


LOAD_16 = r"\bLDG\.E\.128"
STORE_16 = r"\bSTG\.E\.128"
LOAD_MATRIX = r"\bLDSM\.16\.M88\.4"
LOAD_MATRIX_T = r"\bLDSM\.16\.MT88\.4"
COPY_16 = r"\bLDGSTS\.E\.(BYPASS\.)?(\w+\.)*128"
RULES = [
    Rule("gemv", r"gemv_kernel<", (r"\bIMMA\.16832\.S8\.S8", r"\bLDG\.E\.(NA\.)?128")),
    Rule("decode", r"decode_kernel<", (r"\bIMMA\.16832\.S8\.S8", COPY_16, LOAD_MATRIX, r"\bLDS\.128")),
    Rule("sm80_gemm", r"gemm_kernel<.*true>", (r"\bIMMA\.16832\.S8\.S8", COPY_16, LOAD_MATRIX, STORE_16)),
    Rule("sm80_gemm", r"gemm_kernel<.*false>", (r"\bIMMA\.16832\.S8\.S8", COPY_16, LOAD_MATRIX)),
    Rule(
        "sm90_gemm",
        r"gemm_kernel<",
        (r"\bIGMMA\.64x\d+x32\.S8\.S8", r"\bUTMALDG", r"\bLDS\.128", r"\bSTSM"),
        "90a",
    ),
    Rule("sm90_int8_gemm", r"gemm_kernel", (r"\bIGMMA\.64x256x32\.S8\.S8", r"\bUTMALDG", r"\bSTSM"), "90a"),
    Rule("quantize_grad", r"gradient_maxima_kernel<.*true>", (LOAD_16,)),
    Rule("quantize_grad", r"quantize_grad_kernel<.*true>", (LOAD_16, STORE_16)),
    Rule("transpose", r"transpose_\w+_kernel", (LOAD_16, STORE_16)),
    Rule("prepack", r"\bprepack_\w+_kernel", (STORE_16,)),
    Rule("prepack", r"dequantize_prepacked_kernel<.*true>", (STORE_16,)),
    Rule("quantize_act", r"quantize_act_kernel<.*RowShape<[48],", (r"\bLDG\.E\.NA\.128",)),
    Rule("glu_quantize", r"glu_quantize_kernel<.*RowShape<[48],", (r"\bLDG\.E\.NA\.128",)),
    Rule("quantize_weight", r"absmean_partials_kernel<", (LOAD_16,)),
    Rule("quantize_weight", r"quantize_weight_kernel<float", (LOAD_16,)),
    Rule("quantize_weight_groups", r"abs_sums_kernel<", (LOAD_16,)),
    Rule("quantize_weight_groups", r"quantize_weights_kernel<float", (LOAD_16, STORE_16)),
    Rule("pack", r"\bpack_kernel<true>", (LOAD_16,)),
    Rule("pack", r"unpack_kernel<true>", (STORE_16,)),
    Rule("pack", r"dequantize_\w+_kernel<float>", (STORE_16,)),
    Rule("rms_norm", r"rms_norm_kernel<.*ChunkShape<\d+, \d, true,", (LOAD_16, STORE_16)),
    Rule("rms_norm_backward", r"norm_backward_kernel<.*ChunkShape<\d+, \d, true,", (LOAD_16, STORE_16)),
    Rule("norm_pair_quantize", r"norm_pair_quantize_kernel<", (LOAD_16, STORE_16)),
    Rule("norm_pair_backward", r"norm_pair_backward_kernel<", (LOAD_16, STORE_16)),
    Rule("glu_backward", r"norm_backward_kernel<.*ChunkShape<\d+, \d, true,", (LOAD_16, STORE_16)),
    Rule("adam", r"adam_step_kernel", (LOAD_16, STORE_16)),
    Rule("adam_beside", r"adam_beside_kernel<true>", (r"\bLDG\.E\.EF\.128", r"\bSTG\.E\.EF\.128")),
    Rule("adam_rows", r"adam_all_rows_kernel<true>", (r"\bLDG\.E\.EF\.128", r"\bSTG\.E\.EF\.128")),
    Rule("grad_norm", r"square_sums_kernel", (LOAD_16,)),
    Rule("row_gradient", r"sum_rows_kernel", (LOAD_16, STORE_16)),
    Rule("softmax", r"softmax_stats_kernel<", (LOAD_16,)),
    Rule("cross_entropy", r"rows_kernel<", (COPY_16, r"\bLDS\.128", STORE_16)),
    Rule("cross_entropy_parts", r"probability_sums_kernel<", (LOAD_16,)),
    Rule("short_attention", r"short_attention_kernel<", (LOAD_16, r"\bLDS\.128", r"\bSTS\.128")),
    Rule(
        "short_attention_backward",
        r"short_attention_backward_kernel<",
        (LOAD_16, r"\bLDS\.128", r"\bSTS\.128"),
    ),
    Rule("rotary", r"rotary_kernel<\w+, [48],", (LOAD_16, STORE_16)),
    Rule("small_grad", r"small_grad_kernel<", (r"\bHMMA\.16816\.F32\.BF16",)),
    Rule("small_grad", r"small_grad_kernel<float, true", (LOAD_16, STORE_16)),
    Rule("skinny_nt", r"skinny_nt_kernel<", (r"\bHMMA\.16816\.F32", COPY_16, LOAD_MATRIX)),
    Rule("skinny_tn", r"skinny_tn_kernel", (r"\bHMMA\.16816\.F32", COPY_16, LOAD_MATRIX_T, STORE_16)),
    Rule("skinny_nn", r"skinny_nn_kernel", (r"\bHMMA\.16816\.F32", COPY_16, LOAD_MATRIX, LOAD_MATRIX_T)),
    Rule("skinny_sum", r"skinny_sum_kernel", (LOAD_16, STORE_16)),
    Rule("sm90_skinny_nt", r"nt_kernel<", (r"\bHGMMA\.64x128x16\.F32", r"\bLDG\.E\.(NA\.)?128"), "90a"),
    Rule("sm90_skinny_tn", r"tn_kernel", (r"\bHGMMA\.64x128x16\.F32", STORE_16), "90a"),
    Rule("sm90_skinny_nn", r"nn_kernel<", (r"\bHGMMA\.64x128x16\.F32", COPY_16, r"\bSTS\.128"), "90a"),
]


@dataclass
class Kernel:
    """One compiled kernel: what ptxas said about it, and its machine code."""

    source: str
    arch: str
    name: str
    registers: int = 0
    shared: int = 0
    stack: int = 0
    spills: int = 0
    code: list[str] = field(default_factory=list)


def find_tool(name: str, given: str | None) -> str | None:
    """`given`, or `name` on PATH, in CUDA_HOME, or in a Python package of this environment that ships it."""
    if given:
        return shutil.which(given)
    if found := shutil.which(name):
        return found
    folders = [Path(os.environ[v]) / "bin" for v in ("CUDA_HOME", "CUDA_PATH") if v in os.environ]
    for entry in sys.path:
        folders += Path(entry).glob("nvidia/*/bin") if entry else []
        folders.append(Path(entry) / "triton" / "backends" / "nvidia" / "bin")
    for folder in folders:
        if (folder / name).is_file():
            return str(folder / name)
    return None


def run(command: list[str]) -> str:
    """stdout and stderr of `command`; RuntimeError with them when it fails."""
    done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}")
    return done.stdout


def demangle(names: list[str]) -> dict[str, str]:
    """Mangled name -> kernel name with template arguments, without namespaces, parameters and return type."""
    tool = shutil.which("c++filt")
    if tool is None:
        raise RuntimeError("check_kernels needs c++filt (binutils), which is not on PATH")
    lines = run([tool, *names]).splitlines() if names else []
    plain = {}
    for mangled, text in zip(names, lines, strict=True):
        text = re.sub(r"\((anonymous namespace|bool|int)\)|\w+::|^void ", "", text)
        plain[mangled] = text.split("(")[0].replace("::", "")
    return plain


def compile_source(source: Path, arch: str, nvcc: str, nvdisasm: str, folder: Path) -> list[Kernel]:
    cubin = folder / f"{source.stem}.{arch}.cubin"
    gencode = f"arch=compute_{arch},code=sm_{arch}"
    log = run([nvcc, *FLAGS, "-gencode", gencode, "-Xptxas", "-v", "-cubin", "-o", str(cubin), str(source)])
    kernels: dict[str, Kernel] = {}
    current = None
    for line in log.splitlines():
        if match := re.search(r"Compiling entry function '(\w+)'", line):
            current = kernels.setdefault(match[1], Kernel(source.stem, arch, match[1]))
        if current is None:
            continue
        if match := re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line
        ):
            current.stack, current.spills = int(match[1]), int(match[2]) + int(match[3])
        if match := re.search(r"Used (\d+) registers", line):
            current.registers = int(match[1])
            shared = re.search(r"(\d+) bytes smem", line)
            current.shared = int(shared[1]) if shared else 0
    # Said without being asked to warn: the products of a tile would run one after the other.
    if match := re.search(r"wgmma\.mma_async instructions are serialized.*", log):
        raise RuntimeError(f"{source.name} for sm_{arch}: {match[0]}")
    section = None
    for line in run([nvdisasm, "-c", str(cubin)]).splitlines():
        if match := re.match(r"\s*\.section\s+\.text\.(\w+)", line):
            section = kernels.get(match[1])
        elif section is not None and re.match(r"\s*/\*[0-9a-f]{4,}\*/|\.L_\w+:", line):
            section.code.append(line)
    for mangled, name in demangle(list(kernels)).items():
        kernels[mangled].name = name
    return list(kernels.values())


def problems_of(kernels: list[Kernel]) -> list[str]:
    found = []
    for k in kernels:
        where = f"{k.source} sm_{k.arch} {k.name}"
        if k.stack or k.spills:
            found.append(f"{where}: {k.stack} bytes of stack, {k.spills} bytes of spills; both must be 0")
        if not k.code:
            found.append(f"{where}: nvdisasm printed no machine code")
        found += [f"{where}: touches a register of a product in flight: {line}" for line in hazards(k.code)]
    for arch in sorted({k.arch for k in kernels}):
        for rule in RULES:
            if rule.arch not in ("", arch):
                continue
            matching = [
                k
                for k in kernels
                if k.arch == arch and k.source == rule.source and re.search(rule.kernel, k.name)
            ]
            if not matching:
                found.append(f"{rule.source} sm_{arch}: no kernel matches {rule.kernel!r}")
            for k in matching:
                for need in rule.needs:
                    if not any(re.search(need, line) for line in k.code):
                        found.append(f"{k.source} sm_{arch} {k.name}: no instruction matches {need!r}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arch", action="append", help="architecture, e.g. 80 or 90a (default: both)")
    parser.add_argument("--nvcc", help="path of nvcc")
    parser.add_argument("--nvdisasm", help="path of nvdisasm")
    arguments = parser.parse_args()
    nvcc = find_tool("nvcc", arguments.nvcc)
    nvdisasm = find_tool("nvdisasm", arguments.nvdisasm)
    if nvcc is None:
        print("check_kernels: needs nvcc, which is neither on PATH nor in CUDA_HOME", file=sys.stderr)
        return 2
    if nvdisasm is None:
        print(
            "check_kernels: needs nvdisasm, which is neither on PATH nor in CUDA_HOME; "
            "`pip install nvidia-cuda-nvdisasm` brings it",
            file=sys.stderr,
        )
        return 2

    jobs = [
        (source, arch) for arch in arguments.arch or ["80", "90a"] for source in sorted(SOURCES.glob("*.cu"))
    ]
    kernels: list[Kernel] = []
    with (
        tempfile.TemporaryDirectory() as folder,
        concurrent.futures.ThreadPoolExecutor(os.cpu_count() or 1) as pool,
    ):
        futures = [pool.submit(compile_source, *job, nvcc, nvdisasm, Path(folder)) for job in jobs]
        for future in futures:
            try:
                kernels += future.result()
            except RuntimeError as error:
                print(f"check_kernels: {error}", file=sys.stderr)
                pool.shutdown(cancel_futures=True)
                return 1

    print(f"{'arch':6}{'registers':>10}{'shared':>8}{'stack':>7}{'spills':>8}{'code':>8}  kernel")
    for k in sorted(kernels, key=lambda k: (k.source, k.name, k.arch)):
        print(
            f"{'sm_' + k.arch:6}{k.registers:>10}{k.shared:>8}{k.stack:>7}{k.spills:>8}{len(k.code):>8}  "
            f"{k.source}: {k.name}"
        )
    problems = problems_of(kernels)
    for problem in problems:
        print(f"check_kernels: {problem}", file=sys.stderr)
    print(f"{len(kernels)} kernels, {len(problems)} problem(s)")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
