"""The collapse laboratory: why a small ternary model's predictions fall to two or three tokens, and what helps.

``command``     ``bitnet-ext collapse``; ``options`` are its options; ``progress`` is what it shows while it runs
``arms``        the arms: each a named change of the report's run
``blocks``      the factorial study as data: blocks of arms, each with its question
``study``       runs arms x seeds into one folder, resumably
``schedule``    which run comes next; ``workers`` are the processes that share them
``runs``        one run; ``evaluator`` is what is measured in it

Packages, each of which needs only those above it (and ``instrument`` what ``evaluator`` measures with):

``results``     what a study wrote, as data, and how its runs ended
``diagnose``    which kind of trouble one run shows, of whatever training
``verdicts``    what a study shows, by stated rules
``pages``       what people look at: reports, tables, figures
``instrument``  the metrics themselves, checked on predictors of known health
"""

from __future__ import annotations
