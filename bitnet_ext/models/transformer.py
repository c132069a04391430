"""The decoder-only transformer with ternary linear layers."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bitnet_ext import ops
from bitnet_ext.models.config import BitNetConfig
from bitnet_ext.models.kv_cache import KVCache
from bitnet_ext.models.seeding import drawing_from
from bitnet_ext.nn import BitLinear, RMSNorm, WeightCache
from bitnet_ext.nn.fused import apart, glu_linear, norm_linear, side_by_side
from bitnet_ext.ops.attention import apply_rotary
from bitnet_ext.ops.fused_quantize import Activation


def rotary_table(config: BitNetConfig) -> tuple[Tensor, Tensor]:
    """cos and signed sin, [max_seq_len, head_dim], of the rotary embedding (RoFormer, arXiv 2104.09864).

    The pair (i, i + head_dim / 2) turns by ``position * theta^(-2 i / head_dim)``. Both halves of a row hold
    the same cosines; the first half of the sines is negated, as :func:`bitnet_ext.ops.rotary_attention` needs them.
    """
    pairs = config.head_dim // 2
    frequency = config.rope_theta ** (-torch.arange(pairs, dtype=torch.float64) / pairs)
    angle = torch.arange(config.max_seq_len, dtype=torch.float64)[:, None] * frequency
    cos, sin = angle.cos().float(), angle.sin().float()
    return torch.cat((cos, cos), dim=1), torch.cat((-sin, sin), dim=1)


def split_heads(x: Tensor, head_dim: int) -> Tensor:
    """[B, T, heads * head_dim] -> [B, heads, T, head_dim]."""
    return x.unflatten(-1, (-1, head_dim)).transpose(1, 2)


def causal_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """[B, heads, T, head_dim] each, heads of key and value shared by groups of queries -> [B, T, hidden]."""
    out = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=query.shape[2] > 1 and mask is None,
        enable_gqa=key.shape[1] != query.shape[1],
    )
    return out.transpose(1, 2).flatten(-2)


def document_mask(documents: Tensor, input_ids: Tensor, cache: KVCache | None = None) -> Tensor:
    """Which keys each query sees, bool [B, 1, T, T]: those of its own document up to itself."""
    if cache is not None:
        raise ValueError("BitNetForCausalLM: documents must be None with a cache")
    if documents.shape != input_ids.shape or documents.is_floating_point():
        raise ValueError(
            f"BitNetForCausalLM: documents must be integers of the shape of input_ids, {list(input_ids.shape)}, "
            f"got {documents.dtype} of shape {list(documents.shape)}"
        )
    T = documents.shape[1]
    causal = torch.ones(T, T, dtype=torch.bool, device=documents.device).tril()
    return ((documents[:, :, None] == documents[:, None, :]) & causal)[:, None]


class Attention(nn.Module):
    """Causal attention with grouped queries; input and output products are BitLinear."""

    def __init__(self, config: BitNetConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.num_heads, self.num_kv_heads = config.num_heads, config.num_kv_heads
        self.head_dim = config.head_dim
        hidden, kv = config.hidden_size, config.num_kv_heads * config.head_dim
        kind = config.quantization
        self.sizes = (hidden, kv, kv)
        self.input_norm = RMSNorm(hidden, config.norm_eps) if config.pre_linear_norm else None
        self.qkv_cache = WeightCache()
        self.q_proj = BitLinear(hidden, hidden, quantization=kind)
        self.k_proj = BitLinear(hidden, kv, quantization=kind)
        self.v_proj = BitLinear(hidden, kv, quantization=kind)
        self.o_proj = BitLinear(
            hidden, hidden, norm=config.sub_norm, norm_eps=config.norm_eps, quantization=kind
        )

    def forward(
        self,
        x: Tensor,
        delta: Tensor | None,
        norm: RMSNorm,
        cos: Tensor,
        sin: Tensor,
        cache: KVCache | None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The output for ``norm(x + delta)``, and the sum; mask: bool [B, 1, T, T] instead of the causal one."""
        norms = [norm] if self.input_norm is None else [norm, self.input_norm]
        layers = (self.q_proj, self.k_proj, self.v_proj)
        parts, x = norm_linear(x, delta, norms, layers, self.qkv_cache)
        if mask is not None:
            out = causal_attention(*self._rotated(parts, cos, sin), mask)
        elif cache is None:
            out = ops.rotary_attention(
                side_by_side(parts), cos, sin, self.num_heads, self.num_kv_heads, overwrite_qkv=True
            )
        else:
            out = self._continue(parts, cos, sin, cache)
        return self.o_proj(out), x

    def _rotated(self, parts: list[Tensor], cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query and key, turned by position, and value: [B, heads, T, head_dim] each."""
        query, key, value = (split_heads(part, self.head_dim) for part in apart(parts, self.sizes))
        return apply_rotary(query, cos, sin), apply_rotary(key, cos, sin), value

    def _continue(self, parts: list[Tensor], cos: Tensor, sin: Tensor, cache: KVCache) -> Tensor:
        """Attention of tokens that follow those in the cache."""
        query, key, value = self._rotated(parts, cos, sin)
        mask = cache.mask(query.shape[2])
        key, value = cache.append(self.layer, key, value)
        return causal_attention(query, key.to(query.dtype), value.to(query.dtype), mask)


class FeedForward(nn.Module):
    """``down(norm(act(gate(x)) * up(x)))`` with act = squared ReLU or SiLU."""

    def __init__(self, config: BitNetConfig) -> None:
        super().__init__()
        hidden, inner, kind = config.hidden_size, config.intermediate_size, config.quantization
        self.activation: Activation = config.activation  # type: ignore[assignment]
        self.input_norm = RMSNorm(hidden, config.norm_eps) if config.pre_linear_norm else None
        self.gate_up_cache = WeightCache()
        self.gate_proj = BitLinear(hidden, inner, quantization=kind)
        self.up_proj = BitLinear(hidden, inner, quantization=kind)
        self.down_proj = BitLinear(
            inner, hidden, norm=config.sub_norm, norm_eps=config.norm_eps, quantization=kind
        )

    def forward(self, x: Tensor, delta: Tensor | None, norm: RMSNorm) -> tuple[Tensor, Tensor]:
        """Of ``norm(x + delta)``: the output, and that sum."""
        norms = [norm] if self.input_norm is None else [norm, self.input_norm]
        parts, x = norm_linear(x, delta, norms, (self.gate_proj, self.up_proj), self.gate_up_cache)
        return glu_linear(parts, self.activation, self.down_proj), x


class Block(nn.Module):
    """Pre-norm residual block. What it adds to the stream is handed on apart: the next norm adds it in its own pass,
    forward and backward.
    """

    def __init__(self, config: BitNetConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attention = Attention(config, layer)
        self.feed_forward_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.feed_forward = FeedForward(config)

    def forward(
        self,
        x: Tensor,
        delta: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        cache: KVCache | None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The stream ``x + delta`` with the attention added, and what the feed-forward net adds to it."""
        delta, x = self.attention(x, delta, self.attention_norm, cos, sin, cache, mask)
        delta, x = self.feed_forward(x, delta, self.feed_forward_norm)
        return x, delta


class BitNetForCausalLM(nn.Module):
    """A BitNet b1.58 language model; with ``quantization="none"`` its full-precision twin.

    Twins built from one seed have the same initial parameters under the same names. Embedding and output
    head stay in full precision, as in the paper.

    Args:
        config: see :class:`BitNetConfig`; presets through :func:`bitnet_ext.models.preset`.
        seed: of the initialisation, drawn from a generator of its own on each device: the global generators are
            neither read nor set, also in threads. None uses torch's global ones.

    Shapes: input ids int64 [B, T] -> logits [B, T, V].
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, config: BitNetConfig, *, seed: int | None = None) -> None:
        super().__init__()
        self.config = config
        with drawing_from(seed):
            self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
            self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
            self.final_norm = RMSNorm(config.hidden_size, config.norm_eps)
            self.lm_head = (
                None
                if config.tie_embeddings
                else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
            )
            if config.init == "normal":
                self._init_normal()
        cos, sin = rotary_table(config)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BitNetForCausalLM:
        """Moves the rotary table as any buffer. A cast (``model.bfloat16()``) leaves it as it is: rounded angles
        would be another model.
        """
        exact = (self.cos, self.sin)
        super()._apply(fn, recurse)
        if self.cos.dtype != exact[0].dtype:
            self.cos, self.sin = (table.to(self.cos.device) for table in exact)
        return self

    @torch.no_grad()
    def _init_normal(self) -> None:
        std = self.config.init_std
        for name, parameter in self.named_parameters():
            if parameter.dim() < 2:
                continue
            output = name.endswith(("o_proj.weight", "down_proj.weight"))
            parameter.normal_(0.0, std / math.sqrt(2 * self.config.num_layers) if output else std)

    @property
    def head_weight(self) -> Tensor:
        """Output matrix [V, H] in floating point; a model packed with an int8 head has none."""
        return self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def logits(self, hidden: Tensor) -> Tensor:
        """[.., V] of hidden states [.., H], by whatever the output head is."""
        return F.linear(hidden, self.embed_tokens.weight) if self.lm_head is None else self.lm_head(hidden)

    @staticmethod
    def document_numbers(input_ids: Tensor, separator: int) -> Tensor:
        """`documents` of :meth:`hidden_states`, int64 [B, T], for rows in which the token `separator` ends a document
        and belongs to it.
        """
        ends = (input_ids == separator).long()
        return ends.cumsum(1) - ends

    def hidden_states(
        self, input_ids: Tensor, cache: KVCache | None = None, *, documents: Tensor | None = None
    ) -> Tensor:
        """Hidden states after the final norm, [B, T, H]; with a cache, of the tokens that follow it.

        Args:
            input_ids: int64 [B, T].
            cache: of the tokens before; not with documents.
            documents: integers [B, T], equal for the tokens of a document: a token attends to the tokens of its own
                document up to itself. Positions go on through a row, which changes nothing, since the rotary
                embedding is one of differences. An attention mask of 0 (padding) and 1 can be given here.
        """
        if input_ids.dim() != 2 or input_ids.dtype != torch.int64:
            raise ValueError(
                f"BitNetForCausalLM: input_ids must be int64 of shape [B, T], "
                f"got {input_ids.dtype} of shape {tuple(input_ids.shape)}"
            )
        start = 0 if cache is None else cache.length
        T = input_ids.shape[1]
        if start + T > self.config.max_seq_len:
            raise ValueError(
                f"BitNetForCausalLM: input_ids must end within max_seq_len = {self.config.max_seq_len} "
                f"tokens, got {start + T}"
            )
        mask = None if documents is None else document_mask(documents, input_ids, cache)
        # In float32, also where a wrapper casts buffers.
        cos, sin = (
            (table[:T] if cache is None else cache.rows(table, T)).float() for table in (self.cos, self.sin)
        )
        x, delta = self.embed_tokens(input_ids), None
        for layer in self.layers:
            x, delta = layer(x, delta, cos, sin, cache, mask)
        if cache is not None:
            cache.advance(T)
        return self.final_norm.add(x, delta)[0]

    def forward(
        self, input_ids: Tensor, cache: KVCache | None = None, *, documents: Tensor | None = None
    ) -> Tensor:
        return self.logits(self.hidden_states(input_ids, cache, documents=documents))

    def num_parameters(self) -> dict[str, int]:
        """Parameter counts: total, ternary (in quantised layers), embedding and head, norm gains."""
        ternary = sum(m.weight.numel() for m in self.modules() if isinstance(m, BitLinear) and m.is_quantized)
        total = sum(p.numel() for p in self.parameters())
        embedding = self.embed_tokens.weight.numel() + (
            0 if self.lm_head is None else self.lm_head.weight.numel()
        )
        gains = sum(p.numel() for p in self.parameters() if p.dim() == 1)
        return {"total": total, "ternary": ternary, "embedding": embedding, "gains": gains}
