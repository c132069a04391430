"""Text generation: prefill of the prompt, then one token at a time from the cache."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor

from bitnet_ext._capture import capture, capture_stream
from bitnet_ext.models.kv_cache import KVCache, SteadyKVCache
from bitnet_ext.models.transformer import BitNetForCausalLM
from bitnet_ext.nn import FrozenWeights, frozen_weights, resident_weights

#: New tokens from which on a GPU the work of one is captured as a graph.
CAPTURED_TOKENS = 8


@torch.no_grad()
def generate(
    model: BitNetForCausalLM,
    prompt: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_id: int | None = None,
    seed: int | None = None,
    on_token: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Continues each prompt.

    Args:
        model: training or packed form. Its weights are quantised once per call and must not change within it, also
            not by `on_token` (:func:`bitnet_ext.nn.frozen_weights`).
        prompt: int64 [B, T], T >= 1, on the model's device.
        max_new_tokens: >= 0; prompt and new tokens must fit the model's max_seq_len.
        temperature: 0 for greedy choice, else the divisor of the logits.
        top_k: keeps the k most likely tokens; top_p: the smallest set with this share of probability
            (nucleus, arXiv 1904.09751).
        eos_id: ends a sequence, which is then filled up with it; generation stops when all have ended.
        seed: of the sampling.
        on_token: called with each new column int64 [B].

    Returns:
        int64 [B, T + new], new <= max_new_tokens.
    """
    if prompt.dim() != 2 or prompt.shape[1] < 1 or prompt.dtype != torch.int64:
        raise ValueError(
            f"generate: prompt must be int64 of shape [B, T >= 1], got {prompt.dtype} of shape {tuple(prompt.shape)}"
        )
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
    generator = torch.Generator(device=prompt.device)
    if seed is not None:
        generator.manual_seed(seed)
    choice = _Choice(temperature, top_k, top_p, generator)
    captured = prompt.is_cuda and max_new_tokens >= CAPTURED_TOKENS
    tokens = [prompt]
    done = torch.zeros(prompt.shape[0], dtype=torch.bool, device=prompt.device)
    # The weights do not change on the way, so their codes need not be made again for every token.
    with contextlib.ExitStack() as stack:
        stack.callback(model.train, was_training)
        frozen = stack.enter_context(frozen_weights(model))
        decoder = (
            _Captured(model, prompt, total, choice, frozen)
            if captured
            else _Eager(model, prompt, total, choice)
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
        self, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator
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

    def __init__(self, model: BitNetForCausalLM, prompt: Tensor, total: int, choice: _Choice) -> None:
        self._model, self._choice = model, choice
        self._cache = self._new_cache(total, prompt)
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
    ) -> None:
        super().__init__(model, prompt, total, choice)
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
