"""Text generation: prefill of the prompt, then one token at a time from the cache."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, overload

import torch
from torch import Tensor

from bitnet_ext._capture import capture, capture_stream
from bitnet_ext.inference.prompts import (
    PaddedPrompts,
    Prompt,
    TextCoder,
    encode_texts,
    from_attention_mask,
    pad_prompts,
)
from bitnet_ext.models.kv_cache import KVCache, SteadyKVCache
from bitnet_ext.models.transformer import BitNetForCausalLM
from bitnet_ext.nn import FrozenWeights, frozen_weights, resident_weights

#: New tokens from which on a GPU the work of one is captured as a graph.
CAPTURED_TOKENS = 8


@overload
def generate(
    model: BitNetForCausalLM,
    prompt: Tensor,
    max_new_tokens: int = ...,
    *,
    temperature: float = ...,
    top_k: int | None = ...,
    top_p: float | None = ...,
    eos_id: int | None = ...,
    seed: int | None = ...,
    tokenizer: TextCoder | None = ...,
    attention_mask: Tensor | None = ...,
    on_token: Callable[[Tensor], None] | None = ...,
) -> Tensor: ...


@overload
def generate(
    model: BitNetForCausalLM,
    prompt: str,
    max_new_tokens: int = ...,
    *,
    temperature: float = ...,
    top_k: int | None = ...,
    top_p: float | None = ...,
    eos_id: int | None = ...,
    seed: int | None = ...,
    tokenizer: TextCoder | None = ...,
    attention_mask: None = ...,
    on_token: Callable[[Tensor], None] | None = ...,
) -> str: ...


@overload
def generate(
    model: BitNetForCausalLM,
    prompt: list[str] | tuple[str, ...],
    max_new_tokens: int = ...,
    *,
    temperature: float = ...,
    top_k: int | None = ...,
    top_p: float | None = ...,
    eos_id: int | None = ...,
    seed: int | None = ...,
    tokenizer: TextCoder | None = ...,
    attention_mask: None = ...,
    on_token: Callable[[Tensor], None] | None = ...,
) -> list[str]: ...


@overload
def generate(
    model: BitNetForCausalLM,
    prompt: Sequence[Sequence[int] | Tensor],
    max_new_tokens: int = ...,
    *,
    temperature: float = ...,
    top_k: int | None = ...,
    top_p: float | None = ...,
    eos_id: int | None = ...,
    seed: int | None = ...,
    tokenizer: TextCoder | None = ...,
    attention_mask: None = ...,
    on_token: Callable[[Tensor], None] | None = ...,
) -> list[Tensor]: ...


def generate(
    model: BitNetForCausalLM,
    prompt: Prompt,
    max_new_tokens: int = 64,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_id: int | None = None,
    seed: int | None = None,
    tokenizer: TextCoder | None = None,
    attention_mask: Tensor | None = None,
    on_token: Callable[[Tensor], None] | None = None,
) -> Tensor | str | list[str] | list[Tensor]:
    """Continues each prompt.

    Args:
        model: training or packed form. Its weights are quantised once per call and must not change within it, also
            not by `on_token` (:func:`bitnet_ext.nn.frozen_weights`).
        prompt: ids int64 [B, T], T >= 1, on the model's device; or a text; or a list of texts or of rows of ids, which
            may differ in length: the continuation of each is that of the prompt alone (but for rounding).
        max_new_tokens: >= 0; prompt and new tokens must fit the model's max_seq_len.
        temperature: 0 for greedy choice, else the divisor of the logits.
        top_k: keeps the k most likely tokens; top_p: the smallest set with this share of probability
            (nucleus, arXiv 1904.09751).
        eos_id: ends a sequence, which is then filled up with it; generation stops when all have ended.
        seed: of the sampling, from a generator of its own. None samples from torch's global generator of the
            device, which ``torch.manual_seed`` sets, so that each call continues in another way.
        tokenizer: of a text, with encode and decode; default the model's attribute `tokenizer`, if it has one.
        attention_mask: [B, T], 0 at the padding on the left of rows of a tensor `prompt`, which is ignored, and 1
            elsewhere.
        on_token: called with each new column int64 [B].

    Returns:
        prompt and continuation, new <= max_new_tokens: of a tensor int64 [B, T + new], of a text a text, of a list a
        list of texts or of tensors int64 [T_i + new].

    Raises:
        TypeError: the model is of another kind.
        ValueError: an argument is out of range; a text without a tokenizer.
    """
    if not isinstance(getattr(getattr(model, "config", None), "max_seq_len", None), int):
        raise TypeError(
            f"generate: model must be a BitNetForCausalLM, got {type(model).__name__}; a model of transformers has a "
            "generate of its own"
        )
    if isinstance(prompt, Tensor):
        given = prompt
        if given.dim() != 2 or given.shape[1] < 1 or given.dtype != torch.int64:
            raise ValueError(
                f"generate: prompt must be int64 of shape [B, T >= 1], got {given.dtype} of shape {tuple(given.shape)}"
            )
        padded = PaddedPrompts(given, None)
        if attention_mask is not None:
            padded = from_attention_mask(given, attention_mask)
    else:
        if attention_mask is not None:
            raise ValueError("generate: attention_mask must be None where prompt is no tensor")
        rows: list[Any] = [prompt] if isinstance(prompt, str) else list(prompt)
        coder = tokenizer if tokenizer is not None else getattr(model, "tokenizer", None)
        is_text = bool(rows) and all(isinstance(row, str) for row in rows)
        padded = pad_prompts(encode_texts(rows, coder) if is_text else rows, model.embed_tokens.weight.device)
    tokens = _generate(model, padded, max_new_tokens, temperature, top_k, top_p, eos_id, seed, on_token)
    if isinstance(prompt, Tensor):
        return tokens
    found = padded.rows(tokens)
    if not is_text:
        return found
    assert coder is not None
    texts = [coder.decode(row.tolist()) for row in found]
    return texts[0] if isinstance(prompt, str) else texts


@torch.no_grad()
def _generate(
    model: BitNetForCausalLM,
    padded: PaddedPrompts,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    eos_id: int | None,
    seed: int | None,
    on_token: Callable[[Tensor], None] | None,
) -> Tensor:
    """:func:`generate` of a batch, int64 [B, T + new]."""
    prompt = padded.ids
    if max_new_tokens < 0:
        raise ValueError(f"generate: max_new_tokens must be >= 0, got {max_new_tokens}")
    if temperature < 0:
        raise ValueError(f"generate: temperature must be >= 0, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"generate: top_k must be >= 1, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"generate: top_p must be in (0, 1], got {top_p}")
    highest = int(prompt.max()) if prompt.numel() else 0
    if prompt.numel() and not (int(prompt.min()) >= 0 and highest < model.config.vocab_size):
        raise ValueError(f"generate: prompt must hold ids in 0..{model.config.vocab_size - 1}, got {highest}")
    total = prompt.shape[1] + max_new_tokens
    if total > model.config.max_seq_len:
        raise ValueError(
            f"generate: prompt and max_new_tokens make {total} tokens; the model's max_seq_len is "
            f"{model.config.max_seq_len}"
        )
    was_training = model.training
    model.eval()
    # None is torch's global generator of the device.
    generator = None if seed is None else torch.Generator(prompt.device).manual_seed(seed)
    choice = _Choice(temperature, top_k, top_p, generator)
    captured = prompt.is_cuda and max_new_tokens >= CAPTURED_TOKENS
    tokens = [prompt]
    done = torch.zeros(prompt.shape[0], dtype=torch.bool, device=prompt.device)
    # The weights do not change on the way, so their codes need not be made again for every token.
    with contextlib.ExitStack() as stack:
        stack.callback(model.train, was_training)
        frozen = stack.enter_context(frozen_weights(model))
        decoder = (
            _Captured(model, prompt, total, choice, frozen, padded.padding)
            if captured
            else _Eager(model, prompt, total, choice, padded.padding)
        )
        for _ in range(max_new_tokens):
            new = decoder.next()
            if eos_id is not None:
                new = torch.where(done, eos_id, new)
                done |= new == eos_id
                decoder.replace(new)
            tokens.append(new.unsqueeze(1))
            if on_token is not None:
                on_token(new)
            if eos_id is not None and bool(done.all()):
                break
    return torch.cat(tokens, dim=1)


class _Choice:
    """How the next token is chosen from logits."""

    def __init__(
        self, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator | None
    ) -> None:
        self._temperature, self._top_k, self._top_p, self._generator = temperature, top_k, top_p, generator

    def draw_noise(self, noise: Tensor) -> None:
        """Fills [B, V] with what :meth:`__call__` needs of chance."""
        if self._temperature > 0:
            noise.exponential_(generator=self._generator)

    def __call__(self, logits: Tensor, noise: Tensor) -> Tensor:
        """int64 [B] of float32 [B, V]."""
        if self._temperature == 0:
            return logits.argmax(-1)
        logits = logits / self._temperature
        if self._top_k is not None and self._top_k < logits.shape[-1]:
            limit = logits.topk(self._top_k, dim=-1).values[:, -1:]
            logits = logits.masked_fill(logits < limit, -torch.inf)
        if self._top_p is not None and self._top_p < 1:
            ordered, order = logits.sort(dim=-1, descending=True)
            share = ordered.softmax(-1)
            dropped = share.cumsum(-1) - share >= self._top_p
            logits = logits.masked_fill(torch.empty_like(dropped).scatter_(1, order, dropped), -torch.inf)
        # The largest p / noise is token j with probability p_j when the noise is exponential: as torch.multinomial.
        return (logits.softmax(-1) / noise).argmax(-1)


class _Eager:
    """Decodes by calling the model."""

    def __init__(
        self,
        model: BitNetForCausalLM,
        prompt: Tensor,
        total: int,
        choice: _Choice,
        padding: Tensor | None = None,
    ) -> None:
        self._model, self._choice = model, choice
        self._cache = self._new_cache(total, prompt)
        self._cache.padding = padding
        self._input = prompt
        self._noise = torch.empty(0, device=prompt.device)

    def _new_cache(self, total: int, prompt: Tensor) -> KVCache:
        dtype = self._model.embed_tokens.weight.dtype
        return KVCache(self._model.config, prompt.shape[0], total, device=prompt.device, dtype=dtype)

    def next(self) -> Tensor:
        """The next tokens, int64 [B]."""
        logits = self._model.logits(self._model.hidden_states(self._input, self._cache)[:, -1]).float()
        if self._noise.shape != logits.shape:
            self._noise = torch.empty_like(logits)
        self._choice.draw_noise(self._noise)
        new = self._choice(logits, self._noise)
        self._input = new.unsqueeze(1)
        return new

    def replace(self, new: Tensor) -> None:
        """Goes on with other tokens than the last ones chosen."""
        self._input = new.unsqueeze(1)


class _Captured(_Eager):
    """Decodes by replaying one token's work, which is hundreds of launches, as a CUDA graph."""

    def __init__(
        self,
        model: BitNetForCausalLM,
        prompt: Tensor,
        total: int,
        choice: _Choice,
        frozen: FrozenWeights,
        padding: Tensor | None = None,
    ) -> None:
        super().__init__(model, prompt, total, choice, padding)
        self._frozen = frozen
        self._graph: torch.cuda.CUDAGraph | None = None
        self._eager_calls = 0
        self._fixed_input = torch.empty_like(prompt[:, :1])
        self._new = torch.empty_like(prompt[:, 0])

    def _new_cache(self, total: int, prompt: Tensor) -> KVCache:
        dtype = self._model.embed_tokens.weight.dtype
        return SteadyKVCache(self._model.config, prompt.shape[0], total, device=prompt.device, dtype=dtype)

    def next(self) -> Tensor:
        # The prompt, and one token so that libraries are warm at that size.
        if self._eager_calls < 2:
            self._eager_calls += 1
            return super().next()
        self._fixed_input.copy_(self._input)
        if self._graph is None:
            self._capture()
        assert self._graph is not None
        self._choice.draw_noise(self._noise)
        self._graph.replay()
        new = self._new.clone()
        self._input = new.unsqueeze(1)
        return new

    def _capture(self) -> None:
        graph = torch.cuda.CUDAGraph()
        codes = {cache: made for cache, _, made in self._frozen.made()}
        with (
            capture(graph, capture_stream(self._fixed_input.device)),
            resident_weights(codes),
        ):
            hidden = self._model.hidden_states(self._fixed_input, self._cache)[:, -1]
            self._new.copy_(self._choice(self._model.logits(hidden).float(), self._noise))
        self._graph = graph
