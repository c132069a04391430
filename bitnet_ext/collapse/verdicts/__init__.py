"""What a study shows, computed from its results by stated rules; other numbers give other answers.

Of blocks, by intervals over seeds

``answers``        every verdict of a study: the questions, then the solutions
``questions``      the report's five questions, and that of quantisation
``solutions``      the four proposed solutions: what they prevent and what they cost
``judging``        states of arms, families of contrasts, and the words of a verdict
``clock``          whether another learning rate is the same course at another speed
``block_effects``  every arm of a block against its base arm
``statistics``     paired differences, intervals, exact tests, corrections; the unit is the seed

Of a small comparison, by the means of its arms

``findings``       what the curves of one arm show
``contrasts``      what two arms show against each other
``summary``        what all arms come to together

``wording``        numbers as words, for all of them and for the pages
"""

from __future__ import annotations

from bitnet_ext.collapse.verdicts.answers import verdicts
from bitnet_ext.collapse.verdicts.judging import Verdict

__all__ = ["Verdict", "verdicts"]
