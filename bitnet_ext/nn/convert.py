"""Conversion of whole models: nn.Linear -> BitLinear for training, BitLinear -> PackedBitLinear to run."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from bitnet_ext.nn import replace
from bitnet_ext.nn.attention import BitMultiheadAttention
from bitnet_ext.nn.bit_linear import QUANTIZATIONS, BitLinear
from bitnet_ext.nn.convert_marker import mark_conversion
from bitnet_ext.nn.int8_linear import Int8Linear
from bitnet_ext.nn.packed_bit_linear import PackedBitLinear
from bitnet_ext.nn.weight_readers import check_readers, switch_off_fast_paths

ModuleT = TypeVar("ModuleT", bound=nn.Module)

#: "keep": the output head stays in its precision. "int8": it becomes an :class:`Int8Linear`.
HEADS = ("keep", "int8")

#: Attributes of the training form that the packed form does not take over.
_TRAINING_ONLY = ("quantization", "backward_mode", "cache", "norm_eps", "parametrizations")


def convert_linear(
    model: ModuleT, *, skip: Iterable[str] = ("lm_head",), quantization: str = "b1.58", norm: bool = False
) -> ModuleT:
    """Replaces, in place, every ``nn.Linear`` of `model` by a :class:`BitLinear` that shares its parameters.

    A layer under several names becomes one new layer under all of them, and a weight that several layers share stays
    shared. Hooks, training mode, ``requires_grad`` and parametrisations (``torch.nn.utils.parametrize``, ``prune``,
    ``weight_norm``, ``spectral_norm``) are kept: the weight that they compute is quantised.

    Also converted are ``nn.MultiheadAttention``, to :class:`BitMultiheadAttention` (its four projections are ternary),
    and the ``Conv1D`` of transformers (GPT-2), whose weight [K, N] is transposed into a new parameter.
    ``nn.TransformerEncoderLayer`` no longer takes its fast path, which would read the weights in full precision.

    Args:
        model: any module; itself returned. A model that is an nn.Linear is returned as a BitLinear.
        skip: names of layers, or of modules with all that they hold, to leave (the last part of the dotted name, or
            the whole), by default the output head, which BitNet b1.58 keeps in full precision. A layer under several
            names is left when one of them is named.
        quantization: of the new layers.
        norm: gives each new layer an RMSNorm of its own, as the b1.58 FAQ advises for a model whose blocks
            have no norm before their products.

    Raises:
        ValueError: when there is no layer to convert; for a subclass of nn.Linear with a forward of its own, a lazy
            layer without a shape, a layer whose weight its parent reads past the layer's forward, and a layer with a
            forward set on the instance. The model is then as it was.
    """
    if quantization not in QUANTIZATIONS:
        raise ValueError(f"convert_linear: quantization must be one of {QUANTIZATIONS}, got {quantization!r}")
    skipped = set(skip)
    transposed: dict[nn.Parameter, nn.Parameter] = {}

    def build(names: list[str], module: nn.Module) -> nn.Module | None:
        if any(name in skipped or name.rsplit(".", 1)[-1] in skipped for name in names):
            return module
        return build_new(names[0], module)

    def build_new(name: str, module: nn.Module) -> nn.Module | None:
        if type(module) is nn.MultiheadAttention:
            return convert_attention(name, module)
        if _is_conv1d(module):
            return convert_layer(name, module, _transposed(cast(nn.Parameter, module.weight), transposed))
        cls = _class_of(module)
        if not issubclass(cls, nn.Linear):
            return None
        if isinstance(module, nn.modules.lazy.LazyModuleMixin) and module.has_uninitialized_params():
            raise ValueError(
                f"convert_linear: {name or cls.__name__} must have a shape, got a lazy layer; run one forward first"
            )
        if cls.forward is not nn.Linear.forward:
            raise ValueError(
                f"convert_linear: {name or cls.__name__} must be an nn.Linear, got its subclass {cls.__name__} with "
                "a forward of its own; name it in skip= to leave it"
            )
        return convert_layer(name, module, cast(Tensor, module.weight))

    def convert_layer(name: str, module: nn.Module, weight: Tensor) -> BitLinear:
        replace.check_forward("convert_linear", name, module)
        replace.check_computed("convert_linear", name, module)
        N, K = weight.shape
        layer = BitLinear(
            K, N, bias=module.bias is not None, norm=norm, quantization=quantization, device="meta"
        )
        if norm:
            layer.norm_weight = nn.Parameter(torch.ones(K, device=weight.device))
        computed = replace.is_computed(module)
        if isinstance(weight, nn.Parameter):
            layer.weight = weight
        if isinstance(module.bias, nn.Parameter):
            layer.bias = module.bias
        if computed:
            replace.move_computed(module, layer)
        replace.carry_over(module, layer, leave=("parametrizations",))
        return layer

    def convert_attention(name: str, module: nn.MultiheadAttention) -> nn.Module:
        if quantization == "none":
            return module
        replace.check_forward("convert_linear", name, module)
        out_proj = build([f"{name}.out_proj" if name else "out_proj"], module.out_proj)
        return BitMultiheadAttention.from_attention(module, cast(nn.Module, out_proj), norm=norm)

    root = build([""], model)
    if root is not None and root is not model:
        return cast(ModuleT, root)
    replacements = [] if root is model else replace.plan(model, build)
    if not replacements:
        raise ValueError(
            f"convert_linear: model must hold an nn.Linear outside skip = {sorted(skipped)}, "
            f"{type(model).__name__} has none"
        )
    if quantization != "none":
        check_readers("convert_linear", {m: name for name, m in model.named_modules()}, replacements)
    replace.apply(replacements)
    if quantization != "none":
        switch_off_fast_paths(model)
    mark_conversion(model)
    return model


def pack_model(model: ModuleT, *, inplace: bool = False, head: str = "keep") -> ModuleT:
    """Replaces every quantised :class:`BitLinear` by a :class:`PackedBitLinear`, for inference.

    The packed model's logits are the training forward's, bit for bit on one device, unless `head` changes them.
    Other parameters are kept; nothing requires a gradient afterwards. Gradients still flow through the packed layers,
    to adapters that are added later. A weight that is computed (pruned, parametrised) is packed as it is in eval mode.
    Layers that share a weight share the packed one. On the meta device the packed layers are empty, with the
    shapes for ``load_state_dict(assign=True)``.

    Args:
        inplace: changes `model` itself, otherwise a copy.
        head: "keep", or "int8" to replace the output head too, the ``nn.Linear`` named ``lm_head``, by an
            :class:`Int8Linear`: half the bytes of bfloat16, at logits that are about 1 % off. A model whose head is
            tied to its embedding gets a separate int8 head of V x H more bytes; the embedding stays as it is.

    Raises:
        ValueError: when the model has no quantised BitLinear, or one with NaN or Inf weights; with
            ``head="int8"`` also when it has neither an ``nn.Linear`` named ``lm_head`` nor an empty ``lm_head`` with
            an ``nn.Embedding`` named ``embed_tokens``. The model is then as it was.
    """
    if head not in HEADS:
        raise ValueError(f"pack_model: head must be one of {HEADS}, got {head!r}")
    if head == "int8" and not _has_head(model):
        raise ValueError(
            f"pack_model: head 'int8' needs an nn.Linear named lm_head, or an embedding named embed_tokens to which "
            f"the head is tied, {type(model).__name__} has neither"
        )
    packed_weights: dict[nn.Parameter, PackedBitLinear] = {}

    def check(name: str, module: nn.Module) -> None:
        replace.check_forward("pack_model", name, module)
        replace.check_computed("pack_model", name, module)

    def build(names: list[str], module: nn.Module) -> nn.Module | None:
        if isinstance(module, BitLinear) and module.is_quantized:
            cls = _class_of(module)
            if cls.forward is not BitLinear.forward:
                raise ValueError(
                    f"pack_model: {names[0] or cls.__name__} must be a BitLinear, got its subclass {cls.__name__} "
                    "with a forward of its own, which the packed layer would not have"
                )
            check(names[0], module)
            return _pack(module, packed_weights)
        if head == "int8" and _is_head(names, module):
            check(names[0], module)
            return _pack_head(cast(nn.Linear, module))
        return None

    if not inplace:
        model = copy.deepcopy(model, replace.copyable(model))
    root = build([""], model)
    if root is not None:
        return cast(ModuleT, root.requires_grad_(False).eval())
    replacements = replace.plan(model, build)
    if not any(isinstance(r.new, PackedBitLinear) for r in replacements):
        raise ValueError(
            f"pack_model: model must hold a quantised BitLinear, {type(model).__name__} has none"
        )
    replace.apply(replacements)
    if head == "int8":
        for module in [m for m in model.modules() if _is_tied(m)]:
            module.lm_head = Int8Linear.from_weight(cast(nn.Embedding, module.embed_tokens).weight)
    switch_off_fast_paths(model)
    mark_conversion(model)
    return model.requires_grad_(False).eval()


def _class_of(module: nn.Module) -> type[nn.Module]:
    """The class of a module without the subclass that torch.nn.utils.parametrize puts before it."""
    cls = type(module)
    return cls.__bases__[0] if parametrize.is_parametrized(module) else cls


def _is_conv1d(module: nn.Module) -> bool:
    """Whether this is the Conv1D of transformers: ``x weight + bias`` with weight [K, N] and nf = N."""
    weight = module._parameters.get("weight")
    return (
        type(module).__name__ == "Conv1D"
        and weight is not None
        and weight.dim() == 2
        and getattr(module, "nf", None) == weight.shape[1]
        and "bias" in module._parameters
    )


def _transposed(weight: nn.Parameter, known: dict[nn.Parameter, nn.Parameter]) -> nn.Parameter:
    if weight not in known:
        known[weight] = nn.Parameter(weight.detach().t().contiguous(), requires_grad=weight.requires_grad)
    return known[weight]


@torch.no_grad()
def _pack(layer: BitLinear, known: dict[nn.Parameter, PackedBitLinear]) -> PackedBitLinear:
    computed = replace.is_computed(layer)
    if computed:
        replace.refresh_computed(layer)
        training = layer.training
        layer.eval()  # a spectral norm goes on iterating in training mode
        new = PackedBitLinear.from_bit_linear(layer)
        layer.train(training)
    else:
        new = PackedBitLinear.from_bit_linear(layer)
        same = known.setdefault(layer.weight, new)
        new._weight, new.weight_scale = same._weight, same.weight_scale
    _carry_over(layer, new, computed)
    return new


@torch.no_grad()
def _pack_head(layer: nn.Linear) -> Int8Linear:
    computed = replace.is_computed(layer)
    if computed:
        replace.refresh_computed(layer)
    new = Int8Linear.from_linear(layer)
    _carry_over(layer, new, computed)
    return new


def _carry_over(old: nn.Module, new: nn.Module, computed: bool) -> None:
    """The state of a layer that stays when it is packed, without that from which its weight was computed."""
    own = {name for kind in (old._parameters, old._buffers, old._modules) for name in kind}
    replace.carry_over(old, new, leave=(*_TRAINING_ONLY, *(own if computed else ())))
    if computed:
        replace.drop_computing_hooks(old, new)


def _is_head(names: list[str], module: nn.Module) -> bool:
    return type(module) is nn.Linear and any(name.rsplit(".", 1)[-1] == "lm_head" for name in names)


def _is_tied(module: nn.Module) -> bool:
    """Whether a model keeps no head of its own, but multiplies by its embedding."""
    return getattr(module, "lm_head", module) is None and isinstance(
        getattr(module, "embed_tokens", None), nn.Embedding
    )


def _has_head(model: nn.Module) -> bool:
    return any(
        _is_head([name], module) or _is_tied(module)
        for name, module in model.named_modules(remove_duplicate=False)
    )
