"""Text generation: prefill of the prompt, then one token at a time from the cache."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bitnet_ext.models.kv_cache import KVCache
from bitnet_ext.models.transformer import BitNetForCausalLM


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
        model: training or packed form.
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
    dtype = model.embed_tokens.weight.dtype
    cache = KVCache(model.config, prompt.shape[0], total, device=prompt.device, dtype=dtype)
    tokens = [prompt]
    done = torch.zeros(prompt.shape[0], dtype=torch.bool, device=prompt.device)
    step_input = prompt
    try:
        for _ in range(max_new_tokens):
            hidden = model.hidden_states(step_input, cache)[:, -1]
            logits = model.logits(hidden).float()
            new = _choose(logits, temperature, top_k, top_p, generator)
            if eos_id is not None:
                new = torch.where(done, eos_id, new)
                done |= new == eos_id
            tokens.append(new.unsqueeze(1))
            step_input = tokens[-1]
            if on_token is not None:
                on_token(new)
            if eos_id is not None and bool(done.all()):
                break
    finally:
        model.train(was_training)
    return torch.cat(tokens, dim=1)


def _choose(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator
) -> Tensor:
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        limit = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < limit, -torch.inf)
    if top_p is not None and top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        dropped = (before >= top_p).scatter(1, order, before >= top_p)
        logits = logits.masked_fill(dropped, -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(1)
