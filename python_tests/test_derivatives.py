"""Second derivatives, forward mode, vmap and torch.func through every operator: right, or one clear RuntimeError."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_opcheck import CUDA_ONLY, samples
from torch import Tensor
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, linearize, vjp, vmap
from torch.utils import _pytree

from bitnet_ext import _ops, ops
from bitnet_ext.nn import BitLinear

FUNCTIONAL = sorted(name for name in _ops._FAKES if not name.endswith("_"))
ON_CPU = [name for name in FUNCTIONAL if name not in CUDA_ONLY]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


_samples = functools.cache(samples)


def _sample(name: str, device: str) -> tuple[Any, list[Tensor], Callable[..., Any]]:
    """The operator's arguments, those that are float tensors, and the operator as a function of them."""
    arguments = _pytree.tree_map(
        lambda v: v.detach().clone() if isinstance(v, Tensor) else v, _samples(device)[name]
    )
    flat, spec = _pytree.tree_flatten(arguments)
    places = [i for i, v in enumerate(flat) if isinstance(v, Tensor) and v.is_floating_point()]

    def call(*inputs: Tensor) -> Any:
        values = list(flat)
        for place, value in zip(places, inputs, strict=True):
            values[place] = value
        return getattr(torch.ops.bitnet_ext, name)(*_pytree.tree_unflatten(values, spec))

    return arguments, [flat[i] for i in places], call


def _float_results(result: Any) -> list[Tensor]:
    return [t for t in _pytree.tree_leaves(result) if isinstance(t, Tensor) and t.is_floating_point()]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", FUNCTIONAL)
def test_forward_mode_raises(name: str, device: str) -> None:
    if device == "cpu" and name in CUDA_ONLY:
        pytest.skip("for CUDA")
    _, inputs, call = _sample(name, device)
    if not inputs:
        pytest.skip("no input has a derivative")
    for place in range(len(inputs)):

        def of_one(t: Tensor, place: int = place) -> Any:
            return call(*inputs[:place], t, *inputs[place + 1 :])

        message = rf"^bitnet_ext\.{name}: has no forward-mode derivative.*reverse mode"
        with pytest.raises(RuntimeError, match=message):
            jvp(of_one, (inputs[place],), (torch.ones_like(inputs[place]),))
        with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match=message):
            of_one(torch.autograd.forward_ad.make_dual(inputs[place], torch.ones_like(inputs[place])))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", FUNCTIONAL)
def test_no_derivative_is_missing_in_silence(name: str, device: str) -> None:
    """The first backward gives gradients or raises; one through its results, by any path, raises."""
    if device == "cpu" and name in CUDA_ONLY:
        pytest.skip("for CUDA")
    _, inputs, call = _sample(name, device)
    inputs = [t.requires_grad_() for t in inputs]
    results = [t for t in _float_results(call(*inputs)) if t.requires_grad]
    if not results:
        pytest.skip("no result has a derivative")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # "no autograd kernel was registered" among others
        if name not in {
            "bit_linear",
            "glu_bit_linear",
            "rms_norm",
            "linear_cross_entropy",
            "short_attention",
        }:
            with pytest.raises(RuntimeError, match=rf"^bitnet_ext\.{name}: has no derivative"):
                results[0].sum().backward()
            return
        # A sum, whose own derivative is constant: only saved tensors lead to the second derivative.
        first = torch.autograd.grad(results[0].sum(), inputs, create_graph=True, allow_unused=True)
        known = [g for g in first if g is not None]
        assert known
        for gradient in known:
            with pytest.raises(RuntimeError, match=rf"^bitnet_ext\.{name}: has no second derivative"):
                torch.autograd.grad(gradient.float().sum(), inputs, retain_graph=True, allow_unused=True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", FUNCTIONAL)
def test_vmap_gives_what_single_calls_give(name: str, device: str) -> None:
    """For each tensor argument alone, and for all of them, whichever dimension is the batch."""
    if device == "cpu" and name in CUDA_ONLY:
        pytest.skip("for CUDA")
    _arguments, inputs, call = _sample(name, device)
    if not inputs:
        pytest.skip("no float input")
    for places in [[i] for i in range(len(inputs))] + [list(range(len(inputs)))]:
        batches, dims = list(inputs), [None] * len(inputs)
        for i in places:
            dims[i] = inputs[i].dim()  # the last dimension
            batches[i] = torch.stack([inputs[i], inputs[i] * 0.5, inputs[i] * 2], dim=-1)
        together = vmap(call, tuple(dims), out_dims=0)(*batches)
        singles = [
            call(
                *(
                    b if d is None else b.select(-1, s).contiguous()
                    for b, d in zip(batches, dims, strict=True)
                )
            )
            for s in range(3)
        ]
        for got, *expected in zip(
            _pytree.tree_leaves(together), *map(_pytree.tree_leaves, singles), strict=True
        ):
            torch.testing.assert_close(got, torch.stack(expected), rtol=0, atol=0, equal_nan=True)


def _layers() -> dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], list[Tensor]]]:
    """Public operators, their twins in plain PyTorch, and their differentiable inputs."""
    generator = torch.Generator().manual_seed(1)
    make = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    x, weight, gain, bias, delta = make(5, 64), make(48, 64) / 8, make(64) + 2, make(48), make(5, 64)
    gate_up, head, target = make(5, 128), make(30, 64) / 8, torch.tensor([3, 0, 29, -100, 7])
    norm = {"norm_eps": 1e-5}

    def twin(name: str, **options: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
        return (
            lambda *args: getattr(ops, name)(*args, **options),
            lambda *args: getattr(ops, f"{name}_ref")(*args, **options),
        )

    def normed(function: Callable[..., Any], extra: int) -> Callable[..., Any]:
        return lambda *args: function(*args[:extra], norm_weight=args[extra], bias=args[extra + 1], **norm)

    return {
        "bit_linear": (*twin("bit_linear"), [x, weight]),
        "bit_linear with norm": (
            normed(ops.bit_linear, 2),
            normed(ops.bit_linear_ref, 2),
            [x, weight, gain, bias],
        ),
        "add_bit_linear": (
            lambda *a: normed(ops.add_bit_linear, 3)(*a)[0],
            lambda *a: normed(ops.add_bit_linear_ref, 3)(*a)[0],
            [x, delta, weight, gain, bias],
        ),
        "glu_bit_linear": (
            lambda *a: ops.glu_bit_linear(a[0], a[1], "silu", norm_weight=a[2], norm_eps=1e-5),
            lambda *a: ops.glu_bit_linear_ref(a[0], a[1], "silu", norm_weight=a[2], norm_eps=1e-5),
            [gate_up, weight, gain],
        ),
        "rms_norm": (*twin("rms_norm"), [x, gain]),
        "add_rms_norm": (
            lambda *a: ops.add_rms_norm(*a)[0] * a[0],
            lambda *a: ops.add_rms_norm_ref(*a)[0] * a[0],
            [x, delta, gain],
        ),
        "linear_cross_entropy": (
            lambda h, w: ops.linear_cross_entropy(h, w, target, z_loss=1e-2).loss,
            lambda h, w: ops.linear_cross_entropy_ref(h, w, target, z_loss=1e-2).loss,
            [x, head],
        ),
        "skinny_mm_nt": (*twin("skinny_mm_nt"), [x, head]),
        "skinny_mm_nn": (*twin("skinny_mm_nn"), [make(5, 30), head]),
        "skinny_mm_tn": (*twin("skinny_mm_tn"), [make(5, 30), x]),
    }


LAYERS = _layers()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", sorted(LAYERS))
def test_torch_func_gradients(name: str, device: str) -> None:
    """grad, vjp, jacrev and gradients per sample are those of the twin."""
    function, reference, inputs = LAYERS[name]
    inputs = [t.to(device) for t in inputs]
    if name == "linear_cross_entropy" and device == "cuda":
        pytest.skip("its target is on the CPU")
    places = tuple(range(len(inputs)))

    def scalar(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *args: f(*args).float().square().sum()

    def close(got: Any, expected: Any) -> None:
        for a, b in zip(_pytree.tree_leaves(got), _pytree.tree_leaves(expected), strict=True):
            torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-4)

    close(grad(scalar(function), places)(*inputs), grad(scalar(reference_of(reference)), places)(*inputs))
    close(jacrev(function)(*inputs), jacrev(reference_of(reference))(*inputs))
    result, pull = vjp(function, *inputs)
    close(pull(torch.ones_like(result)), vjp(reference_of(reference), *inputs)[1](torch.ones_like(result)))
    batch = torch.stack([inputs[0], -inputs[0]])
    dims = (0, *[None] * (len(inputs) - 1))
    per_sample = vmap(grad(scalar(function), places), dims)(batch, *inputs[1:])
    single = [grad(scalar(function), places)(part, *inputs[1:]) for part in batch]
    close(per_sample, [torch.stack(parts) for parts in zip(*single, strict=True)])


def reference_of(reference: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A twin whose gradients torch.func takes from ordinary autograd: its straight-through function is not for it."""

    class Once(torch.autograd.Function):
        @staticmethod
        def forward(*inputs: Tensor) -> Tensor:
            return reference(*inputs)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Any:
            return Pull.apply(gradient, *ctx.saved_tensors)

        @staticmethod
        def vmap(info: Any, in_dims: Any, *inputs: Tensor) -> Any:
            raise AssertionError("the twin is not batched")

    class Pull(torch.autograd.Function):
        @staticmethod
        def forward(gradient: Tensor, *inputs: Tensor) -> Any:
            with torch.enable_grad():
                leaves = [t.detach().requires_grad_() for t in inputs]
                return torch.autograd.grad(reference(*leaves), leaves, gradient)

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            pass

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> Any:
            raise AssertionError("first derivatives only")

        @staticmethod
        def vmap(info: Any, in_dims: Any, gradient: Tensor, *inputs: Tensor) -> Any:
            rows = [Pull.apply(g, *inputs) for g in gradient.movedim(in_dims[0], 0)]
            return tuple(torch.stack(parts) for parts in zip(*rows, strict=True)), (0,) * len(inputs)

    return Once.apply


GUARDED = sorted(name for name in LAYERS if not name.startswith("skinny"))


@pytest.mark.parametrize("name", GUARDED)
def test_nested_transforms_raise(name: str) -> None:
    function, _, inputs = LAYERS[name]
    *_, first = inputs[:1]
    rest = inputs[1:]

    def scalar(*args: Tensor) -> Tensor:
        return function(*args).square().sum()

    def penalty(place: int) -> Callable[..., Tensor]:
        return lambda *args: grad(scalar, place)(*args).square().sum()

    for inner in range(len(inputs)):
        for outer in range(len(inputs)):
            with pytest.raises(RuntimeError, match=r"^bitnet_ext\.\w+: has no second derivative"):
                grad(penalty(inner), outer)(*inputs)
    for transform in (jacfwd(scalar), jacfwd(grad(scalar)), lambda *a: linearize(scalar, *a)):
        with pytest.raises(RuntimeError, match=r"^bitnet_ext\.\w+: has no forward-mode derivative"):
            transform(first, *rest)
    with pytest.raises(RuntimeError, match=r"^bitnet_ext\.\w+: has no forward-mode derivative"):
        grad(lambda a: jvp(lambda t: scalar(t, *rest), (a,), (a,))[1])(first)


def test_create_graph_without_a_second_derivative_works() -> None:
    """A penalty on another part of the network does not need one."""
    x = torch.randn(3, 64).requires_grad_()
    weight = torch.randn(8, 64).requires_grad_()
    (gradient,) = torch.autograd.grad(
        ops.bit_linear(x.detach(), weight.detach()).sum() + x.square().sum(), x, create_graph=True
    )
    gradient.square().sum().backward()
    assert torch.equal(x.grad, 8 * x.detach())


@pytest.mark.parametrize("norm", [False, True])
def test_per_sample_gradients_and_ensembles_of_a_layer(norm: bool) -> None:
    torch.manual_seed(0)
    layer, x = BitLinear(64, 8, bias=True, norm=norm), torch.randn(4, 64)
    params = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(params: dict[str, Tensor], row: Tensor) -> Tensor:
        return functional_call(layer, params, (row,)).square().sum()

    per_sample = vmap(grad(loss), (None, 0))(params, x)
    for i in range(4):
        layer.zero_grad()
        layer(x[i]).square().sum().backward()
        for name, p in layer.named_parameters():
            torch.testing.assert_close(per_sample[name][i], p.grad, rtol=1e-6, atol=1e-6)
    members = {name: torch.stack([p, 2 * p, -p]) for name, p in params.items()}
    together = vmap(lambda p: functional_call(layer, p, (x,)))(members)
    for i in range(3):
        single = functional_call(layer, {name: p[i].clone() for name, p in members.items()}, (x,))
        assert torch.equal(together[i], single)


def test_batched_grad_outputs() -> None:
    x, weight = torch.randn(3, 64).requires_grad_(), torch.randn(8, 64)
    y = ops.bit_linear(x, weight)
    vectors = torch.randn(4, 3, 8)
    (batched,) = torch.autograd.grad(y, x, vectors, is_grads_batched=True, retain_graph=True)
    for i in range(4):
        (single,) = torch.autograd.grad(y, x, vectors[i], retain_graph=True)
        torch.testing.assert_close(batched[i], single)
