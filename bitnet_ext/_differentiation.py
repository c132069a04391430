"""How autograd, forward mode and vmap see the operators: one kernel of each kind per operator.

:func:`register` gives every operator without side effects

* an Autograd kernel. It saves and runs the formula of the operator. An operator without a formula raises when a
  gradient arrives. So does every operator when a second derivative arrives, and when an input has a tangent of forward
  mode (``torch.func.jvp``, ``torch.autograd.forward_ad``). No derivative is missing in silence.
* a vmap kernel. It calls the operator once where the batch is one more leading dimension, else once per element.

``torch.library.register_autograd`` and ``register_vmap`` give neither: functions that they make fail under
``torch.func.grad``, lose tangents, and ignore second derivatives.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import Function

#: Saves what the backward needs: (ctx, inputs, output).
Setup = Callable[[Any, tuple[Any, ...], Any], None]
#: (ctx, *gradients of the outputs) -> a gradient or None for each input, a list for a list of tensors.
Backward = Callable[..., tuple[Any, ...]]

#: Names of the arguments that may have one more leading dimension. If nothing else is batched, one call does it all.
_LEADING = {
    "quantize_act_int8": {"x"},
    "rms_norm": {"x", "delta"},
    "rms_norm_quantize": {"x"},
    "add_rms_norm_quantize": {"x", "residual"},
    "bit_linear": {"x", "delta"},
    "glu_bit_linear": {"gate_up"},
    "dequantize_act": {"x_i8", "act_scale"},
    "int8xint2_mm_int32": {"x_i8"},
    "int8xint2_mm": {"x_i8", "act_scale"},
}


def transforms_active(*tensors: Tensor) -> bool:
    """Whether a derivative of a function of `tensors`, or a batch of such functions, is being computed."""
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def register(
    library: torch.library.Library,
    name: str,
    setup: Setup | None = None,
    backward: Backward | None = None,
    prepare: Callable[[tuple[Any, ...]], tuple[Any, ...]] | None = None,
) -> None:
    """Registers both kernels of ``bitnet_ext::name``.

    Args:
        setup, backward: the formula; None for an operator without a derivative.
        prepare: changes the arguments of a call that needs gradients.
    """
    op = getattr(torch.ops.bitnet_ext, name).default
    if setup is None or backward is None:
        setup, backward = _save_nothing, _no_derivative(name)
    library.impl(name, _autograd_kernel(op, setup, backward, prepare), "Autograd", with_keyset=True)
    library.impl(name, _vmap_kernel(op), "FuncTorchBatched", with_keyset=True)


def define_first_order(library: torch.library.Library) -> None:
    """Defines ``bitnet_ext::_first_order``, which copies gradients and has no derivative.

    An operator and not a function: torch.func computes nested derivatives level by level, and each level asks
    operators only.
    """
    library.define("_first_order(str op, Tensor[] grads, Tensor anchor) -> Tensor[]")
    library.impl(
        "_first_order", lambda op, grads, anchor: [g.clone() for g in grads], "CompositeExplicitAutograd"
    )
    op = torch.ops.bitnet_ext._first_order.default

    def setup(ctx: Any, inputs: tuple[Any, ...], _output: Any) -> None:
        ctx.op = inputs[0]

    def backward(ctx: Any, *_grads: Tensor | None) -> tuple[Any, ...]:
        raise RuntimeError(f"bitnet_ext.{ctx.op}: has no second derivative")

    library.impl("_first_order", _autograd_kernel(op, setup, backward, None), "Autograd", with_keyset=True)
    library.impl("_first_order", _vmap_kernel(op), "FuncTorchBatched", with_keyset=True)


def first_order(op: str, grads: tuple[Any, ...], anchor: Tensor) -> tuple[Any, ...]:
    """`grads`, the results of a backward; under ``create_graph=True`` a derivative of them raises.

    Args:
        op: name of the operator.
        grads: tensors, None, or lists of them.
        anchor: an output of the operator. It requires a gradient wherever an input of the operator does.
    """
    flat, spec = _flatten(grads)
    places = [i for i, grad in enumerate(flat) if grad is not None]
    if not places:
        return grads
    copies = torch.ops.bitnet_ext._first_order(op, [flat[i] for i in places], anchor)
    for i, copy in zip(places, copies, strict=True):
        flat[i] = copy
    return _unflatten(spec, flat)


# --- autograd ------------------------------------------------------------------------------------------------


def _save_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    pass


def _no_derivative(name: str) -> Backward:
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        raise RuntimeError(
            f"bitnet_ext.{name}: has no derivative; detach its inputs, or compute it under no_grad"
        )

    return backward


def _flatten(values: Sequence[Any]) -> tuple[list[Any], list[int]]:
    """The values with lists opened, and the length of each list (-1 for what is not a list of tensors)."""
    flat: list[Any] = []
    spec = []
    for value in values:
        if isinstance(value, (list, tuple)) and any(v is None or isinstance(v, Tensor) for v in value):
            flat.extend(value)
            spec.append(len(value))
        else:
            flat.append(value)
            spec.append(-1)
    return flat, spec


def _unflatten(spec: Sequence[int], flat: Sequence[Any]) -> tuple[Any, ...]:
    values: list[Any] = []
    place = 0
    for length in spec:
        if length < 0:
            values.append(flat[place])
            place += 1
        else:
            values.append(list(flat[place : place + length]))
            place += length
    return tuple(values)


def _function(op: Any, setup: Setup, backward_formula: Backward) -> type[Function]:
    """The autograd function of an operator whose lists of tensors are opened."""

    def forward(ctx: Any, keyset: Any, spec: list[int], *flat: Any) -> Any:
        args = _unflatten(spec, flat)
        # PyTorch turns both modes off in here, also for the levels of torch.func below this one.
        nested = torch._C._are_functorch_transforms_active()
        with contextlib.ExitStack() as stack:
            if nested:
                stack.enter_context(torch.enable_grad())
                stack.enter_context(forward_ad._set_fwd_grad_enabled(True))
            stack.enter_context(torch._C._AutoDispatchBelowAutograd())
            output = op.redispatch(keyset & torch._C._after_autograd_keyset, *args)
        setup(ctx, args, output)
        ctx.spec = spec
        return tuple(output) if isinstance(output, list) else output

    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        flat_needs = ctx.needs_input_grad
        ctx.needs_input_grad = _unflatten(ctx.spec, flat_needs[2:])
        try:
            flat, spec = _flatten(backward_formula(ctx, *grads))
        finally:
            ctx.needs_input_grad = flat_needs
        assert len(flat) == len(flat_needs) - 2, f"{op}: gradients {spec} do not match the inputs {ctx.spec}"
        return (None, None, *flat)

    name = f"BitnetExt_{op._opname}"
    return type(name, (Function,), {"forward": staticmethod(forward), "backward": staticmethod(backward)})


def _autograd_kernel(
    op: Any, setup: Setup, backward: Backward, prepare: Callable[[tuple[Any, ...]], tuple[Any, ...]] | None
) -> Callable[..., Any]:
    function = _function(op, setup, backward)
    name = op._opname

    def kernel(keyset: Any, *args: Any) -> Any:
        if forward_ad._current_level >= 0 and _has_tangent(args):
            of = args[0] if name == "_first_order" else name
            raise RuntimeError(
                f"bitnet_ext.{of}: has no forward-mode derivative (torch.func.jvp, jacfwd, forward_ad); "
                "use reverse mode (torch.func.vjp, jacrev, backward)"
            )
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            flat, spec = _flatten(args if prepare is None else prepare(args))
            if not torch._C._are_functorch_transforms_active():
                return function.apply(keyset, spec, *flat)
            from torch._functorch.utils import enable_single_level_autograd_function

            # The dispatcher has chosen the level already, so the function is that of one level.
            with enable_single_level_autograd_function():
                return super(Function, function).apply(keyset, spec, *flat)  # type: ignore[misc]
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    return kernel


def _has_tangent(args: tuple[Any, ...]) -> bool:
    flat, _ = _flatten(args)
    return any(isinstance(t, Tensor) and forward_ad.unpack_dual(t, level=0).tangent is not None for t in flat)


# --- vmap ----------------------------------------------------------------------------------------------------


def _vmap_kernel(op: Any) -> Callable[..., Any]:
    names = [argument.name for argument in op._schema.arguments]
    leading = _LEADING.get(op._opname, set())

    def rule(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
        flat, spec = _flatten(args)
        dims = _flatten_like(spec, in_dims)
        of = _flatten_like(
            spec, [[n] * length if length >= 0 else n for n, length in zip(names, spec, strict=False)]
        )
        batched = [d is not None for d in dims]
        flat = [v.movedim(d, 0) if d is not None else v for v, d in zip(flat, dims, strict=True)]
        if all(name in leading for name, b in zip(of, batched, strict=True) if b):
            for i, (name, value) in enumerate(zip(of, flat, strict=True)):
                if name in leading and isinstance(value, Tensor):
                    whole = value if batched[i] else value.expand(info.batch_size, *value.shape)
                    flat[i] = whole.contiguous()
            outputs = op(*_unflatten(spec, flat))
            if isinstance(outputs, Tensor):
                return outputs, 0
            # An operator returns an empty [0] tensor for what a call does not ask for.
            empty = [tuple(t.shape) == (0,) for t in outputs]
            return outputs, tuple(None if e else 0 for e in empty)
        rows = [
            op(*_unflatten(spec, [v[i].contiguous() if b else v for v, b in zip(flat, batched, strict=True)]))
            for i in range(info.batch_size)
        ]
        if isinstance(rows[0], Tensor):
            return torch.stack(rows), 0
        stacked = [torch.stack(parts) for parts in zip(*rows, strict=True)]
        return (
            (stacked, [0] * len(stacked))
            if isinstance(rows[0], list)
            else (tuple(stacked), (0,) * len(stacked))
        )

    def kernel(keyset: Any, *args: Any) -> Any:
        from torch._functorch.autograd_function import custom_function_call_vmap_helper
        from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter

        interpreter: Any = retrieve_current_functorch_interpreter()
        return custom_function_call_vmap_helper(interpreter, rule, op, *args)

    return kernel


def _flatten_like(spec: Sequence[int], values: Sequence[Any]) -> list[Any]:
    flat: list[Any] = []
    for value, length in zip(values, spec, strict=False):
        flat.extend(value if length >= 0 else [None if isinstance(value, list) else value])
    return flat
