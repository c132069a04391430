"""Replacement of layers in a module tree: plan first, then change, so that a refusal leaves the model as it was."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

ModuleT = TypeVar("ModuleT", bound=nn.Module)

#: (names of the module in the tree, the module) -> the module in its place; None to leave it and look at its children;
#: itself to leave it as a whole.
Build = Callable[[list[str], nn.Module], "nn.Module | None"]

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
_TENSORS = ("weight", "bias", "norm_weight")


@dataclass(frozen=True)
class Replacement:
    """One place in the tree and what comes there. A shared module has several places and one `new`."""

    parent: nn.Module
    child_name: str
    old: nn.Module
    new: nn.Module


def plan(model: nn.Module, build: Build) -> list[Replacement]:
    """The replacements that :func:`apply` makes below `model`. A module that occurs several times is built once."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    built: dict[nn.Module, nn.Module | None] = {}
    found: list[Replacement] = []

    def visit(parent: nn.Module) -> None:
        for child_name, child in parent._modules.items():
            if child is None:
                continue
            first = child not in built
            if first:
                built[child] = build(names[child], child)
            new = built[child]
            if new is None:
                if first:
                    visit(child)
            elif new is not child:
                found.append(Replacement(parent, child_name, child, new))

    visit(model)
    return found


def apply(replacements: Iterable[Replacement]) -> None:
    """Carries out a plan."""
    for r in replacements:
        setattr(r.parent, r.child_name, r.new)


def check_forward(op: str, name: str, module: nn.Module) -> None:
    """Refuses a module whose forward was replaced on the instance: the new module would not have it."""
    if "forward" in vars(module):
        raise ValueError(
            f"{op}: {name or type(module).__name__} must not have a forward of its own set on the instance, which a "
            "replacement would lose; remove it first, or name the layer in skip="
        )


def carry_over(old: nn.Module, new: nn.Module, *, leave: Iterable[str] = ()) -> None:
    """Gives `new` the hooks, the mode and the attributes of `old` that it has not itself.

    Args:
        leave: names of attributes and of parameters, buffers and submodules that stay behind.
    """
    for name in _HOOKS:
        hooks = vars(old).get(name)
        if hooks:  # the same dictionary, so that the handles of the hooks can still remove them
            vars(new)[name] = hooks
    if "_is_full_backward_hook" in vars(old):
        new._is_full_backward_hook = old._is_full_backward_hook
    for hook in vars(new).get("_load_state_dict_pre_hooks", {}).values():
        if getattr(
            hook, "with_module", False
        ):  # torch keeps a weak reference to the module it was registered on
            hook.module = weakref.ref(new)
    stays = {*leave, *_TENSORS}
    for kind in ("_parameters", "_buffers", "_modules"):
        for name, value in getattr(old, kind).items():
            if name not in stays and not hasattr(new, name):
                getattr(new, kind)[name] = value
                if kind == "_buffers" and name in old._non_persistent_buffers_set:
                    new._non_persistent_buffers_set.add(name)
    for name, value in vars(old).items():
        if name not in vars(new) and name not in stays:
            vars(new)[name] = value
    new.train(old.training)


# --- weights that are computed: parametrisations, pruning, weight norm, spectral norm -----------------------


def is_computed(module: nn.Module) -> bool:
    """Whether weight or bias of a layer is computed from other parameters."""
    return any(
        name not in module._parameters and getattr(module, name, None) is not None for name in _TENSORS
    )


def computing_hooks(module: nn.Module) -> dict[int, Any]:
    """The forward pre-hooks that compute weight or bias, by their key."""
    kinds = (prune.BasePruningMethod, WeightNorm, SpectralNorm)
    return {key: hook for key, hook in module._forward_pre_hooks.items() if isinstance(hook, kinds)}


def check_computed(op: str, name: str, module: nn.Module) -> None:
    """Refuses a computed weight of which nobody knows how it is computed."""
    if is_computed(module) and not (parametrize.is_parametrized(module) or computing_hooks(module)):
        raise ValueError(
            f"{op}: {name or type(module).__name__} must have its weight as a parameter, or by "
            "torch.nn.utils.parametrize, prune, weight_norm or spectral_norm, got a plain attribute; "
            "name the layer in skip= to leave it"
        )


@torch.no_grad()
def move_computed(old: nn.Module, new: nn.Module) -> None:
    """Has `new` compute its weight and bias as `old` does, from the same parameters."""
    if parametrize.is_parametrized(old):
        # Registering initialises a parametrisation: what it keeps is put back afterwards.
        kept = [
            (m, dict(m._buffers), [None if b is None else b.clone() for b in m._buffers.values()])
            for m in cast(nn.Module, old.parametrizations).modules()
        ]
        for name in old.parametrizations:  # type: ignore[union-attr]
            new._parameters[name] = nn.Parameter(getattr(old, name).detach().clone())
            parametrize.transfer_parametrizations_and_params(old, new, name)
        for module, buffers, values in kept:
            for (name, buffer), value in zip(buffers.items(), values, strict=True):
                module._buffers[name] = buffer
                if buffer is not None and value is not None:
                    buffer.copy_(value)
    for name in ("weight", "bias"):
        if name not in old._parameters and not parametrize.is_parametrized(old, name):
            value = getattr(old, name, None)
            if value is not None:
                del new._parameters[name]
                setattr(new, name, value)


def refresh_computed(module: nn.Module) -> None:
    """Computes the weight of a layer anew from its present parameters, as its next forward in eval mode does."""
    training = module.training
    module.eval()
    try:
        for hook in computing_hooks(module).values():
            hook(module, ())
    finally:
        module.train(training)


def drop_computing_hooks(old: nn.Module, new: nn.Module) -> None:
    """Frees `new`, which took over the hooks of `old`, from those that compute or store a weight."""
    drop = computing_hooks(old)
    new._forward_pre_hooks = OrderedDict(
        (key, hook) for key, hook in old._forward_pre_hooks.items() if key not in drop
    )
    new._state_dict_hooks = OrderedDict()
    new._load_state_dict_pre_hooks = OrderedDict()


def copyable(model: nn.Module) -> dict[int, Any]:
    """A memo for copy.deepcopy of computed weights, which have a history and cannot be copied."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    return memo
