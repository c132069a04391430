"""Draws docs/img/collapse.png, the picture of the README, from the rows of the collapse study.

Usage: python tools/draw_readme_figure.py
"""

from __future__ import annotations

import csv
import gzip
import math
from collections import defaultdict
from pathlib import Path

from matplotlib.figure import Figure

DOCS = Path(__file__).parents[1] / "docs"
ARMS = {
    "standard-lr": ("ternary, Adam with L2", "#D55E00", "solid"),
    "fp-twin": ("full precision, Adam with L2", "#D55E00", (0, (4, 2))),
    "adamw": ("ternary, AdamW", "#0072B2", "solid"),
    "no-decay": ("ternary, no decay", "#009E73", "solid"),
}
PANELS = (
    ("heldout_cross_entropy", "held-out cross-entropy (nats per token)"),
    ("unique_of_20", "distinct predictions for 20 prompts"),
)


def main() -> None:
    courses: dict[tuple[str, str], dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    unigram = math.nan
    with gzip.open(DOCS / "collapse" / "summary.csv.gz", "rt", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["arm"] in ARMS:
                unigram = float(row["unigram_cross_entropy"])
                for key, _ in PANELS:
                    courses[row["arm"], key][int(row["step"])].append(float(row[key]))
    figure = Figure(figsize=(9.2, 3.1), layout="constrained")
    axes = figure.subplots(1, len(PANELS))
    for axis, (key, label) in zip(axes, PANELS, strict=True):
        for arm, (words, colour, dash) in ARMS.items():
            course = courses[arm, key]
            steps = sorted(step for step in course if len(course[step]) == len(course[1]))
            means = [sum(course[step]) / len(course[step]) for step in steps]
            axis.plot(steps, means, color=colour, linestyle=dash, linewidth=1.8, label=words)
        axis.set_xscale("log")
        axis.set_xlabel("step")
        axis.set_title(label, fontsize=10, loc="left")
        axis.grid(color="#dddddd", linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].axhline(unigram, color="#666666", linestyle=(0, (1, 1.6)), label="fixed word counts")
    axes[1].set_ylim(0, 20.5)
    handles, words = axes[0].get_legend_handles_labels()
    figure.legend(handles, words, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=8.5)
    path = DOCS / "img" / "collapse.png"
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=130, metadata={"Software": None})


if __name__ == "__main__":
    main()
