"""Multi-head attention of PyTorch with ternary projections."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bitnet_ext.nn.bit_linear import BitLinear
from bitnet_ext.nn.replace import carry_over


class BitMultiheadAttention(nn.Module):
    """``nn.MultiheadAttention`` whose projections of query, key, value and output are :class:`BitLinear` layers.

    Takes the arguments of ``nn.MultiheadAttention.forward`` and returns what it returns; nested tensors are refused.
    The projections are called as modules, so that they can be packed. ``load_state_dict`` also takes the parameters
    of an ``nn.MultiheadAttention`` (``in_proj_weight``, ``in_proj_bias``).

    Args:
        embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first: as for
            ``nn.MultiheadAttention``.
        norm: gives each projection an RMSNorm of its own.
    """

    #: nn.TransformerEncoderLayer asks for it to choose its fast path, which is not for ternary weights.
    in_proj_bias = None
    in_proj_weight = None

    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    out_proj: nn.Module
    bias_k: Tensor | None
    bias_v: Tensor | None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        *,
        norm: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if embed_dim < 1 or num_heads < 1 or embed_dim % num_heads:
            raise ValueError(
                "BitMultiheadAttention: embed_dim must be a multiple of num_heads, both >= 1, "
                f"got {embed_dim} and {num_heads}"
            )
        self.embed_dim, self.num_heads, self.head_dim = embed_dim, num_heads, embed_dim // num_heads
        self.kdim = embed_dim if kdim is None else kdim
        self.vdim = embed_dim if vdim is None else vdim
        self.dropout = dropout
        self.batch_first = batch_first
        self.add_zero_attn = add_zero_attn
        for name, width in (
            ("q_proj", embed_dim),
            ("k_proj", self.kdim),
            ("v_proj", self.vdim),
            ("out_proj", embed_dim),
        ):
            layer = BitLinear(width, embed_dim, bias=bias, norm=norm, device=device, dtype=dtype)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
            self.add_module(name, layer)
        self.bias_k = self.bias_v = None
        if add_bias_kv:
            self.bias_k, self.bias_v = (
                nn.Parameter(
                    nn.init.normal_(torch.empty(1, 1, embed_dim, device=device, dtype=dtype), std=0.02)
                )
                for _ in range(2)
            )

    @classmethod
    def from_attention(
        cls, module: nn.MultiheadAttention, out_proj: nn.Module, *, norm: bool = False
    ) -> BitMultiheadAttention:
        """The ternary form of a float attention. The in-projection, one parameter there, becomes three parameters of
        the same values; the out-projection and the biases of key and value stay the same objects.

        Args:
            out_proj: the layer in the place of ``module.out_proj``.
            norm: gives the projections of query, key and value an RMSNorm of their own.
        """
        E = module.embed_dim
        new = cls(
            E,
            module.num_heads,
            module.dropout,
            module.in_proj_bias is not None,
            False,
            module.add_zero_attn,
            module.kdim,
            module.vdim,
            module.batch_first,
            device="meta",
        )
        stacked, bias = module.in_proj_weight, module.in_proj_bias
        for index, name in enumerate("qkv"):
            layer = getattr(new, f"{name}_proj")
            own = getattr(module, f"{name}_proj_weight")
            layer.weight = own if stacked is None else _part(stacked, index, E)
            if bias is not None:
                layer.bias = _part(bias, index, E)
            if norm:
                gain = torch.ones(layer.in_features, device=layer.weight.device)
                layer.norm_weight = nn.Parameter(gain)
        new.out_proj = out_proj
        new.bias_k, new.bias_v = module.bias_k, module.bias_v
        # The parameters are in the projections now; what else hangs on the module comes along.
        left = ("in_proj_weight", "in_proj_bias", "q_proj_weight", "k_proj_weight", "v_proj_weight")
        training = module.out_proj.training
        carry_over(module, new, leave=(*left, "_qkv_same_embed_dim"))
        new.out_proj.train(training)
        return new

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for kind in ("weight", "bias"):
            stacked = state_dict.pop(f"{prefix}in_proj_{kind}", None)
            if stacked is not None:
                for name, part in zip("qkv", stacked.chunk(3), strict=True):
                    state_dict[f"{prefix}{name}_proj.{kind}"] = part
        for name in "qkv":
            own = state_dict.pop(f"{prefix}{name}_proj_weight", None)
            if own is not None:
                state_dict[f"{prefix}{name}_proj.weight"] = own
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As ``nn.MultiheadAttention.forward``: [L, B, E], [B, L, E] with batch_first, or [L, E]; and, with
        `need_weights`, the attention weights [B, L, S], or [B, heads, L, S] without `average_attn_weights`.

        Raises:
            ValueError: for nested tensors, inputs of other than two or three dimensions, and `is_causal` without
                `attn_mask`.
        """
        if query.is_nested or key.is_nested or value.is_nested:
            raise ValueError(
                "BitMultiheadAttention: query, key and value must be plain tensors, got a nested one"
            )
        if query.dim() not in (2, 3) or key.dim() != query.dim() or value.dim() != query.dim():
            raise ValueError(
                "BitMultiheadAttention: query, key and value must all have 2 or all 3 dimensions, "
                f"got {query.dim()}, {key.dim()} and {value.dim()}"
            )
        if is_causal and attn_mask is None:
            raise ValueError("BitMultiheadAttention: is_causal needs attn_mask, got None")
        batched = query.dim() == 3
        if not batched:
            query, key, value = (t.unsqueeze(0) for t in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = (t.transpose(0, 1) for t in (query, key, value))
        q, k, v = self.q_proj(query), self.k_proj(key), self.v_proj(value)
        if self.bias_k is not None and self.bias_v is not None:
            k, v = (_append(t, b.to(t.dtype)) for t, b in ((k, self.bias_k), (v, self.bias_v)))
        if self.add_zero_attn:
            k, v = (_append(t, t.new_zeros(1, 1, self.embed_dim)) for t in (k, v))
        B, L, S = q.shape[0], q.shape[1], k.shape[1]
        q, k, v = (t.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for t in (q, k, v))
        mask = self._mask(attn_mask, key_padding_mask, B, S, q.dtype)
        dropout = self.dropout if self.training else 0.0
        weights: Tensor | None = None
        if need_weights:
            scores = q @ k.transpose(-2, -1) / math.sqrt(self.head_dim)
            weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
            out = weights @ v
            if average_attn_weights:
                weights = weights.mean(1)
        else:
            appended = self.bias_k is not None or self.add_zero_attn  # seen by all, whatever the hint says
            causal = is_causal and key_padding_mask is None and L == S and not appended
            out = F.scaled_dot_product_attention(
                q, k, v, None if causal else mask, dropout_p=dropout, is_causal=causal
            )
        out = self.out_proj(out.transpose(1, 2).flatten(-2))
        if not batched:
            return out.squeeze(0), None if weights is None else weights.squeeze(0)
        return out if self.batch_first else out.transpose(0, 1), weights

    def _mask(
        self, attn_mask: Tensor | None, padding: Tensor | None, B: int, S: int, dtype: torch.dtype
    ) -> Tensor | None:
        """Both masks as one that is added to the scores, of a shape that broadcasts to [B, heads, L, S]."""
        mask = None
        if attn_mask is not None:
            mask = _added(attn_mask, S, dtype)
            if mask.dim() == 3:
                mask = mask.reshape(B, self.num_heads, *mask.shape[1:])
        if padding is not None:
            hidden = _added(padding, S, dtype).reshape(B, 1, 1, S)
            mask = hidden if mask is None else mask + hidden
        return mask

    def extra_repr(self) -> str:
        return f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, batch_first={self.batch_first}"


def _part(stacked: nn.Parameter, index: int, E: int) -> nn.Parameter:
    part = stacked.detach()[index * E : (index + 1) * E].clone()
    return nn.Parameter(part, requires_grad=stacked.requires_grad)


def _append(t: Tensor, row: Tensor) -> Tensor:
    """[B, S + 1, E]: one more key or value for every sequence."""
    return torch.cat([t, row.expand(t.shape[0], 1, -1)], dim=1)


def _added(mask: Tensor, S: int, dtype: torch.dtype) -> Tensor:
    """A mask as it is added, for S keys: True becomes minus infinity, appended keys are seen."""
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))
    return F.pad(mask.to(dtype), (0, S - mask.shape[-1]))
