"""float32 products of few tokens with a tall matrix: an output layer's logits and their two gradients.

On CUDA they run on fp16 tensor cores, each number as the sum of two fp16 numbers times a power of two, and are
as accurate as a float32 product (no TF32): a product of two numbers is off by up to 3 * 2^-24 of itself, which a
sum of 16 and more hides behind the roundings of float32. Everywhere else, and for shapes that
:func:`prefers_skinny_mm` does not take, they are plain PyTorch.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from bitnet_ext._differentiation import transforms_active
from bitnet_ext.ops import _checks

_ops = torch.ops.bitnet_ext
_FLOAT = (torch.float32,)
_MAX_HIDDEN = 256  # kSkinnyMaxHidden of csrc/cuda/skinny_mm.h
_CAPABILITIES = {(8, 0), (8, 7), (9, 0), (10, 0), (10, 3)}


def prefers_skinny_mm(product: str, T: int, H: int) -> bool:
    """Whether a kernel takes T tokens of H features, is faster than the library and sums enough terms.

    Args:
        product: "nt", "nn" or "tn". Measured on an H200 for V = 50,257 and H = 256: nt twice as fast as the
            library from 64 to 512 tokens; nn, whose tiles of 128 tokens cost the same when half empty, from 96
            tokens on; tn, which goes once over its result for every 128 tokens, up to 256.
    """
    _checks.one_of("prefers_skinny_mm", "product", product, ("nt", "nn", "tn"))
    _checks.integer("prefers_skinny_mm", "T", T)
    _checks.integer("prefers_skinny_mm", "H", H)
    if not (16 <= T <= 512 and 32 <= H <= _MAX_HIDDEN and H % 8 == 0):
        return False
    if product == "nn":
        return 4 * T >= 3 * (-(-T // 128) * 128)
    return product == "nt" or T <= 256


@functools.lru_cache
def _has_shared_memory(device: torch.device) -> bool:
    """Whether a block can have the 138 KB that the kernels ask for; sm_86, 89 and 120 stop at 99."""
    return torch.cuda.get_device_capability(device) in _CAPABILITIES


def takes_skinny_mm(product: str, T: int, H: int, *operands: Tensor) -> bool:
    """Whether the kernels compute, and are preferred for, T tokens of H features: every operand a float32 CUDA
    matrix that starts at 16 bytes and whose rows, all contiguous, do too."""
    if (
        not prefers_skinny_mm(product, T, H)
        or not operands[0].is_cuda
        or not _has_shared_memory(operands[0].device)
    ):
        return False
    return all(
        t.is_cuda
        and t.dtype == torch.float32
        and t.shape[-1] > 0
        and t.stride(1) == 1
        and t.stride(0) >= t.shape[1]
        and (t.shape[0] == 1 or t.stride(0) % 4 == 0)
        and t.data_ptr() % 16 == 0
        for t in operands
    )


def _without_gradient(product: str, T: int, H: int, *operands: Tensor) -> bool:
    """Whether a kernel computes it: the kernels have no derivative, plain PyTorch has all."""
    return not transforms_active(*operands) and takes_skinny_mm(product, T, H, *operands)


def _check(op: str, left: str, a: Tensor, right: str, b: Tensor) -> None:
    _checks.tensor(op, left, a, dtypes=_FLOAT, dim=2)
    _checks.tensor(op, right, b, dtypes=_FLOAT, dim=2)
    _checks.same_device(op, right, b, left, a)


def skinny_mm_nt(hidden: Tensor, weight: Tensor) -> Tensor:
    """``hidden @ weight.T``.

    Args:
        hidden: float32 [T, H]; weight: float32 [V, H].

    Returns:
        float32 [T, V]. On CUDA its rows may be a multiple of 64 apart, so that each starts at 256 bytes.
    """
    op = "skinny_mm_nt"
    _check(op, "hidden", hidden, "weight", weight)
    _checks.shape(op, "weight", weight, (weight.shape[0], hidden.shape[1]), "H as hidden has it")
    T, V = hidden.shape[0], weight.shape[0]
    if V == 0 or not _without_gradient("nt", *hidden.shape, hidden, weight):
        return torch.mm(hidden, weight.t())
    out = hidden.new_empty((T, -(-V // 64) * 64))
    _ops.skinny_mm_nt_(out, hidden.contiguous(), weight.contiguous())
    return out[:, :V]


def skinny_mm_nt_ref(hidden: Tensor, weight: Tensor) -> Tensor:
    """:func:`skinny_mm_nt` in plain PyTorch, in float64."""
    return torch.mm(hidden.double(), weight.double().t()).float()


def skinny_mm_nn(grad: Tensor, weight: Tensor) -> Tensor:
    """``grad @ weight``; equal inputs give equal bits.

    Args:
        grad: float32 [T, V], whose rows may lie apart; weight: float32 [V, H].

    Returns:
        float32 [T, H].
    """
    op = "skinny_mm_nn"
    _check(op, "grad", grad, "weight", weight)
    _checks.shape(op, "weight", weight, (grad.shape[1], weight.shape[1]), "a row for each column of grad")
    T, H = grad.shape[0], weight.shape[1]
    if not _without_gradient("nn", T, H, grad, weight):
        return torch.mm(grad, weight)
    out = weight.new_empty((T, H))
    _ops.skinny_mm_nn_(out, grad, weight.contiguous())
    return out


def skinny_mm_nn_ref(grad: Tensor, weight: Tensor) -> Tensor:
    """:func:`skinny_mm_nn` in plain PyTorch, in float64."""
    return torch.mm(grad.double(), weight.double()).float()


def skinny_mm_tn(grad: Tensor, hidden: Tensor) -> Tensor:
    """``grad.T @ hidden``.

    Args:
        grad: float32 [T, V], whose rows may lie apart; hidden: float32 [T, H].

    Returns:
        float32 [V, H].
    """
    op = "skinny_mm_tn"
    _check(op, "grad", grad, "hidden", hidden)
    _checks.shape(op, "hidden", hidden, (grad.shape[0], hidden.shape[1]), "a row for each row of grad")
    T, H = hidden.shape
    if not _without_gradient("tn", T, H, grad, hidden):
        return torch.mm(grad.t(), hidden)
    out = hidden.new_empty((grad.shape[1], H))
    _ops.skinny_mm_tn_(out, grad, hidden.contiguous(), False, 0)
    return out


def skinny_mm_tn_ref(grad: Tensor, hidden: Tensor) -> Tensor:
    """:func:`skinny_mm_tn` in plain PyTorch, in float64."""
    return torch.mm(grad.double().t(), hidden.double()).float()
