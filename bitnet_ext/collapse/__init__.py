"""The collapse laboratory.

What is run   ``arms``, ``blocks`` (the factorial study as data), ``study``, ``schedule``, ``workers``, ``runs``,
              ``evaluator``
What is read  ``results``, ``reading`` (how a run ended), ``statistics``, ``clock``
What it says  ``verdicts`` from ``questions`` and ``solutions`` by the rules of ``judging``; ``findings`` and
              ``contrasts`` for a small comparison
How it looks  ``outputs`` chooses ``report`` (a small comparison) or ``study_page`` (blocks); ``page``, ``figures``,
              ``effects`` (curves of a block), ``effect_plot`` with ``block_effects``, ``part_figures``, ``drawing``,
              ``table``, ``glossary``
The metrics   ``instrument`` checks them on the ``predictors`` of known health, with the ``scales`` of each
One's own run ``diagnose`` and the modules named after it
"""

from __future__ import annotations
