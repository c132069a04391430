"""Causal attention with rotary embedding, on the stacked result of one product."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

from bitnet_ext.ops import _checks

_ops = torch.ops.bitnet_ext


def rotary_attention(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    num_heads: int,
    num_kv_heads: int,
    *,
    overwrite_qkv: bool = False,
) -> Tensor:
    """``softmax(q k^T / sqrt(D)) v`` with rotated queries and keys, each position seeing those up to its own.

    Queries and keys turn as in RoFormer (arXiv 2104.09864): ``y = x cos + roll(x, D / 2) sin`` in float32,
    rounded to qkv's dtype. Head h attends to key head ``h // (num_heads / num_kv_heads)`` (arXiv 2305.13245).
    Differentiable once in qkv, with one tensor as its gradient.

    On CUDA, small batches of short sequences (T <= 128, T D <= 8192, D of 32, 64 or 128) take one kernel
    forward and one backward, in float32 arithmetic and with equal bits in every run. Others rotate in a
    kernel of their own, without a copy of the values, before `F.scaled_dot_product_attention`, whose rules of
    choice and of determinism hold. Elsewhere PyTorch's operators do all of it.

    Args:
        qkv: [B, T, (num_heads + 2 num_kv_heads) D] float32, bfloat16 or float16: in each row the query heads,
            then the key heads, then the value heads; D even.
        cos, sin: float32 [T, D], equal halves in each row of cos, and in sin the first half the negated second.
        num_heads, num_kv_heads: the first a multiple of the second.
        overwrite_qkv: lets the rotated queries and keys take the place of the others, so that the backward keeps
            one tensor of qkv's size and not 1 2/3 of it (without grouped heads). What qkv holds afterwards is then
            of no use. For a qkv that nobody reads again; the backward of what computed it must not need its values.

    Returns:
        [B, T, num_heads D] in qkv's dtype, contiguous.
    """
    op = "rotary_attention"
    _checks.tensor(op, "qkv", qkv, dtypes=_checks.FLOATS, dim=3)
    _checks.integer(op, "num_heads", num_heads)
    _checks.integer(op, "num_kv_heads", num_kv_heads)
    if num_kv_heads < 1 or num_heads < 1 or num_heads % num_kv_heads:
        raise ValueError(
            f"{op}: num_heads must be a multiple of num_kv_heads >= 1, got {num_heads} and {num_kv_heads}"
        )
    B, T, width = qkv.shape
    stacked = num_heads + 2 * num_kv_heads
    if width < 1 or width % (2 * stacked):
        raise ValueError(
            f"{op}: qkv must have shape [B, T, {stacked} D] with an even D for {num_heads} query and "
            f"{num_kv_heads} key heads, got {tuple(qkv.shape)}"
        )
    head_dim = width // stacked
    for name, table in (("cos", cos), ("sin", sin)):
        _checks.tensor(op, name, table, dtypes=(torch.float32,), dim=2)
        _checks.shape(op, name, table, (T, head_dim), "[T, D] of qkv")
        _checks.same_device(op, name, table, "qkv", qkv)
    # The kernels have no forward mode and no rule for vmap; PyTorch's operators have both.
    if not qkv.is_cuda or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        heads = qkv.view(B, T, stacked, head_dim) if qkv.is_contiguous() else qkv.unflatten(-1, (stacked, -1))
        turned, value = heads.split((num_heads + num_kv_heads, num_kv_heads), dim=2)
        query, key = apply_rotary(turned.transpose(1, 2), cos, sin).split((num_heads, num_kv_heads), dim=1)
        return _causal_attention(query, key, value.transpose(1, 2))
    qkv, cos, sin = qkv.contiguous(), cos.contiguous(), sin.contiguous()
    if _is_short(B, T, num_heads, head_dim, qkv.dtype):
        return _ops.short_attention(qkv, cos, sin, num_heads, num_kv_heads)[0]
    if overwrite_qkv:
        _ops.rotate_query_key_(qkv.detach(), cos, sin, num_heads, num_kv_heads)
        # The operators of this package do not count their changes; inference tensors have no counter.
        if not torch.compiler.is_compiling() and not qkv.is_inference():
            torch.autograd.graph.increment_version(qkv)
    query, key, value = _RotaryHeads.apply(qkv, cos, sin, num_heads, num_kv_heads, overwrite_qkv)
    return _causal_attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))


def rotary_attention_ref(qkv: Tensor, cos: Tensor, sin: Tensor, num_heads: int, num_kv_heads: int) -> Tensor:
    """:func:`rotary_attention` in plain PyTorch, gradients by autograd; float64 is computed in float64."""
    dtype = torch.promote_types(qkv.dtype, torch.float32)
    heads = qkv.unflatten(-1, (num_heads + 2 * num_kv_heads, -1)).transpose(1, 2).to(dtype)
    T, head_dim = heads.shape[2:]
    turned, value = heads.split((num_heads + num_kv_heads, num_kv_heads), dim=1)
    turned = turned * cos.to(dtype) + turned.roll(head_dim // 2, dims=-1) * sin.to(dtype)
    query, key = turned.to(qkv.dtype).to(dtype).split((num_heads, num_kv_heads), dim=1)
    key, value = (t.repeat_interleave(num_heads // num_kv_heads, dim=1) for t in (key, value))
    scores = query @ key.transpose(-2, -1) / math.sqrt(head_dim)
    future = torch.ones(T, T, dtype=torch.bool, device=qkv.device).triu(1)
    out = scores.masked_fill(future, -math.inf).softmax(-1) @ value
    return out.transpose(1, 2).flatten(-2).to(qkv.dtype)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the pairs (i, i + D / 2) of x [..., T, D] by position, in float32; cos, sin [T, D]."""
    y = x.float()
    # Rolling by half swaps the members of each pair: 3 kernels forward and 4 backward, where halves take 20.
    return torch.addcmul(y * cos, y.roll(x.shape[-1] // 2, dims=-1), sin).to(x.dtype)


#: Multiplications of a score matrix, B heads T^2 D, up to which one kernel is faster than a rotation and an
#: attention kernel of PyTorch's (H200, forward and backward): those use tensor cores for 16-bit types.
_SHORT_WORK = {torch.float32: 1 << 24, torch.bfloat16: 1 << 23, torch.float16: 1 << 23}


def _is_short(B: int, T: int, num_heads: int, head_dim: int, dtype: torch.dtype) -> bool:
    """Whether one kernel does it all (csrc/cuda/short_attention.h) and is the fastest."""
    fits = head_dim in (32, 64, 128) and T <= 128 and T * head_dim <= 8192
    return fits and B * num_heads * T * T * head_dim <= _SHORT_WORK[dtype]


def _causal_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """[B, heads, T, D] each -> [B, T, heads D]."""
    grouped = key.shape[1] != query.shape[1]
    out = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=grouped)
    return out.transpose(1, 2).flatten(-2)


class _RotaryHeads(torch.autograd.Function):
    """qkv -> query and key, rotated, and value, a view of qkv: [B, T, heads, D] each; all three are views where qkv
    holds rotated queries and keys already.

    A function of its own because an operator may not return a view of its input; its backward writes the
    three gradients into one tensor, where slices would each be padded with zeros and added.
    """

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor, num_heads: int, num_kv_heads: int, is_rotated: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        heads = qkv.unflatten(-1, (num_heads + 2 * num_kv_heads, -1))
        query, key, value = heads.split((num_heads, num_kv_heads, num_kv_heads), dim=2)
        if not is_rotated:
            query, key = _ops.rotary_query_key(qkv, cos, sin, num_heads, num_kv_heads)
        ctx.save_for_backward(cos, sin)
        return query, key, value

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, grad_query: Tensor, grad_key: Tensor, grad_value: Tensor
    ) -> tuple[Tensor | None, ...]:
        grads = [g if g.stride(-1) == 1 else g.contiguous() for g in (grad_query, grad_key, grad_value)]
        return _ops.rotary_query_key_backward(*grads, *ctx.saved_tensors), None, None, None, None, None
