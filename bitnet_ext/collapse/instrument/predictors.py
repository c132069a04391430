"""Reference predictors of the instrument check: word counts, human text, and networks that are fresh or dead.

Each has a kind: "healthy" knows text and uses its context, "blind" ignores the context by construction, "fresh" is a
network before its first step, "dead" a network that can say nothing, "human" the text itself.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bitnet_ext.data.statistics import as_token_array, token_counts
from bitnet_ext.models import BitNetConfig, BitNetForCausalLM
from bitnet_ext.models.kv_cache import KVCache
from bitnet_ext.nn import BitLinear

#: Tokens [B, T] in, logits [B, V] after the last one out; goes on from what it was given before.
Session = Callable[[Tensor], Tensor]

HEALTHY, BLIND, FRESH, DEAD, HUMAN = "healthy", "blind", "fresh", "dead", "human"
#: Weight of the unigram in the bigram predictor, in occurrences.
BIGRAM_PRIOR = 64.0
#: Probability that the constant predictor gives to its one token; the rest is the unigram's.
CONSTANT_PROBABILITY = 0.9
#: Logit of the right token of the human predictor, above all others at 0: their mass is below 1e-12.
_CERTAIN = 40.0
#: Final gain of the dead network whose logits are of the size of rounding errors.
ROUNDING_GAIN = 1e-7
_LOGITS_BYTES = 64 << 20


class Predictor(Protocol):
    """What the check asks of a predictor."""

    name: str
    kind: str

    def heldout(self, rows: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Logits [n, V] and targets [n] of all positions of rows int64 [B, T + 1], some at a time."""
        ...

    def session(self, batch: int, length: int) -> Session | None:
        """Begins `batch` texts of at most `length` tokens; None where the predictor cannot say what comes next."""
        ...

    @property
    def model(self) -> BitNetForCausalLM | None:
        """The network, of a network."""
        ...


class LastTokenPredictor:
    """A predictor whose distribution depends on the last token at most.

    Args:
        name, kind: see the module. vocab_size: V.
        log_probs: last tokens int64 [n] in, natural logarithms of probabilities float32 [n, V] out.
    """

    model: BitNetForCausalLM | None = None

    def __init__(self, name: str, kind: str, vocab_size: int, log_probs: Callable[[Tensor], Tensor]) -> None:
        self.name, self.kind = name, kind
        self._chunk = max(1, _LOGITS_BYTES // (4 * vocab_size))
        self._log_probs = log_probs

    def heldout(self, rows: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        last, target = rows[:, :-1].reshape(-1), rows[:, 1:].reshape(-1)
        for some, right in zip(last.split(self._chunk), target.split(self._chunk), strict=True):
            yield self._log_probs(some), right

    def session(self, batch: int, length: int) -> Session | None:
        return lambda tokens: self._log_probs(tokens[:, -1])


class HumanPredictor:
    """All probability on the token that follows in the text: the best that any predictor could be."""

    name, kind = "human next token", HUMAN
    model: BitNetForCausalLM | None = None

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._chunk = max(1, _LOGITS_BYTES // (4 * vocab_size))

    def heldout(self, rows: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        for right in rows[:, 1:].reshape(-1).split(self._chunk):
            logits = torch.zeros(len(right), self._vocab_size, device=rows.device)
            yield logits.scatter_(1, right[:, None], _CERTAIN), right

    def session(self, batch: int, length: int) -> Session | None:
        return None


class NetworkPredictor:
    """A network, in eval mode and without gradients."""

    def __init__(self, name: str, kind: str, model: BitNetForCausalLM) -> None:
        self.name, self.kind, self._model = name, kind, model.eval()

    @property
    def model(self) -> BitNetForCausalLM | None:
        return self._model

    @torch.no_grad()
    def heldout(self, rows: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        hidden = self._model.hidden_states(rows[:, :-1])
        hidden = hidden.reshape(-1, hidden.size(-1))
        chunk = max(1, _LOGITS_BYTES // (4 * self._model.config.vocab_size))
        for some, right in zip(hidden.split(chunk), rows[:, 1:].reshape(-1).split(chunk), strict=True):
            yield self._model.logits(some).float(), right

    def session(self, batch: int, length: int) -> Session | None:
        weight = self._model.embed_tokens.weight
        cache = KVCache(self._model.config, batch, length, device=weight.device, dtype=weight.dtype)

        @torch.no_grad()
        def advance(tokens: Tensor) -> Tensor:
            return self._model.logits(self._model.hidden_states(tokens, cache)[:, -1]).float()

        return advance


def fixed_predictor(name: str, log_probs: Tensor) -> LastTokenPredictor:
    """The same distribution, natural logarithms [V], everywhere."""
    row = log_probs.float()
    return LastTokenPredictor(name, BLIND, len(row), lambda last: row.expand(len(last), -1))


def bigram_predictor(
    tokens: Any,
    unigram_log_probs: Tensor | NDArray[Any],
    device: torch.device | str,
    prior: float = BIGRAM_PRIOR,
) -> LastTokenPredictor:
    """P(w | v) = (count(v, w) + prior P(w)) / (count(v) + prior): counts, interpolated with the unigram.

    The weight of the counts, count(v) / (count(v) + prior), grows with what is known of v (MacKay & Peto 1995,
    "A hierarchical Dirichlet language model").

    Args:
        tokens: training text, integers [n] below V, see `bitnet_ext.data.as_token_array`.
        unigram_log_probs: [V], P(w); a tensor or array.
        prior: > 0, in occurrences.
    """
    if not prior > 0:
        raise ValueError(f"prior must be > 0, got {prior}")
    vocab_size = len(unigram_log_probs)
    stream = as_token_array(tokens).astype(np.int64)
    counts = token_counts(stream[:-1], vocab_size)
    pairs, occurrences = np.unique(stream[:-1] * vocab_size + stream[1:], return_counts=True)
    before, after = np.divmod(pairs, vocab_size)
    first = torch.from_numpy(np.searchsorted(before, np.arange(vocab_size + 1))).to(device)
    total = torch.from_numpy(counts).double().to(device)
    following = torch.from_numpy(after).to(device)
    log_unigram = torch.as_tensor(unigram_log_probs).double().to(device)
    log_total = (total + prior).log()
    mass = torch.from_numpy(occurrences).double().to(device) + prior * log_unigram[following].exp()
    seen = (mass.log() - log_total[torch.from_numpy(before).to(device)]).float()
    log_row, offset = log_unigram.float(), (math.log(prior) - log_total).float()

    def log_probs(last: Tensor) -> Tensor:
        result = log_row + offset[last, None]
        start, number = first[last], first[last + 1] - first[last]
        row = torch.repeat_interleave(torch.arange(len(last), device=last.device), number)
        # The entries of a row lie one after the other; those of the rows before are as many as the cumulated number.
        entry = torch.arange(len(row), device=last.device) - (number.cumsum(0) - number - start)[row]
        result[row, following[entry]] = seen[entry]
        return result

    return LastTokenPredictor("bigram", HEALTHY, vocab_size, log_probs)


def count_predictors(
    tokens: NDArray[Any], unigram_log_probs: Tensor | NDArray[Any], device: torch.device | str
) -> Iterator[Predictor]:
    """Those that are no networks: uniform, constant, unigram, bigram, human.

    Args:
        tokens: training text, integers [n]. unigram_log_probs: [V] of it.
    """
    vocab_size = len(unigram_log_probs)
    unigram = torch.as_tensor(unigram_log_probs).double().to(device)
    yield fixed_predictor("uniform", torch.full_like(unigram, -math.log(vocab_size)))
    constant = (1 - CONSTANT_PROBABILITY) * unigram.exp()
    constant[unigram.argmax()] += CONSTANT_PROBABILITY
    yield fixed_predictor("constant", constant.log())
    yield fixed_predictor("unigram", unigram)
    yield bigram_predictor(tokens, unigram_log_probs, device)
    yield HumanPredictor(vocab_size)


def network_predictors(
    config: BitNetConfig, device: torch.device | str, seed: int = 0
) -> Iterator[Predictor]:
    """Fresh networks, and dead ones made of them, one in memory at a time."""

    def fresh(quantization: str) -> BitNetForCausalLM:
        return BitNetForCausalLM(dataclasses.replace(config, quantization=quantization), seed=seed).to(device)

    yield NetworkPredictor("fresh ternary", FRESH, fresh("b1.58"))
    yield NetworkPredictor("fresh full precision", FRESH, fresh("none"))
    yield NetworkPredictor("dead: final gain 0", DEAD, with_final_gain(fresh("b1.58"), 0.0, seed))
    yield NetworkPredictor(
        "dead: final gain 1e-7", DEAD, with_final_gain(fresh("b1.58"), ROUNDING_GAIN, seed)
    )
    yield NetworkPredictor("dead: latents 0", DEAD, without_latents(fresh("b1.58")))


@torch.no_grad()
def with_final_gain(model: BitNetForCausalLM, size: float, seed: int = 0) -> BitNetForCausalLM:
    """The network, changed: its final gains are normally distributed with this size, as decay leaves them.

    One factor for all gains would leave every argmax as it was.
    """
    gain = model.final_norm.weight
    generator = torch.Generator().manual_seed(seed)
    gain.copy_(torch.randn(gain.shape, generator=generator) * size)
    return model


@torch.no_grad()
def without_latents(model: BitNetForCausalLM) -> BitNetForCausalLM:
    """The network, changed: all weights of its BitLinear layers are 0, so that only the last token reaches the head."""
    for module in model.modules():
        if isinstance(module, BitLinear):
            module.weight.zero_()
    return model


@torch.no_grad()
def continuations(
    session: Session, prompts: Tensor, new_tokens: int, *, top_p: float | None = None, seed: int = 0
) -> Tensor | None:
    """What a predictor writes after each prompt, int64 [B, new_tokens], on the prompts' device.

    Args:
        prompts: int64 [B, T].
        top_p: None for the likeliest token at each step, else nucleus sampling (Holtzman et al. 2020, arXiv:1904.09751)
            from the smallest set of tokens with this much probability.

    Returns:
        None when some logits are NaN or infinite.
    """
    generator = torch.Generator(device=prompts.device).manual_seed(seed)
    fed, written = prompts, []
    for _ in range(new_tokens):
        logits = session(fed)
        if not bool(torch.isfinite(logits.sum())):  # one pass; any NaN or infinity stays in the sum
            return None
        new = logits.argmax(-1) if top_p is None else sample_nucleus(logits.softmax(-1), top_p, generator)
        written.append(new)
        fed = new[:, None]
    return torch.stack(written, 1)


def sample_nucleus(probabilities: Tensor, top_p: float, generator: torch.Generator) -> Tensor:
    """One token for each row, from its nucleus, int64 [B].

    Without sorting: a token drawn from all is in the nucleus when the likelier ones have less than top_p; otherwise it
    is drawn again. Equally likely tokens are all in it or none. At least top_p of the draws are taken.

    Args:
        probabilities: [B, V]. top_p: in (0, 1].
    """
    if not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}")
    result = probabilities.argmax(-1)
    waiting = torch.arange(len(probabilities), device=probabilities.device)
    p, cumulated = probabilities, probabilities.cumsum(-1)
    while len(waiting):
        point = torch.rand(len(waiting), 1, generator=generator, device=p.device) * cumulated[:, -1:]
        drawn = torch.searchsorted(cumulated, point, right=True).clamp_(max=p.size(1) - 1)
        own = p.gather(1, drawn)
        likelier = torch.where(p > own, p, 0.0).sum(-1)
        taken = (likelier < top_p) & (own[:, 0] > 0)
        result[waiting[taken]] = drawn[taken, 0]
        waiting, p, cumulated = waiting[~taken], p[~taken], cumulated[~taken]
    return result
