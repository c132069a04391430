"""The metrics of the report in a few words each, with what they cannot say."""

from __future__ import annotations

GLOSSARY = (
    (
        "Unique of 20",
        "Distinct greedy predictions at the end of 20 fixed prompts of 8 random token ids. At most 20 by "
        "construction. Traps: an untrained network scores 20; a dead one, whose logits are all equal, "
        "scores 13 to 17 by rounding noise; one that learns well can score 3, because the most frequent "
        "tokens are good guesses after nonsense. It is never a verdict by itself.",
    ),
    (
        "Training cross-entropy (loss)",
        "Mean of -ln p(next token) over the training batches since the evaluation before, in nats. Trap: "
        "batches are small and neighbouring ones may come from one article, so it is noisy and can look "
        "better than held-out text deserves. An arm's objective may have more terms; this is cross-entropy "
        "alone.",
    ),
    (
        "Held-out cross-entropy",
        "The same on text that training never sees, at fixed positions. ln V is the score of the uniform "
        "distribution: exactly that number over a long time means that the network says nothing.",
    ),
    (
        "Unigram cross-entropy and excess",
        "The score of the training text's token frequencies, without any context, on the same positions. A "
        "model below it has learned something about text; one far above it would do better by counting.",
    ),
    (
        "Mutual information (context use)",
        "H(mean prediction) minus the mean entropy of the predictions, in nats. 0: every position gets the "
        "same distribution. It tells collapse from the early stage of learning better than any count. "
        "Trap: an untrained network with random logits is slightly above 0; read it with cross-entropy.",
    ),
    (
        "Predictive and marginal entropy",
        "Mean entropy of the single predictions, and entropy of their mean over positions; at most ln V. "
        "High entropy goes together with few distinct argmaxes more often than one would think: a nearly "
        "uniform distribution has one argmax all the same.",
    ),
    (
        "Argmax vocabulary and its effective size",
        "Distinct argmaxes over the held-out positions, and exp of the entropy of their histogram. "
        "Both grow with the number of positions, and both are high for a dead network.",
    ),
    (
        "KL to the unigram",
        "KL(mean prediction || training frequencies). Near 0 at the stage of word counts only.",
    ),
    (
        "Head, torso and tail accuracy",
        "Share of right argmaxes for targets among the most frequent ids that make up half of the training "
        "text, the next 40 %, and the last 10 %.",
    ),
    (
        "Cumulative learning rate",
        "The sum of the learning rates of all steps so far: the distance that a weight can go when each "
        "step moves it by the learning rate, as Adam does to a weight with a steady gradient. It is the "
        "clock for comparing runs with different learning rates.",
    ),
    (
        "Sizes",
        "Mean absolute values of the norms' gains, the embedding, the head and the latent weights of the "
        "BitLinear layers.",
    ),
    (
        "Ternary shares and flip rate",
        "Shares of the codes -1, 0 and +1, and of the codes that the evaluated step changed. Trap: a code "
        "that "
        "swings to and fro counts at every step, so a high rate need not mean that anything is learned.",
    ),
)
