"""Held-out loss, perplexity and bits per byte at intervals of a run."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

from bitnet_ext.data import Corpus
from bitnet_ext.metrics.perplexity import Decoder, evaluate
from bitnet_ext.models import BitNetForCausalLM
from bitnet_ext.training.config import TrainConfig
from bitnet_ext.training.provenance import TokenSource, token_stream


class HeldOutLoss:
    """An :class:`Evaluator` that asks how well the model predicts a held-out text.

    Its results are ``heldout_cross_entropy``, ``heldout_perplexity`` and, with a tokenizer,
    ``heldout_bits_per_byte``, as of :func:`bitnet_ext.metrics.evaluate` with the run's seq_len. Under torchrun each
    process measures the same tokens.

    Args:
        tokens: held-out ids, one dimension.
        config: of the run; eval_tokens are predicted at each measurement, the same ones each time.
        tokenizer: of the ids.
    """

    def __init__(self, tokens: NDArray[Any], config: TrainConfig, tokenizer: Decoder | None = None) -> None:
        if tokens.ndim != 1 or len(tokens) < 2:
            raise ValueError(f"Trainer: heldout must be a row of at least 2 ids, got shape {tokens.shape}")
        self._tokens, self._config, self._tokenizer = tokens, config, tokenizer

    def before_step(self, model: BitNetForCausalLM) -> None:
        pass

    def evaluate(self, model: BitNetForCausalLM, step: Any) -> dict[str, Any]:
        found = evaluate(
            model,
            self._tokens,
            seq_len=self._config.seq_len,
            max_tokens=self._config.eval_tokens,
            tokenizer=self._tokenizer,
            document_separator=self._config.document_separator,
        )
        return {f"heldout_{name}": value for name, value in found.items() if name != "tokens"}


def heldout_text(
    tokens: TokenSource, heldout: TokenSource | None, tokenizer: Decoder | None
) -> tuple[NDArray[Any], Decoder | None]:
    """Held-out ids and what decodes them: those given, else those of the corpus that a run trains on.

    Raises:
        ValueError: there are none.
    """
    if isinstance(tokens, Corpus):
        tokenizer = tokens.tokenizer if tokenizer is None else tokenizer
        heldout = tokens.heldout if heldout is None else heldout
    if heldout is None:
        raise ValueError(
            "Trainer: eval_interval needs a text: tokens that are a Corpus, heldout ids, or an evaluator"
        )
    ids = heldout.heldout if isinstance(heldout, Corpus) else token_stream(heldout).ids
    return ids, tokenizer
