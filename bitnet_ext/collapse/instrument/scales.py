"""The metrics of an evaluation as data: how each is read, its attainable range with the reason, its source."""

from __future__ import annotations

import math
from dataclasses import dataclass

HIGHER, LOWER, HUMAN_LIKE = "higher", "lower", "nearer to human text"


@dataclass(frozen=True)
class Scale:
    """How a metric is read.

    Attributes:
        key: of the eval row. label: for people, with the unit.
        better: HIGHER, LOWER or HUMAN_LIKE, as it is commonly read; None for a description without a good side.
        low, high: attainable values; None for no bound.
        reason: of the range.
        source: of the definition.
    """

    key: str
    label: str
    better: str | None
    low: float | None
    high: float | None
    reason: str
    source: str = ""


@dataclass(frozen=True)
class Sizes:
    """What the ranges depend on: ids, held-out positions, the lowest log-probability of the unigram, and the generated
    texts with their length.
    """

    vocab_size: int
    positions: int
    least_log_probability: float
    texts: int
    text_tokens: int


def scales(sizes: Sizes) -> list[Scale]:
    """The scale of every metric that a predictor has at one time, without a training step, in the order of reading."""
    return [*_prediction(sizes), *_counts(sizes), *_generated(sizes), *_network()]


_COVER = "Cover & Thomas 2006, ch. 2"
_CHANG = "Chang & Bergen 2022, arXiv:2110.02406"


def _prediction(sizes: Sizes) -> list[Scale]:
    top = math.log(sizes.vocab_size)
    worst = -sizes.least_log_probability
    share = "a share"
    return [
        Scale(
            "heldout_cross_entropy",
            "held-out CE (nats)",
            LOWER,
            0.0,
            None,
            "0: every target certain; no bound above",
            _COVER,
        ),
        Scale(
            "excess_over_unigram",
            "excess over unigram (nats)",
            LOWER,
            -worst,
            None,
            "CE of at least 0, minus a unigram CE of at most -ln of its least probability",
            _CHANG,
        ),
        Scale(
            "mutual_information",
            "context use, MI (nats)",
            HIGHER,
            0.0,
            math.log(min(sizes.vocab_size, sizes.positions)),
            "0: the same prediction everywhere; at most ln of the smaller of ids and positions",
            "Lin 1991, IEEE Trans. Inf. Theory 37(1)",
        ),
        Scale(
            "predictive_entropy", "predictive entropy (nats)", None, 0.0, top, "at most ln V: uniform", _COVER
        ),
        Scale(
            "marginal_entropy", "marginal entropy (nats)", HIGHER, 0.0, top, "at most ln V: uniform", _COVER
        ),
        Scale(
            "kl_to_unigram",
            "KL to unigram (nats)",
            LOWER,
            0.0,
            worst,
            "0: the mean prediction is the unigram; most: all mass on its rarest id",
            _CHANG,
        ),
        Scale("logit_std", "logit s.d.", HIGHER, 0.0, None, "0: all logits equal; no bound above"),
        Scale("accuracy", "accuracy", HIGHER, 0.0, 1.0, share),
        Scale("head_accuracy", "accuracy, head", HIGHER, 0.0, 1.0, share + " of the head targets"),
        Scale("torso_accuracy", "accuracy, torso", HIGHER, 0.0, 1.0, share + " of the torso targets"),
        Scale("tail_accuracy", "accuracy, tail", HIGHER, 0.0, 1.0, share + " of the tail targets"),
        Scale(
            "top1_probability",
            "top-1 probability",
            None,
            1 / sizes.vocab_size,
            1.0,
            "1 / V: uniform; its good value is the accuracy",
            "Guo et al. 2017, arXiv:1706.04599",
        ),
    ]


def _counts(sizes: Sizes) -> list[Scale]:
    most = float(min(sizes.vocab_size, sizes.positions))
    return [
        Scale(
            "unique_of_20",
            "unique of 20, the report's",
            HIGHER,
            1.0,
            float(min(20, sizes.vocab_size)),
            "20 prompts have 20 predictions at most",
        ),
        Scale(
            "unique_20_random",
            "unique of 20, random ids",
            HIGHER,
            1.0,
            float(min(20, sizes.vocab_size)),
            "20 predictions are drawn",
            "Hurlbert 1971, Ecology 52(4)",
        ),
        Scale(
            "unique_20_real",
            "unique of 20, real text",
            HIGHER,
            1.0,
            float(min(20, sizes.vocab_size)),
            "20 predictions are drawn",
            "Hurlbert 1971, Ecology 52(4)",
        ),
        Scale(
            "argmax_vocabulary",
            "argmax vocabulary (ids)",
            HIGHER,
            1.0,
            most,
            "at most one id a position; grows with the number of positions",
        ),
        Scale(
            "effective_argmax_vocabulary",
            "effective argmax vocabulary (ids)",
            HIGHER,
            1.0,
            most,
            "at most the argmax vocabulary: all its ids equally frequent",
            "Hill 1973, Ecology 54(2)",
        ),
    ]


def _generated(sizes: Sizes) -> list[Scale]:
    result = []
    for mode in ("greedy", "nucleus"):
        for n in (1, 2):
            grams = sizes.texts * max(1, sizes.text_tokens - n + 1)
            result.append(
                Scale(
                    f"{mode}_distinct_{n}",
                    f"distinct-{n}, {mode}",
                    HIGHER,
                    1 / grams,
                    min(1.0, sizes.vocab_size**n / grams),
                    f"1 to V^{n} different of {grams:,}",
                    "Li et al. 2016, arXiv:1510.03055",
                )
            )
        fours = max(1, sizes.text_tokens - 3)
        result.append(
            Scale(
                f"{mode}_seq_rep_4",
                f"seq-rep-4, {mode}",
                LOWER,
                0.0,
                1 - 1 / fours,
                f"of {fours} 4-grams in a text one at least is new",
                "Welleck et al. 2020, arXiv:1908.04319",
            )
        )
        result.append(
            Scale(
                f"{mode}_zipf",
                f"Zipf exponent, {mode}",
                HUMAN_LIKE,
                0.0,
                None,
                "0: equal counts; absent when fewer than 3 ids occur twice",
                "Holtzman et al. 2020, arXiv:1904.09751",
            )
        )
    return result


def _network() -> list[Scale]:
    sizes = {
        "gain_mean_abs": "mean |gain|",
        "final_gain_mean_abs": "mean |final gain|",
        "embedding_mean_abs": "mean |embedding|",
        "lm_head_mean_abs": "mean |head|",
        "latent_mean_abs": "mean |latent weight|",
        "absmean_mean": "absmean, mean over tensors",
        "absmean_min": "absmean, least of the tensors",
        "threshold_distance": "distance to the threshold",
    } | {
        f"{matrix}_norm_{name}": f"{matrix} row norm, {name}"
        for matrix in ("embedding", "lm_head")
        for name in ("head", "torso", "tail", "unseen")
    }
    shares = {
        "ternary_negative": "share of code -1",
        "ternary_zero": "share of code 0",
        "ternary_positive": "share of code +1",
        "absmean_clamped": "share of tensors at the clamp",
        "near_threshold": "share near the threshold",
    }
    nagel = "Nagel et al. 2022, arXiv:2203.11086"
    every = "of all weights: no sampling error"
    return [
        Scale(key, label, None, 0.0, None, f"a size, {every}", nagel if key == "threshold_distance" else "")
        for key, label in sizes.items()
    ] + [
        Scale(key, label, None, 0.0, 1.0, f"a share, {every}", nagel if key == "near_threshold" else "")
        for key, label in shares.items()
    ]


#: Keys of the eval row that only a training step gives, with their ranges in words; the check does not measure them.
OF_A_STEP = {
    "train_loss": "no bound: terms of the objective may be negative",
    "train_cross_entropy": "0 or more, as the held-out one",
    "grad_norm": "0 or more",
    "clip_rate": "a share of steps, 0 to 1",
    "flip_rate": "a share of codes, 0 to 1 (Helwegen et al. 2019, arXiv:1906.02107)",
    "decay_share": "a share of coordinates, 0 (no decay) to 1; so are those of the groups of parameters",
    "cumulative_lr": "0 or more; only grows",
}
