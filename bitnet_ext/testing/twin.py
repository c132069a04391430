"""The networks of bitnet_ext.models as one would write them in plain PyTorch, for comparison.

nn.Linear (for a quantised configuration with weight and input fake-quantised), nn.RMSNorm and
F.scaled_dot_product_attention; parameters under the same names up to the norms, so that both start from equal weights.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from bitnet_ext.models import BitNetConfig, BitNetForCausalLM
from bitnet_ext.models.transformer import rotary_table
from bitnet_ext.ops.attention import apply_rotary


class FakeQuantLinear(nn.Linear):
    """Ternary weight and int8 input in float, with the straight-through gradient (BitNet b1.58 FAQ)."""

    def forward(self, x: Tensor) -> Tensor:
        scale = 127.0 / x.abs().max(dim=-1, keepdim=True).values.clamp(min=1e-5)
        x_quant = (x * scale).round().clamp(-128, 127) / scale
        scale = 1.0 / self.weight.abs().mean().clamp(min=1e-5)
        w_quant = (self.weight * scale).round().clamp(-1, 1) / scale
        x = x + (x_quant - x).detach()
        weight = self.weight + (w_quant - self.weight).detach()
        return F.linear(x, weight)


def linear(config: BitNetConfig, in_features: int, out_features: int) -> nn.Linear:
    kind = nn.Linear if config.quantization == "none" else FakeQuantLinear
    return kind(in_features, out_features, bias=False)


def norm(config: BitNetConfig, features: int, wanted: bool = True) -> nn.Module:
    return nn.RMSNorm(features, eps=config.norm_eps) if wanted else nn.Identity()


class TwinAttention(nn.Module):
    def __init__(self, config: BitNetConfig) -> None:
        super().__init__()
        hidden, kv = config.hidden_size, config.num_kv_heads * config.head_dim
        self.head_dim = config.head_dim
        self.grouped = config.num_kv_heads != config.num_heads
        self.input_norm = norm(config, hidden, config.pre_linear_norm)
        self.q_proj = linear(config, hidden, hidden)
        self.k_proj = linear(config, hidden, kv)
        self.v_proj = linear(config, hidden, kv)
        self.o_norm = norm(config, hidden, config.sub_norm)
        self.o_proj = linear(config, hidden, hidden)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        B, T, hidden = x.shape
        x = self.input_norm(x)
        query, key, value = (
            proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = apply_rotary(query, cos, sin), apply_rotary(key, cos, sin)
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=self.grouped)
        return self.o_proj(self.o_norm(out.transpose(1, 2).reshape(B, T, hidden)))


class TwinFeedForward(nn.Module):
    def __init__(self, config: BitNetConfig) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.activation = config.activation
        self.input_norm = norm(config, hidden, config.pre_linear_norm)
        self.gate_proj = linear(config, hidden, inner)
        self.up_proj = linear(config, hidden, inner)
        self.down_norm = norm(config, inner, config.sub_norm)
        self.down_proj = linear(config, inner, hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = self.input_norm(x)
        gate = self.gate_proj(x)
        gate = F.relu(gate).square() if self.activation == "relu2" else F.silu(gate)
        return self.down_proj(self.down_norm(gate * self.up_proj(x)))


class TwinBlock(nn.Module):
    def __init__(self, config: BitNetConfig) -> None:
        super().__init__()
        self.attention_norm = norm(config, config.hidden_size)
        self.attention = TwinAttention(config)
        self.feed_forward_norm = norm(config, config.hidden_size)
        self.feed_forward = TwinFeedForward(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin)
        return x + self.feed_forward(self.feed_forward_norm(x))


class TwinModel(nn.Module):
    """BitNetForCausalLM's network in plain PyTorch: int64 [B, T] -> logits [B, T, V]."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: BitNetConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(TwinBlock(config) for _ in range(config.num_layers))
        self.final_norm = norm(config, config.hidden_size)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        cos, sin = rotary_table(config)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def hidden_states(self, input_ids: Tensor) -> Tensor:
        T = input_ids.shape[1]
        x = self.embed_tokens(input_ids)
        for layer in self.layers:
            x = layer(x, self.cos[:T], self.sin[:T])
        return self.final_norm(x)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.lm_head(self.hidden_states(input_ids))

    def load_from(self, model: BitNetForCausalLM) -> TwinModel:
        """Copies the weights of our model."""
        state = {
            name.replace("_proj.norm_weight", "_norm.weight"): value
            for name, value in model.state_dict().items()
        }
        state.setdefault("lm_head.weight", state["embed_tokens.weight"])
        self.load_state_dict(state)
        return self
