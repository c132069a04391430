"""Configuration of a BitNet transformer and the named presets."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

ACTIVATIONS = ("relu2", "silu")
INITS = ("linear-default", "normal")
QUANTIZATIONS = ("b1.58", "none")  # those of bitnet_ext.nn, which imports torch


@dataclass(frozen=True)
class BitNetConfig:
    """Shape and flavour of a decoder-only transformer whose linear layers are ternary.

    Attributes:
        vocab_size, hidden_size, num_layers, num_heads, num_kv_heads, intermediate_size: the usual sizes.
        max_seq_len: longest sequence the rotary table covers.
        activation: gate of the feed-forward net, "relu2" (squared ReLU) or "silu"; the net is gated.
        rope_theta: base of the rotary embedding (half-split form).
        norm_eps: epsilon of every RMSNorm.
        pre_linear_norm: a second RMSNorm between a block's own norm and its input products, as in the
            collapse report's network, where BitLinear brought a norm of its own.
        sub_norm: an RMSNorm before the output products of attention and feed-forward (BitNet 2B4T).
        tie_embeddings: the output head is the embedding.
        quantization: "b1.58", or "none" for the full-precision twin.
        init: "linear-default" (embedding N(0, 1), everything else as nn.Linear) or "normal" (N(0,
            init_std), output products scaled by 1 / sqrt(2 num_layers) as in GPT-2).
        init_std: of "normal".
    """

    vocab_size: int = 50257
    hidden_size: int = 256
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 4
    intermediate_size: int = 512
    max_seq_len: int = 2048
    activation: str = "relu2"
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    pre_linear_norm: bool = False
    sub_norm: bool = True
    tie_embeddings: bool = False
    quantization: str = "b1.58"
    init: str = "normal"
    init_std: float = 0.02

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "intermediate_size",
            "max_seq_len",
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"BitNetConfig: {name} must be an integer >= 1, got {value!r}")
        if self.hidden_size % (2 * self.num_heads):
            raise ValueError(
                f"BitNetConfig: hidden_size must be a multiple of 2 * num_heads = {2 * self.num_heads} "
                f"(rotary pairs), got {self.hidden_size}"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"BitNetConfig: num_heads must be a multiple of num_kv_heads, "
                f"got {self.num_heads} and {self.num_kv_heads}"
            )
        for name, accepted in (("activation", ACTIVATIONS), ("quantization", QUANTIZATIONS), ("init", INITS)):
            if getattr(self, name) not in accepted:
                raise ValueError(
                    f"BitNetConfig: {name} must be one of {accepted}, got {getattr(self, name)!r}"
                )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> BitNetConfig:
        check_fields("BitNetConfig", values)
        return cls(**values)


def check_fields(caller: str, values: Iterable[str]) -> None:
    """Raises ValueError when a name is no field of :class:`BitNetConfig`."""
    known = [field.name for field in dataclasses.fields(BitNetConfig)]
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ValueError(
            f"{caller}: unknown fields {', '.join(unknown)}; BitNetConfig has {', '.join(known)}. A network of another "
            "shape can be built with another library and made ternary by bitnet_ext.nn.convert_linear"
        )


def _collapse(width: int, num_layers: int = 4) -> BitNetConfig:
    """The collapse report's network at a width: head_dim 64, feed-forward 2x, norms twice."""
    heads = max(1, width // 64)
    return BitNetConfig(
        hidden_size=width,
        num_layers=num_layers,
        num_heads=heads,
        num_kv_heads=heads,
        intermediate_size=2 * width,
        max_seq_len=1024,
        pre_linear_norm=True,
        init="linear-default",
    )


def _b158(hidden: int, ffn: int, heads: int, layers: int) -> BitNetConfig:
    """Sizes of the b1.58 paper and FAQ (table 2) with the 2B4T block."""
    return BitNetConfig(
        vocab_size=50257,
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        intermediate_size=ffn,
        tie_embeddings=True,
    )


#: Every preset. `collapse-256` is the collapse report's network; `bitnet-b1.58-2b-4t` that of arXiv 2504.12285.
PRESETS: dict[str, BitNetConfig] = {
    "collapse-64": _collapse(64, num_layers=2),
    "collapse-128": _collapse(128),
    "collapse-256": _collapse(256),
    "collapse-512": _collapse(512),
    "collapse-768": _collapse(768),
    "bitnet-100m": _b158(768, 2048, 12, 12),
    "bitnet-700m": _b158(1536, 4096, 24, 24),
    "bitnet-1.3b": _b158(2048, 5460, 32, 24),
    "bitnet-3b": _b158(3200, 8640, 32, 26),
    "bitnet-b1.58-2b-4t": BitNetConfig(
        vocab_size=128256,
        hidden_size=2560,
        num_layers=30,
        num_heads=20,
        num_kv_heads=5,
        intermediate_size=6912,
        max_seq_len=4096,
        rope_theta=500000.0,
        tie_embeddings=True,
    ),
}


def preset(name: str, **overrides: Any) -> BitNetConfig:
    """A preset's configuration, with fields replaced by `overrides`."""
    if name not in PRESETS:
        raise ValueError(f"preset: name must be one of {', '.join(PRESETS)}; got {name!r}")
    check_fields("preset", overrides)
    return dataclasses.replace(PRESETS[name], **overrides)
