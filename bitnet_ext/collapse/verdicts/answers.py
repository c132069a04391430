"""Verdicts of a study: five questions, the part of quantisation, and four solutions, computed from its numbers.

Each verdict states its claim and its rule; the answer follows from intervals over seeds only, so that another data set
gives another answer. The rules are in :mod:`bitnet_ext.collapse.verdicts.questions` and
:mod:`bitnet_ext.collapse.verdicts.solutions`, the states and thresholds in :mod:`bitnet_ext.collapse.verdicts.judging`.
"""

from __future__ import annotations

from bitnet_ext.collapse.results import Study
from bitnet_ext.collapse.verdicts import questions, solutions
from bitnet_ext.collapse.verdicts.judging import Answer, ContrastResult, Evidence, Family, Verdict

__all__ = ["FAMILIES", "Answer", "ContrastResult", "Verdict", "contrasts", "verdicts"]

#: Verdict -> the contrasts over which its p values are corrected, metric by metric.
FAMILIES: dict[str, Family] = {**questions.FAMILIES, **solutions.FAMILIES}


def verdicts(study: Study) -> list[Verdict]:
    """q1 to q5, quantisation and s1 to s4, however little of the study there is.

    An arm that is missing, or has too few seeds or steps, makes the verdicts that need it undecided, and they say so.
    """
    evidence = Evidence(study)
    return [judge(evidence) for judge in questions.QUESTIONS] + [
        solutions.judge_solution(evidence, key) for key in solutions.SOLUTIONS
    ]


def contrasts(study: Study) -> list[ContrastResult]:
    """Every contrast that the verdicts of this study name, with p values corrected within verdict and metric."""
    evidence = Evidence(study)
    return [result for name, family in FAMILIES.items() for result in evidence.family(name, family)]
