"""Tensors of a checkpoint by name: names without wrappers, each tensor stored once."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

_COMPILED = "_orig_mod."


def plain_name(name: str) -> str:
    """A parameter's name without the parts that ``torch.compile`` adds to it."""
    return name.replace(_COMPILED, "")


def plain_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under their :func:`plain_name`."""
    return {plain_name(name): value for name, value in tensors.items()}


def shared_names(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Name -> first name of the same tensor, for each further name of a tensor.

    Two entries are the same tensor when they are the same elements of the same memory.
    """
    first: dict[tuple[object, ...], str] = {}
    further: dict[str, str] = {}
    for name, value in tensors.items():
        if value.numel() == 0 or value.is_meta:
            continue
        key = (value.device, value.data_ptr(), value.dtype, value.shape, value.stride())
        if first.setdefault(key, name) != name:
            further[name] = first[key]
    return further


def to_store(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors as a safetensors file can hold them: each once, contiguous, on the CPU, without common memory.

    Returns:
        the tensors, and :func:`shared_names`.
    """
    further = shared_names(tensors)
    stored = {
        name: value.detach().cpu().contiguous() for name, value in tensors.items() if name not in further
    }
    end = 0
    for name, value in sorted(stored.items(), key=lambda item: item[1].data_ptr()):
        begin = value.data_ptr()
        if value.numel() and begin < end:  # overlaps another one, as a slice of it does
            stored[name] = value.clone()
        end = max(end, begin + value.nbytes)
    return stored, further


def share_parameters(model: nn.Module, further: Mapping[str, str]) -> None:
    """Makes each parameter named by a key the parameter named by its value.

    Raises:
        AttributeError: the model has no parameter of that name.
    """
    names = {plain_name(name): name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name, first in further.items():
        if plain_name(name) in names and plain_name(first) in names:
            owner, _, leaf = names[plain_name(name)].rpartition(".")
            parameter = model.get_parameter(names[plain_name(first)])
            setattr(model.get_submodule(owner), leaf, parameter)


def compiled_from(model: object) -> object:
    """The module inside the wrapper that ``torch.compile(module)`` returns; anything else itself."""
    while isinstance(model, nn.Module) and isinstance(getattr(model, "_orig_mod", None), nn.Module):
        model = model._orig_mod
    return model
