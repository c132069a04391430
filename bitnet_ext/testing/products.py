"""One product [M, K] x [K, N] on a GPU in all the ways that the benchmarks compare: ours and its peers.

All ways start from the same quantised weights and activations, each in its own number format, are checked
against the exact sums before they are timed, and rotate over copies of the weight that exceed three times
the last cache. Peers: cuBLAS in bfloat16 (``F.linear``), ``torch._int_mm`` on int8 weights, ``torch._scaled_mm``
in fp8 e4m3 with fast accumulation, and gemlite's A8W158 where it is installed and asked for.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bitnet_ext import ops
from bitnet_ext.ops.int8_mm import int8_mm, quantize_rows_int8
from bitnet_ext.testing.bench import Call, rotation_count
from bitnet_ext.testing.script import WrongResultError, environment_variables

_ops = torch.ops.bitnet_ext

BF16, INT8, FP8, GEMLITE = "torch bf16", "torch._int_mm", "torch._scaled_mm fp8", "gemlite A8W158"
PEERS = (BF16, INT8, FP8, GEMLITE)

#: Largest difference from the exact product, relative to its largest value, that is rounding and no mistake.
TOLERANCE = {BF16: 0.02, FP8: 0.1, GEMLITE: 0.02}

#: Columns of a peer's result that are checked. Ours is checked whole.
CHECKED_COLUMNS = 512

FP8_DTYPE = torch.float8_e4m3fn


class NotTakenError(RuntimeError):
    """A peer does not take a shape, or is not there at all."""


def exact_sums(x_i8: Tensor, codes: Tensor) -> Tensor:
    """int32 [M, N] of int8 [M, K] and [N, K]: float64 products, a slab of N at a time."""
    M, K = x_i8.shape
    x = x_i8.double()
    out = torch.empty(M, codes.shape[0], dtype=torch.int32, device=codes.device)
    step = max(1, (1 << 26) // max(M, K))
    for start in range(0, codes.shape[0], step):
        out[:, start : start + step] = x @ codes[start : start + step].double().t()
    return out


class Problem:
    """A weight and the activations of `most_tokens` tokens, Gaussian before they are quantised.

    Args:
        N, K: out_features and in_features.
        most_tokens: largest M to be asked for.
        int8: int8 weights with a scale a row (the head) in place of ternary ones with one scale.

    Attributes:
        codes, weight_scale, x_i8, act_scale: the operands.
        sums: the exact int32 [most_tokens, N].
    """

    def __init__(self, N: int, K: int, most_tokens: int, device: torch.device, *, int8: bool = False) -> None:
        self.N, self.K, self.int8, self.device = N, K, int8, device
        generator = torch.Generator(device).manual_seed(N * 10007 + K)
        weight = torch.randn(N, K, generator=generator, device=device)
        quantize = quantize_rows_int8 if int8 else ops.quantize_weight_ternary
        self.codes, self.weight_scale = quantize(weight)
        del weight
        x = torch.randn(most_tokens, K, generator=generator, device=device)
        self.x_i8, self.act_scale = ops.quantize_act_int8(x)
        self.sums = exact_sums(self.x_i8, self.codes)

    def exact(self, M: int, columns: int | None = None) -> Tensor:
        """The float32 product, rounded as ours: each factor in turn."""
        scale = self.weight_scale.reshape(-1)[:columns]
        return self.sums[:M, :columns].float() * self.act_scale[:M, None] * scale

    def dense(self) -> Tensor:
        """The weight itself, float32 [N, K]."""
        return self.codes.float() * self.weight_scale.reshape(-1, 1)

    def rotated(self, weight: Tensor) -> list[Tensor]:
        nbytes = weight.numel() * weight.element_size()
        return [weight] + [weight.clone() for _ in range(rotation_count(nbytes, self.device) - 1)]


class Ours:
    """The prepacked product of a problem."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        if problem.int8:
            weight = _ops.prepack_int8(problem.codes)
        else:
            weight = _ops.prepack_ternary(ops.pack_ternary(problem.codes), problem.K)
        self.weights = problem.rotated(weight)

    @property
    def weight_bytes(self) -> int:
        return self.weights[0].numel() * self.weights[0].element_size()

    def moved_bytes(self, M: int) -> int:
        """What a product has to read and write: the weight and its scales, x with its scales, y in bfloat16."""
        p = self.problem
        return self.weight_bytes + 4 * p.weight_scale.numel() + M * (p.K + 4) + 2 * M * p.N

    def calls(self, M: int, variables: Mapping[str, str], *, constant: bool) -> list[Call]:
        """Checked calls with bfloat16 results.

        Args:
            variables: environment variables that the library reads at each launch.
            constant: says that the kernel before does not write the weights.
        """
        p = self.problem
        x_i8, act_scale = p.x_i8[:M], p.act_scale[:M]

        def product(weight: Tensor) -> Tensor:
            with environment_variables(variables):
                if p.int8:
                    return int8_mm(
                        x_i8,
                        act_scale,
                        weight,
                        p.weight_scale,
                        out_features=p.N,
                        out_dtype=torch.bfloat16,
                        weight_is_constant=constant,
                    )
                return _ops.prepacked_mm(
                    x_i8, act_scale, weight, p.N, p.weight_scale, None, [], torch.bfloat16, constant
                )

        self._poison(M)
        with environment_variables(variables):
            sums = _ops.prepacked_mm_int32(x_i8, self.weights[0], p.N)
        if not torch.equal(sums, p.sums[:M]):
            raise WrongResultError(f"the int32 sums differ for M x N x K = {M} x {p.N} x {p.K}")
        del sums
        self._poison(M)
        if not torch.equal(product(self.weights[0]), p.exact(M).bfloat16()):
            raise WrongResultError(f"the scaled product differs for M x N x K = {M} x {p.N} x {p.K}")
        return [lambda weight=weight: product(weight) for weight in self.weights]  # type: ignore[misc]

    def _poison(self, M: int) -> None:
        """Fills memory and frees it, so that the next result starts as garbage and not as a right one."""
        for dtype, value in ((torch.int32, -1_234_567), (torch.bfloat16, 1e30)):
            block = torch.full((M, self.problem.N), value, dtype=dtype, device=self.problem.device)
            del block


class Peers:
    """The peers of a problem; their weights are made when first asked for, and kept."""

    def __init__(self, problem: Problem, names: tuple[str, ...] = (BF16, INT8, FP8)) -> None:
        self.problem, self.names = problem, names
        self._weights: dict[str, list[Any]] = {}

    def calls(self, M: int) -> tuple[dict[str, list[Call]], dict[str, str]]:
        """Checked calls by peer, and the reasons of those that are left out."""
        make = {BF16: self._bf16, INT8: self._int_mm, FP8: self._fp8, GEMLITE: self._gemlite}
        calls: dict[str, list[Call]] = {}
        skipped: dict[str, str] = {}
        for name in self.names:
            try:
                variants = make[name](M)
                self._check(name, variants[0](), M)
                calls[name] = variants
            except NotTakenError as reason:
                skipped[name] = str(reason)
            except Exception as error:
                # What bfloat16 does wrong is a fault of the benchmark, and so is a wrong result of PyTorch.
                if name == BF16 or (name != GEMLITE and isinstance(error, WrongResultError)):
                    raise
                first = str(error).strip().splitlines()[:1]
                skipped[name] = f"{type(error).__name__}: {first[0] if first else ''}"[:200]
        return calls, skipped

    def _kept(self, name: str, make: Callable[[], list[Any]]) -> list[Any]:
        if name not in self._weights:
            self._weights[name] = make()
        return self._weights[name]

    def _x(self, M: int) -> Tensor:
        return ops.dequantize_act(self.problem.x_i8[:M], self.problem.act_scale[:M])

    def _bf16(self, M: int) -> list[Call]:
        p = self.problem
        weights = self._kept(BF16, lambda: p.rotated(p.dense().bfloat16()))
        x = self._x(M).bfloat16()
        return [lambda w=w: F.linear(x, w) for w in weights]  # type: ignore[misc]

    def _int_mm(self, M: int) -> list[Call]:
        p = self.problem
        if M <= 16:
            raise NotTakenError("needs M > 16")
        if p.N % 8 or p.K % 8:
            raise NotTakenError("needs N and K in multiples of 8")
        weights = self._kept(INT8, lambda: p.rotated(p.codes))
        x = p.x_i8[:M]
        return [lambda w=w: torch._int_mm(x, w.t()) for w in weights]  # type: ignore[misc]

    def _fp8(self, M: int) -> list[Call]:
        p = self.problem
        if p.N % 16 or p.K % 16:
            raise NotTakenError("needs N and K in multiples of 16")

        def quantized(t: Tensor) -> tuple[Tensor, Tensor]:
            scale = t.abs().amax() / torch.finfo(FP8_DTYPE).max
            return (t / scale).to(FP8_DTYPE), scale

        def make() -> list[Any]:
            weight, scale = quantized(p.dense())
            return [(w, scale) for w in p.rotated(weight)]

        weights = self._kept(FP8, make)
        x, x_scale = quantized(self._x(M))

        def product(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
            return torch._scaled_mm(
                x, weight.t(), scale_a=x_scale, scale_b=scale, out_dtype=torch.bfloat16, use_fast_accum=True
            )

        try:
            product(x, *weights[0])
        except RuntimeError:
            if M % 16 == 0:
                raise
            x = F.pad(x.view(torch.uint8), (0, 0, 0, -M % 16)).view(FP8_DTYPE)  # rows of +0
        return [lambda w=w: product(x, *w) for w in weights]  # type: ignore[misc]

    def _gemlite(self, M: int) -> list[Call]:
        """Its time has the quantisation of the activations in it."""
        p = self.problem
        if p.int8:
            raise NotTakenError("has no int8 weights with a scale a row in this form")
        try:
            helper = importlib.import_module("gemlite.helper")
        except ImportError as error:
            raise NotTakenError(f"cannot be imported: {error}"[:200]) from None

        def make() -> list[Any]:
            maker = helper.A8W158_INT_dynamic(device=str(p.device), dtype=torch.bfloat16)
            codes = p.codes.bfloat16()
            count = rotation_count(codes.numel() // 4, p.device)
            return [maker.from_weights(weight=codes, weight_scale=p.weight_scale) for _ in range(count)]

        layers = self._kept(GEMLITE, make)
        x = self._x(M).bfloat16()
        return [lambda layer=layer: layer(x) for layer in layers]  # type: ignore[misc]

    def _check(self, name: str, result: object, M: int) -> None:
        assert isinstance(result, Tensor)
        got = result[:M, :CHECKED_COLUMNS]
        if name == INT8:
            right = torch.equal(got, self.problem.sums[:M, :CHECKED_COLUMNS])
        else:
            exact = self.problem.exact(M, CHECKED_COLUMNS)
            right = float((got.float() - exact).abs().max() / exact.abs().max()) < TOLERANCE[name]
        if not right:
            p = self.problem
            raise WrongResultError(f"{name} is not the product for M x N x K = {M} x {p.N} x {p.K}")
